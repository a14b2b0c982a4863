"""gigatoken gives the ids of the reference tokenizer, or is not used."""

import json
import random
import shutil
import sys
import unicodedata
from pathlib import Path

import pytest
import sentencepiece

from megadyn.errors import UserError
from megadyn.tokenization.gigatoken import (
    CHARACTER_RANGES,
    GigatokenTokenizer,
    Proof,
    itself,
    may_overlap,
    with_engine,
)
from megadyn.tokenization.tokenizer import Tokenizer, load_tokenizer
from tests.helpers.corpora import WORDS, random_texts

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
QWEN = {
    "type": "Sequence",
    "pretokenizers": [
        {
            "type": "Split",
            "behavior": "Isolated",
            "invert": False,
            "pattern": {
                "Regex": (
                    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
                    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
                )
            },
        },
        BYTE_LEVEL | {"use_regex": False},
    ],
}
LLAMA3 = {
    "type": "Sequence",
    "pretokenizers": [
        {
            "type": "Split",
            "behavior": "Isolated",
            "invert": False,
            "pattern": {
                "Regex": (
                    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
                    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
                )
            },
        },
        BYTE_LEVEL | {"use_regex": False},
    ],
}
O200K = {
    "type": "Sequence",
    "pretokenizers": [
        {
            "type": "Split",
            "behavior": "Isolated",
            "invert": False,
            "pattern": {
                "Regex": (
                    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
                    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
                    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
                )
            },
        },
        BYTE_LEVEL | {"use_regex": False},
    ],
}
DEEPSEEK = {
    "type": "Sequence",
    "pretokenizers": [
        *(
            {"type": "Split", "behavior": "Isolated", "invert": False, "pattern": {"Regex": pattern}}
            for pattern in (
                r"\p{N}{1,3}",
                "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
                "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
                "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
            )
        ),
        BYTE_LEVEL | {"use_regex": False},
    ],
}
TOOL: dict[str, object] = {
    "id": 300,
    "content": "<tool>",
    "special": False,
    "single_word": False,
    "lstrip": False,
    "rstrip": False,
    "normalized": False,
}


def awkward_texts(count: int) -> list[str]:
    draw = random.Random(3)
    words = [*WORDS, "<tool>", "<|endoftext|>", "</s>", "'S", "e\u0301", "\u00a0"]
    return [
        "",
        *(
            "".join(
                draw.choice(words) + chr(draw.randrange(*draw.choice(CHARACTER_RANGES))) * draw.randrange(2)
                for _ in range(draw.randrange(1, 30))
            )
            for _ in range(count)
        ),
    ]


def variant(source: Path, target: Path, **changes: object) -> Tokenizer:
    shutil.copytree(source, target)
    content = json.loads((source / "tokenizer.json").read_text()) | changes
    (target / "tokenizer.json").write_text(json.dumps(content))
    return load_tokenizer(target)


@pytest.mark.parametrize(
    ("changes", "extra"),
    [
        ({}, []),
        ({"pre_tokenizer": BYTE_LEVEL | {"add_prefix_space": True}}, []),
        ({"pre_tokenizer": QWEN}, []),
        ({"pre_tokenizer": QWEN, "normalizer": {"type": "NFC"}}, []),
        ({}, [TOOL]),
        ({}, [TOOL | {"lstrip": True, "rstrip": True}]),
        ({"normalizer": {"type": "NFC"}}, [TOOL | {"normalized": True}]),
    ],
)
def test_equal_to_the_reference(tokenizer_folder, tmp_path, changes, extra):
    added = json.loads((tokenizer_folder / "tokenizer.json").read_text())["added_tokens"]
    reference = variant(tokenizer_folder, tmp_path / "it", added_tokens=added + extra, **changes)
    tokenizer, make = with_engine(reference, "gigatoken", lambda: random_texts(50))
    texts = awkward_texts(1000)
    want = reference.encode_batch(texts)
    # encoded as one; others apart
    without = [i for i, text in enumerate(texts) if "<|endoftext|>" not in text]
    for some in (range(len(texts)), without, without[:1], range(0)):
        raw = [texts[i].encode() for i in some]
        ids = [want[i].tolist() for i in some]
        for one in (tokenizer, make(reference), GigatokenTokenizer(reference, apart=True)):
            for eod in (None, 7, one.eod):
                tokens, lengths = one.encode(raw, eod)
                ended = [[*some, eod] if some and eod is not None else some for some in ids]
                assert lengths.tolist() == [len(some) for some in ended]
                assert tokens.tolist() == [i for some in ended for i in some]
    assert [ids.tolist() for ids in tokenizer.encode_batch(texts[:50])] == [ids.tolist() for ids in want[:50]]
    assert (tokenizer.fingerprint, tokenizer.vocab_size, tokenizer.eod) == (
        reference.fingerprint,
        reference.vocab_size,
        reference.eod,
    )


def added(*contents: str, normalized: bool = False) -> list[dict[str, object]]:
    """Tokens beside <|endoftext|>."""
    return [
        TOOL | {"id": 300 + i, "content": content, "normalized": normalized}
        for i, content in enumerate(contents)
    ]


def fuzzed(tokens: list[str], separator: str, count: int) -> list[str]:
    """Texts with `tokens`, and with all beginnings and ends of `separator` anywhere and at their own ends."""
    draw = random.Random(5)
    bits = [half for i in range(1, len(separator)) for half in (separator[:i], separator[i:])]
    words = [
        *WORDS,
        "\u0338",
        "\u0301",
        "\u3099",
        "\u037e",
        "\u212a",
        "\uac00",
        "\u11a8",
        "a\nb",
        "1,2;",
        "\U00018d91",
        "\u1dc4",
    ]
    return [
        "".join(
            draw.choice(draw.choices([words, bits, tokens or words], [6, 2, draw.randrange(2)])[0])
            for _ in range(draw.randrange(12))
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize("composing", [False, True])
@pytest.mark.parametrize(
    ("split", "extra", "separator"),
    [
        (BYTE_LEVEL, added("<|end|>", "endof"), b"<|end|>"),
        (LLAMA3, [], b"<|endoftext|>"),
        (O200K, added("<|end", "<|pad|>"), b"<|pad|>"),
        (DEEPSEEK, added("<\uff5cend\uff5c>", "t|>\n"), "<\uff5cend\uff5c>".encode()),
        (LLAMA3, added("x<|", "||"), None),
        (QWEN, added("a\nb", "1,2"), b"<|endoftext|>"),
        (QWEN, added("<|endoftext|>x", "<|endoftext|>\n"), None),
        (O200K, added("<tool>", "x;", "K", "   ", normalized=True), b"<|endoftext|>"),
    ],
)
def test_no_text_changes_what_is_found_of_the_others(
    tokenizer_folder, tmp_path, composing, split, extra, separator
):
    """Texts are encoded as one, and may be cut, only where no added token reaches over the border, whatever the texts are."""
    usual = json.loads((tokenizer_folder / "tokenizer.json").read_text())["added_tokens"]
    reference = variant(
        tokenizer_folder,
        tmp_path / "it",
        pre_tokenizer=split,
        added_tokens=usual + extra,
        normalizer={"type": "NFC"} if composing else None,
    )
    tokenizer, _ = with_engine(reference, "gigatoken", list)
    assert isinstance(tokenizer, GigatokenTokenizer)
    assert (tokenizer._separator.text if tokenizer._separator else None) == separator
    for tokens in ([], reference.added_tokens()):
        texts = fuzzed(tokens, (separator or b"<|endoftext|>").decode(), 600)
        want = reference.encode_batch(texts)
        for size in (1, 3, 50):
            for first in range(0, len(texts), size):
                some = tokenizer.encode_batch(texts[first : first + size])
                for text, found, wanted in zip(texts[first:], some, want[first:], strict=False):
                    assert found.tolist() == wanted.tolist(), ascii(text)


@pytest.mark.parametrize(
    ("one", "other", "overlap"),
    [
        ("<|end|>", "<|end|>", False),
        ("<|end|>", "a<", True),
        ("<|end|>", ">b", True),
        ("<|end|>", "end", True),
        ("||", "||", True),
        ("<|end|>", "<|end|>x", True),
        ("<|end|>", "<|pad|>", False),
        ("<|a", "a|>", True),
        ("x", "x", False),
    ],
)
def test_which_tokens_may_overlap(one, other, overlap):
    assert may_overlap(one, other) == may_overlap(other, one) == overlap


def test_separator_has_the_librarys_id_whatever_the_file_says(tokenizer_folder, tmp_path):
    reference = variant(tokenizer_folder, tmp_path / "it", added_tokens=[TOOL | {"id": 999}])
    assert GigatokenTokenizer(reference)._separator == (b"<tool>", 300)


@pytest.mark.parametrize("composing", [False, True])
def test_characters_of_later_unicodes_are_left_to_the_reference(tokenizer_folder, tmp_path, composing):
    """Each character that Python's table lacks or that composes late, where classing and composing it shows."""
    reference = variant(
        tokenizer_folder,
        tmp_path / "it",
        normalizer={"type": "NFC"} if composing else None,
        pre_tokenizer=QWEN,
    )
    tokenizer = GigatokenTokenizer(reference)
    marks = [chr(code) for code in range(0x300, 0x1F000) if unicodedata.combining(chr(code))]
    codes = [
        0x88F,
        0xA7CE,
        0x10940,
        0x18D91,
        0x1E6C0,
        0x2B73A,
        0x323B0,
        0x33479,
        *map(ord, marks),
        *range(0x11930, 0x11940),
    ]
    texts = [
        f"{chr(code)}'s in-{chr(code)}the 1{chr(code)}1 e\u0301{chr(code)}'s \u0928{chr(code)}\u093c \U00011935{chr(code)}"
        for code in codes
    ]
    for ours, theirs, text in zip(
        tokenizer.encode_batch(texts), reference.encode_batch(texts), texts, strict=True
    ):
        assert ours.tolist() == theirs.tolist(), ascii(text)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"pre_tokenizer": None}, "gigatoken differs from tokenizer it on the text"),
        (
            {"pre_tokenizer": BYTE_LEVEL | {"use_regex": False}},
            "gigatoken differs from tokenizer it on the text",
        ),
        ({"added_tokens": [TOOL | {"single_word": True}]}, "gigatoken differs from tokenizer it on the text"),
        (
            {"added_tokens": [TOOL, TOOL | {"content": "y<", "normalized": True}]},
            "gigatoken does not support added token 'y<'",
        ),
        (
            {"added_tokens": [TOOL | {"content": "é", "normalized": True}], "normalizer": {"type": "NFC"}},
            "gigatoken does not support added token 'é', which is looked for in normalized text",
        ),
        (
            {"normalizer": {"type": "Lowercase"}},
            "gigatoken does not support tokenizer it (Unsupported normalizer type: Lowercase",
        ),
        (
            {"pre_tokenizer": {"type": "Whitespace"}},
            "gigatoken does not support tokenizer it (Unsupported pre_tokenizer",
        ),
    ],
)
def test_tokenizers_it_cannot_do_go_to_the_reference(tokenizer_folder, tmp_path, logged, changes, reason):
    reference = variant(tokenizer_folder, tmp_path / "it", **changes)
    assert with_engine(reference, "auto", list) == (reference, itself)
    assert f"engine: reference tokenizer ({reason}" in logged.messages[-1]
    with pytest.raises(UserError) as refused:
        with_engine(reference, "gigatoken", list)
    assert f"--engine gigatoken: {reason}" in str(refused.value)


def test_difference_on_a_document_of_the_corpus_is_found(tokenizer_folder):
    class Wrong(GigatokenTokenizer):
        def encode_batch(self, texts):
            right = super().encode_batch(texts)
            return [ids[::-1] if "surprise" in text else ids for text, ids in zip(texts, right, strict=True)]

    reference = load_tokenizer(tokenizer_folder)
    documents = ["one", "two " * 10_000, "a surprise", "four"]
    with pytest.raises(UserError, match="differs from tokenizer tokenizer on document 3 of the corpus"):
        Proof(reference, documents).of(Wrong(reference))
    assert "the first 2 documents" in Proof(reference, documents[:2]).of(Wrong(reference))


def test_what_was_proved_is_in_the_log(tokenizer_folder, logged):
    reference = load_tokenizer(tokenizer_folder)
    assert with_engine(reference, "auto", lambda: ["a", "b"])[1] is not itself
    assert (
        "engine: gigatoken, equal to the reference tokenizer on the first 2 documents and"
        in logged.messages[-1]
    )
    assert with_engine(reference, "reference", list) == (reference, itself)


def test_without_the_package(tokenizer_folder, monkeypatch, logged):
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    reference = load_tokenizer(tokenizer_folder)
    assert with_engine(reference, "auto", list) == (reference, itself)
    assert logged.messages == [
        "engine: reference tokenizer (gigatoken is not installed (pip install gigatoken))"
    ]
    with pytest.raises(UserError, match=r"gigatoken is not installed \(pip install gigatoken\)"):
        with_engine(reference, "gigatoken", list)


def test_bytes_need_no_engine():
    with pytest.raises(UserError, match="the byte tokenizer needs no other engine"):
        with_engine(load_tokenizer("byte"), "gigatoken", list)


@pytest.mark.parametrize(
    ("options", "engine"),
    [
        ({"normalization_rule_name": "identity", "remove_extra_whitespaces": False}, "gigatoken"),
        (
            {
                "normalization_rule_name": "identity",
                "remove_extra_whitespaces": False,
                "add_dummy_prefix": False,
            },
            "gigatoken",
        ),
        (
            {
                "normalization_rule_name": "identity",
                "remove_extra_whitespaces": False,
                "user_defined_symbols": ["<tool>"],
            },
            "reference",
        ),
        (
            {
                "normalization_rule_name": "identity",
                "remove_extra_whitespaces": False,
                "user_defined_symbols": ["<tool>"],
                "add_dummy_prefix": False,
            },
            "gigatoken",
        ),
        ({"normalization_rule_name": "identity"}, "reference"),
        ({}, "reference"),
        ({"byte_fallback": False}, "reference"),
        ({"model_type": "unigram"}, "reference"),
    ],
)
def test_sentencepiece(tmp_path, options, engine):
    with (tmp_path / "it.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(random_texts(100)),
            model_writer=file,
            minloglevel=2,
            hard_vocab_limit=False,
            **{"vocab_size": 300, "model_type": "bpe", "byte_fallback": True} | options,
        )
    reference = load_tokenizer(tmp_path / "it.model")
    tokenizer, chosen = with_engine(reference, "auto", lambda: random_texts(20))
    assert (chosen is itself) == (engine == "reference")
    texts = awkward_texts(500)
    assert [ids.tolist() for ids in tokenizer.encode_batch(texts)] == [
        ids.tolist() for ids in reference.encode_batch(texts)
    ]


@pytest.mark.parametrize(
    ("changes", "in_pieces"),
    [
        ({}, True),
        ({"pre_tokenizer": QWEN, "normalizer": {"type": "NFC"}}, True),
        ({"pre_tokenizer": BYTE_LEVEL | {"add_prefix_space": True}}, False),
    ],
)
def test_only_strange_pieces_are_left_to_the_reference_where_pieces_may_be_apart(
    tokenizer_folder, tmp_path, monkeypatch, changes, in_pieces
):
    reference = variant(tokenizer_folder, tmp_path / "it", **changes)
    tokenizer, make = with_engine(reference, "gigatoken", list)
    text = "one's\nTwo 2\n\nfor\u3000\nb\nthree \u0301\n 's \U00018d91's in\n 4, 5;\U00018d91.\nseven\neight\U00018d91\n"
    wanted = reference.encode_batch([text])[0].tolist()
    seen = []
    encode_batch = reference.encode_batch
    monkeypatch.setattr(reference, "encode_batch", lambda texts: (seen.extend(texts), encode_batch(texts))[1])
    for one in (tokenizer, make(reference)):
        seen.clear()
        assert one.encode([b"x", text.encode()]).tokens.tolist()[-len(wanted) :] == wanted
        assert seen == (
            ["three \u0301\n 's \U00018d91's in", ";\U00018d91.\n", "eight\U00018d91\n"]
            if in_pieces
            else [text]
        )
