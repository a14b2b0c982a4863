"""Pipeline stages of equal cost."""

from collections.abc import Sequence
from itertools import accumulate


def balanced_stages(layers: Sequence[float], head: float, stages: int) -> list[int]:
    """Boundaries [0, ..., len(layers)] of `stages` stretches, none empty, with the least cost of the dearest one.

    Args:
        layers: cost of each transformer layer. head: cost of what follows the last one, on the last stage.
    """
    total = list(accumulate(layers, initial=0.0))
    count = len(layers)
    # best[i]: (cost of the dearest stage, boundaries) of the cheapest way to cut layers[:i] into the stages so far
    best: dict[int, tuple[float, list[int]]] = {i: (total[i], [0, i]) for i in range(1, count + 1)}
    for stage in range(2, stages + 1):
        extra = head if stage == stages else 0.0
        best = {
            i: min((max(best[j][0], total[i] - total[j] + extra), [*best[j][1], i]) for j in range(stage - 1, i))
            for i in range(stage, count + 1)
        }
    return best[count][1]
