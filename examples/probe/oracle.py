"""Choices of tokens by what is known of them, written as a recording that a run replays (`training.routing_replay`)."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megadyn.config import Config
from megadyn.data.indexed import IndexedDataset
from megadyn.data.labels import read_labels
from megadyn.data.samples import SampleSet
from megadyn.kinds import DENSE, capacity_count
from megadyn.routing.recording import Recorded, Recording
from megadyn.routing.replay import about_run
from megadyn.training.data import open_data


def merit(hops: NDArray[np.uint8]) -> NDArray[np.float32]:
    """hops [N, T + 1] of the tokens of samples -> [N, T]: the higher, the sooner a position is chosen.

    2 for positions that need depth, because predicting the next token takes steps; 1 for the position before such a one,
    from which its steps begin; 0 for others. Among equals, the earlier.
    """
    needs = hops[:, 1:] > 0
    begins = np.zeros_like(needs)
    begins[:, :-1] = needs[:, 1:] & ~needs[:, :-1]
    place = np.arange(needs.shape[1], dtype=np.float32) / (2 * needs.shape[1])
    return (2 * needs + begins - place).astype(np.float32)


def write_oracle(config: Config, folder: Path) -> None:
    """The recording of the whole run that `config` describes; `config` gets its vocabulary and its end."""
    samples = open_data(config).train
    assert isinstance(samples, SampleSet) and config.training.iterations is not None
    hops = read_labels(IndexedDataset(samples.dataset.prefix)).hops
    choosing = {index: of for index, of in enumerate(config.model.layer_types) if of != DENSE}
    recording, batch = Recording(folder), config.training.global_batch_size
    count = capacity_count(config.model.routing.share, config.training.sequence_length)
    recording.begin(about_run(config, choosing, samples.key))
    for step in range(1, config.training.iterations + 1):
        first = (step - 1) * batch
        places = np.stack([samples.places(sample) for sample in range(first, first + batch)])
        score = merit(hops[places])
        cut = -np.partition(-score, count - 1, axis=1)[:, count - 1]
        for layer in choosing:
            recording.write(layer, step, Recorded(score >= cut[:, None], score, cut, first))
