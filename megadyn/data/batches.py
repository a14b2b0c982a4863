"""Which samples a data-parallel rank takes in a step: a pure function of the samples consumed before."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from megadyn.data.samples import SampleSet

Tokens = NDArray[np.int64]


def sample_ids(consumed: int, global_batch: int, dp_rank: int, dp_size: int) -> range:
    """Samples of this rank in the step that begins after `consumed` samples: its contiguous share of the batch."""
    if global_batch % dp_size:
        raise ValueError(f"a global batch of {global_batch} cannot be shared by {dp_size} data-parallel ranks")
    share = global_batch // dp_size
    first = consumed + dp_rank * share
    return range(first, first + share)


def batches(samples: SampleSet, consumed: int, *, global_batch: int, micro_batch: int,
            dp_rank: int = 0, dp_size: int = 1) -> Iterator[tuple[Tokens, Tokens]]:
    """This rank's micro-batches of one step as (tokens, labels), each [micro_batch, sequence_length].

    Label t is token t + 1: shifted here, and nowhere else.
    """
    ids = sample_ids(consumed, global_batch, dp_rank, dp_size)
    if len(ids) % micro_batch:
        raise ValueError(f"{len(ids)} samples a rank cannot be cut into micro-batches of {micro_batch}")
    for first in range(0, len(ids), micro_batch):
        rows = np.stack([samples[s] for s in ids[first:first + micro_batch]])
        yield rows[:, :-1], rows[:, 1:]
