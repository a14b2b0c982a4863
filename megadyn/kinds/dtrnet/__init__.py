"""DTRNet (arXiv 2509.00925): each token takes attention or a linear bypass; every token keeps its MLP."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from megadyn.checks import at_least, one_of
from megadyn.costs.memory import Kept, Workload, backward_bytes, dense_kept, inner_kept, router_kept
from megadyn.costs.operations import LayerFlops, flops_of_layer, router_flops
from megadyn.costs.shape import Shape
from megadyn.errors import ConfigError
from megadyn.kinds.kind import DENSE, TRAINED_SO
from megadyn.kinds.laid import Laid
from megadyn.kinds.topk import TopK


@dataclass
class Dtrnet(Laid, TopK):
    kind: str = "dtrnet"
    router_type: str = "token_choice"
    """`token_choice` (each token attends if it prefers to) or `expert_choice` (top-k by `capacity`). With token choice,
    `capacity` is only the share that plans assume."""
    aux_loss_lambda: float = 8e-4
    """Weight of the load-weighted attention loss; with `target_share`, the initial lambda of each layer."""
    aux_loss_warmup: int = 0
    """Steps over which `aux_loss_lambda` rises from 0."""
    target_share: float | None = None
    """Token choice: the share of tokens that should attend, in (0, 1]. Each layer then has its own lambda, which is
    adjusted after each step so that the layer's share follows this target. Without it lambda is fixed, as in the paper,
    and training decides the share."""
    aux_loss_lambda_limit: float = 0.1
    """With `target_share`: lambda stays within plus and minus this value."""
    safe_min_attn_ratio: float = 0.05
    """Token choice, in training: at least this share of each sequence attends; 0 turns this off."""
    jitter: float = 0.0
    """In training: router logits are multiplied by uniform noise in [1 - jitter, 1 + jitter], drawn for each sample and
    step."""
    entropy_bonus: float = 0.0
    """Weight of a reward for the router's entropy."""

    name = "dtrnet"
    benchmark = "dtrnet:0.1"
    title = "DTRNet"
    sentence = (
        "In a routed layer a token either attends to the other attending tokens, or takes a linear bypass of attention; "
        "every token keeps its feed-forward (arXiv 2509.00925)."
    )
    sources = ("arXiv 2509.00925",)
    tags = ("dtrnet",)
    verb = "attended"
    legend = {
        "p0": "p0: probability to attend, mean over tokens",
        "f": "f: share of tokens that attended",
        "lead": "lead: logit difference, mean over tokens",
        "lambda": "lambda: weight of the attention loss",
        "refills": "refills: share of sequences that were raised to the safe minimum",
    }
    layers = {"dtrnet": "DtrLayer"}
    totals = ("loads",)
    fixed = Laid.fixed | {"router_type": TRAINED_SO}
    rules = ("threshold",)
    scores = ("probability", "logit")
    recorded = (*TopK.recorded, "router_type")
    variants = {
        "target": {"target_share": 0.3},
        "expert": {"router_type": "expert_choice", "capacity": 0.4},
        "jitter": {"jitter": 0.1, "entropy_bonus": 0.1},
        "threshold": {
            "router_type": "expert_choice",
            "capacity": 0.4,
            "choose": "threshold",
            "threshold_start": 1,
        },
    }
    default_capacity = 0.1

    def check(self) -> None:
        super().check()
        one_of("model.routing.router_type", self.router_type, ("token_choice", "expert_choice"))
        for name in ("aux_loss_lambda", "aux_loss_lambda_limit", "aux_loss_warmup", "entropy_bonus"):
            at_least(f"model.routing.{name}", getattr(self, name), 0)
        for name in ("safe_min_attn_ratio", "jitter"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"model.routing.{name}", getattr(self, name), "in [0, 1]")
        if self.token_choice and self.by_threshold:
            raise ConfigError(
                "model.routing.choose",
                self.choose,
                "left out with token choice, which uses no threshold",
            )
        if self.target_share is not None:
            self._check_target_share(self.target_share)

    def _check_target_share(self, target: float) -> None:
        if not self.token_choice:
            raise ConfigError(
                "model.routing.target_share",
                target,
                "left out without token choice, where model.routing.capacity sets the share",
            )
        if not max(self.safe_min_attn_ratio, 1e-3) <= target <= 1:
            raise ConfigError(
                "model.routing.target_share",
                target,
                "in [0.001, 1] and at least "
                f"model.routing.safe_min_attn_ratio = {self.safe_min_attn_ratio}, which training guarantees",
            )
        if self.aux_loss_warmup:
            raise ConfigError(
                "model.routing.aux_loss_warmup",
                self.aux_loss_warmup,
                "0 with model.routing.target_share, which adjusts the weight from the first step",
            )
        if self.aux_loss_lambda > self.aux_loss_lambda_limit:
            raise ConfigError(
                "model.routing.aux_loss_lambda",
                self.aux_loss_lambda,
                f"at most model.routing.aux_loss_lambda_limit = {self.aux_loss_lambda_limit}",
            )

    @property
    def share(self) -> float:
        return super().share if self.target_share is None else self.target_share

    @property
    def token_choice(self) -> bool:
        """Whether each token chooses for itself, by the same rule in training and in use."""
        return self.router_type == "token_choice"

    @property
    def varies(self) -> bool:
        return self.token_choice or super().varies

    @property
    def has_capacity(self) -> bool:
        return not self.token_choice

    @property
    def has_topk(self) -> bool:
        return not self.token_choice and super().has_topk

    @property
    def uses_threshold(self) -> bool:
        return not self.token_choice

    @property
    def holds_share(self) -> bool:
        return not self.token_choice or self.target_share is not None

    @property
    def settling_steps(self) -> int:
        return max(super().settling_steps, self.aux_loss_warmup)

    def describe(self) -> str:
        if self.target_share is not None:
            return f"{self.name} at a target share of {self.target_share}"
        if self.token_choice:
            return f"{self.name}, each token's own choice, planned at a share of {self.capacity}"
        return super().describe()

    def explain(self, measured: Mapping[str, float]) -> str:
        if not self.token_choice:
            return super().explain(measured)
        seen = (
            f" At the end of training {measured['routed_fraction']:.1%} attended."
            if "routed_fraction" in measured
            else ""
        )
        return f"{self.sentence}\n\nEach token chooses for itself, in training and in use alike.{seen}"

    def to_export(self, shape: Shape) -> dict[str, Any]:
        return super().to_export(shape) | (
            {"causal": "token_choice"} if self.token_choice else {"score": "logit"}
        )

    @classmethod
    def from_export(cls, routing: Mapping[str, Any], layer_types: list[str]) -> Self:
        given = dict(routing)
        if given.get("causal") == "token_choice":  # token choice is causal itself and needs no causal rule
            del given["causal"]
        return super().from_export(given, layer_types)

    def flops(self, layer: str, shape: Shape, length: int, share: float | None = None) -> LayerFlops:
        if layer == DENSE:
            return flops_of_layer(shape, length)
        return flops_of_layer(
            shape, length, self.taken(length, share), whole=router_flops(shape, length, outputs=2)
        )

    def parameters(self, layer: str, shape: Shape) -> int:
        d = shape.hidden_size
        return 0 if layer == DENSE else (d + 1) * (d // 2) + 2 * (d // 2) + 2

    def kept(self, layer: str, work: Workload) -> Kept:
        """With token choice: at the planned share."""
        if layer == DENSE:
            return dense_kept(work)
        (d, q, k, _), b, n, m = work.widths, work.bytes, work.tokens, work.part
        c = work.chosen(self.share)
        attending = c * (
            b * (d + 2 * q + 2 * k) + work.turned + work.segments * (work.documents or self.varies)
        )
        bypass = m * (work.norm(d, is_kept=True) + work.norm(d) + b * d) + n * (
            b * (2 * d + q) + work.inner + 12
        )
        router = router_kept(work, 2 * (d // 2)) + 24 * n
        return Kept(m * b * d, attending + bypass, inner_kept(work, n, c), router, n * backward_bytes(work))


KIND = Dtrnet
