"""Tells of routers that stopped doing their work, which the loss does not show, from the statistics that are reported anyway.

`RouterHealth.look` takes the statistics of a report and returns what is new. It runs on rank 0 alone and touches no tensor, so
it waits for no device. A problem counts once it was there in PERSISTENCE reports in a row, all of them after the averages had
time to settle. It is told once for each layer and start of a run.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megadyn.config import Config
from megadyn.kinds import Kind, capacity_count

PERSISTENCE = 5
"""Reports in a row: the statistics are of few steps, and one odd batch is no trouble."""
DEAD_GATE = 1e-6
"""Mean gate of the chosen tokens. Below it, rounding loses the layer's update in half precision, and its gradient with it."""
CLOSED_GATE = 0.1
"""Mean gate of the chosen tokens. Below it the layer is computed for less than a tenth of its effect."""
OPEN_GATE = 0.99
"""Mean gate of the chosen and of the other tokens. Above it no token is held back, and the gate's gradient has vanished."""
LEAST_SEPARATION = 0.02
"""Between the mean gates of chosen and other tokens, of a gate in [0, 1]. Below it which tokens are chosen is nearly a matter
of rounding, and the choice will not carry over to a causal rule."""
LEAST_KAPPA = 0.25
"""Cohen's kappa of the causal rule and top-k: agreement above chance, by what there is above chance. Below it three quarters of
what the rule could know are lost in generation."""
SHARE_FACTOR = 1.5
"""Between the share of tokens that a layer takes and the planned one, either way: so far are costs off from the plan's."""

MEAN_SHARE = "mean_share"
"""Added to the statistics of kinds whose layers are held to their mean share: that mean in the first layer, NaN in the others, so
that it is told once."""

Statistics = dict[str, float]


@dataclass
class Finding:
    """What is wrong with the router of one layer."""

    layer: int
    problem: str
    """A key of CHECKS."""
    since: int
    """Iteration of the first of the reports in a row that showed it."""
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
    """Share of tokens on which two independent choices of this share agree."""
    return capacity**2 + (1 - capacity) ** 2


def gate_size(found: Statistics, routing: Kind) -> float:
    """Mean gate of the chosen tokens; of a gate that may be negative, its root mean square."""
    if routing.has_signed_gate:
        return math.hypot(found["gate_routed"], found["gate_routed_std"])
    return found["gate_routed"]


def is_mixed(found: Statistics) -> bool:
    """Whether some tokens were chosen and some were not."""
    return 0 < found["routed_fraction"] < 1


# Each check: value and what is wrong with it, or None where it does not apply or all is well.
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
        f"its gate is closed (mean {size:.3f} over chosen tokens, under {CLOSED_GATE}): it is computed and hardly used",
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
        f"its router hardly tells tokens apart (gates of chosen and other tokens differ by {distance:.3f})",
    )


def chance_choice(found: Statistics, routing: Kind, planned: float) -> Told:
    agreement, chance = found.get("causal_agreement"), chance_agreement(planned)
    if agreement is None or chance == 1 or not agreement < chance + LEAST_KAPPA * (1 - chance):
        return None
    return (
        agreement,
        f"its causal rule agrees with top-k on {agreement:.0%} of tokens, where chance gives {chance:.0%}",
    )


def strayed_share(found: Statistics, routing: Kind, planned: float) -> Told:
    share = found.get(MEAN_SHARE, found["routed_fraction"])
    if not math.isfinite(share) or planned / SHARE_FACTOR <= share <= planned * SHARE_FACTOR:
        return None
    takes = "all routed layers together take" if MEAN_SHARE in found else "it takes"
    return share, f"{takes} {share:.1%} of tokens, where {planned:.1%} were planned"


CHECKS: dict[str, Callable[[Statistics, Kind, float], Told]] = {
    "dead_gate": dead_gate,
    "closed_gate": closed_gate,
    "saturated_gate": saturated_gate,
    "unseparated_scores": unseparated_scores,
    "chance_choice": chance_choice,
    "strayed_share": strayed_share,
}
"""By the problem's name, as metrics.jsonl has it."""
NEEDED = ("routed_fraction", "gate_routed", "gate_routed_std", "gate_unrouted")
"""Statistics of a layer that chooses tokens; a layer without them is not looked at."""


def planned_share(config: Config) -> float:
    """Share of a sequence's tokens that each routed layer is planned to take."""
    routing, length = config.model.routing, config.training.sequence_length
    return routing.share if routing.varies else capacity_count(routing.share, length) / length


def settled_at(config: Config) -> int:
    """Iteration from which on reports count: the warm-ups are over, and the thresholds' averages full."""
    return max(config.optimizer.warmup_iterations, config.model.routing.settling_steps)


def with_mean_share(statistics: dict[int, Statistics]) -> dict[int, Statistics]:
    """The statistics by layer, with MEAN_SHARE."""
    shares = [found["routed_fraction"] for found in statistics.values()]
    means = [math.fsum(shares) / len(shares), *[math.nan] * (len(shares) - 1)] if shares else []
    return {
        layer: found | {MEAN_SHARE: mean}
        for (layer, found), mean in zip(statistics.items(), means, strict=True)
    }


class RouterHealth:
    """What all reports of this start of a run showed. Rank 0 only."""

    def __init__(self, config: Config):
        self.routing, self.planned, self.settled = (
            config.model.routing,
            planned_share(config),
            settled_at(config),
        )
        self.findings: dict[tuple[int, str], Finding] = {}
        """All that was told, by layer and problem, with the latest values."""
        # since when, and in how many reports in a row
        self._seen: dict[tuple[int, str], tuple[int, int]] = {}

    def look(self, iteration: int, statistics: dict[int, Statistics]) -> list[Finding]:
        """What this report's statistics, by layer, show for the first time."""
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
        """Begins to count anew where a run goes back; what was told is not told again."""
        self._seen.clear()

    def summary(self) -> list[str]:
        """A sentence for each finding, for the end of a run; it says where the latest report no longer showed it."""
        return [
            finding.sentence + ("" if key in self._seen else " (no longer at the last report)")
            for key, finding in sorted(self.findings.items())
        ]
