"""Kinds whose routed layers take the tokens with the best scores in each sequence, and the causal rules that replace top-k."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from megadyn.checks import at_least, in_range, one_of
from megadyn.costs.memory import Workload, router_kept
from megadyn.costs.operations import router_flops
from megadyn.costs.shape import Shape, capacity_count
from megadyn.errors import ConfigError
from megadyn.kinds.kind import Kind


@dataclass
class Capped(Kind):
    """Base of kinds whose routed layers take the k = max(1, floor(capacity T)) tokens with the best scores in each sequence."""

    capacity: float | None = None
    """Share of each sequence's tokens that a routed layer takes by top-k, in (0, 1]."""

    default_capacity: ClassVar[float] = 0.5
    recorded: ClassVar[tuple[str, ...]] = ("capacity",)

    def check(self) -> None:
        if self.capacity is None:
            self.capacity = self.default_capacity
        in_range("model.routing.capacity", self.capacity, 0, 1)

    @property
    def rule(self) -> str:
        """The causal rule that replaces top-k in use, one of `rules`."""
        return self.rules[0]

    @property
    def share(self) -> float:
        assert self.capacity is not None, "checked"
        return self.capacity

    @property
    def has_capacity(self) -> bool:
        return True

    @property
    def has_topk(self) -> bool:
        return True

    @property
    def uses_threshold(self) -> bool:
        return self.rule == "threshold"

    def describe(self) -> str:
        return f"{self.name} at capacity {self.capacity}"

    def explain(self, measured: Mapping[str, float]) -> str:
        agreed = ""
        if "causal_agreement" in measured:
            agreed = f" At the end of training the two agreed on {measured['causal_agreement']:.1%} of the choices."
        return (
            f"{self.sentence}\n\n"
            f"**In training** a routed layer takes exactly the {self.share:.1%} of a sequence's tokens with the highest "
            f'scores (top-k), which looks at the whole sequence. **In use** `config.routing_mode = "causal"`, the default, '
            f"does not look ahead: {RULES[self.rule]} (`{self.rule}`).{agreed}\n\n"
            '`routing_mode = "topk"` scores whole texts as in training. It has no cache, and its choice depends on all '
            "tokens of a row: padding needs an `attention_mask`, and tools that give none (lm_eval) need a batch of one."
        )

    def taken(self, length: int, share: float | None) -> float:
        """Tokens of a sequence that a routed layer takes, at the measured share or, if None, as top-k does."""
        return capacity_count(self.share, length) if share is None else share * length

    def summed_if_skipping(self, work: Workload) -> float:
        """`summed` of a layer whose whole block is skipped by tokens that are not chosen. Under sequence parallelism
        the chosen ones are summed once more, when they are gathered from the parts."""
        return self.share * (1.5 if work.sequence else 1.0)


@dataclass
class TopK(Capped):
    """Base of kinds whose scores are learned, so that their causal rule must be learned too."""

    causal: str | None = None
    """The rule that replaces top-k when the future is unknown: `threshold` (a running average of the lowest score that
    top-k took), `predictor` (a small network trained to predict top-k's choice), or another rule of the kind."""
    threshold_momentum: float = 0.99
    """Momentum per training step of the running average that gives the threshold."""
    predictor_loss_weight: float = 0.01
    """Weight of the predictor's binary cross-entropy against the top-k choice. Its gradient reaches only the predictor."""
    choose: str = "topk"
    """How training chooses: by `topk`, or by `threshold`: every token whose score reaches the threshold, the same rule
    as in use. The threshold is adjusted so that a share `capacity` of all tokens reaches it (arXiv 2603.11535)."""
    threshold_start: int | None = None
    """With `choose: threshold`: number of steps with top-k at the start (default 100)."""
    safe_min: float | None = None
    """With `choose: threshold`, in training: at least this share of each sequence is taken (default: half the capacity)."""
    safe_max: float | None = None
    """With `choose: threshold`, in training: at most this share of each sequence is taken (default: twice the capacity)."""

    rules: ClassVar[tuple[str, ...]] = ("threshold", "predictor")
    recorded: ClassVar[tuple[str, ...]] = (*Capped.recorded, "causal", "threshold_momentum", "choose")

    def check(self) -> None:
        super().check()
        if self.causal is None:
            self.causal = self.rules[0]
        one_of(f"model.routing.causal with model.routing.kind = {self.kind}", self.causal, self.rules)
        if not 0 <= self.threshold_momentum < 1:
            raise ConfigError("model.routing.threshold_momentum", self.threshold_momentum, "in [0, 1)")
        at_least("model.routing.predictor_loss_weight", self.predictor_loss_weight, 0)
        one_of("model.routing.choose", self.choose, ("topk", "threshold"))
        if self.by_threshold:
            self._check_threshold()
            return
        for key in ("threshold_start", "safe_min", "safe_max"):
            if getattr(self, key) is not None:
                raise ConfigError(
                    f"model.routing.{key}",
                    getattr(self, key),
                    "left out unless model.routing.choose is threshold",
                )

    def _check_threshold(self) -> None:
        if self.causal != "threshold":
            raise ConfigError(
                "model.routing.causal", self.causal, "threshold with model.routing.choose = threshold"
            )
        at_least("model.routing.threshold_start", self.threshold_start, 0)
        least, most = self.guards
        if not 0 <= least <= self.share:
            raise ConfigError(
                "model.routing.safe_min", least, f"in [0, model.routing.capacity = {self.share}]"
            )
        if not self.share <= most <= 1:
            raise ConfigError(
                "model.routing.safe_max", most, f"in [model.routing.capacity = {self.share}, 1]"
            )

    @property
    def by_threshold(self) -> bool:
        """Whether training also uses the threshold, after its first steps."""
        return self.choose == "threshold"

    @property
    def start(self) -> int:
        """Number of steps with top-k before the threshold is used."""
        return 100 if self.threshold_start is None else self.threshold_start

    @property
    def guards(self) -> tuple[float, float]:
        """The smallest and the largest share of a sequence that training by threshold takes."""
        least = self.share / 2 if self.safe_min is None else self.safe_min
        return least, min(1.0, 2 * self.share) if self.safe_max is None else self.safe_max

    @property
    def varies(self) -> bool:
        return self.by_threshold

    @property
    def has_topk(self) -> bool:
        return not self.by_threshold

    def describe(self) -> str:
        return f"{super().describe()}{', by threshold' if self.by_threshold else ''}"

    def explain(self, measured: Mapping[str, float]) -> str:
        if not self.by_threshold:
            return super().explain(measured)
        seen = ""
        if "routed_fraction" in measured:
            seen = f" At the end of training {measured['routed_fraction']:.1%} of tokens did."
        return (
            f"{self.sentence}\n\nBoth in use and in training (after {self.start} steps of top-k), a token is processed if "
            f"its score reaches the layer's threshold, which training adjusted so that {self.share:.1%} of all tokens do "
            f"(arXiv 2603.11535).{seen} Only in training, a sequence gave at least {self.guards[0]:.1%} and at most "
            f"{self.guards[1]:.1%} of its tokens. There is one routing mode: `topk` and `causal` are the same."
        )

    @property
    def rule(self) -> str:
        assert self.causal is not None, "checked"
        return self.causal

    @property
    def settling_steps(self) -> int:
        return math.ceil(1 / (1 - self.threshold_momentum))

    def sizes(self, shape: Shape) -> dict[str, Any]:
        return {"model.routing.causal": "a predictor" if self.causal == "predictor" else "no predictor"}

    def predictor_flops(self, shape: Shape, length: int) -> float:
        return router_flops(shape, length) if self.causal == "predictor" else 0.0

    def predictor_parameters(self, shape: Shape) -> int:
        d = shape.hidden_size
        return d * (d // 2) + d // 2 if self.causal == "predictor" else 0

    def predictor_kept(self, work: Workload) -> float:
        """What the predictor keeps; in fp32 also the layer's input, which it reads directly."""
        d = work.model.hidden_size
        return (router_kept(work, 2 * (d // 2)) + work.part * 4 * d * (work.bytes == 4)) * (
            self.causal == "predictor"
        )


RULES = {
    "threshold": "a token is processed if its score reaches a threshold, the running average in training of the lowest score "
    "that top-k took",
    "predictor": "a small network, trained to predict which tokens top-k takes, decides for each token by itself",
    "bce": "a token is processed if its score, trained by cross-entropy against top-k's choice, is above 0",
    "sign": "a token is processed if its score is above 0",
}
"""Causal rules of `routing/choice.py`, described for model cards."""
