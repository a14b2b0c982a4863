"""From the configuration's dataset names to the micro-batches of a step."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from megadyn.config import BatchPlan, Config
from megadyn.data.batches import batches
from megadyn.data.indexed import IndexedDataset, check_tokenizer
from megadyn.data.samples import Indices, SampleSet, split_documents
from megadyn.data.tokenizer import load_tokenizer
from megadyn.errors import ConfigError
from megadyn.log import log


class Data(NamedTuple):
    train: SampleSet
    validation: SampleSet | None
    eod: int | None
    """The token that ends a document, where samples are masked by document."""


def open_data(config: Config) -> Data:
    """Opens and checks tokenizer and datasets, and fills in `model.vocab_size` where it was left out.

    Raises UserError for files that are missing, damaged, or do not fit each other or the model.
    """
    tokenizer = load_tokenizer(config.tokenizer.path)
    if config.model.vocab_size is None:
        config.model.vocab_size = tokenizer.vocab_size
    if config.model.vocab_size < tokenizer.vocab_size:
        raise ConfigError("model.vocab_size", config.model.vocab_size,
                          f"at least the tokenizer's {tokenizer.vocab_size} ({config.tokenizer.path})")
    section, training = config.data, config.training
    train = IndexedDataset(section.train)
    check_tokenizer(train, tokenizer)
    documents, held_out = None, None
    if section.validation is not None:
        other = IndexedDataset(section.validation)
        check_tokenizer(other, tokenizer)
    else:
        other = train
        documents, held_out = split_documents(train, section.validation_fraction, training.seed)
    for dataset in (train, other):
        if section.document_mask and dataset.record is not None and not dataset.record.append_eod:
            raise ConfigError("data.document_mask", True, f"false: {dataset.prefix} was made without --append-eod, so that "
                              "nothing in it marks where documents end")
    has_validation = section.validation is not None or section.validation_fraction > 0

    def cut(dataset: IndexedDataset, documents: Indices | None, shuffle: bool) -> SampleSet:
        return SampleSet(dataset, sequence_length=training.sequence_length, seed=training.seed, documents=documents,
                         shuffle=shuffle, cache_dir=section.cache)

    return Data(cut(train, documents, shuffle=True), cut(other, held_out, shuffle=False) if has_validation else None,
                tokenizer.eod if section.document_mask else None)


def step_batches(samples: SampleSet, consumed: int, global_batch: int, plan: BatchPlan,
                 dp_rank: int) -> Iterator[tuple[Tensor, Tensor]]:
    """This data-parallel rank's (tokens, labels), [micro_batch, T] each, of the step after `consumed` samples."""
    for tokens, labels in batches(samples, consumed, global_batch=global_batch, micro_batch=plan.micro_batch,
                                  dp_rank=dp_rank, dp_size=plan.data_parallel):
        yield torch.from_numpy(tokens).contiguous(), torch.from_numpy(labels).contiguous()


def evaluation_size(samples: SampleSet, wanted: int, plan: BatchPlan) -> int:
    """Validation samples that an evaluation uses: `wanted`, or fewer, a multiple of what one round of ranks takes."""
    per_round = plan.micro_batch * plan.data_parallel
    size = min(wanted, len(samples)) // per_round * per_round
    if size == 0:
        raise ConfigError("training.eval_samples", wanted,
                          f"at least {per_round} (one micro-batch a data-parallel rank), of which the validation set "
                          f"must have as many; it has {len(samples)}")
    if size < wanted:
        log.info("evaluations use %d samples: of %d wanted, %d there are, in rounds of %d", size, wanted, len(samples), per_round)
    return size
