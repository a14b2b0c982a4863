"""What a soak measures, and the bounds that it must keep.

A FAIL is an edge from which training does not come back, or a promise of the plan that is broken. A WARN is a router that works,
but drifts towards uselessness: seen, and to be explained, not hidden.
"""

import math
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

OK, SEEN, WARN, FAIL = "ok", "seen", "warn", "fail"

LAST = 0.2
"""Part of a run, at its end, over which values are averaged."""
LARGEST = 100.0
"""A router's scalars, thresholds and mean logits stay within plus and minus this."""
SCALARS = (
    "beta_ce",
    "beta_cu",
    "ce_offset",
    "ce_log_offset",
    "cu_multiplier",
    "threshold",
    "logit",
    "logit_std",
    "lead",
    "lead_std",
    "lambda",
)
CLOSED, OPEN = 1e-4, 1 - 1e-4
"""Gates of chosen tokens below CLOSED on average are dead, and so are those of all tokens above OPEN."""
CLOSING, APART = 0.1, 0.02
"""Gates of chosen tokens below CLOSING, or no farther than APART from the others', are a warning."""
FOLLOWS = 1.5
"""A target share, and the share under a running threshold, may be off by this factor."""
BY_CHANCE = 0.02
"""A causal rule that agrees with top-k no more than by chance and this is a warning."""


@dataclass
class Curves:
    """One value per record."""

    iterations: list[int]
    loss: list[float]
    grad_norm: list[float]
    layers: dict[str, dict[str, list[float]]]
    """By layer and name."""
    validation: dict[str, float]
    """The last, by routing mode."""


@dataclass
class Soaked:
    """One case, as far as it came."""

    name: str
    rule: str
    share: float | None
    """Of tokens that a routed layer is to process; None where nothing holds it."""
    steps: int
    curves: Curves
    seconds: float
    ended: str
    """Why it ended early; empty if it did not."""
    is_exact: bool = True
    """Top-k takes exactly `share`; else something steers towards it."""
    follows: bool = False
    """Its causal rule is a running threshold."""
    is_signed: bool = False
    """Its gate may be any number."""
    is_chance: bool = False
    """Its gate is the probability of being chosen, and multiplies nothing."""
    in_mean: bool = False
    """`share` is that of all routed layers together."""

    @classmethod
    def of(cls, record: dict[str, Any]) -> "Soaked":
        return cls(**record | {"curves": Curves(**record["curves"])})

    def record(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def final_loss(self) -> float:
        return late(self.curves.loss)

    def by_layer(self, name: str) -> dict[str, list[float]]:
        return {layer: found[name] for layer, found in self.curves.layers.items() if name in found}


class Verdict(NamedTuple):
    level: str
    text: str


def late(values: list[float]) -> float:
    """Mean over the last part of a run; NaN for none."""
    return statistics.fmean(values[-max(1, round(len(values) * LAST)) :]) if values else math.nan


def verdicts(soaked: Soaked, half: Soaked | None, length: int) -> list[Verdict]:
    """Of every bound; `half`: the dense model of half the depth, trained alike; `length`: tokens of a sequence."""
    found = [Verdict(FAIL, soaked.ended)] if soaked.ended else []
    curves = soaked.curves
    if soaked.ended == "" and (not curves.iterations or curves.iterations[-1] != soaked.steps):
        found.append(Verdict(FAIL, f"the last record is not of step {soaked.steps}"))
    everything = [
        curves.loss,
        curves.grad_norm,
        *(values for layer in curves.layers.values() for values in layer.values()),
    ]
    if not all(math.isfinite(value) for values in everything for value in values):
        found.append(Verdict(FAIL, "a value is not finite"))
    for bounds in (scalars, shares, gates, causal_rules):
        found += bounds(soaked, length)
    if half is not None and not soaked.rule.startswith("dense"):
        below = soaked.final_loss < half.final_loss
        found.append(
            Verdict(
                OK if below else FAIL,
                f"loss {soaked.final_loss:.3f}, {half.final_loss:.3f} at half the depth",
            )
        )
    return found


def scalars(soaked: Soaked, length: int) -> Iterator[Verdict]:
    for name in SCALARS:
        for layer, values in soaked.by_layer(name).items():
            if (most := max(map(abs, values))) > LARGEST:
                yield Verdict(FAIL, f"layer {layer}: {name} reached {most:.3g}")


def shares(soaked: Soaked, length: int) -> Iterator[Verdict]:
    found = {f"layer {layer}": late(values) for layer, values in soaked.by_layer("routed_fraction").items()}
    if soaked.in_mean and found:
        found = {"all layers": statistics.fmean(found.values())}
    for what, share in found.items():
        wanted = soaked.share
        if wanted is None:
            level = SEEN
        elif not soaked.is_exact:
            level = OK if wanted / FOLLOWS <= share <= wanted * FOLLOWS else FAIL
        else:
            level = OK if abs(share - max(1, int(wanted * length)) / length) < 1e-5 else FAIL
        yield Verdict(
            level, f"{what}: share {share:.3f}" + ("" if wanted is None else f", planned {wanted:g}")
        )


def gates(soaked: Soaked, length: int) -> Iterator[Verdict]:
    others = soaked.by_layer("gate_unrouted")
    for layer, values in soaked.by_layer("gate_routed").items():
        chosen, rest = late(values), late(others[layer])
        what = "chance to be chosen" if soaked.is_chance else "gate"
        text = f"layer {layer}: {what} of chosen tokens {chosen:.3g}, of others {rest:.3g}"
        dead = abs(chosen) < CLOSED and not soaked.is_chance
        if dead or (chosen > OPEN and rest > OPEN and not soaked.is_signed):
            yield Verdict(FAIL, text)
        elif abs(chosen) < CLOSING or abs(chosen - rest) < APART:
            yield Verdict(WARN, text)


def causal_rules(soaked: Soaked, length: int) -> Iterator[Verdict]:
    wanted = soaked.share or 1.0
    for layer, values in soaked.by_layer("causal_fraction").items():
        share = late(values)
        if not wanted / FOLLOWS <= share <= wanted * FOLLOWS:
            yield Verdict(
                FAIL if soaked.follows else WARN,
                f"layer {layer}: {share:.3f} of tokens routed causally, planned {wanted:g}",
            )
    for layer, values in soaked.by_layer("causal_agreement").items():
        chance = wanted * wanted + (1 - wanted) * (1 - wanted)
        if (agreement := late(values)) < chance + BY_CHANCE:
            yield Verdict(WARN, f"layer {layer}: causal agreement {agreement:.1%}, {chance:.1%} by chance")
