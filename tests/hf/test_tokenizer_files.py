"""transformers gives every text the ids of training, whichever tokenizer the run had."""

import io
import json
import random
import shutil
from pathlib import Path

import pytest
import sentencepiece
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer

from megadyn.config.config_map import to_dense_config, to_hf_config
from megadyn.hf.tokenizer_files import SENTENCEPIECE, check_auto_tokenizer, write_json, write_tokenizer
from megadyn.prepare.train_tokenizer import train_tokenizer
from megadyn.tokenization.gigatoken import probe_texts
from megadyn.tokenization.tokenizer import load_tokenizer
from tests.helpers.corpora import random_texts
from tests.helpers.tiny import tiny_config

SOURCES = ("byte", "bpe", "sentencepiece-bpe", "sentencepiece-unigram")
PACKAGE = Path(__file__).parents[2] / "megadyn" / "hf"


def sentencepiece_model(path: Path, kind: str, **options: object) -> Path:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(random_texts(100)),
        model_writer=model,
        vocab_size=310,
        model_type=kind,
        minloglevel=2,
        hard_vocab_limit=False,
        **{"byte_fallback": True, "required_chars": "</unk|edoftx>0A"} | options,
    )
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("sources")
    train_tokenizer(random_texts(100), 300, folder / "bpe")
    return {"byte": "byte", "bpe": str(folder / "bpe")} | {
        f"sentencepiece-{kind}": str(sentencepiece_model(folder / f"{kind}.model", kind))
        for kind in ("bpe", "unigram")
    }


@pytest.mark.parametrize("name", SOURCES)
def test_auto_tokenizer_gives_the_ids_of_training(name: str, sources: dict[str, str], tmp_path: Path) -> None:
    reference = load_tokenizer(sources[name])
    special, note = write_tokenizer(sources[name], tmp_path, max_position=24)
    write_json(
        tmp_path / "config.json", to_hf_config(tiny_config("dtf", vocab_size=400).model, "float32") | special
    )
    shutil.copy(PACKAGE / "configuration_megadyn.py", tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    texts = [*probe_texts(reference), *random_texts(50, seed=1)]
    wanted = [ids.tolist() for ids in reference.encode_batch(texts)]
    assert [tokenizer(text)["input_ids"] for text in texts] == wanted
    # this needs no trust
    assert PreTrainedTokenizerFast.from_pretrained(tmp_path)(texts)["input_ids"] == wanted
    # we read it as well
    assert [ids.tolist() for ids in load_tokenizer(tmp_path).encode_batch(texts)] == wanted
    draw = random.Random(0)
    for ids in [*wanted, *([draw.randrange(257) for _ in range(12)] for _ in range(100) if name == "byte")]:
        assert tokenizer.decode(ids) == reference.decode(ids)
    assert set(special.values()) == {tokenizer.eos_token_id} == {tokenizer.pad_token_id} == {reference.eod}
    assert tokenizer.model_max_length == 24
    assert ("equal to it on" in note) == name.startswith("sentencepiece")


@pytest.mark.parametrize("name", ["bpe", "qwen2s own"])
def test_a_qwen2_folder_says_where_auto_tokenizer_gives_other_ids(
    name: str, sources: dict[str, str], tmp_path: Path
) -> None:
    path = sources["bpe"]
    if name != "bpe":  # the same merges under Qwen2's rules
        path = str(tmp_path / "own")
        model = json.loads(Path(sources["bpe"], "tokenizer.json").read_text())["model"]
        Qwen2Tokenizer(model["vocab"], [tuple(pair) for pair in model["merges"]]).save_pretrained(path)
    folder = tmp_path / "out"
    folder.mkdir()
    special, _ = write_tokenizer(path, folder, None)
    write_json(
        folder / "config.json",
        to_dense_config(tiny_config("dense", vocab_size=400).model, "qwen2", "float32") | special,
    )
    assert ("PreTrainedTokenizerFast" in (check_auto_tokenizer(folder, path, "Qwen2") or "")) == (
        name == "bpe"
    )
    texts = list(probe_texts(load_tokenizer(path)))
    assert PreTrainedTokenizerFast.from_pretrained(folder)(texts)["input_ids"] == [
        ids.tolist() for ids in load_tokenizer(path).encode_batch(texts)
    ]


def test_sentencepiece_without_an_equal_form_is_kept_out_of_auto_tokenizers_reach(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A rule that tokenizer.json cannot hold: spaces stand behind words instead of before them."""
    odd = sentencepiece_model(tmp_path / "odd.model", "unigram", treat_whitespace_as_suffix=True)
    folder = tmp_path / "out"
    folder.mkdir()
    _, note = write_tokenizer(str(odd), folder, None)
    assert {path.name for path in folder.iterdir()} == {SENTENCEPIECE}
    assert "AutoTokenizer cannot load it" in note
    assert "differs from tokenizer odd on the text" in note
    word = sentencepiece_model(tmp_path / "word.model", "word", byte_fallback=False)
    assert "neither a BPE nor a unigram model" in write_tokenizer(str(word), folder, None)[1]


def test_a_symbol_of_ones_own_is_part_of_the_proof(tmp_path: Path) -> None:
    """A text around it would get a dummy prefix on both sides."""
    path = sentencepiece_model(tmp_path / "own.model", "bpe", user_defined_symbols=["<tool>"])
    folder = tmp_path / "out"
    folder.mkdir()
    assert (
        "differs from tokenizer own on the text '<tool> a<tool>b"
        in write_tokenizer(str(path), folder, None)[1]
    )


def test_nothing_is_added_cut_or_dropped(sources: dict[str, str], tmp_path: Path) -> None:
    """Training leaves out what a tokenizer.json may ask for beside encoding."""
    source, folder = tmp_path / "source", tmp_path / "out"
    shutil.copytree(sources["bpe"], source)
    folder.mkdir()
    content = json.loads((source / "tokenizer.json").read_text())
    content["model"]["dropout"] = 0.9
    content["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    content["padding"] = {
        "strategy": {"Fixed": 8},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<|endoftext|>",
    }
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "pair": [],
        "single": [
            {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}},
    }
    (source / "tokenizer.json").write_text(json.dumps(content))
    (source / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>", "add_bos_token": true}')
    write_tokenizer(str(source), folder, None)
    text = "return the first of several words"
    wanted = load_tokenizer(source).encode_batch([text])[0].tolist()
    assert len(wanted) > 8
    assert PreTrainedTokenizerFast.from_pretrained(folder)(text)["input_ids"] == wanted
    write_tokenizer(sources["bpe"], folder, None)
    assert (folder / "tokenizer.json").read_bytes() == Path(sources["bpe"], "tokenizer.json").read_bytes()


@pytest.mark.parametrize(
    "stated",
    [
        {"tokenizer_class": "Qwen2Tokenizer"},
        {"tokenizer_class": "GPTNeoXTokenizerFast"},
        {"add_prefix_space": True},
        {"auto_map": {"AutoTokenizer": ["own.Tokenizer", None]}},
        {"bos_token": "return", "unk_token": {"content": "<unk>"}},
        {"additional_special_tokens": ["return", "<|endoftext|>"]},
        {"extra_special_tokens": {"of_image": "return"}},
        {
            "added_tokens_decoder": {
                "299": {
                    "content": "return",
                    "lstrip": False,
                    "rstrip": False,
                    "normalized": False,
                    "single_word": False,
                    "special": True,
                }
            }
        },
    ],
    ids=lambda stated: next(iter(stated)),
)
def test_no_setting_makes_transformers_read_otherwise_than_training(
    stated: dict, sources: dict[str, str], tmp_path: Path
) -> None:
    source, folder = tmp_path / "source", tmp_path / "out"
    shutil.copytree(sources["bpe"], source)
    folder.mkdir()
    (source / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"} | stated))
    special, _ = write_tokenizer(str(source), folder, None)
    write_json(
        folder / "config.json", to_hf_config(tiny_config("dtf", vocab_size=400).model, "float32") | special
    )
    shutil.copy(PACKAGE / "configuration_megadyn.py", folder)
    reference = load_tokenizer(source)
    texts = ["def f(): return <unk> 7<|endoftext|>", *probe_texts(reference), *random_texts(20, seed=1)]
    assert AutoTokenizer.from_pretrained(folder)(texts)["input_ids"] == [
        ids.tolist() for ids in reference.encode_batch(texts)
    ]


def test_settings_of_the_tokenizer_are_kept(sources: dict[str, str], tmp_path: Path) -> None:
    source, folder = tmp_path / "source", tmp_path / "out"
    shutil.copytree(sources["bpe"], source)
    folder.mkdir()
    stated = {"eos_token": "<|endoftext|>", "chat_template": "{{ x }}", "model_max_length": 7}
    (source / "tokenizer_config.json").write_text(json.dumps(stated))
    # older folders'
    (source / "special_tokens_map.json").write_text('{"eos_token": "?", "mask_token": "<|endoftext|>"}')
    write_tokenizer(str(source), folder, 24)
    written = json.loads((folder / "tokenizer_config.json").read_text())
    assert written == stated | {
        "pad_token": "<|endoftext|>",
        "mask_token": "<|endoftext|>",
        "tokenizer_class": "TokenizersBackend",
        "clean_up_tokenization_spaces": False,
        "megadyn_fingerprint": load_tokenizer(source).fingerprint,
    }


def test_the_token_that_ended_documents_in_training_is_the_exports(
    sources: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source"
    shutil.copytree(sources["bpe"], source)
    content = json.loads((source / "tokenizer.json").read_text())
    end = content["added_tokens"][0] | {"id": 300, "content": "<end>"}
    (source / "tokenizer.json").write_text(
        json.dumps(content | {"added_tokens": [*content["added_tokens"], end]})
    )
    reference = load_tokenizer(source)
    for folder in ("own", "other", "ordinary"):
        (tmp_path / folder).mkdir()
    special, _ = write_tokenizer(str(source), tmp_path / "own", 24, "<|endoftext|>")
    assert set(special.values()) == {reference.eod}
    special, _ = write_tokenizer(str(source), tmp_path / "other", 24, "<end>")
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path / "other")
    assert set(special.values()) == {300} == {theirs.eos_token_id}
    monkeypatch.setattr("megadyn.log.log.propagate", True)
    special, _ = write_tokenizer(str(source), tmp_path / "ordinary", 24, "!")
    assert "does not declare '!', which ends its documents" in caplog.messages[-1]
    assert set(special.values()) == {reference.id_of("!")}
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path / "ordinary")
    assert theirs("a! b")["input_ids"] == reference.encode_batch(["a! b"])[0].tolist()
