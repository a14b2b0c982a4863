"""The section `training` of the configuration."""

import math
from dataclasses import dataclass, field
from os.path import realpath
from typing import NamedTuple

from megadyn.checks import at_least, one_of
from megadyn.config.anneal import AnnealConfig
from megadyn.config.tasks import TasksConfig
from megadyn.errors import ConfigError
from megadyn.paths import expanded

LENGTHS = ("iterations", "tokens", "samples", "epochs", "flops")
"""Keys for the length of a run; exactly one of them is given."""


class Length(NamedTuple):
    """The length of a run that was not given in iterations."""

    unit: str
    """`tokens`, `samples`, `epochs` or `flops`."""
    amount: float
    iterations: int | None
    """The equivalent number of iterations, once it is known."""


RECOMPUTE = ("none", "selective", "full")
KERNELS = ("auto", "triton", "torch")


@dataclass
class TrainingConfig:
    iterations: int | None = None
    """Length of the run in steps, including those before it was resumed."""
    tokens: int | None = None
    """Length of the run in tokens (3000000000, 3e9, 3B), instead of `iterations`; rounded up to whole steps. Like
    `samples` and `epochs`, it stays the same if a resumed run uses another `global_batch_size`."""
    samples: int | None = None
    """Length of the run in samples, instead of `iterations`; rounded up to whole steps."""
    epochs: float | None = None
    """Length of the run in passes over the training data (for a blend: until its first dataset runs out); rounded down
    to whole steps."""
    flops: float | None = None
    """Length of the run in floating-point operations of forward and backward passes (1e18), rounded down to whole steps.
    Counted as the plan does, with routed layers at their planned share of tokens: for comparing models at equal cost."""
    seconds: float | None = None
    """Beside the length: end the run sooner, once its steps have taken so many seconds by rank 0's clock, with a checkpoint and
    the evaluations of a complete run. Evaluations, checkpoints and starts do not count; steps before a resume do. It needs
    `optimizer.schedule: constant` or `schedule_tokens`, because the number of steps is not known before."""
    global_batch_size: int = 32
    """Samples per step, over all data-parallel ranks and micro-batches. It affects the result; to save memory change
    `micro_batch_size` instead."""
    micro_batch_size: int = 1
    """Samples that one rank processes at once. Larger is faster until memory is full; results change only by
    rounding."""
    sequence_length: int = 1024
    """Tokens per sample. Memory grows linearly with it, attention's time quadratically."""
    seed: int = 1234
    """Seed of the initial weights, the order of samples and all random choices. Change it to measure the spread between
    runs."""
    eval_interval: int = 0
    """Steps between evaluations; 0 evaluates only at the end."""
    eval_samples: int = 64
    """Validation samples per evaluation; fewer if the set is smaller. More give a less noisy loss but take longer."""
    recompute: str = "none"
    """What to recompute in the backward pass instead of keeping it in memory: `none`; `selective`, the inner
    activations of attention (rotation, scores, average) and of the MLP (SwiGLU's product), which costs attention once
    more but no projections (arXiv 2205.05198, section 5); or `full`, everything in a layer except its input."""
    compile: bool = False
    """Compile each layer's forward and backward pass with torch.compile, under every layout but ZeRO-3. The first step takes a
    minute, and the second one too where documents or routing choices vary in number."""
    kernels: str = "auto"
    """Kernels for norms, SwiGLU, rotary positions and the loss, and for taking tokens out and putting them back: `triton`, our
    fused GPU kernels; `torch`, its own operations; or `auto`, Triton if it can run."""
    routing_record: str | None = None
    """Folder for a recording of every step's routing choices, with scores and cuts: one file per layer and step
    (`megadyn/routing/recording.py`), the same under every layout. A resumed run continues the recording. In a replay it
    records what the layers would have chosen themselves."""
    routing_replay: str | None = None
    """Folder of recorded choices that replace the routed layers' own, in training only and under any layout. Scores,
    gates, losses and statistics are computed as usual. For comparing layouts, and for studies."""
    z_loss_weight: float = 0.0
    """Weight of the z-loss: the mean square of each token's log of the sum of exponentiated logits (PaLM, arXiv 2204.02311).
    It keeps logits from drifting, which half precision needs in long runs; 1e-4 is usual. Only gradients contain it, not the
    losses that are reported."""
    gc_interval: int = 0
    """Steps between Python's garbage collections, which then take place at the same steps on all ranks. 0 leaves them to Python:
    each rank collects at other steps, and all others wait for it, which shows with many ranks. Try 100."""
    deterministic: bool = False
    """Take only algorithms that give the same bits each time, and fail where there are none: two runs with the same layout,
    machines and versions are then equal bit for bit. Slower on GPUs; for finding faults."""
    on_bad_step: str = "stop"
    """What to do after a step whose loss or gradient norm is NaN or infinite, or whose loss or norm is a spike; the step
    never reaches the weights. `stop`; `skip` its samples; or `rollback`: weights and iteration return to the last checkpoint,
    and the run continues with the samples after the bad step."""
    spike_factor: float = 0.0
    """A loss above this multiple of the running median is a spike and handled by `on_bad_step`; 0 turns the rule off. 2
    means twice the median."""
    spike_window: int = 64
    """Number of good steps for the running median; until there are that many, no loss and no norm is a spike."""
    norm_spike_factor: float = 0.0
    """A gradient norm above this multiple of its exponential moving average (over about `spike_window` good steps) is a spike and
    handled by `on_bad_step`, before it reaches the weights; 0 turns the rule off. Costs one small all-reduce per step."""
    max_bad_steps: int = 10
    """Stop the run after more consecutive bad steps than this. After a rollback, only a good step beyond the bad one
    resets the count."""
    max_bad_steps_total: int = 100
    """Stop the run after more bad steps than this in total, including those before it was resumed."""
    timeout_s: float = 600.0
    """Seconds without progress (a step, an evaluation, loading or saving a checkpoint) after which the whole job ends,
    naming the rank that is stuck or gone."""
    grace_s: float = 600.0
    """Seconds that a run has to save and end after SIGTERM, SIGINT or SIGUSR1, before it is killed."""
    anneal: AnnealConfig = field(default_factory=AnnealConfig)
    """A routing capacity that changes in the first steps of a run or phase."""
    tasks: TasksConfig = field(default_factory=TasksConfig)
    """Tasks of lm_eval, on which checkpoints are evaluated while training goes on."""

    @property
    def collective_timeout_s(self) -> float:
        """Timeout of collectives; longer than the watchdog's, because the watchdog can name the cause."""
        return self.timeout_s + 30.0

    def __post_init__(self) -> None:
        self.length: Length | None = None  # not a key of the configuration, so not a field

    def check(self) -> None:
        for name in ("routing_record", "routing_replay"):
            if (path := getattr(self, name)) is not None:
                setattr(self, name, expanded(path, f"training.{name}"))
        if (
            self.routing_record
            and self.routing_replay
            and realpath(self.routing_record) == realpath(self.routing_replay)
        ):
            raise ConfigError(
                "training.routing_record", self.routing_record, "another folder than training.routing_replay"
            )
        self._check_bad_steps()
        at_least("training.z_loss_weight", self.z_loss_weight, 0)
        at_least("training.timeout_s", self.timeout_s, 1)
        at_least("training.grace_s", self.grace_s, 1)
        for name in (
            "iterations",
            "tokens",
            "samples",
            "global_batch_size",
            "micro_batch_size",
            "sequence_length",
            "eval_samples",
        ):
            at_least(f"training.{name}", getattr(self, name), 1)
        one_of("training.recompute", self.recompute, RECOMPUTE)
        one_of("training.kernels", self.kernels, KERNELS)
        at_least("training.eval_interval", self.eval_interval, 0)
        at_least("training.gc_interval", self.gc_interval, 0)
        at_least("training.seed", self.seed, 0)
        for name in ("epochs", "flops", "seconds"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"training.{name}", value, "a finite number above 0")
        given = [f"training.{name}" for name in LENGTHS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ConfigError(
                "training.iterations",
                self.iterations,
                "given, or else training.tokens, training.samples, "
                f"training.epochs or training.flops, one of the five{' and not ' + ' with '.join(given) if given else ''}",
            )
        unit = given[0].removeprefix("training.")
        if unit != "iterations":
            self.length = Length(unit, getattr(self, unit), None)
        elif self.length and self.length.iterations != self.iterations:  # `iterations` was set afterwards
            self.length = None
        # The iterations of epochs and operations are known only after data and tokenizer are opened.
        if unit in ("tokens", "samples"):
            self.settle()

    def _check_bad_steps(self) -> None:
        one_of("training.on_bad_step", self.on_bad_step, ("stop", "skip", "rollback"))
        for name in ("spike_factor", "norm_spike_factor"):
            factor = getattr(self, name)
            at_least(f"training.{name}", factor, 0)
            if 0 < factor <= 1:
                raise ConfigError(f"training.{name}", factor, "above 1, or 0 for no rule")
        at_least("training.spike_window", self.spike_window, 1)
        at_least("training.max_bad_steps", self.max_bad_steps, 0)
        at_least("training.max_bad_steps_total", self.max_bad_steps_total, 0)

    def settle(
        self,
        iteration: int = 0,
        consumed_samples: int = 0,
        *,
        epoch_samples: int = 0,
        sample_flops: float = math.inf,
    ) -> None:
        """Sets `iterations` to the number of the run's last step, if the length was given in another unit.

        The remaining length is measured in batches of the current size, so earlier batch sizes do not matter.

        Args:
            iteration, consumed_samples: position of the run; after rollbacks these are not proportional.
            epoch_samples: samples in one epoch of the training data. sample_flops: operations for one sample.

        Raises:
            ConfigError: the epochs or operations do not contain a single step.
        """
        if self.length is None:
            return
        unit, amount, _ = self.length
        length = self.sequence_length
        wanted = {
            "samples": amount,
            "tokens": -(-amount // length),
            "epochs": int(amount * epoch_samples),
            "flops": int(amount // sample_flops),
        }[unit]
        left = max(0, int(wanted) - consumed_samples)
        rounds_up = unit in ("samples", "tokens")
        steps = -(-left // self.global_batch_size) if rounds_up else left // self.global_batch_size
        self.iterations = iteration + steps
        if self.iterations == 0:
            has = f"an epoch has {epoch_samples} samples"
            if unit == "flops":
                has = f"a sample takes {sample_flops:.3g}"
            raise ConfigError(
                f"training.{unit}",
                amount,
                f"more: {has}, and a step takes training.global_batch_size = {self.global_batch_size}",
            )
        self.length = self.length._replace(iterations=self.iterations)
        self.tokens = self.samples = self.epochs = self.flops = None  # the original unit is what is saved

    @property
    def tokens_per_step(self) -> int:
        return self.global_batch_size * self.sequence_length

    def samples_at_end(self, iteration: int = 0, consumed_samples: int = 0) -> int:
        """Total samples consumed at the end of a run that is at `iteration` and has consumed `consumed_samples`."""
        return consumed_samples + max(0, (self.iterations or 0) - iteration) * self.global_batch_size
