"""Which samples a data-parallel rank uses in a step: a pure function of the samples consumed before."""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from megadyn.data.samples import Samples

Tokens = NDArray[np.int64]


def sample_ids(consumed: int, global_batch: int, dp_rank: int, dp_size: int) -> range:
    """Samples of this rank in the step that begins after `consumed` samples: its contiguous share of the batch."""
    if global_batch % dp_size:
        raise ValueError(
            f"a global batch of {global_batch} cannot be shared by {dp_size} data-parallel ranks"
        )
    share = global_batch // dp_size
    first = consumed + dp_rank * share
    return range(first, first + share)


def micro_batch_ids(
    consumed: int, end: int, *, global_batch: int, micro_batch: int, dp_rank: int = 0, dp_size: int = 1
) -> Iterator[range]:
    """Samples of this rank's micro-batches, one after another, in the steps from sample `consumed` of the run to `end`."""
    for step in range(consumed, end, global_batch):
        ids = sample_ids(step, global_batch, dp_rank, dp_size)
        if len(ids) % micro_batch:
            raise ValueError(f"{len(ids)} samples per rank cannot be cut into micro-batches of {micro_batch}")
        for first in range(0, len(ids), micro_batch):
            yield ids[first : first + micro_batch]


def read_batch(samples: Samples, ids: Sequence[int]) -> tuple[Tokens, Tokens]:
    """The samples as (tokens, labels), each [len(ids), sequence_length].

    Label t is token t + 1. This is the only place where labels are shifted.
    """
    rows = samples.take(ids)
    return rows[:, :-1], rows[:, 1:]
