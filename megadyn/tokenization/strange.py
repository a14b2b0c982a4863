"""Characters on which two tokenizer libraries may differ, because each knows another version of Unicode.

They class characters, and cut a text where the class changes; and some compose characters before (NFC).
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
"""Below this all characters are older than any table of Unicode in use."""
FIRST_BYTE = chr(FIRST).encode()[0]
LAST_KNOWN = 0x323AF
"""Highest character of Unicode 15 and 16; above are those of later versions, and those that will stay without a class."""
PICTOGRAPHS = range(0x1F200, 0x1FB00)
"""Symbols all, those to come too: most of the new characters in real texts, as each Unicode brings new emoji."""
SYMBOL_BLIND_STEPS = {"Sequence", "Split", "ByteLevel", "Digits", "Metaspace", "NFC", "Replace", "Prepend"}
SYMBOL_BLIND_CLASSES = re.compile("[LMNPZ][a-z]?")
"""Names of classes, as in `\\p{Lu}`, that hold no symbol and no character without a class."""
BLOCK = 64
"""Characters that are looked at together; Unicode gives them out in blocks."""


class StrangeCharacters:
    """Those that libraries may class in different ways in the eyes of one tokenizer, and may compose if that does."""

    def __init__(self, rules: dict[str, Any], added_tokens: Sequence[AddedToken] = ()) -> None:
        """`rules`: normalizer and pre_tokenizer of a tokenizer.json."""
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
        """Which of the texts, as UTF-8, hold one."""
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
    """[all characters] Those without a class in Python's own table.

    That is of Unicode 14 or 15, the reference library's of 16, gigatoken's of 17.
    """
    unknown = np.zeros(0x110000, np.bool_)
    unknown[LAST_KNOWN + 1 : 0xE0000] = True
    characters = np.arange(LAST_KNOWN + 1, dtype="<u4").tobytes().decode("utf-32-le", "surrogatepass")
    for first in range(FIRST, len(characters), BLOCK):
        block = characters[first : first + BLOCK]
        if not block.isprintable():  # which all are in most blocks, and far sooner told
            unknown[first : first + len(block)] = [
                unicodedata.category(character) == "Cn" for character in block
            ]
    return unknown


@cache
def late_compositions() -> NDArray[np.bool_]:
    """[all characters] Marks and compositions later than Unicode 3.2: the reference library's table is of about Unicode 9."""
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
    """Characters with which a text does not hold the same ASCII `tokens` once it is composed, as `>` and U+0338 become one."""
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
    """Whether it may matter for where a text is cut that a character without a class has become a symbol."""
    written = orjson.dumps([rules["normalizer"], rules["pre_tokenizer"]]).decode()
    steps, classes = re.findall(r'"type":"(\w+)"', written), re.findall(r"\\[pP]\{?\^?(\w+)", written)
    return (
        not SYMBOL_BLIND_STEPS.issuperset(steps)
        or "[:" in written
        or not all(map(SYMBOL_BLIND_CLASSES.fullmatch, classes))
    )


def beginnings(characters: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """[256, 256] Whether the UTF-8 of one of `characters` may begin with these two bytes."""
    pairs = np.zeros((256, 256), np.bool_)
    pairs[0xC0:0xE0] = characters[:0x800].reshape(32, 64).any(1, keepdims=True)
    pairs[0xE0:0xF0, 0x80:0xC0] = characters[:0x10000].reshape(16, 64, 64).any(2)
    pairs[0xF0:0xF4, 0x80:0xC0] = characters[:0x100000].reshape(4, 64, 4096).any(2)
    pairs[0xF4, 0x80:0x90] = characters[0x100000:].reshape(16, 4096).any(1)
    return pairs


def characters_at(utf8: NDArray[np.uint8], first: NDArray[np.int64]) -> NDArray[np.int32]:
    """The characters, of two bytes or more, that begin at `first`; three bytes of any kind follow the last."""
    lead, *rest = (utf8[first + i].astype(np.int32) for i in range(4))
    one, two, three = (byte & 0x3F for byte in rest)
    return np.select(
        [lead < 0xE0, lead < 0xF0],
        [(lead & 0x1F) << 6 | one, (lead & 0x0F) << 12 | one << 6 | two],
        (lead & 0x07) << 18 | one << 12 | two << 6 | three,
    )
