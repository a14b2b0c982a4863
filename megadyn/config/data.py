"""The `data` section of the configuration: the datasets, their proportions, and how they are split."""

import re
from dataclasses import dataclass
from typing import Any

from megadyn.checks import at_least
from megadyn.config.numbers import count
from megadyn.errors import ConfigError, did_you_mean
from megadyn.paths import expanded

SHARE_UNITS = ("weight", "tokens")
SOURCE_KEYS = ("prefix", *SHARE_UNITS, "skip", "order")
VALIDATION_SHARE = 0.01
UNNAMED = "validation"
"""What a validation set without a name is called, in metrics too; one with a name is `validation/NAME` there."""
SET_NAME = re.compile(r"\w[\w.-]*", re.ASCII)


@dataclass(frozen=True)
class Source:
    """One dataset of a blend."""

    prefix: str
    """Path of its `.bin` and `.idx` files without the suffix."""
    share: float | None = None
    """Its weight; weights need not sum to 1. None (for all): in proportion to the number of samples."""
    skip: int = 0
    """Samples at the beginning of its order that are left out, because an earlier run used them."""
    order: int | None = None
    """Number of its order, which decides how it is shuffled. None: its place in the list."""


@dataclass
class DataConfig:
    train: Any = "???"
    """Prefix of an indexed dataset (PREFIX.bin and PREFIX.idx), or a list of datasets to blend, each a prefix or
    `{prefix: ..., weight: ...}` or `{prefix: ..., tokens: ...}`. Weights and token counts (2e12, 300B) are proportions
    and need not sum to 1; without them each dataset counts by its number of samples. `skip: N` leaves out the first N samples
    of a dataset, and `order` is the place in the list by which it is shuffled, for a run that goes on with another mix."""
    origin: int = 0
    """Samples that the run has consumed when these data begin: the first of them is the run's sample `origin`. Above 0, a run may
    resume with them from a checkpoint of other training data or another sequence length. Phases set it."""
    validation: Any = None
    """A separate validation set, given like `train`, or several: a mapping of names to sets (`{code: ..., web: ...}`), each
    evaluated and reported by its name. Otherwise `split` takes a share of the documents of `train`."""
    test: Any = None
    """A separate test set, given like `train`; otherwise `split` takes a share of the documents of `train`. Its loss is
    reported once, at the end."""
    split: list[float] | None = None
    """Shares of the documents of `train` (of each dataset in a blend) for training, validation and test, which sum to
    1. Default: [0.99, 0.01, 0], or [1, 0, 0] with a separate validation set."""
    validation_fraction: float | None = None
    """Short for split: [1 - f, f, 0]; has no effect with a separate validation set."""
    repeat: bool = True
    """A dataset that runs out starts again, in another order; false refuses a run that needs more samples than there
    are."""
    document_mask: bool = False
    """Attention, positions and moving averages stay inside a document; documents end with the tokenizer's
    end-of-document token."""
    cache: str | None = None
    """Folder for shuffle and sample indices (default: PREFIX.cache)."""
    mmap: bool = True
    """Memory-map datasets; false uses plain reads, for file systems where memory maps are slow or missing."""

    def check(self) -> None:
        if _is_named(self.validation):
            given = self.validation
            self.validation = {name: _with_paths(f"data.validation.{name}", given[name]) for name in given}
        for name in ("train", "validation", "test"):
            setattr(self, name, _with_paths(f"data.{name}", getattr(self, name)))
        self.sources("train")
        self.sources("test")
        self.validation_sources()
        at_least("data.origin", self.origin, 0)
        for name, own in {"test": self.sources("test"), **self.validation_sources()}.items():
            if moved := [source for source in own if source.skip or source.order is not None]:
                raise ConfigError(
                    f"data.{name or UNNAMED}", moved[0].prefix, "without skip and order, keys of data.train"
                )
        if self.cache is not None:
            self.cache = expanded(self.cache, "data.cache")
        fraction = VALIDATION_SHARE if self.validation_fraction is None else self.validation_fraction
        if not 0 <= fraction < 1:
            raise ConfigError("data.validation_fraction", fraction, "in [0, 1)")
        if self.split is None:
            held_out = 0.0 if self.validation is not None else fraction
            self.split = [1 - held_out, held_out, 0.0]
        elif self.validation_fraction is not None:
            raise ConfigError("data.validation_fraction", fraction, "left out where data.split is given")
        self.validation_fraction = None  # so that the resolved config states the shares only once
        shares = self.split
        if len(shares) != 3 or not min(shares) >= 0 or not abs(sum(shares) - 1) <= 1e-6 or shares[0] == 0:
            raise ConfigError(
                "data.split",
                shares,
                "three shares, of training (above 0), validation and test, that sum to 1",
            )
        for name, share in zip(("validation", "test"), shares[1:]):
            if share and getattr(self, name) is not None:
                raise ConfigError(
                    "data.split", shares, f"0 for the {name} set, because data.{name} names a separate one"
                )

    def sources(self, name: str) -> list[Source]:
        """The datasets named under `train` or `test`, or under `validation` if it is one set, each once; empty if the key
        is not set."""
        given = getattr(self, name)
        return [] if given is None and name != "train" else _sources(f"data.{name}", given)

    @property
    def is_moved(self) -> bool:
        """Whether training does not begin with the first samples of the data, or not at the begin of the run."""
        return self.origin > 0 or any(source.skip for source in self.sources("train"))

    def validation_sources(self) -> dict[str, list[Source]]:
        """The datasets of each separate validation set, by its name; of one without a name by "". Empty if there is none."""
        if not _is_named(self.validation):
            return {"": own} if (own := self.sources("validation")) else {}
        for name in self.validation:
            if not (isinstance(name, str) and SET_NAME.fullmatch(name)):
                raise ConfigError("data.validation", name, "a name of letters, digits, '.', '_' and '-'")
        return {name: _sources(f"data.validation.{name}", given) for name, given in self.validation.items()}

    @property
    def validation_names(self) -> list[str]:
        """Names of all validation sets; of one without a name, separate or split off, UNNAMED."""
        if _is_named(self.validation):
            return list(self.validation)
        return [UNNAMED] if self.validation is not None or (self.split and self.split[1]) else []


def _is_named(validation: Any) -> bool:
    """Whether it is a mapping of names to sets, not one set given as `{prefix: ..., weight: ...}`."""
    return (
        isinstance(validation, dict) and bool(validation) and not {"prefix", *SHARE_UNITS} & validation.keys()
    )


def _sources(key: str, given: Any) -> list[Source]:
    """The datasets of one set or blend, each once."""
    entries = given if isinstance(given, list) else [given]
    if not entries:
        raise ConfigError(key, given, "a prefix, or a list of at least one")
    found = [
        _source(f"{key}[{i}]" if isinstance(given, list) else key, entry) for i, entry in enumerate(entries)
    ]
    for i, (source, unit) in enumerate(found):
        if unit != found[0][1]:
            raise ConfigError(
                f"{key}[{i}]", entries[i], f"given like the first, with {found[0][1] or 'only a prefix'}"
            )
        if source.prefix in {other.prefix for other, _ in found[:i]}:
            raise ConfigError(f"{key}[{i}].prefix", source.prefix, "named once, with the sum of its shares")
    return [source for source, _ in found]


def _with_paths(key: str, given: Any) -> Any:
    """`given` with `~` and variables expanded in its prefixes. Invalid forms are left for `sources` to refuse."""
    if isinstance(given, str):
        return expanded(given, key)
    if isinstance(given, list):
        return [_with_paths(f"{key}[{i}]", entry) for i, entry in enumerate(given)]
    if isinstance(given, dict) and isinstance(given.get("prefix"), str):
        return given | {"prefix": expanded(given["prefix"], f"{key}.prefix")}
    return given


def _source(key: str, given: Any) -> tuple[Source, str | None]:
    """An entry of a list of datasets, and the unit of its share."""
    if isinstance(given, str) and given:
        return Source(given), None
    if not isinstance(given, dict) or not isinstance(given.get("prefix"), str) or not given["prefix"]:
        raise ConfigError(
            key, given, "a dataset's prefix, or {prefix: ..., weight: ...}, or {prefix: ..., tokens: ...}"
        )
    for word in given:
        if word not in SOURCE_KEYS:
            raise ConfigError(
                f"{key}.{word}",
                given[word],
                f"left out: there is no such key{did_you_mean(str(word), SOURCE_KEYS)}",
            )
    skip, order = _whole(key, given, "skip") or 0, _whole(key, given, "order")
    units = [unit for unit in SHARE_UNITS if unit in given]
    if not units:
        return Source(given["prefix"], None, skip, order), None
    if len(units) > 1:
        raise ConfigError(key, given, "given a weight or tokens, not both")
    share = given[units[0]]
    if units[0] == "tokens" and isinstance(share, str):
        share = count(f"{key}.tokens", share)
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share < float("inf"):
        raise ConfigError(
            f"{key}.{units[0]}", share, "a number above 0 (remove a dataset that should not be used)"
        )
    return Source(given["prefix"], float(share), skip, order), units[0]


def _whole(key: str, given: dict[str, Any], word: str) -> int | None:
    """The whole number `word` of an entry; None if it is not given."""
    value = given.get(word)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
        raise ConfigError(f"{key}.{word}", value, "a whole number of at least 0")
    return value
