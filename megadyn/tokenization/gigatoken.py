"""gigatoken, a fast engine for BPE tokenizers, used if it gives the same ids as the reference tokenizer.

The reference is the library that a tokenizer's file belongs to. gigatoken refuses most tokenizers that it does not
support, but not all: for example, it ignores `single_word` of added tokens. So it is compared with the reference before
it is used: on awkward texts, on each added token in several contexts, and on the first documents of the corpus.

gigatoken uses a newer Unicode than the reference. The two may classify or compose some very rare characters
differently. Pieces of text with such characters are therefore encoded by the reference.
"""

import random
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import groupby, islice
from typing import NamedTuple, Self

import numpy as np
import orjson

from megadyn.errors import UserError
from megadyn.log import log
from megadyn.tokenization.proofs import KeptProof, Proved
from megadyn.tokenization.strange import StrangeCharacters
from megadyn.tokenization.tokenizer import (
    AddedToken,
    Encoded,
    TokenArray,
    Tokenizer,
    TokenizerJson,
    ended,
    joined,
    split,
)

ENGINES = ("auto", "gigatoken", "reference")
PROOF_DOCUMENTS = 256
PROOF_CHARACTERS = 2**17
"""Total size of the documents compared; the reference takes about 0.1 s for them."""
PROOF_DOCUMENT_CHARACTERS = 2**14
AWKWARD = (
    "",
    " ",
    "   ",
    "\n",
    " \n \n\n  x",
    "\t\tx \t y",
    "\r\n\r\n",
    "\0",
    "it's IT'S 'll don'T we've ''s \u017fs '\u017f \u212a \u0130",
    "1234567 1.5e-3 \u0663\u0664 \u00bd \u2167",
    "na\u00efve nai\u0308ve \ufb01 \u00c5 A\u030a",
    "日本語のテキスト 한국어",
    "🙂👩\u200d👩\u200d👧🇩🇪",
    "\ufeffx \u200b \u00a0\u2028\u3000",
    "</s> <s> <unk> <|endoftext|> <0x0A>",
    "▁a ▁▁ _",
    "a" * 300,
    " " * 300,
    "=" * 300,
    "\ue000 \U000f0000 \U0010ffff",
    "\U00018d91's \u088f's",
)
CUT_PROBES = (
    "a\nb \n\nc\t\nd.\n\r\ne\n f\ng\nH'\ns x\u3000\ny",
    "I,'s 1,2;3\n4 (a,b;;\n\n\nc)\nA,,\n",
    "x\n\n, y ,;z,\r\n9\n",
)
CUT_DOCUMENTS = 4
CHARACTER_RANGES = (
    (0x00, 0x80),
    (0x80, 0x600),
    (0x600, 0x3100),
    (0x3100, 0xD800),
    (0xE000, 0x10000),
    (0x10000, 0x20000),
)
CUT = re.compile(rb"(?<=[0-9A-Za-z])(?=[,;\n])|(?<=[!-~]\n)(?=[A-Za-z])")
"""Places where the tokens on one side hardly ever depend on the other side."""


class Unequal(UserError):
    """Two tokenizers give different ids for a text."""


Make = Callable[[Tokenizer], Tokenizer]


class Separator(NamedTuple):
    """An added token placed between texts, so that several texts can be encoded as one."""

    text: bytes
    id: int


def separator_of(added: Sequence[AddedToken], eod: int | None) -> Separator | None:
    """One of the `added` tokens that is recognised in any context; `eod` itself if possible."""
    usable = sorted(
        (token for token in added if not token.is_particular and not token.is_normalized),
        key=lambda token: (not token.content.isascii(), token.id != eod),
    )
    return next(
        (
            Separator(token.content.encode(), token.id)
            for token in usable
            if not any(may_overlap(token.content, other.content) for other in added)
        ),
        None,
    )


def may_overlap(one: str, other: str) -> bool:
    """Whether both can occur in a text with shared characters. If they are equal: whether one can overlap with itself."""
    if one != other and (one in other or other in one):
        return True
    return any(
        one.endswith(other[:shared]) or other.endswith(one[:shared])
        for shared in range(1, min(len(one), len(other)))
    )


def refuse_added_tokens(content: TokenizerJson) -> None:
    """Raises `UserError` if it matters that gigatoken looks for added tokens only in the original, not in the
    normalized text."""
    for token in content.added_tokens:
        rivals = (other for other in content.added_tokens if other.is_normalized != token.is_normalized)
        composes = b'"NFC"' in orjson.dumps(content.rules["normalizer"]) and not token.content.isascii()
        if token.is_normalized and (
            composes or any(may_overlap(token.content, other.content) for other in rivals)
        ):
            raise UserError(
                f"gigatoken does not support added token {token.content!r}, which is looked for in normalized text"
            )


def may_be_cut(content: TokenizerJson) -> bool:
    """Whether no token crosses a place matched by `CUT`, because texts are split by class there and no added token
    contains one."""
    return b'"ByteLevel"' in orjson.dumps(content.rules["pre_tokenizer"]) and not any(
        token.is_particular or CUT.search(b"!" + token.content.encode()) for token in content.added_tokens
    )


class GigatokenTokenizer(Tokenizer):
    """Another tokenizer, encoding with gigatoken. Raises `UserError` if gigatoken is not installed or does not support it.

    Texts are encoded as one, with a separator between them, because gigatoken's call for many texts is no faster and
    imports
    `awkward`, which takes a tenth of a second. With `apart` they are encoded separately. With `in_pieces` the reference
    gets only those pieces of a text on which it may differ; `may_be_cut` says whether it makes sense to prove this.
    """

    def __init__(self, reference: Tokenizer, apart: bool = False, in_pieces: bool = False) -> None:
        self.in_pieces = in_pieces
        self._reference = reference
        self.name, self.vocab_size = reference.name, reference.vocab_size
        self.fingerprint, self.eod_or_none = reference.fingerprint, reference.eod_or_none
        try:
            import gigatoken
        except ImportError as error:
            raise UserError("gigatoken is not installed (pip install gigatoken)") from error
        content = reference.for_gigatoken()
        refuse_added_tokens(content)
        self._strange = StrangeCharacters(content.rules, content.added_tokens)
        self._separator = None if apart else separator_of(content.added_tokens, reference.eod_or_none)
        self.may_be_cut = may_be_cut(content)
        try:
            self.engine = gigatoken.Tokenizer.from_json(content.text)
        except BaseException as error:  # a panic of the library is not an Exception
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            raise UserError(
                f"gigatoken does not support tokenizer {self.name} ({str(error).splitlines()[0]})"
            ) from error

    def encode_batch(self, texts: list[str]) -> list[TokenArray]:
        return split(self.encode([text.encode() for text in texts]))

    def encode(self, texts: Sequence[bytes], eod: int | None = None) -> Encoded:
        strange = self._strange.among(texts)
        encoded = self._without_reference(texts, None if strange else eod)
        if not strange:
            return encoded
        arrays = split(encoded)
        for i, ids in zip(strange, self._with_reference([texts[i] for i in strange]), strict=True):
            arrays[i] = ids
        return ended(joined(arrays), eod)

    def _with_reference(self, texts: Sequence[bytes]) -> list[TokenArray]:
        """The ids of texts that contain strange characters."""
        pieces = [
            (i, piece)
            for i, text in enumerate(texts)
            for piece in (CUT.split(text) if self.in_pieces else [text])
        ]
        strange = set(self._strange.among([piece for _, piece in pieces]))
        runs = [
            (i, is_strange, b"".join(pieces[k][1] for k in numbers))
            for (i, is_strange), numbers in groupby(
                range(len(pieces)), lambda k: (pieces[k][0], k in strange)
            )
        ]
        by_reference = iter(
            self._reference.encode_batch([run.decode() for _, is_strange, run in runs if is_strange])
        )
        usual = iter(split(self._without_reference([run for _, is_strange, run in runs if not is_strange])))
        arrays: list[list[TokenArray]] = [[] for _ in texts]
        for i, is_strange, _ in runs:
            arrays[i].append(next(by_reference if is_strange else usual))
        return [np.concatenate(some) for some in arrays]

    def _without_reference(self, texts: Sequence[bytes], eod: int | None = None) -> Encoded:
        return self._as_one(texts, eod) or ended(self._apart(texts), eod)

    def _as_one(self, texts: Sequence[bytes], eod: int | None) -> Encoded | None:
        """The result of `encode`; None if there is no separator or a text contains it."""
        if self._separator is None:
            return None
        ids = self.engine.encode(self._separator.text.join([*texts, b""]))
        ends = np.flatnonzero(ids == self._separator.id)
        if len(ends) != len(texts):
            return None
        lengths = np.diff(ends, prepend=-1)
        if eod is None:
            return Encoded(np.delete(ids, ends), lengths - 1)
        ids[ends] = eod
        empty = lengths == 1
        return Encoded(np.delete(ids, ends[empty]), lengths - empty) if empty.any() else Encoded(ids, lengths)

    def _apart(self, texts: Sequence[bytes]) -> Encoded:
        if self._separator:  # then texts are rarely encoded apart
            return joined([self.engine.encode(text) for text in texts])
        layout = self.engine.encode_batch(list(texts), parallel=False).layout
        return Encoded(layout.content.data, np.diff(layout.offsets.data))

    def id_of(self, token: str) -> int | None:
        return self._reference.id_of(token)

    def token_of(self, id: int) -> str:
        return self._reference.token_of(id)

    def decode(self, ids: Sequence[int]) -> str:
        return self._reference.decode(ids)

    def added_tokens(self) -> list[str]:
        return self._reference.added_tokens()


def with_engine(
    reference: Tokenizer, engine: str, documents: Callable[[], Iterable[str]]
) -> tuple[Tokenizer, Make]:
    """(the tokenizer to encode with, a function that makes it from `reference`). Logs the reason.

    `engine` is one of `ENGINES`; `gigatoken` raises `UserError` in cases where `auto` uses the reference.
    """
    if engine == "reference":
        return reference, itself
    kept = KeptProof(reference)
    try:
        known = kept.read()
        apart = known is not None and known.apart
        with Proof(reference, islice(documents(), PROOF_DOCUMENTS), is_short=known is not None) as proof:
            fast = GigatokenTokenizer(reference, apart)
            try:
                proved = proof.of(fast)
            except Unequal:  # some tokenizers treat the beginning of a text specially
                if apart:
                    raise
                apart = True
                fast = GigatokenTokenizer(reference, apart)
                proved = proof.of(fast)
            fast.in_pieces = (fast.may_be_cut if known is None else known.in_pieces) and proof.in_pieces(fast)
        if known is None:
            kept.write(Proved(apart, fast.in_pieces))
    except UserError as error:
        if engine == "gigatoken":
            raise UserError(f"--engine gigatoken: {error}") from error
        log.info("engine: reference tokenizer (%s)", error)
        return reference, itself
    log.info("engine: gigatoken, equal to the reference tokenizer %s", proved)
    return fast, partial(GigatokenTokenizer, apart=apart, in_pieces=fast.in_pieces)


def itself(reference: Tokenizer) -> Tokenizer:
    return reference


class Proof:
    """Texts on which tokenizers are compared with `reference`, which encodes them in a background thread (it hardly
    needs the GIL).

    `is_short` leaves out the texts that depend only on the tokenizer, if these were proved earlier.
    """

    def __init__(self, reference: Tokenizer, documents: Iterable[str], is_short: bool = False) -> None:
        self._reference = reference
        self._is_short = is_short
        self._probes = [*AWKWARD, *CUT_PROBES] if is_short else list(probe_texts(reference))
        self._first: list[str] = []
        left = PROOF_CHARACTERS
        for document in documents:
            self._first.append(document[: min(left, PROOF_DOCUMENT_CHARACTERS)])
            left -= len(self._first[-1])
            if left <= 0:
                break
        self._texts = self._probes + self._first
        self._thread = ThreadPoolExecutor(1)
        self._wanted = self._thread.submit(reference.encode_batch, self._texts)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown()

    def of(self, other: Tokenizer, name: str = "gigatoken") -> str:
        """A phrase saying on which texts `other`, called `name`, agrees. Raises `Unequal` with the first text on which
        it does not."""
        found = other.encode_batch(self._texts)
        # So that each is also the first text of a call.
        alone = [other.encode_batch([text])[0] for text in AWKWARD]
        wanted = self._wanted.result()
        for i, text in enumerate(self._texts):
            if not np.array_equal(found[i], wanted[i]) or (
                i < len(alone) and not np.array_equal(alone[i], wanted[i])
            ):
                of_corpus = i - len(self._probes) + 1
                which = f"document {of_corpus} of the corpus" if of_corpus > 0 else f"the text {text[:40]!r}"
                raise Unequal(f"{name} differs from tokenizer {self._reference.name} on {which}")
        earlier = ", and on all others in an earlier run" if self._is_short else ""
        return f"on the first {len(self._first)} documents and {len(self._probes)} awkward texts{earlier}"

    def in_pieces(self, other: Tokenizer) -> bool:
        """Whether `other` gives the same ids if the pieces of each text (see `CUT`) are encoded separately."""
        those = [
            i
            for i, text in enumerate(self._texts[: len(self._probes) + CUT_DOCUMENTS])
            if i >= len(self._probes) or text in CUT_PROBES
        ]
        pieces = [piece for i in those for piece in CUT.split(self._texts[i].encode())]
        return np.array_equal(
            other.encode(pieces).tokens, np.concatenate([self._wanted.result()[i] for i in those])
        )


def probe_texts(tokenizer: Tokenizer) -> Iterator[str]:
    """Texts on which engines tend to differ; the same in every run."""
    yield from AWKWARD
    yield from CUT_PROBES
    for token in tokenizer.added_tokens():
        forms = {
            token,
            *(unicodedata.normalize(form, token) for form in ("NFC", "NFD", "NFKC")),
            token.upper(),
            token.lower(),
        }
        for form in sorted(forms):
            yield f"{form} a{form}b {form}{form}\n{form} \n {form}\t."
            yield form
    draw = random.Random(0)
    for _ in range(300):
        ranges = draw.choices(CHARACTER_RANGES, k=draw.randint(1, 20))
        yield "".join(
            chr(draw.randrange(*span)) + draw.choice(("", "", " ", "a", "1", "\n", "'s", "  "))
            for span in ranges
        )
