"""The `model` section of the configuration, with `model.routing`: which layers, and which of them skip tokens."""

import math
import re
from dataclasses import dataclass, field

from megadyn.config.checks import at_least, in_range, one_of
from megadyn.errors import ConfigError

CAPACITY = {"dense": 1.0, "dtf": 0.5, "mod": 0.125, "dtrnet": 0.1}
"""Default capacity of each kind of routing; the keys are the kinds there are."""
CAUSAL_RULES = {"dense": ("threshold",), "dtf": ("threshold", "predictor"), "mod": ("threshold", "predictor", "bce"),
                "dtrnet": ("threshold",)}
"""By kind, the rules that can stand in for top-k; the first is the default. DTRNet's token choice needs none."""


@dataclass
class RoutingConfig:
    kind: str = "dense"
    """`dense`, `dtf` (Decision / Dynamic pairs of layers), `mod` (Mixture-of-Depths), `dtrnet` (attention or bypass)."""
    capacity: float | None = None
    """Share of each sequence's tokens that a routed layer processes under top-k, in (0, 1]; by kind: see CAPACITY."""
    layout: str | None = None
    """Which layers are routed: `bilayer` (every second; the default), `zero_attn` (all), `four_attn` (all but 1, 2, L/2,
    L/2 + 1), or a pattern of T (dense) and D (routed) such as `TDTD` or `T2D14`. DTF's pairs are fixed."""
    causal: str = "threshold"
    """The rule that stands in for top-k where the future is unknown: `threshold`, `predictor`, or MoD's `bce`."""
    threshold_momentum: float = 0.99
    """Momentum, per training step, of the running average that becomes the threshold."""
    predictor_loss_weight: float = 0.01
    """Weight of the predictor's binary cross-entropy against the top-k choice; it reaches the predictor alone."""
    ma_window: int = 100
    """DTF: tokens in the moving average of the static surprise."""
    prior_factor: float = 0.0625
    """DTF: inner width of the prior's feed-forward, as a share of the hidden size."""
    prior_loss_weight: float = 0.05
    beta_ce_init: float = -0.3
    beta_cu_init: float = -0.6
    ce_log_offset_init: float = math.log(1.025)
    """DTF: initial lambda_ce, the logarithm of the offset of S_CE. `ce_offset_init`, the offset itself, is the older spelling;
    it is read still, and converted."""
    cu_multiplier_init: float = 1.1
    gate: str = "sigmoid"
    """MoD: what a token's update is multiplied by: `sigmoid` of its logit, or the logit itself (`identity`)."""
    bce_loss_weight: float = 0.01
    """MoD: binary cross-entropy of the logit against the top-k choice."""
    z_loss_weight: float = 1e-4
    """MoD: mean squared logit."""
    router_type: str = "token_choice"
    """DTRNet: `token_choice` (each token attends iff it prefers to) or `expert_choice` (top-k by `capacity`)."""
    aux_loss_lambda: float = 8e-4
    """DTRNet: weight of the load-weighted attention loss; with `target_share`, where each layer's lambda starts."""
    aux_loss_warmup: int = 0
    """DTRNet: steps over which that weight rises from 0."""
    target_share: float | None = None
    """DTRNet token choice: share of tokens that is to attend, in (0, 1]. Each layer then has a lambda of its own, which moves
    from step to step so that the layer's share follows this target. Left out, lambda is fixed, as in the paper, and the share
    goes where training takes it."""
    aux_loss_lambda_limit: float = 0.1
    """With `target_share`: lambda stays between minus and plus this."""
    safe_min_attn_ratio: float = 0.05
    """DTRNet token choice, in training: at least this share of a sequence attends; 0 turns it off."""
    jitter: float = 0.0
    """DTRNet, in training: router logits are multiplied by uniform noise in [1 - jitter, 1 + jitter], drawn anew for
    each sample and step."""
    entropy_bonus: float = 0.0
    """DTRNet: weight of the router's entropy, which training then raises."""

    def check(self) -> None:
        one_of("model.routing.kind", self.kind, tuple(CAPACITY))
        if self.capacity is None:
            self.capacity = CAPACITY[self.kind]
        in_range("model.routing.capacity", self.capacity, 0, 1)
        one_of(f"model.routing.causal with model.routing.kind = {self.kind}", self.causal, CAUSAL_RULES[self.kind])
        one_of("model.routing.gate", self.gate, ("sigmoid", "identity"))
        one_of("model.routing.router_type", self.router_type, ("token_choice", "expert_choice"))
        if self.layout is not None and self.kind not in ("mod", "dtrnet"):
            raise ConfigError("model.routing.layout", self.layout, f"left out with model.routing.kind = {self.kind}")
        if not 0 <= self.threshold_momentum < 1:
            raise ConfigError("model.routing.threshold_momentum", self.threshold_momentum, "in [0, 1)")
        at_least("model.routing.ma_window", self.ma_window, 1)
        in_range("model.routing.prior_factor", self.prior_factor, 0, 4)
        for name in ("prior_loss_weight", "predictor_loss_weight", "bce_loss_weight", "z_loss_weight", "aux_loss_lambda",
                     "aux_loss_lambda_limit", "aux_loss_warmup", "entropy_bonus"):
            at_least(f"model.routing.{name}", getattr(self, name), 0)
        for name in ("beta_ce_init", "beta_cu_init", "ce_log_offset_init", "cu_multiplier_init"):
            if not math.isfinite(getattr(self, name)):
                raise ConfigError(f"model.routing.{name}", getattr(self, name), "a finite number")
        for name in ("safe_min_attn_ratio", "jitter"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"model.routing.{name}", getattr(self, name), "in [0, 1]")
        if self.target_share is not None:
            self._check_target_share(self.target_share)

    def _check_target_share(self, target: float) -> None:
        if not self.is_token_choice:
            raise ConfigError("model.routing.target_share", target, "left out without DTRNet's token choice: elsewhere "
                              "model.routing.capacity sets the share")
        if not max(self.safe_min_attn_ratio, 1e-3) <= target <= 1:
            raise ConfigError("model.routing.target_share", target, "in [0.001, 1] and at least "
                              f"model.routing.safe_min_attn_ratio = {self.safe_min_attn_ratio}, which training holds")
        if self.aux_loss_warmup:
            raise ConfigError("model.routing.aux_loss_warmup", self.aux_loss_warmup,
                              "0 with model.routing.target_share, which moves the weight from the first step")
        if self.aux_loss_lambda > self.aux_loss_lambda_limit:
            raise ConfigError("model.routing.aux_loss_lambda", self.aux_loss_lambda,
                              f"at most model.routing.aux_loss_lambda_limit = {self.aux_loss_lambda_limit}")

    @property
    def summary(self) -> str:
        """The kind, and what sets its share of tokens, in a few words."""
        if self.kind == "dense":
            return self.kind
        if self.target_share is not None:
            return f"{self.kind} at a target share of {self.target_share}"
        if self.is_token_choice:
            return f"{self.kind}, each token's own choice, planned at a share of {self.capacity}"
        return f"{self.kind} at capacity {self.capacity}"

    @property
    def planned_share(self) -> float:
        """Share of tokens that a routed layer is expected to process: the target where there is one, else the capacity."""
        if self.target_share is not None:
            return self.target_share
        return 1.0 if self.capacity is None else self.capacity

    @property
    def uses_threshold(self) -> bool:
        """Whether top-k routing here needs a running threshold for its causal form."""
        return self.kind != "dense" and self.causal == "threshold" and not self.is_token_choice

    @property
    def is_token_choice(self) -> bool:
        return self.kind == "dtrnet" and self.router_type == "token_choice"


def capacity_count(capacity: float, length: int) -> int:
    """k = max(1, floor(capacity * T)): how many of a sequence's `length` tokens top-k chooses."""
    return max(1, int(capacity * length))


def expand_layout(layout: str, num_layers: int) -> str:
    """A layout as one letter a layer: T dense, D routed. ConfigError unless it describes `num_layers` layers."""
    half = num_layers // 2
    named = {"bilayer": ("TD" * num_layers)[:num_layers], "zero_attn": "D" * num_layers,
             "four_attn": "".join("T" if i in (0, 1, half - 1, half) else "D" for i in range(num_layers))}
    if layout in named:
        return named[layout]
    runs = [(letter, int(count or 1)) for letter, count in re.findall(r"([TD])(\d{0,6})", layout)]
    pattern = "".join(letter * min(count, num_layers + 1) for letter, count in runs)
    if not re.fullmatch(r"([TD]\d{0,6})+", layout) or len(pattern) != num_layers:
        raise ConfigError("model.routing.layout", layout, f"{', '.join(named)}, or letters T and D with counts, such as T2D14, "
                          f"for model.num_layers = {num_layers} layers")
    return pattern


@dataclass
class ModelConfig:
    """A Qwen2/Llama-style transformer; `routing` says which of its layers skip tokens."""

    hidden_size: int = 512
    num_layers: int = 8
    num_heads: int = 8
    num_kv_heads: int | None = None
    """Key/value heads (grouped-query attention); all heads when left out."""
    head_dim: int | None = None
    ffn_size: int | None = None
    """Inner width of the SwiGLU; 8/3 of the hidden size, rounded up to 64, when left out."""
    vocab_size: int | None = None
    """The tokenizer's when left out. Larger is allowed; the excess ids never occur in the data."""
    max_position: int | None = None
    """Longest sequence the model is meant for; `training.sequence_length` when left out."""
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6
    qkv_bias: bool = False
    tie_embeddings: bool = False
    init_std: float = 0.02
    normalization: str = "pre"
    """`pre`; `lns` (pre-norms scaled by 1/sqrt(layer), arXiv 2502.05795); `hybridnorm` (norms on q, k, v and after attention,
    arXiv 2503.04598)."""
    attention: str = "auto"
    """Attention backend: `auto`, `flash` (the flash-attn package), `varlen` (torch's own, with its kernels for segments of
    different lengths) or `sdpa`, which runs anywhere."""
    routing: RoutingConfig = field(default_factory=RoutingConfig)

    def check(self) -> None:
        for name in ("hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "ffn_size",
                     "vocab_size", "max_position"):
            at_least(f"model.{name}", getattr(self, name), 1)
        if self.num_kv_heads is None:
            self.num_kv_heads = self.num_heads
        if self.num_heads % self.num_kv_heads:
            raise ConfigError("model.num_kv_heads", self.num_kv_heads, f"a divisor of model.num_heads = {self.num_heads}")
        if self.head_dim is None:
            if self.hidden_size % self.num_heads:
                raise ConfigError("model.hidden_size", self.hidden_size,
                                  f"a multiple of model.num_heads = {self.num_heads} (or give model.head_dim)")
            self.head_dim = self.hidden_size // self.num_heads
        if self.head_dim % 2:
            raise ConfigError("model.head_dim", self.head_dim, "even, because rotary positions turn pairs")
        if self.ffn_size is None:
            self.ffn_size = math.ceil(self.hidden_size * 8 / 3 / 64) * 64
        one_of("model.normalization", self.normalization, ("pre", "lns", "hybridnorm"))
        one_of("model.attention", self.attention, ("auto", "flash", "varlen", "sdpa"))
        in_range("model.norm_eps", self.norm_eps, 0, 1)
        in_range("model.rope_theta", self.rope_theta, 1, math.inf)
        at_least("model.init_std", self.init_std, 0)
        if self.routing.kind == "dtf" and self.num_layers < 2:
            raise ConfigError("model.num_layers", self.num_layers, "at least 2 with model.routing.kind = dtf (pairs of layers)")
        if self.routing.kind != "dense" and set(self.layer_types) == {"dense"}:
            raise ConfigError("model.routing.layout", self.routing.layout, f"one with a routed layer (D) among {self.num_layers}")

    @property
    def layer_types(self) -> list[str]:
        """What each layer is, first to last. DTF: odd layers decide, even ones skip; a last odd one is dense."""
        if self.routing.kind == "dtf":
            pairs = ["dtf_decision", "dtf_dynamic"] * (self.num_layers // 2)
            return pairs + ["dense"] * (self.num_layers % 2)
        if self.routing.kind == "dense":
            return ["dense"] * self.num_layers
        layout = expand_layout("bilayer" if self.routing.layout is None else self.routing.layout, self.num_layers)
        return ["dense" if letter == "T" else self.routing.kind for letter in layout]

    @property
    def prior_size(self) -> int:
        """Inner width of a DTF prior: max(2, ceil(d f) made even) (DTF thesis, section 3)."""
        width = math.ceil(self.hidden_size * self.routing.prior_factor)
        return max(2, width + width % 2)
