"""Tokenizers behind one small interface: Hugging Face `tokenizer.json`, SentencePiece `.model`, bytes.

None of them adds tokens by itself: no BOS, EOS, padding or truncation. Libraries are imported where they are used, so
that tools start quickly.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson
from numpy.typing import NDArray

from megadyn.errors import UserError
from megadyn.hub import TOKENIZER, address_in, local_path

TokenArray = NDArray[np.integer[Any]]

BYTE = "byte"
"""The name of the tokenizer that needs no file."""
USUAL_EODS = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>")
"""Special tokens assumed to end a document, in this order, if the tokenizer does not name one."""


class Encoded(NamedTuple):
    """Several texts as tokens."""

    tokens: TokenArray  # [N] of all texts, back to back
    lengths: NDArray[np.int64]  # [texts]


def joined(arrays: Sequence[TokenArray]) -> Encoded:
    return Encoded(np.concatenate(arrays), np.array([array.size for array in arrays], np.int64))


def split(encoded: Encoded) -> list[TokenArray]:
    return np.split(encoded.tokens, np.cumsum(encoded.lengths))[:-1]


def ended(encoded: Encoded, eod: int | None) -> Encoded:
    """Ends each non-empty text with `eod`, if that is not None."""
    if eod is None:
        return encoded
    lengths = encoded.lengths + (encoded.lengths > 0)
    ends = np.cumsum(lengths)[encoded.lengths > 0] - 1
    tokens = np.empty(
        len(encoded.tokens) + len(ends), np.promote_types(encoded.tokens.dtype, np.min_scalar_type(eod))
    )
    is_text = np.ones(len(tokens), np.bool_)
    is_text[ends] = False
    tokens[is_text] = encoded.tokens
    tokens[ends] = eod
    return Encoded(tokens, lengths)


class AddedToken(NamedTuple):
    """A text that always becomes one token."""

    id: int
    content: str
    is_particular: bool
    """Whether it depends on its context: found only between certain characters, or with surrounding white space."""
    is_normalized: bool
    """Whether it is searched in the normalized text."""


class TokenizerJson(NamedTuple):
    text: str
    added_tokens: Sequence[AddedToken]
    rules: dict[str, Any]
    """Its normalizer and pre_tokenizer. Parsed here because a large vocabulary makes parsing the whole file slow."""


class Tokenizer(ABC):
    name: str
    vocab_size: int
    """Highest id + 1."""
    fingerprint: str
    """sha256 of the content. Equal only for tokenizers that give every text the same ids.

    Tokenizers that differ only in the end-of-document token may have equal fingerprints; users of that token check it
    against a dataset's record.
    """
    eod_or_none: int | None
    eod_reason = "part of the tokenizer"
    """Why `eod_or_none` was chosen."""

    @property
    def eod(self) -> int:
        """Id of the end-of-document token; raises `UserError` if the tokenizer has none."""
        if self.eod_or_none is None:
            raise UserError(
                f"tokenizer {self.name}: no end-of-document token (neither an eos_token nor, among its special "
                f"tokens, one of {', '.join(USUAL_EODS)}); name one of its tokens (--eod TOKEN)"
            )
        return self.eod_or_none

    def choose_eod(self, token: str, reason: str) -> None:
        """Makes `token` the end of a document; raises `UserError` if it is not in the vocabulary."""
        found = self.id_of(token)
        if found is None:
            raise UserError(f"tokenizer {self.name}: no token {token!r} in its vocabulary ({reason})")
        self.eod_or_none, self.eod_reason = found, reason

    @abstractmethod
    def id_of(self, token: str) -> int | None:
        """The id of a token spelled as in the vocabulary; None if there is none."""

    @abstractmethod
    def token_of(self, id: int) -> str:
        """The inverse of `id_of`; raises `UserError` for an unknown id."""

    @abstractmethod
    def encode_batch(self, texts: list[str]) -> list[TokenArray]:
        """One array of ids per text, in order."""

    def encode(self, texts: Sequence[bytes], eod: int | None = None) -> Encoded:
        """The ids of all texts (UTF-8) in one array; with `eod`, each non-empty text ends with it."""
        return ended(joined(self.encode_batch([text.decode() for text in texts])), eod)

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, including special tokens."""

    def eod_text(self) -> str:
        """The text of the end-of-document token."""
        return self.decode([self.eod])

    def added_tokens(self) -> list[str]:
        """Texts that become a token of their own in any context."""
        return []

    def for_gigatoken(self) -> TokenizerJson:
        """What gigatoken needs to give the same ids; raises `UserError` if that is impossible."""
        raise UserError(f"the {self.name} tokenizer needs no other engine")


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes as ids 0-255, and 256 for the end of a document."""

    def __init__(self) -> None:
        self.name = BYTE
        self.vocab_size = 257
        self.eod_or_none = 256
        self.fingerprint = hashlib.sha256(b"megadyn byte tokenizer").hexdigest()

    def encode_batch(self, texts: list[str]) -> list[TokenArray]:
        return [np.frombuffer(text.encode(), np.uint8) for text in texts]

    def encode(self, texts: Sequence[bytes], eod: int | None = None) -> Encoded:
        return ended(
            Encoded(
                np.frombuffer(b"".join(texts), np.uint8), np.array([len(text) for text in texts], np.int64)
            ),
            eod,
        )

    def id_of(self, token: str) -> int | None:
        if token == USUAL_EODS[0]:
            return 256
        raw = token.encode()
        return raw[0] if len(raw) == 1 else None

    def token_of(self, id: int) -> str:
        if id == 256:
            return USUAL_EODS[0]
        if not 0 <= id < 128:
            raise UserError(f"tokenizer {self.name}: id {id} is not a character")
        return chr(id)

    def decode(self, ids: Sequence[int]) -> str:
        eod = USUAL_EODS[0].encode()
        return b"".join(eod if i == 256 else bytes([i]) for i in ids).decode(errors="replace")


class HfTokenizer(Tokenizer):
    """A folder with tokenizer.json and, for its eos_token and split_special_tokens, tokenizer_config.json."""

    def __init__(self, folder: Path, name: str | None = None) -> None:
        """`name`: instead of the folder's."""
        import tokenizers

        path = folder / "tokenizer.json"
        raw = read_bytes(path)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(raw.decode())
        except Exception as error:  # the library raises bare `Exception`
            raise UserError(f"{path}: cannot load the tokenizer: {error}") from error
        # Some files enable truncation, which would silently cut every document short.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        if getattr(self._tokenizer.model, "dropout", None):
            self._tokenizer.model.dropout = None  # dropout would give random ids
        settings = tokenizer_settings(folder)
        # Special tokens spelled out in a text are plain text.
        splits = settings.get("split_special_tokens") is True
        self._tokenizer.encode_special_tokens = splits
        vocab = self._tokenizer.get_vocab(with_added_tokens=True)
        self.name = name or folder.resolve().name
        self.vocab_size = max(vocab.values(), default=-1) + 1
        self.eod_or_none, self.eod_reason = find_eod(self._tokenizer, vocab, folder)
        content = orjson.loads(raw)
        self.fingerprint = fingerprint(content, splits)
        self._rules = {key: content.get(key) for key in ("normalizer", "pre_tokenizer")}

    def encode_batch(self, texts: list[str]) -> list[TokenArray]:
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=False)
        return text

    def id_of(self, token: str) -> int | None:
        found: int | None = self._tokenizer.token_to_id(token)
        return found

    def token_of(self, id: int) -> str:
        token: str | None = self._tokenizer.id_to_token(id)
        return known_token(self.name, id, token)

    def added_tokens(self) -> list[str]:
        return [token.content for token in self._tokenizer.get_added_tokens_decoder().values()]

    def for_gigatoken(self) -> TokenizerJson:
        # Not from the file, which may number them differently.
        added = [
            AddedToken(i, token.content, token.single_word or token.lstrip or token.rstrip, token.normalized)
            for i, token in self._tokenizer.get_added_tokens_decoder().items()
        ]
        return TokenizerJson(self._tokenizer.to_str(), added, self._rules)


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece `.model` file."""

    def __init__(self, path: Path) -> None:
        import sentencepiece

        raw = read_bytes(path)
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=raw)
        except (RuntimeError, ValueError) as error:
            raise UserError(f"{path}: cannot load the SentencePiece model: {error}") from error
        self._raw = raw
        self.name = path.stem
        self.vocab_size = self._model.vocab_size()
        self.eod_or_none = self._model.eos_id() if self._model.eos_id() >= 0 else None
        self.eod_reason = "the model's eos_id"
        self.fingerprint = hashlib.sha256(raw).hexdigest()

    def encode_batch(self, texts: list[str]) -> list[TokenArray]:
        return [np.array(ids, np.int32) for ids in self._model.encode(texts, out_type=int, num_threads=1)]

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._model.decode([int(i) for i in ids])
        return text

    def eod_text(self) -> str:
        return self.token_of(self.eod)

    def id_of(self, token: str) -> int | None:
        found: int = self._model.piece_to_id(token)  # the unknown token's id if there is no such piece
        return found if self._model.id_to_piece(found) == token else None

    def token_of(self, id: int) -> str:
        return known_token(self.name, id, self._model.id_to_piece(id) if 0 <= id < self.vocab_size else None)

    def added_tokens(self) -> list[str]:
        # Control symbols may not be recognised in texts; listing them anyway is safe.
        return [*user_defined(self._raw), *self._control_symbols()]

    def _control_symbols(self) -> list[str]:
        return [self._model.id_to_piece(i) for i in range(self.vocab_size) if self._model.is_control(i)]

    def for_gigatoken(self) -> TokenizerJson:
        from gigatoken._load.sentencepiece import sentencepiece_to_tokenizer_json

        try:
            content = json.loads(sentencepiece_to_tokenizer_json(self._raw))
        except ValueError as error:
            raise UserError(f"gigatoken does not support tokenizer {self.name} ({error})") from error
        if any(step["type"] == "Precompiled" for step in content["normalizer"]["normalizers"]):
            raise UserError(f"gigatoken and tokenizer {self.name} normalize some characters differently")
        # SentencePiece treats control symbols such as </s> in a text as plain text.
        control = set(self._control_symbols())
        content["added_tokens"] = [
            token for token in content["added_tokens"] if token["content"] not in control
        ]
        content["model"]["merges"] = [
            pair for pair in content["model"]["merges"] if "".join(pair) not in control
        ]
        added = [
            AddedToken(token["id"], token["content"], False, token["normalized"])
            for token in content["added_tokens"]
        ]
        return TokenizerJson(json.dumps(content), added, content)


def user_defined(raw: bytes) -> list[str]:
    """Symbols that a SentencePiece model always takes whole from a text, in any context."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(raw)
    return [piece.piece for piece in proto.pieces if piece.type == piece.USER_DEFINED]


def known_token(name: str, id: int, token: str | None) -> str:
    if token is None:
        raise UserError(f"tokenizer {name}: no token has the id {id}")
    return token


def load_tokenizer(path: str | Path, eod: str | None = None, why: str = "--eod") -> Tokenizer:
    """The tokenizer at `path`: a folder with tokenizer.json, a SentencePiece `.model` file, the address of a repository with
    tokenizer.json on the Hugging Face hub (see `hub`), or the word `byte`.

    `eod` is a token of its vocabulary that ends a document, instead of its own; `why` says where this was requested.
    """
    tokenizer = _load_tokenizer(path)
    if eod is not None:
        tokenizer.choose_eod(eod, why)
    return tokenizer


def find_tokenizer(path: str | Path) -> Path:
    """Where the files of the tokenizer `path` are: itself, or the folder of the hub's cache for an address."""
    return Path(path) if str(path) == BYTE else local_path(path, f"tokenizer {path}", TOKENIZER)


def _load_tokenizer(path: str | Path) -> Tokenizer:
    if str(path) == BYTE:
        return ByteTokenizer()
    address, path = address_in(path), find_tokenizer(path)
    if path.is_dir():
        if not (path / "tokenizer.json").exists():
            raise UserError(
                f"tokenizer {path}: the folder holds no tokenizer.json (name a SentencePiece .model by its file)"
            )
        return HfTokenizer(path, str(address) if address else None)
    if path.suffix != ".model":
        raise UserError(
            f"tokenizer {path}: neither a folder with tokenizer.json nor a SentencePiece .model file"
        )
    return SentencePieceTokenizer(path)


def read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error


def fingerprint(content: dict[str, Any], splits_special_tokens: bool = False) -> str:
    """sha256 of everything in tokenizer.json that determines ids, independent of the file's formatting.

    Truncation, padding, post-processor and decoder are left out, because encoding does not use them.
    """
    deciding = {key: content.get(key) for key in ("added_tokens", "normalizer", "pre_tokenizer", "model")}
    deciding |= {"split_special_tokens": True} if splits_special_tokens else {}
    return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()


def tokenizer_settings(folder: Path, name: str = "tokenizer_config.json") -> dict[str, Any]:
    """The JSON object in that file; empty if there is no file."""
    path = folder / name
    try:
        settings = json.loads(read_bytes(path)) if path.exists() else {}
    except ValueError as error:
        raise UserError(f"{path}: invalid JSON ({error})") from error
    if not isinstance(settings, dict):
        raise UserError(f"{path}: not a JSON object")
    return settings


def find_eod(tokenizer: Any, vocab: dict[str, int], folder: Path) -> tuple[int | None, str]:
    """(id, reason) of the eos_token that `folder` names, otherwise of the first special token in `USUAL_EODS`.

    Only special tokens are considered, because `</s>` is an ordinary token (an HTML tag) in some vocabularies.
    """
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        stated = tokenizer_settings(folder, name).get("eos_token")
        if isinstance(stated, dict):  # older files store the whole added token
            stated = stated.get("content")
        if stated is None:
            continue
        if not isinstance(stated, str) or stated not in vocab:
            raise UserError(f"{folder / name}: eos_token {stated!r} is not in the vocabulary")
        return vocab[stated], f"eos_token in {name}"
    special = {token.content: i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    for token in USUAL_EODS:
        if token in special:
            return special[token], "a special token of tokenizer.json with a usual name"
    return None, "none"
