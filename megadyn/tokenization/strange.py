"""Characters on which two tokenizer libraries may differ because they use different versions of Unicode.

Libraries classify characters, and cut a text where the class changes; some also compose characters first (NFC).
"""

import re
import unicodedata
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from megadyn.tokenization.tokenizer import AddedToken

FIRST = 0x300
"""All characters below this are older than any Unicode table in use."""
FIRST_BYTE = chr(FIRST).encode()[0]
LAST_KNOWN = 0x323AF
"""Highest character of Unicode 15 and 16. Higher ones belong to later versions, or never get a class."""
PICTOGRAPHS = range(0x1F200, 0x1FB00)
"""All symbols, including unassigned ones: most new characters in real texts are here, because each Unicode adds
emoji."""
SYMBOL_BLIND_STEPS = {"Sequence", "Split", "ByteLevel", "Digits", "Metaspace", "NFC", "Replace", "Prepend"}
SYMBOL_BLIND_CLASSES = re.compile("[LMNPZ][a-z]?")
"""Names of classes, as in `\\p{Lu}`, that contain neither symbols nor characters without a class."""
BLOCK = 64
"""Characters checked together; Unicode assigns them in blocks."""


class StrangeCharacters:
    """Characters that libraries may classify differently for a given tokenizer, or compose differently if it composes."""

    def __init__(self, rules: dict[str, Any], added_tokens: Sequence[AddedToken] = ()) -> None:
        """`rules`: normalizer and pre_tokenizer of tokenizer.json."""
        self._strange = unknown_characters()
        if not tells_symbols(rules):
            self._strange[PICTOGRAPHS] = False
        if b'"NFC"' in orjson.dumps(rules["normalizer"]):
            self._strange |= late_compositions()
            self._strange[
                making_or_breaking([token.content for token in added_tokens if token.is_normalized])
            ] = True
        self._pairs = beginnings(self._strange)

    def among(self, texts: Sequence[bytes]) -> list[int]:
        """Indices of the texts, in UTF-8, that contain one."""
        doubtful = [i for i, text in enumerate(texts) if not text.isascii()]
        raw = np.frombuffer(b"".join([*(texts[i] for i in doubtful), b"   "]), np.uint8)
        first = np.flatnonzero(raw >= FIRST_BYTE)
        first = first[self._pairs[raw[first], raw[first + 1]]]
        first = first[self._strange[characters_at(raw, first)]]
        if not first.size:
            return []
        ends = np.cumsum([len(texts[i]) for i in doubtful])
        return [doubtful[i] for i in sorted(set(np.searchsorted(ends, first, "right").tolist()))]


def unknown_characters() -> NDArray[np.bool_]:
    """[all characters] True for characters without a class in Python's own table.

    Python's table is of Unicode 14 or 15, the reference library's of 16, gigatoken's of 17.
    """
    unknown = np.zeros(0x110000, np.bool_)
    unknown[LAST_KNOWN + 1 : 0xE0000] = True
    characters = np.arange(LAST_KNOWN + 1, dtype="<u4").tobytes().decode("utf-32-le", "surrogatepass")
    for first in range(FIRST, len(characters), BLOCK):
        block = characters[first : first + BLOCK]
        if not block.isprintable():  # a fast test, which most blocks pass
            unknown[first : first + len(block)] = [
                unicodedata.category(character) == "Cn" for character in block
            ]
    return unknown


@cache
def late_compositions() -> NDArray[np.bool_]:
    """[all characters] Marks and compositions newer than Unicode 3.2; the reference library's table is of about Unicode 9."""
    late = np.zeros(0x110000, np.bool_)
    old = unicodedata.ucd_3_2_0
    for character in map(chr, range(FIRST, LAST_KNOWN + 1)):
        if old.category(character) == "Cn":
            parts = unicodedata.decomposition(character)
            late[ord(character)] |= unicodedata.combining(character) > 0
            if parts and not parts.startswith("<"):
                codes = [ord(character), *(int(part, 16) for part in parts.split())]
                late[[code for code in codes if old.category(chr(code)) == "Cn"]] = True
    return late


def making_or_breaking(tokens: Sequence[str]) -> list[int]:
    """Characters that can create or destroy ASCII `tokens` when a text is composed, as U+0338 does after `>`."""
    characters, last = set("".join(tokens)), {token[-1] for token in tokens}
    found = []
    for code in range(0x80, 0x3000):
        decomposition = unicodedata.decomposition(chr(code))
        if decomposition and not decomposition.startswith("<"):
            first, *marks = [chr(int(part, 16)) for part in decomposition.split()]
            if first in (last if marks else characters):
                found.append(ord(marks[0]) if marks else code)
    return found


def tells_symbols(rules: dict[str, Any]) -> bool:
    """Whether cuts may change when a character without a class becomes a symbol."""
    written = orjson.dumps([rules["normalizer"], rules["pre_tokenizer"]]).decode()
    steps, classes = re.findall(r'"type":"(\w+)"', written), re.findall(r"\\[pP]\{?\^?(\w+)", written)
    return (
        not SYMBOL_BLIND_STEPS.issuperset(steps)
        or "[:" in written
        or not all(map(SYMBOL_BLIND_CLASSES.fullmatch, classes))
    )


def beginnings(characters: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """[256, 256]: whether the UTF-8 of one of `characters` can begin with these two bytes."""
    pairs = np.zeros((256, 256), np.bool_)
    pairs[0xC0:0xE0] = characters[:0x800].reshape(32, 64).any(1, keepdims=True)
    pairs[0xE0:0xF0, 0x80:0xC0] = characters[:0x10000].reshape(16, 64, 64).any(2)
    pairs[0xF0:0xF4, 0x80:0xC0] = characters[:0x100000].reshape(4, 64, 4096).any(2)
    pairs[0xF4, 0x80:0x90] = characters[0x100000:].reshape(16, 4096).any(1)
    return pairs


def characters_at(utf8: NDArray[np.uint8], first: NDArray[np.int64]) -> NDArray[np.int32]:
    """The characters of two or more bytes that begin at `first`; at least three more bytes must follow the last one."""
    lead, *rest = (utf8[first + i].astype(np.int32) for i in range(4))
    one, two, three = (byte & 0x3F for byte in rest)
    return np.select(
        [lead < 0xE0, lead < 0xF0],
        [(lead & 0x1F) << 6 | one, (lead & 0x0F) << 12 | one << 6 | two],
        (lead & 0x07) << 18 | one << 12 | two << 6 | three,
    )
