"""The tokenizer of an exported folder, in the form that transformers reads: the same ids as in training, or an error."""

import json
import shutil
from pathlib import Path
from typing import Any

from megadyn.errors import UserError
from megadyn.log import log
from megadyn.tokenization.gigatoken import Proof, probe_texts
from megadyn.tokenization.tokenizer import (
    ByteTokenizer,
    HfTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    find_tokenizer,
    load_tokenizer,
    read_bytes,
    tokenizer_settings,
    user_defined,
)

OWN_RULES = ("auto_map", "add_prefix_space", "added_tokens_decoder")
"""Settings that make transformers deviate from tokenizer.json, as classes such as Qwen2's and GPT-NeoX's also do."""
TEMPLATE = "chat_template.jinja"
SENTENCEPIECE = "sentencepiece.model"
"""Not named tokenizer.model: AutoTokenizer would read that, and drop its dummy prefix and its rules for spaces."""
FINGERPRINT = "megadyn_fingerprint"
"""Key in tokenizer_config.json: the fingerprint of the training tokenizer, which shows whether a dataset matches."""
NORMAL, USER_DEFINED = 1, 4
"""SentencePiece piece types: NORMAL pieces result from merging, USER_DEFINED ones are cut out of the text first. The
other types never match text."""


def write_tokenizer(
    path: str, folder: Path, max_position: int | None, eod: str | None = None
) -> tuple[dict[str, int], str]:
    """Writes the tokenizer at `path` into `folder`. `eod`: the token that ended documents in training, if not its own.

    Returns:
        The special ids for config.json, and a sentence that tells users of the folder about its tokenizer.
    """
    tokenizer, source = load_tokenizer(path), find_tokenizer(path)
    own = tokenizer.eod_or_none
    if eod is not None:
        tokenizer.choose_eod(eod, "the run's tokenizer.eod")
    settings: dict[str, Any] = {"clean_up_tokenization_spaces": False}
    if isinstance(tokenizer, HfTokenizer):
        stated = tokenizer_settings(source, "special_tokens_map.json") | tokenizer_settings(source)
        settings |= without_own_rules(stated, set(tokenizer.added_tokens()))
        settings |= {name: False for name in ("add_bos_token", "add_eos_token") if settings.get(name)}
    else:
        settings["split_special_tokens"] = True  # a special token spelled out in a text is plain text in both
    settings |= {"tokenizer_class": "TokenizersBackend", FINGERPRINT: tokenizer.fingerprint}
    if max_position is not None:
        settings["model_max_length"] = min(max_position, settings.get("model_max_length") or max_position)
    special = {}
    if (end := tokenizer.eod_or_none) is not None:
        settings |= _end_settings(tokenizer, settings, is_own=end == own)
        special = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
    write_json(folder / "tokenizer_config.json", settings)
    if isinstance(tokenizer, ByteTokenizer):
        (folder / "tokenizer.json").write_text(bytes_as_json(tokenizer))
        return (
            special,
            "UTF-8 bytes as ids 0-255, and 256 for the end of a document (a byte-level BPE without merges)",
        )
    if isinstance(tokenizer, SentencePieceTokenizer):
        return special, _write_sentencepiece(tokenizer, source, folder)
    (folder / "tokenizer.json").write_bytes(without_additions(read_bytes(source / "tokenizer.json")))
    if (source / TEMPLATE).is_file():
        shutil.copyfile(source / TEMPLATE, folder / TEMPLATE)
    return special, "the tokenizer of the training run"


def _end_settings(tokenizer: Tokenizer, settings: dict[str, Any], is_own: bool) -> dict[str, Any]:
    """Names the token that ends documents, if transformers can use it and still read texts as in training."""
    if is_own:
        return {
            name: tokenizer.eod_text() for name in ("eos_token", "pad_token") if settings.get(name) is None
        }
    token = tokenizer.token_of(tokenizer.eod)
    if token not in tokenizer.added_tokens():
        log.warning(
            "the export's tokenizer does not declare %r, which ends its documents, as eos_token, because it is an ordinary "
            "token of texts; config.json has its id",
            token,
        )
        return {}
    return {"eos_token": token} | ({} if settings.get("pad_token") else {"pad_token": token})


def without_own_rules(settings: dict[str, Any], added: set[str]) -> dict[str, Any]:
    """Removes settings that make transformers read a text differently from tokenizer.json. `added`: the tokens that
    tokenizer.json cuts out of texts. transformers would cut out, or add, any other token that the settings call special."""

    def is_known(token: Any) -> bool:
        return token is None or (token.get("content") if isinstance(token, dict) else token) in added

    kept, unknown = {}, []
    for name, value in settings.items():
        if name in ("additional_special_tokens", "extra_special_tokens") and value:
            pairs = value.items() if isinstance(value, dict) else enumerate(value)
            unknown += [token for _, token in pairs if not is_known(token)]
            value = (
                {key: token for key, token in pairs if is_known(token)}
                if isinstance(value, dict)
                else [token for token in value if is_known(token)]
            )
        elif (
            name.endswith("_token")
            and name != "eos_token"
            and not isinstance(value, bool)
            and not is_known(value)
        ):
            unknown.append(value)
            continue
        if name not in OWN_RULES:
            kept[name] = value
    if unknown:
        log.warning(
            "left out of the export's tokenizer_config.json, because its tokenizer.json has no such tokens: %s",
            ", ".join(map(str, unknown)),
        )
    return kept


def without_additions(raw: bytes) -> bytes:
    """A tokenizer.json that neither truncates, pads, adds nor drops tokens, like training. Unchanged if it already is one."""
    content = json.loads(raw)
    wanted = content | {"truncation": None, "padding": None}
    if (content.get("post_processor") or {}).get("type") != "ByteLevel":  # this type changes only offsets
        wanted["post_processor"] = None
    if content["model"].get("dropout"):
        wanted["model"] = content["model"] | {"dropout": None}
    if all(content.get(key) == value for key, value in wanted.items()):
        return raw
    return json.dumps(wanted, indent=2, ensure_ascii=False).encode()


def bytes_as_json(tokenizer: ByteTokenizer) -> str:
    """The byte tokenizer as tokenizer.json. Byte-level tokenizers write each byte as a visible character: a printable
    Latin-1 byte as itself, the others in order as the characters from U+0100."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Library

    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(0x100) if byte not in visible]
    characters = {byte: chr(byte) for byte in visible} | {
        byte: chr(0x100 + i) for i, byte in enumerate(hidden)
    }
    library = Library(models.BPE({characters[byte]: byte for byte in range(0x100)}, []))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens([AddedToken(tokenizer.token_of(256), special=True, normalized=False)])
    text: str = library.to_str(pretty=True)
    return text


def _write_sentencepiece(tokenizer: SentencePieceTokenizer, source: Path, folder: Path) -> str:
    """Writes the model file, and a tokenizer.json if it is proved to give the same ids."""
    shutil.copyfile(source, folder / SENTENCEPIECE)
    try:
        (folder / "tokenizer.json").write_text(sentencepiece_as_json(read_bytes(source)))
        converted = HfTokenizer(folder)
        with Proof(tokenizer, []) as proof:
            proved = proof.of(converted, name="its form as tokenizer.json")
    except UserError as error:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name).unlink(missing_ok=True)
        log.warning("AutoTokenizer cannot load the export's %s: %s", SENTENCEPIECE, error)
        return f"`{SENTENCEPIECE}`, for the sentencepiece library: AutoTokenizer cannot load it ({error})"
    return f"converted from `{SENTENCEPIECE}`, and equal to it {proved}"


def sentencepiece_as_json(raw: bytes) -> str:
    """A SentencePiece BPE or unigram model as tokenizer.json. Needs a proof: SentencePiece has more rules than these."""
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import AddedToken, Regex, decoders, models, normalizers
    from tokenizers import Tokenizer as Library

    proto = sentencepiece_model_pb2.ModelProto.FromString(raw)
    rules, trainer = proto.normalizer_spec, proto.trainer_spec
    ids = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    texts = {piece.piece for piece in proto.pieces if piece.type in (NORMAL, USER_DEFINED)}
    if trainer.model_type == trainer.BPE:
        # Pieces merge in order of falling score. SentencePiece assigns scores in the order in which it found the pieces.
        merges = sorted(
            (-piece.score, ids[left], ids[right], left, right)
            for piece in proto.pieces
            if piece.type == NORMAL
            for left, right in _halves(piece.piece)
            if left in texts and right in texts
        )
        model: models.Model = models.BPE(
            ids,
            [merge[3:] for merge in merges],
            unk_token=trainer.unk_piece,
            fuse_unk=True,
            byte_fallback=trainer.byte_fallback,
        )
    elif trainer.model_type == trainer.UNIGRAM:
        never = -1e9  # so that control symbols never match text
        model = models.Unigram(
            [(piece.piece, piece.score if piece.piece in texts else never) for piece in proto.pieces],
            trainer.unk_id,
            byte_fallback=trainer.byte_fallback,
        )
    else:
        raise UserError("it is neither a BPE nor a unigram model")
    library = Library(model)
    steps: list[Any] = (
        [normalizers.Precompiled(rules.precompiled_charsmap)] if rules.precompiled_charsmap else []
    )
    if rules.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex("^ +| +$"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    steps += [normalizers.Prepend("▁")] if rules.add_dummy_prefix else []
    library.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    first_space = [decoders.Strip(" ", 1, 0)] if rules.add_dummy_prefix else []
    library.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *first_space]
    )
    control = [piece.piece for piece in proto.pieces if piece.type == piece.CONTROL]
    library.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in control])
    library.add_tokens([AddedToken(symbol, normalized=False) for symbol in user_defined(raw)])
    text: str = library.to_str()
    return text


def check_auto_tokenizer(folder: Path, path: str, title: str) -> str | None:
    """What a reader of a folder of `title` (Qwen2) must know: for this type of model AutoTokenizer may take rules of splitting of
    its own, whatever tokenizer.json says, and so give other ids than in training. None if it gives the same."""
    from transformers import AutoTokenizer

    if not (folder / "tokenizer.json").exists():
        return None
    reference, theirs = load_tokenizer(path), AutoTokenizer.from_pretrained(folder, local_files_only=True)
    texts = list(probe_texts(reference))
    found = (theirs(text, add_special_tokens=False)["input_ids"] for text in texts)
    if all(ids == wanted.tolist() for ids, wanted in zip(found, reference.encode_batch(texts), strict=True)):
        return None
    warning = (
        f"AutoTokenizer splits texts by {title}'s rules for this type of model, not by tokenizer.json's: "
        "load PreTrainedTokenizerFast.from_pretrained instead, which gives the ids of training"
    )
    log.warning("%s", warning)
    return warning


def _halves(piece: str) -> list[tuple[str, str]]:
    return [(piece[:i], piece[i:]) for i in range(1, len(piece))]


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
