"""From the configuration's dataset names to sets of samples."""

from collections.abc import Sequence
from typing import NamedTuple

from megadyn.config import BatchPlan, Config
from megadyn.config.data import Source
from megadyn.data.blend import Blend
from megadyn.data.ends import adopt_eod, check_eod, check_marked
from megadyn.data.indexed import IndexedDataset, check_tokenizer
from megadyn.data.largest import check_ids
from megadyn.data.samples import Mask, Samples, SampleSet, split_documents
from megadyn.errors import ConfigError
from megadyn.log import log
from megadyn.tokenization.tokenizer import Tokenizer, load_tokenizer
from megadyn.training.length import Position, settle_length


class Data(NamedTuple):
    train: Samples
    validation: Samples | None
    test: Samples | None
    eod: int | None
    """The token that ends a document, where samples are masked by document."""


BEGINNING = Position()


def open_data(config: Config, start: Position | None = BEGINNING) -> Data:
    """Opens and checks tokenizer and datasets, and fills in what follows from them: `model.vocab_size` and
    `tokenizer.eod` where they were left out, and `training.iterations` where the length of the run is given in something else.

    Args:
        start: where the run goes on from; None if nothing is to be trained, so that its length does not matter.

    Raises UserError for files that are missing, damaged, or do not fit each other, the model or the length of the run.
    """
    tokenizer = load_tokenizer(config.tokenizer.path, config.tokenizer.eod, "tokenizer.eod")
    if config.model.vocab_size is None:
        config.model.vocab_size = tokenizer.vocab_size
    if config.model.vocab_size < tokenizer.vocab_size:
        raise ConfigError(
            "model.vocab_size",
            config.model.vocab_size,
            f"at least the tokenizer's {tokenizer.vocab_size} ({config.tokenizer.path})",
        )
    section, seed = config.data, config.training.seed
    sources = section.sources("train")
    if config.tokenizer.eod is None:
        adopt_eod(tokenizer, IndexedDataset(sources[0].prefix, mmap=section.mmap))
    datasets = [open_dataset(source.prefix, config, tokenizer) for source in sources]
    assert section.split is not None
    _, for_validation, for_test = section.split
    splits = [split_documents(dataset, for_validation, for_test, seed) for dataset in datasets]
    # Another seed for each dataset, or those with as many documents would be shuffled alike.
    train = blended(
        sources,
        [
            cut(config, dataset, split.train, seed + d)
            for d, (dataset, split) in enumerate(zip(datasets, splits, strict=True))
        ],
    )
    if start is not None:
        settle_length(config, train, start)
        log.info(
            "data: %s, %s samples before any repeats; the run takes %s",
            dataset_names(sources),
            f"{len(train):,}",
            f"{config.training.samples_at_end(*start):,}",
        )

    def held_out(name: str, share: float) -> Samples | None:
        """The datasets that `name` names, or else its share of those for training."""
        if own := section.sources(name):
            return blended(
                own, [cut(config, open_dataset(source.prefix, config, tokenizer)) for source in own]
            )
        if not share:
            return None
        return blended(
            sources,
            [
                cut(config, dataset, getattr(split, name))
                for dataset, split in zip(datasets, splits, strict=True)
            ],
        )

    validation, test = held_out("validation", for_validation), held_out("test", for_test)
    if config.tokenizer.eod is None and tokenizer.eod_or_none is not None:
        config.tokenizer.eod = tokenizer.token_of(tokenizer.eod)
    return Data(train, validation, test, tokenizer.eod if section.document_mask else None)


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
    """Samples in an order drawn from `seed`, or one pass in the order of the file."""
    return SampleSet(
        dataset,
        sequence_length=config.training.sequence_length,
        seed=seed or 0,
        documents=documents,
        shuffle=seed is not None,
        cache_dir=config.data.cache,
    )


def blended(sources: Sequence[Source], sets: Sequence[SampleSet]) -> Samples:
    """Each set in its share, or in proportion to its size where none is given."""
    if len(sets) == 1:
        return sets[0]
    return Blend(
        sets,
        [
            len(samples) if source.share is None else source.share
            for source, samples in zip(sources, sets, strict=True)
        ],
    )


def dataset_names(sources: Sequence[Source]) -> str:
    return sources[0].prefix if len(sources) == 1 else f"a blend of {len(sources)} datasets"


def evaluation_size(name: str, samples: Samples, wanted: int, plan: BatchPlan) -> int:
    """Samples of the set `name` that an evaluation uses: `wanted`, or fewer, a multiple of what one round of ranks takes."""
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
