"""Detects routers that have stopped working, which the loss does not show, from statistics that are reported anyway.

`RouterHealth.look` takes the statistics of a report and returns new findings. It runs only on rank 0 and uses no
tensors, so it never waits for the device. A problem counts once it has appeared in PERSISTENCE consecutive reports, all
of them after the averages had time to settle. It is reported once per layer and start of a run.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megadyn.config import Config
from megadyn.kinds import Kind, capacity_count

PERSISTENCE = 5
"""Consecutive reports, because statistics cover only a few steps and one odd batch is not a problem."""
DEAD_GATE = 1e-6
"""Mean gate of chosen tokens. Below it, half precision rounds away the layer's update, and with it its gradient."""
CLOSED_GATE = 0.1
"""Mean gate of chosen tokens. Below it, the layer's full cost buys less than a tenth of its effect."""
OPEN_GATE = 0.99
"""Mean gate of chosen and of other tokens. Above it no token is held back, and the gate's gradient has vanished."""
LEAST_SEPARATION = 0.02
"""Difference between the mean gates of chosen and other tokens, for gates in [0, 1]. Below it the choice is nearly a
matter of rounding, and a causal rule cannot reproduce it."""
LEAST_KAPPA = 0.25
"""Cohen's kappa of the causal rule and top-k: agreement above chance, relative to the maximum above chance. Below it,
generation loses three quarters of what the rule could know."""
SHARE_FACTOR = 1.5
"""Ratio between the actual and the planned share of tokens of a layer, in either direction. Costs differ from the plan
as much."""

MEAN_SHARE = "mean_share"
"""Extra statistic for kinds that control only the mean share of their layers: that mean in the first layer, NaN in the
others, so that it is reported once."""

Statistics = dict[str, float]


@dataclass
class Finding:
    """A problem of one layer's router."""

    layer: int
    problem: str
    """A key of CHECKS."""
    since: int
    """Iteration of the first of the consecutive reports with this problem."""
    value: float
    sentence: str

    def record(self) -> dict[str, Any]:
        return {
            "layer": self.layer,
            "problem": self.problem,
            "since": self.since,
            "value": self.value,
            "sentence": self.sentence,
        }


def chance_agreement(capacity: float) -> float:
    """Share of tokens on which two independent choices of this capacity agree."""
    return capacity**2 + (1 - capacity) ** 2


def gate_size(found: Statistics, routing: Kind) -> float:
    """Mean gate of chosen tokens; for gates that may be negative, their root mean square."""
    if routing.has_signed_gate:
        return math.hypot(found["gate_routed"], found["gate_routed_std"])
    return found["gate_routed"]


def is_mixed(found: Statistics) -> bool:
    """Whether some tokens were chosen and others were not."""
    return 0 < found["routed_fraction"] < 1


# Each check returns a value and what is wrong with it, or None if all is well or the check does not apply.
Told = tuple[float, str] | None


def dead_gate(found: Statistics, routing: Kind, planned: float) -> Told:
    size = gate_size(found, routing)
    if routing.gate_is_chance or found["routed_fraction"] == 0 or not size < DEAD_GATE:
        return None
    return (
        size,
        f"its gate is dead (mean {size:.2g} over chosen tokens): neither its update nor a gradient comes through",
    )


def closed_gate(found: Statistics, routing: Kind, planned: float) -> Told:
    size = gate_size(found, routing)
    if routing.gate_is_chance or found["routed_fraction"] == 0 or not DEAD_GATE <= size < CLOSED_GATE:
        return None
    return (
        size,
        f"its gate is closed (mean {size:.3f} over chosen tokens, below {CLOSED_GATE}): it is computed but hardly used",
    )


def saturated_gate(found: Statistics, routing: Kind, planned: float) -> Told:
    least = min(found["gate_routed"], found["gate_unrouted"]) if is_mixed(found) else found["gate_routed"]
    if routing.has_signed_gate or found["routed_fraction"] == 0 or not least > OPEN_GATE:
        return None
    return least, f"its gate is saturated (mean {least:.4f} or more over all tokens): it holds no token back"


def unseparated_scores(found: Statistics, routing: Kind, planned: float) -> Told:
    distance = found["gate_routed"] - found["gate_unrouted"]
    scale = gate_size(found, routing) if routing.has_signed_gate else 1.0
    explained = saturated_gate(found, routing, planned) or dead_gate(found, routing, planned)
    if explained or not is_mixed(found) or not distance < LEAST_SEPARATION * scale:
        return None
    return (
        distance,
        f"its router hardly separates tokens (gates of chosen and other tokens differ by {distance:.3f})",
    )


def chance_choice(found: Statistics, routing: Kind, planned: float) -> Told:
    agreement, chance = found.get("causal_agreement"), chance_agreement(planned)
    if agreement is None or chance == 1 or not agreement < chance + LEAST_KAPPA * (1 - chance):
        return None
    return (
        agreement,
        f"its causal rule agrees with top-k on {agreement:.0%} of tokens, but chance alone gives {chance:.0%}",
    )


def strayed_share(found: Statistics, routing: Kind, planned: float) -> Told:
    share = found.get(MEAN_SHARE, found["routed_fraction"])
    if not math.isfinite(share) or planned / SHARE_FACTOR <= share <= planned * SHARE_FACTOR:
        return None
    takes = "all routed layers together take" if MEAN_SHARE in found else "it takes"
    return share, f"{takes} {share:.1%} of tokens, but {planned:.1%} were planned"


CHECKS: dict[str, Callable[[Statistics, Kind, float], Told]] = {
    "dead_gate": dead_gate,
    "closed_gate": closed_gate,
    "saturated_gate": saturated_gate,
    "unseparated_scores": unseparated_scores,
    "chance_choice": chance_choice,
    "strayed_share": strayed_share,
}
"""Checks by the problem's name in metrics.jsonl."""
NEEDED = ("routed_fraction", "gate_routed", "gate_routed_std", "gate_unrouted")
"""Statistics of a layer that chooses tokens; layers without them are not checked."""


def planned_share(config: Config) -> float:
    """Planned share of a sequence's tokens that each routed layer takes."""
    routing, length = config.model.routing, config.training.sequence_length
    return routing.share if routing.varies else capacity_count(routing.share, length) / length


def settled_at(config: Config) -> int:
    """Iteration from which reports count: after the warm-ups, and once the thresholds' averages have settled, which a phase
    begins anew."""
    warm = config.optimizer.schedule_begin + config.optimizer.warmup_steps(config.training.tokens_per_step)
    begin = config.phase.begin if config.phase else 0
    return max(warm, begin + config.model.routing.settling_steps)


def with_mean_share(statistics: dict[int, Statistics]) -> dict[int, Statistics]:
    """Adds MEAN_SHARE to the statistics by layer."""
    shares = [found["routed_fraction"] for found in statistics.values()]
    means = [math.fsum(shares) / len(shares), *[math.nan] * (len(shares) - 1)] if shares else []
    return {
        layer: found | {MEAN_SHARE: mean}
        for (layer, found), mean in zip(statistics.items(), means, strict=True)
    }


class RouterHealth:
    """What all reports since this start of the run showed. Rank 0 only."""

    def __init__(self, config: Config):
        self.routing, self.planned, self.settled = (
            config.model.routing,
            planned_share(config),
            settled_at(config),
        )
        self.findings: dict[tuple[int, str], Finding] = {}
        """Everything reported so far, by layer and problem, with the latest values."""
        # Iteration of the first, and number of, consecutive reports.
        self._seen: dict[tuple[int, str], tuple[int, int]] = {}

    def look(self, iteration: int, statistics: dict[int, Statistics]) -> list[Finding]:
        """The problems that this report's statistics, by layer, show for the first time."""
        if iteration <= self.settled:
            return []
        new = []
        chosen = {
            layer: found
            for layer, found in sorted(statistics.items())
            if all(name in found for name in NEEDED)
        }
        if self.routing.held_in_mean:
            chosen = with_mean_share(chosen)
        for layer, found in chosen.items():
            for problem, check in CHECKS.items():
                key, told = (layer, problem), check(found, self.routing, self.planned)
                if told is None:
                    self._seen.pop(key, None)
                    continue
                since, count = self._seen.get(key, (iteration, 0))
                self._seen[key] = since, count + 1
                if count + 1 < PERSISTENCE:
                    continue
                if key not in self.findings:
                    new.append(self._finding(key, since, *told))
                self.findings[key] = self._finding(key, since, *told)
        return new

    def _finding(self, key: tuple[int, str], since: int, value: float, what: str) -> Finding:
        layer, problem = key
        return Finding(layer, problem, since, value, f"layer {layer}: {what}, since iteration {since}")

    def go_back(self) -> None:
        """Restarts counting when a run goes back. Earlier findings are not reported again."""
        self._seen.clear()

    def summary(self) -> list[str]:
        """One sentence per finding, for the end of a run; notes if the latest report no longer shows the problem."""
        return [
            finding.sentence + ("" if key in self._seen else " (no longer at the last report)")
            for key, finding in sorted(self.findings.items())
        ]
