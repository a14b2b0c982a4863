"""gigatoken, a fast engine for BPE tokenizers, used where it gives the ids of the reference tokenizer.

The reference is the library that belongs to the tokenizer's file. gigatoken refuses most tokenizers that it does not
support, but not all: it takes no notice of a `single_word` token, for one. So it is held to the reference before it is
used: on awkward texts, on each added token in several surroundings, and on the first documents of the corpus.

It knows a later Unicode than the reference does. Documents with characters that the two may class or compose in
different ways, which are very rare, are therefore left to the reference.
"""

import json
import random
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from megadyn.data.tokenizer import Encoded, TokenArray, Tokenizer
from megadyn.errors import UserError
from megadyn.log import log

ENGINES = ("auto", "gigatoken", "reference")
PROOF_DOCUMENTS = 256
PROOF_CHARACTERS = 2**17
"""Of all documents; the reference takes some 0.1 s for them."""
PROOF_DOCUMENT_CHARACTERS = 2**14
AWKWARD = (
    "", " ", "   ", "\n", " \n \n\n  x", "\t\tx \t y", "\r\n\r\n", "\0",
    "it's IT'S 'll don'T we've ''s \u017fs '\u017f \u212a \u0130",
    "1234567 1.5e-3 \u0663\u0664 \u00bd \u2167", "na\u00efve nai\u0308ve \ufb01 \u00c5 A\u030a", "日本語のテキスト 한국어",
    "🙂👩\u200d👩\u200d👧🇩🇪", "\ufeffx \u200b \u00a0\u2028\u3000", "</s> <s> <unk> <|endoftext|> <0x0A>", "▁a ▁▁ _",
    "a" * 300, " " * 300, "=" * 300, "\ue000 \U000f0000 \U0010ffff", "\U00018d91's \u088f's")
CHARACTER_RANGES = ((0x00, 0x80), (0x80, 0x600), (0x600, 0x3100), (0x3100, 0xd800), (0xe000, 0x10000), (0x10000, 0x20000))


FIRST_STRANGE = 0x300
"""Below this all characters are older than any table of Unicode in use."""
LAST_KNOWN = 0x323af
"""Highest character of Unicode 15 and 16; above are those of later versions, and those that will stay without a class."""


@cache
def strange_characters(composing: bool) -> NDArray[np.bool_]:
    """[all characters] Which ones engines may class in different ways; if `composing`, also compose.

    To class, those that Python's own table does not know: Unicode 14 or 15, while the reference has 16 and gigatoken
    17. To compose, marks and compositions later than Unicode 3.2, as the reference's table is of about Unicode 9.
    """
    strange = np.zeros(0x110000, np.bool_)
    strange[LAST_KNOWN + 1:0xe0000] = True
    old = unicodedata.ucd_3_2_0
    for character in map(chr, range(FIRST_STRANGE, LAST_KNOWN + 1)):
        if unicodedata.category(character) == "Cn":
            strange[ord(character)] = True
        elif composing and old.category(character) == "Cn":
            parts = unicodedata.decomposition(character)
            if unicodedata.combining(character):
                strange[ord(character)] = True
            if parts and not parts.startswith("<"):
                codes = [ord(character), *(int(part, 16) for part in parts.split())]
                strange[[code for code in codes if old.category(chr(code)) == "Cn"]] = True
    return strange


class GigatokenTokenizer(Tokenizer):
    """Another tokenizer, encoding with gigatoken. `UserError` if it is not installed or does not support that one."""

    def __init__(self, reference: Tokenizer) -> None:
        self._reference = reference
        self.name, self.vocab_size = reference.name, reference.vocab_size
        self.fingerprint, self.eod_or_none = reference.fingerprint, reference.eod_or_none
        try:
            import gigatoken
        except ImportError as error:
            raise UserError("gigatoken is not installed (pip install gigatoken)") from error
        content = reference.gigatoken_json()
        self._strange = strange_characters('"NFC"' in json.dumps(json.loads(content)["normalizer"]))
        try:
            self.engine = gigatoken.Tokenizer.from_json(content)
        except BaseException as error:      # a panic of the library is no Exception
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            raise UserError(f"gigatoken does not support tokenizer {self.name} ({str(error).splitlines()[0]})") from error

    def encode_batch(self, texts: list[str]) -> list[TokenArray]:
        ids, lengths = self.encode(texts)
        return np.split(ids, np.cumsum(lengths)[:-1])

    def encode(self, texts: list[str]) -> Encoded:
        layout = self.engine.encode_batch(texts, parallel=False).layout
        encoded = Encoded(layout.content.data, np.diff(layout.offsets.data))
        if not self._is_strange("".join(text for text in texts if not text.isascii())):
            return encoded
        strange = [i for i, text in enumerate(texts) if self._is_strange(text)]
        arrays = np.split(encoded.tokens, np.cumsum(encoded.lengths)[:-1])
        for i, ids in zip(strange, self._reference.encode_batch([texts[i] for i in strange]), strict=True):
            arrays[i] = ids
        return Encoded(np.concatenate(arrays), np.array([array.size for array in arrays], np.int64))

    def _is_strange(self, text: str) -> bool:
        """Whether gigatoken and the reference may differ on a character of `text`."""
        codes = np.frombuffer(text.encode("utf-32-le"), np.int32)
        return bool(self._strange.take(codes[codes >= FIRST_STRANGE]).any())

    def decode(self, ids: Sequence[int]) -> str:
        return self._reference.decode(ids)

    def added_tokens(self) -> list[str]:
        return self._reference.added_tokens()


def with_engine(reference: Tokenizer, engine: str, documents: Callable[[], Iterable[str]]) -> tuple[Tokenizer, str]:
    """(the tokenizer to encode with, the name of its engine), and in the log why.

    `engine` is one of `ENGINES`; `gigatoken` raises `UserError` where `auto` takes the reference.
    """
    if engine == "reference":
        return reference, "reference"
    try:
        fast = GigatokenTokenizer(reference)
        proved = prove_equal(fast, reference, list(islice(documents(), PROOF_DOCUMENTS)))
    except UserError as error:
        if engine == "gigatoken":
            raise UserError(f"--engine gigatoken: {error}") from error
        log.info("engine: reference tokenizer (%s)", error)
        return reference, "reference"
    log.info("engine: gigatoken, equal to the reference tokenizer %s", proved)
    return fast, "gigatoken"


def prove_equal(fast: Tokenizer, reference: Tokenizer, documents: list[str], name: str = "gigatoken") -> str:
    """On what the two are equal, in words; `UserError` with the first text on which they differ. `name` is that of `fast`."""
    left, first = PROOF_CHARACTERS, []
    for document in documents:
        first.append(document[:min(left, PROOF_DOCUMENT_CHARACTERS)])
        left -= len(first[-1])
        if left <= 0:
            break
    probes = list(probe_texts(reference))
    texts = probes + first
    with ThreadPoolExecutor(1) as other:        # the reference needs no Python, the first batch of gigatoken many imports
        encoding = other.submit(reference.encode_batch, texts)
        found, wanted = fast.encode_batch(texts), encoding.result()
    for i, text in enumerate(texts):
        if not np.array_equal(found[i], wanted[i]):
            which = f"the text {text[:40]!r}" if i < len(probes) else f"document {i - len(probes) + 1} of the corpus"
            raise UserError(f"{name} differs from tokenizer {reference.name} on {which}")
    return f"on the first {len(first)} documents and {len(probes)} awkward texts"


def probe_texts(tokenizer: Tokenizer) -> Iterator[str]:
    """Texts on which engines tend to differ; the same in each run."""
    yield from AWKWARD
    for token in tokenizer.added_tokens():
        forms = {token, *(unicodedata.normalize(form, token) for form in ("NFC", "NFD", "NFKC")), token.upper(), token.lower()}
        for form in sorted(forms):
            yield f"{form} a{form}b {form}{form}\n{form} \n {form}\t."
            yield form
    draw = random.Random(0)
    for _ in range(300):
        ranges = draw.choices(CHARACTER_RANGES, k=draw.randint(1, 20))
        yield "".join(chr(draw.randrange(*span)) + draw.choice(("", "", " ", "a", "1", "\n", "'s", "  ")) for span in ranges)
