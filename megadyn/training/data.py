"""Opens the datasets that the configuration names, as sets of samples."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import NamedTuple

from megadyn.config import BatchPlan, Config
from megadyn.config.data import UNNAMED, Source
from megadyn.data.blend import Blend
from megadyn.data.ends import adopt_eod, check_eod, check_marked
from megadyn.data.indexed import IndexedDataset, check_tokenizer
from megadyn.data.largest import check_ids
from megadyn.data.samples import Mask, Samples, SampleSet, Split, shifted, split_documents
from megadyn.errors import ConfigError
from megadyn.hub import TOKENIZER, pinned
from megadyn.log import log
from megadyn.tokenization.tokenizer import Tokenizer, load_tokenizer
from megadyn.training.length import Position, settle_length


class Data(NamedTuple):
    train: Samples
    validation: Samples | None
    test: Samples | None
    eod: int | None
    """The token that ends a document, if samples are masked by document."""
    named: Mapping[str, Samples] = MappingProxyType({})
    """Validation sets with names; `validation` is then None."""

    @property
    def validations(self) -> dict[str, Samples]:
        """All validation sets, by their names in metrics."""
        if self.validation is not None:
            return {UNNAMED: self.validation}
        return {f"{UNNAMED}/{name}": samples for name, samples in self.named.items()}


BEGINNING = Position()


def open_data(config: Config, start: Position | None = BEGINNING) -> Data:
    """Opens and checks tokenizer and datasets. Fills in what follows from them: `model.vocab_size` and `tokenizer.eod`
    if they are not set, and `training.iterations` if the run's length is given in other units.

    Args:
        start: position from which the run continues; None if nothing will be trained, so that the length does not matter.

    Raises UserError for files that are missing, damaged, or do not match each other, the model or the length of the run.
    """
    tokenizer = open_tokenizer(config)
    section, seed = config.data, config.training.seed
    sources = section.sources("train")
    if config.tokenizer.eod is None:
        adopt_eod(tokenizer, IndexedDataset(sources[0].prefix, mmap=section.mmap))
    datasets = [open_dataset(source.prefix, config, tokenizer) for source in sources]
    assert section.split is not None
    _, for_validation, for_test = section.split
    splits = [split_documents(dataset, for_validation, for_test, seed) for dataset in datasets]
    train = _training_samples(config, sources, datasets, splits)
    if start is not None:
        settle_length(config, train, start)
        log.info(
            "data: %s, %s samples before any repeats; the run uses %s",
            dataset_names(sources),
            f"{len(train):,}",
            f"{config.training.samples_at_end(*start):,}",
        )

    def separate(own: Sequence[Source]) -> Samples:
        return blended(own, [cut(config, open_dataset(source.prefix, config, tokenizer)) for source in own])

    def held_out(name: str, own: Sequence[Source], share: float) -> Samples | None:
        """The datasets `own`, or otherwise that share of the training datasets."""
        if own:
            return separate(own)
        if not share:
            return None
        return blended(
            [replace(source, skip=0) for source in sources],
            [
                cut(config, dataset, getattr(split, name))
                for dataset, split in zip(datasets, splits, strict=True)
            ],
        )

    of_validation = section.validation_sources()
    validation = held_out("validation", of_validation.pop("", []), for_validation)
    test = held_out("test", section.sources("test"), for_test)
    named = {name: separate(own) for name, own in of_validation.items()}
    if config.tokenizer.eod is None and tokenizer.eod_or_none is not None:
        config.tokenizer.eod = tokenizer.token_of(tokenizer.eod)
    return Data(train, validation, test, tokenizer.eod if section.document_mask else None, named)


def _training_samples(
    config: Config,
    sources: Sequence[Source],
    datasets: Sequence[IndexedDataset],
    splits: Sequence[Split],
) -> Samples:
    """The blend of the datasets' training parts, from `data.origin` on."""
    # A different seed for each dataset, because datasets with equally many documents would be shuffled alike.
    parts = [
        cut(
            config, dataset, split.train, config.training.seed + (d if source.order is None else source.order)
        )
        for d, (source, dataset, split) in enumerate(zip(sources, datasets, splits, strict=True))
    ]
    return shifted(blended(sources, parts), -config.data.origin)


def open_tokenizer(config: Config) -> Tokenizer:
    """An address in the configuration gets its commit, so that a later start or export has the same tokenizer."""
    section = config.tokenizer
    if section.path != "byte":
        section.path = pinned(section.path, f"tokenizer.path = {section.path!r}", TOKENIZER)
    tokenizer = load_tokenizer(section.path, section.eod, "tokenizer.eod")
    settle_vocabulary(config, tokenizer)
    return tokenizer


def settle_vocabulary(config: Config, tokenizer: Tokenizer) -> None:
    """Sets `model.vocab_size` if it is not given; raises ConfigError if the tokenizer has more tokens."""
    if config.model.vocab_size is None:
        config.model.vocab_size = tokenizer.vocab_size
    if config.model.vocab_size < tokenizer.vocab_size:
        raise ConfigError(
            "model.vocab_size",
            config.model.vocab_size,
            f"at least the tokenizer's {tokenizer.vocab_size} ({config.tokenizer.path})",
        )


def open_dataset(prefix: str, config: Config, tokenizer: Tokenizer) -> IndexedDataset:
    dataset = IndexedDataset(prefix, mmap=config.data.mmap)
    check_tokenizer(dataset, tokenizer)
    assert config.model.vocab_size is not None
    check_ids(dataset, config.model.vocab_size, config.data.cache)
    check_eod(dataset, tokenizer.eod_or_none)
    if config.data.document_mask:
        check_marked(dataset, tokenizer.eod)
    return dataset


def cut(
    config: Config, dataset: IndexedDataset, documents: Mask | None = None, seed: int | None = None
) -> SampleSet:
    """Samples in an order drawn from `seed`; without a seed, one pass in file order."""
    return SampleSet(
        dataset,
        sequence_length=config.training.sequence_length,
        seed=seed or 0,
        documents=documents,
        shuffle=seed is not None,
        cache_dir=config.data.cache,
    )


def blended(sources: Sequence[Source], sets: Sequence[SampleSet]) -> Samples:
    """Blends the sets, behind what is skipped of each, by their shares, or in proportion to their sizes if no shares are
    given."""
    left = [shifted(samples, source.skip) for source, samples in zip(sources, sets, strict=True)]
    if len(left) == 1:
        return left[0]
    return Blend(
        left,
        [
            len(samples) if source.share is None else source.share
            for source, samples in zip(sources, sets, strict=True)
        ],
    )


def dataset_names(sources: Sequence[Source]) -> str:
    return sources[0].prefix if len(sources) == 1 else f"a blend of {len(sources)} datasets"


def evaluation_size(name: str, samples: Samples, wanted: int, plan: BatchPlan) -> int:
    """Number of samples from the set `name` used per evaluation: `wanted` or fewer, a multiple of one round over all ranks."""
    per_round = plan.micro_batch * plan.data_parallel
    size = min(wanted, len(samples)) // per_round * per_round
    if size == 0:
        raise ConfigError(
            "training.eval_samples",
            wanted,
            f"at least {per_round} (one micro-batch per data-parallel rank), and the {name} set "
            f"must have that many; it has {len(samples)}",
        )
    return size
