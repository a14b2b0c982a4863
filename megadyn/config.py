"""The configuration of a run: typed sections, read from YAML and `key=value`, refused early.

`load_config` runs on one CPU before any process group exists. Every check names the key, what it
holds and what it must be. Relative paths are relative to the working directory.
"""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from megadyn.config_data import DataConfig
from megadyn.errors import ConfigError, UserError, did_you_mean


def one_of(key: str, got: str, allowed: Sequence[str]) -> None:
    if got not in allowed:
        raise ConfigError(key, got, f"one of {', '.join(allowed)}{did_you_mean(got, allowed)}")


def at_least(key: str, got: float | None, least: float) -> None:
    if got is not None and not least <= got < math.inf:
        raise ConfigError(key, got, f"a finite number of at least {least}" if got == math.inf else f"at least {least}")


def in_range(key: str, got: float, low: float, high: float) -> None:
    """Refuses what is outside (low, high]."""
    if not low < got <= high:
        raise ConfigError(key, got, f"in ({low}, {high}]")


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
    ce_offset_init: float = 1.025
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
    """DTRNet: weight of the load-weighted attention loss."""
    aux_loss_warmup: int = 0
    """DTRNet: steps over which that weight rises from 0."""
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
        # ce_offset's logarithm is taken.
        for name in ("prior_loss_weight", "predictor_loss_weight", "bce_loss_weight", "z_loss_weight", "aux_loss_lambda",
                     "aux_loss_warmup", "entropy_bonus", "ce_offset_init"):
            at_least(f"model.routing.{name}", getattr(self, name), 0)
        for name in ("safe_min_attn_ratio", "jitter"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"model.routing.{name}", getattr(self, name), "in [0, 1]")

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


@dataclass
class TokenizerConfig:
    path: str = "???"
    """Folder with tokenizer.json, a SentencePiece `.model` file, or `byte`."""


@dataclass
class ParallelConfig:
    tensor: int = 1
    pipeline: int = 1
    sequence: bool = False
    """Sequence parallelism: tensor ranks share out the sequence wherever they share neither heads nor widths."""

    def check(self) -> None:
        at_least("parallel.tensor", self.tensor, 1)
        at_least("parallel.pipeline", self.pipeline, 1)
        if self.sequence and self.tensor == 1:
            raise ConfigError("parallel.sequence", True, "false while parallel.tensor = 1: tensor ranks share a sequence")


@dataclass
class MultipliersConfig:
    """Learning-rate multipliers of the parameter groups."""

    base: float = 1.0
    router: float = 1.0
    prior: float = 1.0

    def check(self) -> None:
        for name in ("base", "router", "prior"):
            at_least(f"optimizer.multipliers.{name}", getattr(self, name), 0)


@dataclass
class OptimizerConfig:
    learning_rate: float = 3e-4
    min_learning_rate: float = 3e-5
    schedule: str = "cosine"
    """After the warm-up: `cosine`, `linear`, `constant`, or `wsd` (constant, then a linear decay)."""
    warmup_iterations: int = 100
    decay_iterations: int | None = None
    """wsd: length of the closing decay; a tenth of the run when left out."""
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    """Applied to matrices only: not to norms, biases, embeddings-of-one-row or router scalars."""
    clip_grad: float = 1.0
    """Largest global gradient norm; 0 turns clipping off."""
    multipliers: MultipliersConfig = field(default_factory=MultipliersConfig)

    def check(self) -> None:
        one_of("optimizer.schedule", self.schedule, ("cosine", "linear", "constant", "wsd"))
        for name in ("learning_rate", "min_learning_rate", "warmup_iterations", "decay_iterations", "weight_decay",
                     "clip_grad"):
            at_least(f"optimizer.{name}", getattr(self, name), 0)
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"optimizer.{name}", getattr(self, name), "in [0, 1)")
        in_range("optimizer.eps", self.eps, 0, 1)
        if self.min_learning_rate > self.learning_rate:
            raise ConfigError("optimizer.min_learning_rate", self.min_learning_rate,
                              f"at most optimizer.learning_rate = {self.learning_rate}")


LENGTHS = ("iterations", "tokens", "samples", "epochs")
"""Keys that give the length of a run; one of them is given."""


RECOMPUTE = ("none", "selective", "full")


@dataclass
class TrainingConfig:
    iterations: int | None = None
    tokens: int | None = None
    """Length of the run in tokens, instead of `iterations`; rounded up to whole steps."""
    samples: int | None = None
    """The same in samples; rounded up to whole steps."""
    epochs: float | None = None
    """The same in passes over the training data (a blend's: until its first dataset runs out); rounded down to whole steps."""
    global_batch_size: int = 32
    """Samples in a step, over all data-parallel ranks and micro-batches."""
    micro_batch_size: int = 1
    """Samples that one rank runs at once."""
    sequence_length: int = 1024
    seed: int = 1234
    eval_interval: int = 0
    """Steps between evaluations; 0 evaluates only at the end."""
    eval_samples: int = 64
    """Validation samples in an evaluation; fewer if the set is smaller."""
    recompute: str = "none"
    """What is computed again in the backward pass instead of being kept: `none`; `selective`, the inner activations of
    attention (rotation, scores, average) and of the MLP (SwiGLU's product), at the cost of one more attention and of no
    projection (arXiv 2205.05198, section 5); or `full`, all of a layer but its input."""
    compile: bool = False
    """Layers' forward and backward passes through torch.compile, whose first step takes a minute; for shapes that stay."""
    on_bad_step: str = "stop"
    """What follows a step whose loss or gradient norm is no number, or whose loss is a spike; it never reaches the weights.
    `stop`; `skip` its samples; or `rollback`: weights and iteration return to the last checkpoint, and the run goes on with
    the samples after the bad step."""
    spike_factor: float = 0.0
    """A loss above this multiple of the running median is a spike; 0 for no such rule."""
    spike_window: int = 64
    """Good steps whose median counts; before there are so many, no loss is a spike."""
    max_bad_steps: int = 10
    """More bad steps than this since the last checkpoint stop the run."""
    timeout_s: float = 600.0
    """Seconds without progress (a step, an evaluation, loading or saving a checkpoint) after which the whole job ends,
    naming the rank that is stuck or gone."""
    grace_s: float = 600.0
    """Seconds within which a run that SIGTERM, SIGINT or SIGUSR1 asked to stop has to save and end, or is ended by force."""

    def check(self) -> None:
        one_of("training.on_bad_step", self.on_bad_step, ("stop", "skip", "rollback"))
        at_least("training.spike_factor", self.spike_factor, 0)
        if 0 < self.spike_factor <= 1:
            raise ConfigError("training.spike_factor", self.spike_factor, "above 1, or 0 for no rule")
        at_least("training.spike_window", self.spike_window, 1)
        at_least("training.max_bad_steps", self.max_bad_steps, 0)
        at_least("training.timeout_s", self.timeout_s, 1)
        at_least("training.grace_s", self.grace_s, 1)
        for name in ("iterations", "tokens", "samples", "global_batch_size", "micro_batch_size", "sequence_length",
                     "eval_samples"):
            at_least(f"training.{name}", getattr(self, name), 1)
        one_of("training.recompute", self.recompute, RECOMPUTE)
        at_least("training.eval_interval", self.eval_interval, 0)
        at_least("training.seed", self.seed, 0)
        if self.epochs is not None and not 0 < self.epochs < math.inf:
            raise ConfigError("training.epochs", self.epochs, "a finite number above 0")
        given = [f"training.{name}" for name in LENGTHS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ConfigError("training.iterations", self.iterations, "given, or else training.tokens, training.samples or "
                              f"training.epochs, one of the four{' and not ' + ' with '.join(given) if given else ''}")
        if self.tokens is not None:
            self.iterations = -(-self.tokens // self.tokens_per_step)
        if self.samples is not None:
            self.iterations = -(-self.samples // self.global_batch_size)
        self.tokens = self.samples = None       # the resolved config states the length once

    def resolve_epochs(self, samples: int) -> None:
        """Turns `epochs` into `iterations`, once the `samples` of one are known. ConfigError if they make no step."""
        if self.epochs is None:
            return
        self.iterations = int(self.epochs * samples) // self.global_batch_size
        if self.iterations == 0:
            raise ConfigError("training.epochs", self.epochs, f"more: an epoch has {samples} samples, and a step takes "
                              f"training.global_batch_size = {self.global_batch_size}")
        self.epochs = None

    @property
    def tokens_per_step(self) -> int:
        return self.global_batch_size * self.sequence_length

    @property
    def num_samples(self) -> int:
        """Of the whole run; once `epochs` is resolved."""
        return (self.iterations or 0) * self.global_batch_size


@dataclass
class CheckpointConfig:
    interval: int = 0
    """Steps between checkpoints; 0 saves only at the end (and on SIGTERM)."""
    keep: int = 2
    """Newest checkpoints to keep; 0 keeps all."""
    keep_every: int = 0
    """Checkpoints of iterations that are multiples of this stay for good, beside the newest; 0 for none."""
    background: bool = False
    """Training waits only for a copy in host memory (12 bytes a parameter, shared out over the ranks) and goes on while it is
    written. A run that dies meanwhile resumes from the checkpoint before."""
    on_error: str = "stop"
    """What follows a checkpoint that could not be written: `stop`, or `continue` with the earlier ones. The last one of a run
    must be written either way."""
    resume: str = "auto"
    """`auto` (the newest in output_dir, if any), `never`, or the path of a checkpoint."""
    allow_other_data: bool = False
    """Resume although the training data, or their order, are not those of the checkpoint."""
    init_from: str | None = None
    """Hugging Face folder whose weights the run starts from."""

    def check(self) -> None:
        at_least("checkpoint.interval", self.interval, 0)
        at_least("checkpoint.keep", self.keep, 0)
        at_least("checkpoint.keep_every", self.keep_every, 0)
        one_of("checkpoint.on_error", self.on_error, ("stop", "continue"))


@dataclass
class LoggingConfig:
    interval: int = 10
    """Steps between log lines and metrics."""
    tensorboard: bool = True

    def check(self) -> None:
        at_least("logging.interval", self.interval, 1)


@dataclass
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    precision: str = "bf16"
    """`fp32`, or `bf16` / `fp16` with fp32 master weights."""
    deepspeed_config: str = "ds_configs/zero1.json"
    """JSON with DeepSpeed's engine settings; batch sizes, precision and optimizer come from here instead."""
    output_dir: str = "???"

    def checked(self) -> "Config":
        """Itself, with what was left out filled in. Raises ConfigError for what cannot be.

        Not done on construction: OmegaConf builds every section from its defaults first.
        """
        one_of("precision", self.precision, ("fp32", "bf16", "fp16"))
        for section in (self.model.routing, self.model, self.data, self.parallel, self.optimizer.multipliers, self.optimizer,
                        self.training, self.checkpoint, self.logging):
            section.check()
        check_together(self)
        return self


def check_together(config: Config) -> None:
    """Rules that span sections; one function, so that they can be read in a minute."""
    model, parallel, training = config.model, config.parallel, config.training
    if model.num_heads % parallel.tensor:
        raise ConfigError("parallel.tensor", parallel.tensor, f"a divisor of model.num_heads = {model.num_heads}")
    kv_heads = model.num_kv_heads or model.num_heads
    if kv_heads % parallel.tensor and parallel.tensor % kv_heads:
        raise ConfigError("parallel.tensor", parallel.tensor, f"a divisor or a multiple of model.num_kv_heads = {kv_heads}")
    if (model.ffn_size or 0) % parallel.tensor:
        raise ConfigError("parallel.tensor", parallel.tensor, f"a divisor of model.ffn_size = {model.ffn_size}")
    if parallel.pipeline > model.num_layers:
        raise ConfigError("parallel.pipeline", parallel.pipeline, f"at most model.num_layers = {model.num_layers}")
    if parallel.sequence and training.sequence_length % parallel.tensor:
        raise ConfigError("training.sequence_length", training.sequence_length,
                          f"a multiple of parallel.tensor = {parallel.tensor} with parallel.sequence")
    if model.max_position is None:
        model.max_position = training.sequence_length
    if training.sequence_length > model.max_position:
        raise ConfigError("training.sequence_length", training.sequence_length,
                          f"at most model.max_position = {model.max_position}")
    if training.global_batch_size % training.micro_batch_size:
        raise ConfigError("training.global_batch_size", training.global_batch_size,
                          f"a multiple of training.micro_batch_size = {training.micro_batch_size}")
    if training.on_bad_step == "rollback" and not config.checkpoint.interval:
        raise ConfigError("training.on_bad_step", training.on_bad_step,
                          "stop or skip with checkpoint.interval = 0, which leaves nothing to go back to")
    if training.compile:
        check_compilable(config)


def check_compilable(config: Config) -> None:
    """Raises ConfigError for what `training.compile` cannot capture as one graph of fixed shapes."""
    if config.parallel.tensor > 1:
        raise ConfigError("parallel.tensor", config.parallel.tensor, "1 with training.compile: tensor ranks talk inside a layer")
    if config.data.document_mask:
        raise ConfigError("data.document_mask", True, "false with training.compile: documents come in any number")
    if config.model.routing.is_token_choice:
        raise ConfigError("model.routing.router_type", "token_choice", "expert_choice with training.compile: "
                          "by token choice any number of tokens attends")


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The checked configuration from a YAML file and `key=value` overrides.

    Raises:
        UserError: missing or malformed file, unknown key, wrong type, impossible value or combination.
    """
    try:
        from_file = OmegaConf.load(path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except Exception as error:           # the YAML library has no common base for its errors
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    for word in overrides:
        if not re.match(r"[\w-]+(\.[\w-]+)*=", word):
            raise UserError(f"{word!r} on the command line: must be of the form key=value")
    from_words = OmegaConf.from_dotlist(list(overrides))
    for given, source in ((from_file, str(path)), (from_words, "the command line")):
        _check_sections(Config, OmegaConf.to_container(given), "", source)
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Config), from_file, from_words)
        config = OmegaConf.to_object(merged)
    except ConfigKeyError as error:
        raise _unknown_key(str(error.full_key)) from None
    except OmegaConfBaseException as error:
        reason = str(error.msg or error).splitlines()[0]
        raise UserError(f"{error.full_key or path}: {reason}") from None
    assert isinstance(config, Config)
    return config.checked()


def _check_sections(section: Any, given: Any, name: str, source: str) -> None:
    """OmegaConf does not name the key where a section is given as a plain value."""
    if not isinstance(given, dict):
        known = ", ".join(f.name for f in fields(section))
        raise UserError(f"{name or source}: must hold keys ({known}), is {given!r}" + (f" in {source}" if name else ""))
    for f in fields(section):
        if f.name in given and is_dataclass(f.default_factory):
            _check_sections(f.default_factory, given[f.name], f"{name}.{f.name}".lstrip("."), source)


def _unknown_key(full_key: str) -> UserError:
    section: Any = Config
    *path, name = full_key.split(".")
    for part in path:
        section = next(f.default_factory for f in fields(section) if f.name == part)
        assert is_dataclass(section)
    where = f"section {'.'.join(path)!r}" if path else "the configuration"
    return UserError(f"{full_key}: {where} has no such key{did_you_mean(name, [f.name for f in fields(section)])}")


def save_config(config: Config, path: Path) -> None:
    OmegaConf.save(OmegaConf.structured(config), path)


@dataclass(frozen=True)
class BatchPlan:
    """How a step's samples are spread."""

    global_batch: int
    micro_batch: int
    micro_batches: int
    """Micro-batches that each data-parallel rank runs in a step."""
    data_parallel: int


def batch_plan(config: Config, world_size: int) -> BatchPlan:
    """Raises ConfigError when `world_size` processes cannot be laid out as configured."""
    parallel, training = config.parallel, config.training
    model_parallel = parallel.tensor * parallel.pipeline
    if world_size % model_parallel:
        raise ConfigError("number of processes", world_size, "a multiple of parallel.tensor * parallel.pipeline = "
                          f"{parallel.tensor} * {parallel.pipeline} = {model_parallel}")
    data_parallel = world_size // model_parallel
    per_round = training.micro_batch_size * data_parallel
    if training.global_batch_size % per_round:
        raise ConfigError("training.global_batch_size", training.global_batch_size,
                          f"a multiple of training.micro_batch_size * data-parallel size = "
                          f"{training.micro_batch_size} * {data_parallel} = {per_round}")
    return BatchPlan(training.global_batch_size, training.micro_batch_size,
                     training.global_batch_size // per_round, data_parallel)


DECIDED_HERE = {
    "train_batch_size": "training.global_batch_size", "train_micro_batch_size_per_gpu": "training.micro_batch_size",
    "gradient_accumulation_steps": "the training section", "gradient_clipping": "optimizer.clip_grad",
    "optimizer": "the optimizer section", "scheduler": "the optimizer section", "bf16": "precision", "fp16": "precision",
    "data_types": "precision", "activation_checkpointing": "training.recompute", "pipeline": "parallel.pipeline",
    "steps_per_print": "logging.interval", "zero_allow_untested_optimizer": "the optimizer section",
    "zero_force_ds_cpu_optimizer": "the optimizer section",
}
"""DeepSpeed's keys that may not stand in the JSON, and what they follow from."""


def engine_settings(config: Config) -> dict[str, Any]:
    """DeepSpeed's JSON as the user wrote it: engine settings only, checked against the rest of `config`."""
    path = config.deepspeed_config
    try:
        settings = json.loads(Path(path).read_text())
    except OSError as error:
        raise ConfigError("deepspeed_config", path, f"a readable file ({error.strerror or error})") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(settings, dict):
        raise UserError(f"{path}: must hold one JSON object")
    for key in sorted(DECIDED_HERE.keys() & settings.keys()):
        raise ConfigError(f"{path}: {key}", settings[key], f"left out; it follows from {DECIDED_HERE[key]}")
    zero = settings.setdefault("zero_optimization", {"stage": 0})
    if not isinstance(zero, dict):
        raise ConfigError(f"{path}: zero_optimization", zero, 'an object such as {"stage": 1}')
    stage = zero.setdefault("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise ConfigError(f"{path}: zero_optimization.stage", stage, "0, 1, 2 or 3")
    if config.parallel.pipeline > 1 and stage > 1:
        raise ConfigError(f"{path}: zero_optimization.stage", stage,
                          "0 or 1 with parallel.pipeline > 1 (gradients and weights of a pipeline stage stay whole); "
                          "use ds_configs/zero1.json, or parallel.pipeline=1")
    if config.training.compile and stage == 3:
        raise ConfigError(f"{path}: zero_optimization.stage", stage, "at most 2 with training.compile: weights are gathered "
                          "inside a layer; use ds_configs/zero2.json")
    if config.precision != "fp32" and stage == 0:
        raise ConfigError(f"{path}: zero_optimization.stage", stage,
                          f"at least 1 with precision = {config.precision} (fp32 master weights need a ZeRO optimizer); "
                          "use ds_configs/zero1.json")
    return settings
