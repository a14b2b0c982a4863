import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants

from megadyn.errors import UserError
from megadyn.hf.tokenizer_files import write_tokenizer
from megadyn.prepare.train_tokenizer import train_tokenizer
from megadyn.tokenization.tokenizer import load_tokenizer
from tests.helpers.corpora import random_texts
from tests.helpers.servers import lay_out

AWKWARD = ["", " ", "a , b . don ' t n't", "\r\n\t\0", "é 日本 🙂", "\ufeffx", "x" * 1000]


def rewritten(source: Path, target: Path, name: str, **changes: object) -> Path:
    """A copy of a tokenizer folder with keys of one of its files changed."""
    shutil.copytree(source, target)
    content = json.loads((target / name).read_text()) | changes
    (target / name).write_text(json.dumps(content))
    return target


def test_bytes(tmp_path):
    tokenizer = load_tokenizer("byte")
    assert [ids.tolist() for ids in tokenizer.encode_batch(["", "aé"])] == [[], [97, 0xC3, 0xA9]]
    assert tokenizer.decode([97, 0xC3, 0xA9, 256, 98]) == "aé<|endoftext|>b"
    assert (tokenizer.vocab_size, tokenizer.eod) == (257, 256)


def test_trained_tokenizer_roundtrips_and_equals_transformers(tokenizer_folder):
    from transformers import AutoTokenizer

    ours, theirs = load_tokenizer(tokenizer_folder), AutoTokenizer.from_pretrained(tokenizer_folder)
    texts = AWKWARD + random_texts(20, seed=1)
    for text, ids in zip(texts, ours.encode_batch(texts), strict=True):
        assert theirs(text).input_ids == ids.tolist()
        assert ours.decode(ids) == theirs.decode(ids.tolist()) == text
    assert ours.vocab_size == len(theirs) == 300
    assert ours.eod == theirs.eos_token_id == theirs.pad_token_id == 0
    assert (
        json.loads((tokenizer_folder / "tokenizer_config.json").read_text())["clean_up_tokenization_spaces"]
        is False
    )
    assert theirs.decode([0]) == ours.decode([0]) == "<|endoftext|>"


def test_fingerprint_outlives_a_save_by_transformers(tokenizer_folder, tmp_path):
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(tmp_path / "again")
    assert load_tokenizer(tmp_path / "again").fingerprint == load_tokenizer(tokenizer_folder).fingerprint


def test_fingerprint_tells_tokenizers_apart(tokenizer_folder, tmp_path):
    train_tokenizer(random_texts(100), 299, tmp_path / "smaller")
    normalizing = rewritten(tokenizer_folder, tmp_path / "nfc", "tokenizer.json", normalizer={"type": "NFC"})
    folders = [tokenizer_folder, tmp_path / "smaller", normalizing]
    assert len({load_tokenizer(folder).fingerprint for folder in folders}) == len(folders)


def test_training_twice_gives_the_same_bytes(tokenizer_folder, tmp_path):
    script = (
        "import sys; from pathlib import Path; from tests.helpers.corpora import random_texts; "
        "from megadyn.prepare.train_tokenizer import train_tokenizer; "
        "train_tokenizer(random_texts(100), 300, Path(sys.argv[1]))"
    )
    subprocess.run(
        [sys.executable, "-c", script, tmp_path / "again"],
        check=True,
        cwd=Path(__file__).parent,
        env={"PYTHONHASHSEED": "7", "RAYON_NUM_THREADS": "3", "PYTHONPATH": ":".join(sys.path)},
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tokenizer_folder / name).read_bytes()


def test_truncation_padding_and_bos_in_the_file_are_not_obeyed(tokenizer_folder, tmp_path):
    bos = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}},
    }
    folder = rewritten(
        tokenizer_folder,
        tmp_path / "eager",
        "tokenizer.json",
        post_processor=bos,
        truncation={"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0},
        padding={
            "strategy": {"Fixed": 50},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "<|endoftext|>",
        },
    )
    plain, eager = load_tokenizer(tokenizer_folder), load_tokenizer(folder)
    texts = ["self return naïve 1234 -->", "x"]
    assert [ids.tolist() for ids in eager.encode_batch(texts)] == [
        ids.tolist() for ids in plain.encode_batch(texts)
    ]
    assert eager.fingerprint == plain.fingerprint


def test_end_of_document_token(tokenizer_folder, tmp_path):
    vocab = json.loads((tokenizer_folder / "tokenizer.json").read_text())["model"]["vocab"]
    named = rewritten(
        tokenizer_folder, tmp_path / "named", "tokenizer_config.json", eos_token={"content": "!"}
    )
    assert load_tokenizer(named).eod == vocab["!"]
    (named / "tokenizer_config.json").unlink()
    assert load_tokenizer(named).eod == 0  # <|endoftext|>, because it is there

    wrong = rewritten(tokenizer_folder, tmp_path / "wrong", "tokenizer_config.json", eos_token="<nope>")
    with pytest.raises(
        UserError, match=r"tokenizer_config\.json: eos_token '<nope>' is not in the vocabulary"
    ):
        load_tokenizer(wrong)


def with_added(source: Path, target: Path, *tokens: tuple[str, bool]) -> Path:
    """A copy of a tokenizer folder without tokenizer_config.json, whose only added tokens are these, special or not."""
    start = json.loads((source / "tokenizer.json").read_text())
    added = [
        {
            "id": 300 + i,
            "content": content,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": special,
        }
        for i, (content, special) in enumerate(tokens)
    ]
    model = start["model"] | {
        "vocab": {token: i for token, i in start["model"]["vocab"].items() if token != "<|endoftext|>"}
    }
    folder = rewritten(source, target, "tokenizer.json", added_tokens=added, model=model)
    (folder / "tokenizer_config.json").unlink()
    return folder


def test_end_of_document_token_is_looked_for_among_special_tokens_only(tokenizer_folder, tmp_path):
    """Gemma has <eos>, and an ordinary </s> for the HTML tag."""
    gemma = load_tokenizer(with_added(tokenizer_folder, tmp_path / "gemma", ("</s>", False), ("<eos>", True)))
    assert gemma.token_of(gemma.eod) == "<eos>"
    assert gemma.eod_reason == "a special token of tokenizer.json with a usual name"
    with pytest.raises(UserError, match=r"no end-of-document token .*--eod TOKEN"):
        _ = load_tokenizer(with_added(tokenizer_folder, tmp_path / "html", ("</s>", False))).eod
    stated = with_added(
        tokenizer_folder, tmp_path / "stated", ("</s>", False), ("<eos>", True), ("<end>", True)
    )
    (stated / "special_tokens_map.json").write_text('{"eos_token": {"content": "<end>"}}')
    tokenizer = load_tokenizer(stated)
    assert tokenizer.token_of(tokenizer.eod) == "<end>"


@pytest.mark.parametrize("kind", ["byte", "hf", "sentencepiece"])
def test_a_token_can_be_chosen_for_the_end(tokenizer_folder, sentencepiece_model, kind):
    path, token = {
        "byte": ("byte", "!"),
        "hf": (tokenizer_folder, "!"),
        "sentencepiece": (sentencepiece_model, "<s>"),
    }[kind]
    own, chosen = load_tokenizer(path), load_tokenizer(path, eod=token)
    assert chosen.eod == own.id_of(token) != own.eod
    assert chosen.token_of(chosen.eod) == token
    assert own.token_of(own.eod) == own.eod_text()
    assert chosen.fingerprint == own.fingerprint
    with pytest.raises(UserError, match="no token '<nope>' in its vocabulary"):
        load_tokenizer(path, eod="<nope>")


def test_no_end_of_document_token_is_an_error_only_when_asked_for(tokenizer_folder, tmp_path):
    model = json.loads((tokenizer_folder / "tokenizer.json").read_text())["model"]
    model["vocab"] = {token: i for token, i in model["vocab"].items() if token != "<|endoftext|>"}
    folder = rewritten(tokenizer_folder, tmp_path / "none", "tokenizer.json", model=model, added_tokens=[])
    (folder / "tokenizer_config.json").unlink()
    tokenizer = load_tokenizer(folder)
    assert tokenizer.vocab_size == 300  # the highest id is still 299
    with pytest.raises(UserError, match="tokenizer none: no end-of-document token"):
        _ = tokenizer.eod


def test_sentencepiece(sentencepiece_model):
    tokenizer = load_tokenizer(sentencepiece_model)
    ids = tokenizer.encode_batch(["self return x", ""])
    assert tokenizer.decode(ids[0]) == "self return x"
    assert ids[1].size == 0
    assert not {1, 2} & set(ids[0].tolist())  # no <s>, no </s>
    assert (tokenizer.vocab_size, tokenizer.eod, tokenizer.name) == (300, 2, "pieces")


def test_missing_and_broken_tokenizers(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tokenizer.json").write_bytes(b"\xff{")
    (tmp_path / "bad.model").write_bytes(b"no model")
    (tmp_path / "notes.txt").write_text("")
    for name, sentence in [
        ("nowhere", "nowhere: no such file or folder"),
        ("empty", "holds no tokenizer.json"),
        ("broken", "tokenizer.json: cannot load the tokenizer: "),
        ("bad.model", "bad.model: cannot load the SentencePiece model: "),
        ("notes.txt", "neither a folder"),
    ]:
        with pytest.raises(UserError, match=sentence):
            load_tokenizer(tmp_path / name)


def test_training_refuses_and_leaves_nothing(tmp_path):
    def fails() -> None:
        yield "text"
        raise UserError("a bad document")

    for texts, size, sentence in [
        ([], 300, "corpus is empty"),
        (["", ""], 300, "corpus is empty"),
        (["a"], 256, "at least 257"),
        (fails(), 300, "a bad document"),
    ]:
        with pytest.raises(UserError, match=sentence):
            train_tokenizer(texts, size, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_training_over_an_existing_folder(tmp_path):
    folder = tmp_path / "out"
    first = train_tokenizer(["aa bb"], 257, folder)
    with pytest.raises(UserError, match="out exists already; give --overwrite"):
        train_tokenizer(["aa bb"], 258, folder)
    second = train_tokenizer(["aa bb"], 258, folder, overwrite=True)
    assert (first.vocab_size, second.vocab_size) == (257, 258)
    (folder / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"holds more than a tokenizer \(thesis\.tex\)"):
        train_tokenizer(["aa bb"], 258, folder, overwrite=True)
    assert (folder / "thesis.tex").exists()
    assert list(tmp_path.iterdir()) == [folder]


def test_a_tokenizer_by_its_address_is_the_same(tokenizer_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    lay_out(
        tmp_path / "hub", {path.name: path.read_bytes() for path in tokenizer_folder.iterdir()}, "org/words"
    )
    here, there = load_tokenizer(tokenizer_folder), load_tokenizer("org/words@main")
    assert there.name == "org/words"
    assert (there.fingerprint, there.eod) == (here.fingerprint, here.eod)
    exports = [tmp_path / name for name in ("here", "there")]
    for given, folder in zip((str(tokenizer_folder), "org/words"), exports, strict=True):
        folder.mkdir()
        write_tokenizer(given, folder, None)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (exports[0] / name).read_bytes() == (exports[1] / name).read_bytes()
    with pytest.raises(
        UserError, match=r"tokenizer org/none: no such file or folder here, and as an address"
    ):
        load_tokenizer("org/none")
