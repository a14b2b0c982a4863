"""The section `optimizer` of the configuration."""

import math
from dataclasses import asdict, dataclass, field

from megadyn.checks import at_least, in_range, one_of
from megadyn.errors import ConfigError


@dataclass
class MultipliersConfig:
    """Learning-rate multipliers of the parameter groups."""

    base: float = 1.0
    """For all parameters except routers and priors."""
    router: float = 1.0
    """For routers and causal predictors."""
    prior: float = 1.0
    """For DTF's and STT's priors."""

    def check(self) -> None:
        for name in ("base", "router", "prior"):
            at_least(f"optimizer.multipliers.{name}", getattr(self, name), 0)


WARMUP = 100
"""Steps of the warm-up by default."""
IN_TOKENS = {"warmup_iterations": "warmup_tokens", "decay_iterations": "decay_tokens"}
"""Keys for a length in steps, and the same in tokens."""
OPTIMIZERS = ("adamw", "muon")
MUON_PRECISIONS = ("auto", "fp32", "bf16")


@dataclass
class MuonConfig:
    """Muon's own settings. Other optimizers refuse them."""

    momentum: float = 0.95
    """Muon: momentum of the gradients' sum, per step, in Nesterov's form."""
    steps: int = 5
    """Muon: steps of the Newton-Schulz iteration, which makes an update's singular values nearly equal. Fewer are cheaper
    and less exact."""
    precision: str = "auto"
    """Muon: the iteration computes and sends updates in `bf16` or `fp32`. `auto` is bf16 in bf16 runs, otherwise fp32."""
    multiplier: float = 1.0
    """Muon: learning rate of the matrices of the blocks, relative to `learning_rate`. Their updates are scaled to be as large
    as AdamW's, so 1 is a good start."""

    def iterates_in(self, precision: str) -> str:
        """`bf16` or `fp32`, in a run of this precision."""
        if self.precision != "auto":
            return self.precision
        return "bf16" if precision == "bf16" else "fp32"

    def check(self, name: str) -> None:
        """`name`: the optimizer's."""
        if not 0 <= self.momentum < 1:
            raise ConfigError("optimizer.muon.momentum", self.momentum, "in [0, 1)")
        at_least("optimizer.muon.steps", self.steps, 1)
        one_of("optimizer.muon.precision", self.precision, MUON_PRECISIONS)
        if not 0 < self.multiplier < math.inf:
            raise ConfigError("optimizer.muon.multiplier", self.multiplier, "a number above 0")
        for key, default in asdict(MuonConfig()).items():
            if name != "muon" and getattr(self, key) != default:
                raise ConfigError(
                    f"optimizer.muon.{key}",
                    getattr(self, key),
                    f"left out with optimizer.name = {name}, or set optimizer.name=muon",
                )


@dataclass
class OptimizerConfig:
    name: str = "adamw"
    """`adamw` (arXiv 1711.05101), or `muon` (arXiv 2502.16982): the matrices of the blocks by Muon, everything else
    (embedding, head, norms, biases, routers, priors) by AdamW."""
    learning_rate: float = 3e-4
    """Peak learning rate, reached at the end of the warm-up. Use less for larger models, or if the loss spikes."""
    min_learning_rate: float = 3e-5
    """Learning rate at the end of the run, for every schedule except `constant`."""
    schedule: str = "cosine"
    """After the warm-up: `cosine`, `linear`, `constant`, or `wsd` (constant, then a linear decay)."""
    warmup_iterations: int | None = None
    """Steps over which the learning rate rises linearly from 0 (default: 100). Use more if the first steps are unstable."""
    warmup_tokens: int | None = None
    """The same in tokens (2B), instead of `warmup_iterations`; rounded up to whole steps. It stays the same if the batch size
    changes."""
    decay_iterations: int | None = None
    """wsd: steps of the final decay (default: a tenth of the run). A decay that does not fit after the warm-up is
    shortened, with a warning."""
    decay_tokens: int | None = None
    """wsd: the final decay in tokens (20B), instead of `decay_iterations`; rounded up to whole steps."""
    decay_shape: str = "linear"
    """wsd: shape of the final decay: `linear`, `cosine`, or `sqrt` (1 - sqrt(x), arXiv 2405.18392), which falls fastest at
    first."""
    schedule_tokens: int | None = None
    """Length of the schedule in tokens (300B), if it is not that of the run: a run that will be extended follows the longer
    run's rates. After its end the rate stays at the lowest."""
    schedule_begin: int = 0
    """Iteration at which the schedule begins, with its warm-up: for a run that goes on from another one's checkpoint. Before it
    the rate is that of its first step. Phases set it."""
    schedule_end: int | None = None
    """Iteration at which the schedule ends, if that is not the end of the run. After it the rate stays at the lowest."""
    beta1: float = 0.9
    """AdamW: momentum of the gradient's average, per step."""
    beta2: float = 0.95
    """AdamW: momentum of the squared gradient's average, per step. 0.95 forgets outliers faster than the usual
    0.999."""
    eps: float = 1e-8
    """AdamW: added to the denominator. Rarely changed."""
    weight_decay: float = 0.1
    """Decoupled weight decay: each step shrinks weights by this times the learning rate. Applied to
    two-dimensional parameters (including embeddings), not to norms, biases or router scalars."""
    clip_grad: float = 1.0
    """Largest global gradient norm; gradients above it are scaled down. 0 turns clipping off."""
    rates: dict[str, float] = field(default_factory=dict)
    """Learning rates by name: shell patterns of tensor names, and what each multiplies the rate of the matching tensors by, as
    `{"model.embed_tokens.*": 0.1}`. The first pattern that matches counts; those of a file that this
    one extends come first. Names are those of an export."""
    freeze: list[str] = field(default_factory=list)
    """Shell patterns of the names of tensors that do not change, as `["model.layers.*.mlp.*"]`. Their gradients count as 0, also
    in the gradient norm; the optimizer still holds their state."""
    multipliers: MultipliersConfig = field(default_factory=MultipliersConfig)
    """Learning rate of each parameter group, relative to `learning_rate`."""
    muon: MuonConfig = field(default_factory=MuonConfig)
    """Settings of `optimizer.name: muon`."""

    def check(self) -> None:
        one_of("optimizer.name", self.name, OPTIMIZERS)
        self.muon.check(self.name)
        one_of("optimizer.schedule", self.schedule, ("cosine", "linear", "constant", "wsd"))
        one_of("optimizer.decay_shape", self.decay_shape, ("linear", "cosine", "sqrt"))
        at_least("optimizer.schedule_begin", self.schedule_begin, 0)
        self.check_tokens()
        for name in ("schedule_tokens", "warmup_tokens", "decay_tokens"):
            if (value := getattr(self, name)) is not None and self.is_in_iterations:
                raise ConfigError(
                    f"optimizer.{name}",
                    value,
                    "null with optimizer.schedule_begin or schedule_end, which count iterations",
                )
        for name in (
            "learning_rate",
            "min_learning_rate",
            "warmup_iterations",
            "decay_iterations",
            "weight_decay",
            "clip_grad",
        ):
            at_least(f"optimizer.{name}", getattr(self, name), 0)
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"optimizer.{name}", getattr(self, name), "in [0, 1)")
        in_range("optimizer.eps", self.eps, 0, 1)
        for pattern, factor in self.rates.items():
            if not 0 < factor < math.inf:
                raise ConfigError(
                    f"optimizer.rates[{pattern!r}]",
                    factor,
                    "a number above 0; optimizer.freeze stops changes",
                )
        if self.min_learning_rate > self.learning_rate:
            raise ConfigError(
                "optimizer.min_learning_rate",
                self.min_learning_rate,
                f"at most optimizer.learning_rate = {self.learning_rate}",
            )

    def check_tokens(self) -> None:
        """Fills in the default warm-up. Raises ConfigError for a length that is given twice, in steps and in tokens."""
        for name in ("schedule_tokens", "warmup_tokens", "decay_tokens"):
            at_least(f"optimizer.{name}", getattr(self, name), 1)
        for name, tokens in IN_TOKENS.items():
            steps, amount = getattr(self, name), getattr(self, tokens)
            if steps is not None and amount is not None:
                raise ConfigError(
                    f"optimizer.{tokens}",
                    amount,
                    f"null with optimizer.{name} = {steps}, or set that to null",
                )
        if self.warmup_iterations is None and self.warmup_tokens is None:
            self.warmup_iterations = WARMUP

    @property
    def is_in_tokens(self) -> bool:
        """Whether a part of the schedule is given in tokens, so that it follows what was consumed in a run of any length."""
        return not (self.schedule_tokens is self.warmup_tokens is self.decay_tokens is None)

    def warmup_steps(self, tokens_per_step: int) -> int:
        """Length of the warm-up in steps of this size."""
        if self.warmup_tokens is not None:
            return -(-self.warmup_tokens // tokens_per_step)
        return WARMUP if self.warmup_iterations is None else self.warmup_iterations

    def decay_steps(self, tokens_per_step: int, end: float) -> int:
        """Length of wsd's decay in steps of this size, in a schedule of `end` steps."""
        if self.decay_tokens is not None:
            return -(-self.decay_tokens // tokens_per_step)
        return math.ceil(end / 10) if self.decay_iterations is None else self.decay_iterations

    @property
    def is_in_iterations(self) -> bool:
        """Whether begin or end of the schedule are given, so that it follows iterations in a run of any length."""
        return self.schedule_begin > 0 or self.schedule_end is not None

    def span(self, iterations: int) -> int:
        """Length in steps of the schedule of a run of `iterations`."""
        return (iterations if self.schedule_end is None else self.schedule_end) - self.schedule_begin

    def check_span(self, iterations: int | None) -> None:
        """Raises ConfigError if the schedule has no step; a length that is not known yet is not checked."""
        end = iterations if self.schedule_end is None else self.schedule_end
        if self.is_in_iterations and end is not None and end <= self.schedule_begin:
            raise ConfigError(
                "optimizer.schedule_begin",
                self.schedule_begin,
                f"before the schedule's end at iteration {end}",
            )
