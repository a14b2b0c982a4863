"""Simulates the 1F1B pipeline (arXiv 2006.09503, PipeDream-Flush): the time of a step, including waiting between stages
and micro-batches.

Time is divided into slots as in DeepSpeed's `TrainSchedule`: in slot t, stage i runs a forward pass if t + i is even
and a backward pass if it is odd, provided that there is a micro-batch for it. Before the backward pass in an odd slot,
a stage and the next one exchange tensors: the previous slot's activations in one direction, their gradients in the
other. Both wait for that.
"""

from collections.abc import Sequence
from typing import NamedTuple


class Slot(NamedTuple):
    """One pass of one micro-batch, numbered from 0 within the step."""

    micro_batch: int
    is_forward: bool


class PipelineTimes(NamedTuple):
    """A simulated step, in the same unit as the input times."""

    step: float
    busy: list[float]
    """Busy time per stage, without waiting and sending."""

    @property
    def bubble(self) -> float:
        """Share of the stages' time in which they do not compute; 0 for one stage."""
        # Rounding can make it slightly negative for one stage.
        return max(0.0, 1 - sum(self.busy) / (len(self.busy) * self.step))


def slot_of(stage: int, time: int, stages: int, micro_batches: int) -> Slot | None:
    """What `stage` computes in slot `time`, both 0-based; None if it is idle."""
    is_forward = (time + stage) % 2 == 0
    micro_batch = (time - stage) // 2 if is_forward else (time - (2 * stages - 1 - stage)) // 2
    return Slot(micro_batch, is_forward) if 0 <= micro_batch < micro_batches else None


def in_flight(stage: int, stages: int, micro_batches: int) -> int:
    """Largest number of micro-batches whose activations `stage` holds at once."""
    return min(stages - stage, micro_batches)


def simulate(
    forward: Sequence[float], backward: Sequence[float], micro_batches: int, send: float = 0.0
) -> PipelineTimes:
    """One step of 1F1B.

    Args:
        forward, backward: time of each stage on a micro-batch. send: time of one transfer between neighbours.
    """
    stages = len(forward)
    clock = [0.0] * stages
    for time in range(2 * (micro_batches + stages - 1)):
        slots = [slot_of(stage, time, stages, micro_batches) for stage in range(stages)]
        # In this slot `stage` runs backward and the next one forward.
        for stage in range(1 - time % 2, stages - 1, 2):
            if crossing := (slots[stage] is not None) + (slots[stage + 1] is not None):
                clock[stage] = clock[stage + 1] = max(clock[stage : stage + 2]) + crossing * send
        for stage, slot in enumerate(slots):
            if slot is not None:
                clock[stage] += forward[stage] if slot.is_forward else backward[stage]
    return PipelineTimes(
        max(clock), [micro_batches * (f + b) for f, b in zip(forward, backward, strict=True)]
    )
