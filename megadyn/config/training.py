"""The sections `optimizer`, `training` and `checkpoint` of the configuration."""

import math
from dataclasses import dataclass, field
from os.path import realpath
from typing import NamedTuple

from megadyn.checks import at_least, in_range, one_of
from megadyn.errors import ConfigError
from megadyn.paths import expanded


@dataclass
class MultipliersConfig:
    """Learning-rate multipliers of the parameter groups."""

    base: float = 1.0
    """Of all parameters that are neither a router's nor a prior's."""
    router: float = 1.0
    """Of routers and causal predictors."""
    prior: float = 1.0
    """Of DTF's and STT's priors."""

    def check(self) -> None:
        for name in ("base", "router", "prior"):
            at_least(f"optimizer.multipliers.{name}", getattr(self, name), 0)


@dataclass
class OptimizerConfig:
    learning_rate: float = 3e-4
    """Largest learning rate of AdamW, reached at the end of the warm-up. Smaller for larger models, and when losses spike."""
    min_learning_rate: float = 3e-5
    """Learning rate at the end of the run, for every schedule but `constant`."""
    schedule: str = "cosine"
    """After the warm-up: `cosine`, `linear`, `constant`, or `wsd` (constant, then a linear decay)."""
    warmup_iterations: int = 100
    """Steps over which the learning rate rises linearly from 0. Longer if the first steps are unstable."""
    decay_iterations: int | None = None
    """wsd: steps of the closing decay; a tenth of the run when left out. A decay that does not fit behind the warm-up is
    shortened, with a warning."""
    beta1: float = 0.9
    """AdamW: momentum of the gradient's average, per step."""
    beta2: float = 0.95
    """AdamW: momentum of the squared gradient's average, per step. 0.95 forgets outliers sooner than the usual 0.999."""
    eps: float = 1e-8
    """AdamW: added to the denominator. Rarely changed."""
    weight_decay: float = 0.1
    """AdamW's decoupled weight decay; a step shrinks each weight by this times the learning rate. Applied to parameters of two
    dimensions (embeddings too), not to norms, biases or router scalars."""
    clip_grad: float = 1.0
    """Largest global gradient norm; gradients above it are scaled down. 0 turns clipping off."""
    multipliers: MultipliersConfig = field(default_factory=MultipliersConfig)
    """Learning rate of each parameter group, relative to `learning_rate`."""

    def check(self) -> None:
        one_of("optimizer.schedule", self.schedule, ("cosine", "linear", "constant", "wsd"))
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
        if self.min_learning_rate > self.learning_rate:
            raise ConfigError(
                "optimizer.min_learning_rate",
                self.min_learning_rate,
                f"at most optimizer.learning_rate = {self.learning_rate}",
            )


LENGTHS = ("iterations", "tokens", "samples", "epochs")
"""Keys that give the length of a run; one of them is given."""


class Length(NamedTuple):
    """The length of a run as it was given, where that is not in iterations."""

    unit: str
    """`tokens`, `samples` or `epochs`."""
    amount: float
    iterations: int | None
    """What it comes to, as far as is known."""


RECOMPUTE = ("none", "selective", "full")
KERNELS = ("auto", "triton", "torch")


@dataclass
class TrainingConfig:
    iterations: int | None = None
    """Length of the run in steps, those of earlier starts included."""
    tokens: int | None = None
    """Length of the run in tokens (3000000000, 3e9, 3B), instead of `iterations`; rounded up to whole steps. Like `samples`
    and `epochs` it counts what was consumed: it stays the same when a resumed run has another `global_batch_size`."""
    samples: int | None = None
    """The same in samples; rounded up to whole steps."""
    epochs: float | None = None
    """The same in passes over the training data (a blend's: until its first dataset runs out); rounded down to whole steps."""
    global_batch_size: int = 32
    """Samples in a step, over all data-parallel ranks and micro-batches. It changes the result; for memory see
    `micro_batch_size`."""
    micro_batch_size: int = 1
    """Samples that one rank runs at once. Larger is faster until memory is full; results change by rounding alone."""
    sequence_length: int = 1024
    """Tokens in a sample. Memory grows linearly with it, attention's time quadratically."""
    seed: int = 1234
    """Of the starting weights, the order of samples and all random choices. Change it to measure the spread between runs."""
    eval_interval: int = 0
    """Steps between evaluations; 0 evaluates only at the end."""
    eval_samples: int = 64
    """Validation samples in an evaluation; fewer if the set is smaller. More give a steadier loss and take longer."""
    recompute: str = "none"
    """What is computed again in the backward pass instead of being kept: `none`; `selective`, the inner activations of
    attention (rotation, scores, average) and of the MLP (SwiGLU's product), at the cost of one more attention and of no
    projection (arXiv 2205.05198, section 5); or `full`, all of a layer but its input."""
    compile: bool = False
    """Layers' forward and backward passes through torch.compile, whose first step takes a minute; for shapes that stay."""
    kernels: str = "auto"
    """Norms and the taking and putting back of tokens: `triton`, our fused kernels for GPUs; `torch`, its own operations; or
    `auto`, Triton's where they can run."""
    routing_record: str | None = None
    """Folder into which every step's routing choices are written, with scores and cuts: a file per layer and step
    (`megadyn/routing/recording.py`), the same under every layout. A run that goes on continues it. In a replay it takes what the
    layers would have chosen themselves."""
    routing_replay: str | None = None
    """Folder of recorded choices that routed layers take in place of their own, in training alone and under any layout; scores,
    gates, losses and statistics are computed as ever. For comparing layouts, and for studies."""
    on_bad_step: str = "stop"
    """What follows a step whose loss or gradient norm is NaN or infinite, or whose loss is a spike; it never reaches the weights.
    `stop`; `skip` its samples; or `rollback`: weights and iteration return to the last checkpoint, and the run goes on with
    the samples after the bad step."""
    spike_factor: float = 0.0
    """A loss above this multiple of the running median is a spike and handled by `on_bad_step`; 0 turns the rule off. 2
    means twice the median."""
    spike_window: int = 64
    """Good steps whose median counts; before there are so many, no loss is a spike."""
    max_bad_steps: int = 10
    """More bad steps than this in a row stop the run. After a rollback only a good step beyond the bad one ends the row."""
    max_bad_steps_total: int = 100
    """More bad steps than this in the whole run, over all its starts, stop it."""
    timeout_s: float = 600.0
    """Seconds without progress (a step, an evaluation, loading or saving a checkpoint) after which the whole job ends,
    naming the rank that is stuck or gone."""
    grace_s: float = 600.0
    """Seconds within which a run that SIGTERM, SIGINT or SIGUSR1 asked to stop has to save and end, or is ended by force."""

    @property
    def collective_timeout_s(self) -> float:
        """When a collective gives up by itself: so much later than the watchdog, which can tell why."""
        return self.timeout_s + 30.0

    def __post_init__(self) -> None:
        self.length: Length | None = None  # no key of the configuration: no field

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
        one_of("training.on_bad_step", self.on_bad_step, ("stop", "skip", "rollback"))
        at_least("training.spike_factor", self.spike_factor, 0)
        if 0 < self.spike_factor <= 1:
            raise ConfigError("training.spike_factor", self.spike_factor, "above 1, or 0 for no rule")
        at_least("training.spike_window", self.spike_window, 1)
        at_least("training.max_bad_steps", self.max_bad_steps, 0)
        at_least("training.max_bad_steps_total", self.max_bad_steps_total, 0)
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
        at_least("training.seed", self.seed, 0)
        if self.epochs is not None and not 0 < self.epochs < math.inf:
            raise ConfigError("training.epochs", self.epochs, "a finite number above 0")
        given = [f"training.{name}" for name in LENGTHS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ConfigError(
                "training.iterations",
                self.iterations,
                "given, or else training.tokens, training.samples or "
                f"training.epochs, one of the four{' and not ' + ' with '.join(given) if given else ''}",
            )
        unit = given[0].removeprefix("training.")
        if unit != "iterations":
            self.length = Length(unit, getattr(self, unit), None)
        elif self.length and self.length.iterations != self.iterations:  # `iterations` was set since
            self.length = None
        if unit in ("tokens", "samples"):  # the iterations of an epoch are known once the data are open
            self.settle(0)

    def settle(self, epoch_samples: int, iteration: int = 0, consumed_samples: int = 0) -> None:
        """Sets `iterations` to the number of the run's last step, where the length was given in something else.

        What remains of that length is measured in today's batches, so that it does not matter what the batch was before.

        Args:
            epoch_samples: in one epoch of the training data.
            iteration, consumed_samples: where the run stands; after rollbacks these are not in proportion.

        Raises:
            ConfigError: epochs that do not make a single step.
        """
        if self.length is None:
            return
        unit, amount, _ = self.length
        length = self.sequence_length
        wanted = {"samples": amount, "tokens": -(-amount // length), "epochs": int(amount * epoch_samples)}[
            unit
        ]
        left = max(0, int(wanted) - consumed_samples)
        steps = left // self.global_batch_size if unit == "epochs" else -(-left // self.global_batch_size)
        self.iterations = iteration + steps
        if self.iterations == 0:
            raise ConfigError(
                "training.epochs",
                amount,
                f"more: an epoch has {epoch_samples} samples, and a step takes "
                f"training.global_batch_size = {self.global_batch_size}",
            )
        self.length = self.length._replace(iterations=self.iterations)
        self.tokens = self.samples = self.epochs = None  # what is saved has the length as it was given

    @property
    def tokens_per_step(self) -> int:
        return self.global_batch_size * self.sequence_length

    def samples_at_end(self, iteration: int = 0, consumed_samples: int = 0) -> int:
        """Samples consumed when the run ends that stands at `iteration` with `consumed_samples` behind it."""
        return consumed_samples + max(0, (self.iterations or 0) - iteration) * self.global_batch_size


@dataclass
class CheckpointConfig:
    interval: int = 0
    """Steps between checkpoints; 0 saves only at the end (and on SIGTERM). What a fault costs is at most so many steps."""
    keep: int = 2
    """Newest checkpoints to keep; 0 keeps all."""
    keep_every: int = 0
    """Checkpoints of iterations that are multiples of this stay for good, beside the newest; 0 for none."""
    background: bool = False
    """Training waits only for a copy in host memory (12 bytes per parameter, shared by the ranks) and continues while it is
    written. A run that dies meanwhile resumes from the checkpoint before."""
    on_error: str = "stop"
    """What follows a checkpoint that could not be written: `stop`, or `continue` with the earlier ones. The last one of a run
    must be written either way."""
    resume: str = "auto"
    """`auto`: go on from the newest good checkpoint in output_dir, if there is one, or else begin. `never`: begin, and refuse an
    output_dir with checkpoints. A path is another way to write `fork_from: PATH` with `resume: auto`."""
    fork_from: str | None = None
    """Where the run begins: a checkpoint, or a run's folder. Once the run has checkpoints of its own, `resume: auto` goes on from
    these. A checkpoint of the run's own output_dir takes the run back to it, once."""
    allow_other_data: bool = False
    """Resume although the training data, or their order, are not those of the checkpoint."""
    init_from: str | None = None
    """Hugging Face folder whose weights the run starts from: an export of megadyn, or a dense Qwen2, Qwen3, Llama, Mistral or
    SmolLM3 of transformers."""

    def check(self) -> None:
        for name in ("resume", "fork_from", "init_from"):
            if (path := getattr(self, name)) is not None:
                setattr(self, name, expanded(path, f"checkpoint.{name}"))
        if self.resume not in ("auto", "never"):
            if self.fork_from not in (None, self.resume):
                raise ConfigError(
                    "checkpoint.resume",
                    self.resume,
                    f"auto or never with checkpoint.fork_from = {self.fork_from}",
                )
            self.fork_from, self.resume = self.resume, "auto"
        if self.fork_from is not None and self.init_from is not None:
            raise ConfigError(
                "checkpoint.init_from",
                self.init_from,
                "null with checkpoint.fork_from (or a path in "
                "checkpoint.resume): a run begins with the weights of one of the two",
            )
        at_least("checkpoint.interval", self.interval, 0)
        at_least("checkpoint.keep", self.keep, 0)
        at_least("checkpoint.keep_every", self.keep_every, 0)
        one_of("checkpoint.on_error", self.on_error, ("stop", "continue"))
