"""Pipeline stages of equal cost."""

from collections.abc import Sequence
from itertools import accumulate, pairwise


def balanced_stages(layers: Sequence[float], head: float, stages: int) -> list[int]:
    """Boundaries [0, ..., len(layers)] of `stages` non-empty stages that minimise the cost of the most expensive one.

    Args:
        layers: cost of each transformer layer. head: cost of what follows the last one, on the last stage.
    """
    total = list(accumulate(layers, initial=0.0))
    count = len(layers)
    # best[i]: (cost of the most expensive stage, boundaries) of the best way to cut layers[:i] into the stages so far
    best: dict[int, tuple[float, list[int]]] = {i: (total[i], [0, i]) for i in range(1, count + 1)}
    for stage in range(2, stages + 1):
        extra = head if stage == stages else 0.0
        best = {
            i: min(
                (max(best[j][0], total[i] - total[j] + extra), [*best[j][1], i]) for j in range(stage - 1, i)
            )
            for i in range(stage, count + 1)
        }
    return best[count][1]


def stage_costs(layers: Sequence[float], head: float, cuts: Sequence[int]) -> list[float]:
    """Cost of each stage between `cuts` (as from `balanced_stages`); the last includes the head."""
    costs = [float(sum(layers[a:b])) for a, b in pairwise(cuts)]
    costs[-1] += head
    return costs


def stage_table(layers: Sequence[float], head: float, cuts: Sequence[int]) -> str:
    """One line per stage: its layers and its share of the total cost."""
    costs = stage_costs(layers, head, cuts)
    count = len(costs)
    lines = ["stage  layers     share of FLOPs"]
    for stage, ((a, b), cost) in enumerate(zip(pairwise(cuts), costs, strict=True)):
        extras = ["embedding"] * (stage == 0) + ["head"] * (stage == count - 1)
        span = f"{a}-{b - 1}" if b - a > 1 else str(a)
        lines.append(f"{stage:>5}  {span:<9}  {cost / sum(costs):>6.1%}  {', '.join(extras)}".rstrip())
    lines.append(f"the most expensive stage costs {max(costs) * count / sum(costs):.2f} times the mean")
    return "\n".join(lines)
