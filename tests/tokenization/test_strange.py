"""Characters on which libraries may differ are found in UTF-8, and they are the ones that they are said to be."""

import random
import unicodedata
from typing import Any

import numpy as np
import pytest

from megadyn.tokenization.gigatoken import CHARACTER_RANGES
from megadyn.tokenization.strange import (
    PICTOGRAPHS,
    StrangeCharacters,
    beginnings,
    characters_at,
    tells_symbols,
    unknown_characters,
)
from megadyn.tokenization.tokenizer import AddedToken

GPT2: dict[str, Any] = {"normalizer": None, "pre_tokenizer": {"type": "ByteLevel", "use_regex": True}}
NEW_EMOJI, NEW_LETTER = "\U0001faef", "\U000323b0"  # Unicode 17


def split(pattern: str) -> dict[str, Any]:
    return {"normalizer": None, "pre_tokenizer": {"type": "Split", "pattern": {"Regex": pattern}}}


def test_unknown_are_those_without_a_class():
    unknown = unknown_characters()
    draw = random.Random(0)
    for code in draw.sample(range(0x300, 0x323B0), 20_000):
        assert unknown[code] == (unicodedata.category(chr(code)) == "Cn"), hex(code)
    assert not unknown[:0x300].any() and not unknown[0xE0000:].any()


def test_beginnings_and_characters_are_those_of_utf8():
    codes = np.array([*range(0x80, 0xD800), *range(0xE000, 0x110000)])
    raw = "".join(map(chr, codes)).encode() + b"   "
    first = np.cumsum([0, *(2 if code < 0x800 else 3 if code < 0x10000 else 4 for code in codes)])[:-1]
    utf8 = np.frombuffer(raw, np.uint8)
    assert np.array_equal(characters_at(utf8, first), codes)
    for some in (codes[::97], codes[-3:], codes[:3], np.array([0x7FF, 0x800, 0xFFFF, 0x10000])):
        marked = np.zeros(0x110000, np.bool_)
        marked[some] = True
        pairs = beginnings(marked)
        assert all(pairs[tuple(chr(code).encode()[:2])] for code in some)
        assert pairs.sum() <= 256 * len(some)


@pytest.mark.parametrize("composing", [False, True])
def test_texts_with_one_are_found(composing):
    strange = StrangeCharacters(GPT2 | {"normalizer": {"type": "NFC"} if composing else None})
    draw = random.Random(1)
    texts = [
        "".join(chr(draw.randrange(*draw.choice(CHARACTER_RANGES))) for _ in range(draw.randrange(6)))
        for _ in range(3000)
    ]
    wanted = [
        i for i, text in enumerate(texts) if any(strange._strange[ord(character)] for character in text)
    ]
    assert 100 < len(wanted) < 2900
    assert strange.among([text.encode() for text in texts]) == wanted
    assert strange.among([]) == strange.among([b"", b"a"]) == []
    usual = "aé日本🙂\u0301\u2019Ⅷ한"
    assert strange.among([usual.encode(), NEW_LETTER.encode(), (usual + NEW_LETTER).encode()]) == [1, 2]
    assert strange.among(["\u1dc4".encode()]) == ([0] if composing else [])  # one of Unicode 4.1


def test_new_emoji_are_strange_only_where_symbols_are_told():
    assert StrangeCharacters(GPT2).among([NEW_EMOJI.encode()]) == []
    assert StrangeCharacters(split(r"\p{S}+|\p{L}+")).among([NEW_EMOJI.encode()]) == [0]
    assert all(unicodedata.category(chr(code)) in ("So", "Sk", "Cn") for code in PICTOGRAPHS)


@pytest.mark.parametrize(
    ("content", "tells"),
    [
        (GPT2, False),
        (split(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+"), False),
        (split(r"[\p{Lu}\p{Lt}\p{M}]+|\p{Han}+"), True),
        (split(r"[^\s\p{P}\p{S}]+"), True),
        (split(r"\P{L}|\p{^L}"), False),
        (split(r"\p{^S}"), True),
        (split(r"\p{Print}+"), True),
        (split("[[:punct:]]+"), True),
        (GPT2 | {"pre_tokenizer": {"type": "Punctuation"}}, True),
        (GPT2 | {"normalizer": {"type": "BertNormalizer"}}, True),
        ({"normalizer": None, "pre_tokenizer": None}, False),
    ],
)
def test_what_tells_symbols(content, tells):
    assert tells_symbols(content) == tells


def test_what_composes_with_a_token_is_strange():
    nfc = {"normalizer": {"type": "NFC"}, "pre_tokenizer": None}
    texts = [text.encode() for text in ("a\u0338", "b\u0301", "\u212a", "e\u0301", "\u037e", "\u00e1")]
    for token, found in (("<K>", [0, 2]), ("a", [1, 3]), (";  ", [4]), ("é", [])):
        assert StrangeCharacters(nfc, [AddedToken(1, token, False, True)]).among(texts) == found, token
        assert StrangeCharacters(nfc, [AddedToken(1, token, False, False)]).among(texts) == []
    assert StrangeCharacters(GPT2, [AddedToken(1, "<K>", False, True)]).among(texts) == []
