"""The configuration of a run: typed sections, refused early. Every error names the key, its value and what it must be."""

import json
from dataclasses import dataclass, field
from typing import Any

from megadyn.checks import at_least, one_of
from megadyn.config.checkpoint import CheckpointConfig
from megadyn.config.data import DataConfig
from megadyn.config.engine_file import read_engine_file
from megadyn.config.logging import LoggingConfig
from megadyn.config.model import ModelConfig
from megadyn.config.optimizer import OptimizerConfig
from megadyn.config.phase import Phase
from megadyn.config.training import TrainingConfig
from megadyn.errors import ConfigError, UserError
from megadyn.paths import expanded


@dataclass
class TokenizerConfig:
    path: str = "???"
    """Folder with tokenizer.json, a SentencePiece `.model` file, a repository on the Hugging Face hub with tokenizer.json
    (`ORG/NAME` or `ORG/NAME@REVISION`), or `byte`."""
    eod: str | None = None
    """The token that ends a document, spelled as in the vocabulary. Default: the one with which the datasets were made,
    otherwise the tokenizer's own."""


@dataclass
class ParallelConfig:
    tensor: int = 1
    """Ranks that split each layer's heads and widths (arXiv 1909.08053). Raise it when a layer does not fit on one device, and
    keep these ranks within one node: they communicate in every layer."""
    pipeline: int = 1
    """Stages that split the layers. The remaining processes are data-parallel. Raise it when the model does not fit otherwise,
    with many micro-batches per step, because stages wait for each other at the start and end of a step."""
    sequence: bool = False
    """Sequence parallelism: tensor ranks also split the sequence wherever they split neither heads nor widths. Saves memory with
    `tensor` above 1."""

    def check(self) -> None:
        at_least("parallel.tensor", self.tensor, 1)
        at_least("parallel.pipeline", self.pipeline, 1)
        if self.sequence and self.tensor == 1:
            raise ConfigError(
                "parallel.sequence", True, "false while parallel.tensor = 1: tensor ranks share a sequence"
            )


@dataclass
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    """Shape of the transformer, and which of its layers skip tokens."""
    data: DataConfig = field(default_factory=DataConfig)
    """Datasets to train and evaluate on."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """The tokenizer of these datasets."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """How processes divide the model."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """AdamW or Muon, and the learning-rate schedule."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """Length of the run, batch sizes, evaluation and fault handling."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """When to save, and where to start from."""
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    """What the run reports, and where."""
    precision: str = "bf16"
    """`fp32`, or `bf16` / `fp16` with fp32 master weights. Use bf16 on GPUs that have it, and fp32 on a CPU or to
    compare layouts."""
    deepspeed_config: str = "zero1"
    """DeepSpeed's engine settings: `zero0`, `zero1`, `zero2`, `zero3` or `zero3_offload`, which come with megadyn, or the path
    of a JSON file, relative to the working directory or to the file that names it. Batch sizes, precision and optimizer
    come from this configuration instead."""
    output_dir: str = "???"
    """Folder for checkpoints, metrics and everything else that the run writes. Required."""
    phases: list[Any] = field(default_factory=list)
    """Phases of the run, one after another: `{name: ..., share: ...}` and the keys that the phase changes, in their sections.
    Lengths are shares of the run, or `iterations`, `tokens` or `samples` of each phase, which then make up the run. A phase may
    change the training data, sequence length, batch sizes, learning rates, capacity and losses of the routing, and RoPE."""

    def __post_init__(self) -> None:
        self.phase: Phase | None = None  # of a phase's own configuration; not a key, so not a field

    @property
    def is_in_parts(self) -> bool:
        """Whether it is trained in several parts, each in an engine of its own: phases, or levels of the capacity."""
        return bool(self.phases) or self.training.anneal.capacity is not None

    @property
    def last_iteration(self) -> int:
        """The number of the last step of the run, over all phases; 0 while it is not known."""
        return self.phase.total if self.phase else self.training.iterations or 0

    def checked(self) -> "Config":
        """Itself, with defaults filled in. Raises ConfigError for invalid values.

        Not done on construction, because OmegaConf first builds every section from its defaults.
        """
        one_of("precision", self.precision, PRECISIONS)
        self.output_dir = expanded(self.output_dir, "output_dir")
        self.deepspeed_config = expanded(self.deepspeed_config, "deepspeed_config")
        self.tokenizer.path = expanded(self.tokenizer.path, "tokenizer.path")
        for section in (
            self.model.routing,
            self.model,
            self.data,
            self.parallel,
            self.optimizer.multipliers,
            self.optimizer,
            self.training.anneal,
            self.training.tasks,
            self.training,
            self.checkpoint,
            self.logging,
        ):
            section.check()
        check_together(self)
        return self


def check_together(config: Config) -> None:
    """Rules that span sections, together so that they are easy to review."""
    model, parallel, training = config.model, config.parallel, config.training
    check_cuts(model, parallel, training.sequence_length)
    if model.max_position is None:
        model.max_position = training.sequence_length
    if training.sequence_length > model.max_position:
        raise ConfigError(
            "training.sequence_length",
            training.sequence_length,
            f"at most model.max_position = {model.max_position}",
        )
    if training.global_batch_size % training.micro_batch_size:
        raise ConfigError(
            "training.global_batch_size",
            training.global_batch_size,
            f"a multiple of training.micro_batch_size = {training.micro_batch_size}",
        )
    check_length(config)
    if training.anneal.capacity is not None and not model.routing.has_capacity:
        raise ConfigError(
            "training.anneal.capacity",
            training.anneal.capacity,
            f"null with {model.routing.describe()}: no capacity sets what its layers take",
        )
    if training.on_bad_step == "rollback" and not config.checkpoint.interval:
        raise ConfigError(
            "training.on_bad_step",
            training.on_bad_step,
            "stop or skip with checkpoint.interval = 0, because there is no checkpoint to go back to",
        )
    if training.norm_spike_factor and config.precision == "fp16":
        raise ConfigError(
            "training.norm_spike_factor",
            training.norm_spike_factor,
            "0 with precision = fp16, where a step that is kept out of the weights also lowers the loss scale; use bf16",
        )
    training.tasks.check_interval(config.checkpoint.interval)
    config.checkpoint.check_best(training.eval_interval, config.data.validation_names)
    if model.rope.type == "dynamic" and config.data.document_mask:
        raise ConfigError(
            "model.rope.type",
            model.rope.type,
            "another one with data.document_mask: its base follows from the length of a sequence, not of a document",
        )
    model.routing.check_run(pipeline=parallel.pipeline, documents=config.data.document_mask)


def check_cuts(model: ModelConfig, parallel: ParallelConfig, length: int) -> None:
    """Raises ConfigError for a model, or sequences of `length` tokens, that cannot be cut as `parallel` says."""
    if model.num_heads % parallel.tensor:
        raise ConfigError(
            "parallel.tensor", parallel.tensor, f"a divisor of model.num_heads = {model.num_heads}"
        )
    kv_heads = model.num_kv_heads or model.num_heads
    if kv_heads % parallel.tensor and parallel.tensor % kv_heads:
        raise ConfigError(
            "parallel.tensor", parallel.tensor, f"a divisor or a multiple of model.num_kv_heads = {kv_heads}"
        )
    if (model.ffn_size or 0) % parallel.tensor:
        raise ConfigError(
            "parallel.tensor", parallel.tensor, f"a divisor of model.ffn_size = {model.ffn_size}"
        )
    if parallel.pipeline > model.num_layers:
        raise ConfigError(
            "parallel.pipeline", parallel.pipeline, f"at most model.num_layers = {model.num_layers}"
        )
    if parallel.sequence and length % parallel.tensor:
        raise ConfigError(
            "training.sequence_length",
            length,
            f"a multiple of parallel.tensor = {parallel.tensor} with parallel.sequence",
        )


def check_length(config: Config) -> None:
    """Raises ConfigError for a schedule, or for positions in the data, that do not go with the run's length."""
    training = config.training
    config.optimizer.check_span(training.iterations)
    if training.epochs is not None and config.data.is_moved:
        raise ConfigError("training.epochs", training.epochs, "null with data.origin or skip")
    if training.seconds is None:
        return
    if config.is_in_parts:
        raise ConfigError(
            "training.seconds",
            training.seconds,
            "null with phases or training.anneal, whose steps are planned",
        )
    if config.optimizer.schedule != "constant" and config.optimizer.schedule_tokens is None:
        raise ConfigError(
            "training.seconds",
            training.seconds,
            f"null with optimizer.schedule = {config.optimizer.schedule}, whose decay would begin at an unknown step: use "
            "optimizer.schedule=constant, or give the schedule's own length (optimizer.schedule_tokens)",
        )


@dataclass(frozen=True)
class BatchPlan:
    """How a step's samples are divided."""

    global_batch: int
    micro_batch: int
    micro_batches: int
    """Micro-batches per step on each data-parallel rank."""
    data_parallel: int


def batch_plan(config: Config, world_size: int) -> BatchPlan:
    """Raises ConfigError if `world_size` processes cannot be arranged as configured."""
    parallel, training = config.parallel, config.training
    model_parallel = parallel.tensor * parallel.pipeline
    if world_size % model_parallel:
        raise ConfigError(
            "number of processes",
            world_size,
            "a multiple of parallel.tensor * parallel.pipeline = "
            f"{parallel.tensor} * {parallel.pipeline} = {model_parallel}",
        )
    data_parallel = world_size // model_parallel
    per_round = training.micro_batch_size * data_parallel
    if training.global_batch_size % per_round:
        raise ConfigError(
            "training.global_batch_size",
            training.global_batch_size,
            f"a multiple of training.micro_batch_size * data-parallel size = "
            f"{training.micro_batch_size} * {data_parallel} = {per_round}",
        )
    return BatchPlan(
        training.global_batch_size,
        training.micro_batch_size,
        training.global_batch_size // per_round,
        data_parallel,
    )


DECIDED_HERE = {
    "train_batch_size": "training.global_batch_size",
    "train_micro_batch_size_per_gpu": "training.micro_batch_size",
    "gradient_accumulation_steps": "the training section",
    "gradient_clipping": "optimizer.clip_grad",
    "optimizer": "the optimizer section",
    "scheduler": "the optimizer section",
    "bf16": "precision",
    "fp16": "precision",
    "data_types": "precision",
    "activation_checkpointing": "training.recompute",
    "pipeline": "parallel.pipeline",
    "steps_per_print": "logging.interval",
    "timers": "the logging section",
    "zero_allow_untested_optimizer": "the optimizer section",
    "zero_force_ds_cpu_optimizer": "the optimizer section",
}
"""DeepSpeed's keys that must not be in the JSON file, and where their values come from."""
PRECISIONS = ("fp32", "bf16", "fp16")
REDUCED_IN = "communication_data_type"
"""DeepSpeed's key for the dtype in which gradients are summed over data-parallel ranks."""


def reduction_type(settings: dict[str, Any], precision: str) -> str:
    """The dtype in which gradients are summed over data-parallel ranks: that of the engine settings, else fp32, or fp16
    in an fp16 run. DeepSpeed's own default is the dtype of the weights; in bf16 a sum of fp32 gradients would lose 16
    of their 24 bits."""
    return settings.get(REDUCED_IN, "fp16" if precision == "fp16" else "fp32")


def engine_settings(config: Config) -> dict[str, Any]:
    """DeepSpeed's JSON file as the user wrote it: engine settings only, checked against the rest of `config`."""
    path = config.deepspeed_config
    try:
        settings = json.loads(read_engine_file(path))
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
    if zero.get("round_robin_gradients"):
        raise ConfigError(
            f"{path}: zero_optimization.round_robin_gradients",
            zero["round_robin_gradients"],
            "false or left out: DeepSpeed then names wrong places of tensors in its partitions, and checkpoints mix them up",
        )
    offload = zero.get("offload_optimizer")
    on_disk = isinstance(offload, dict) and offload.get("device") == "nvme"
    if on_disk and config.optimizer.name == "muon":
        raise ConfigError(
            f"{path}: zero_optimization.offload_optimizer.device",
            "nvme",
            "cpu or none with optimizer.name = muon",
        )
    if config.parallel.pipeline > 1 and stage > 1:
        raise ConfigError(
            f"{path}: zero_optimization.stage",
            stage,
            "0 or 1 with parallel.pipeline > 1 (gradients and weights of a pipeline stage stay whole); "
            "use deepspeed_config=zero1, or parallel.pipeline=1",
        )
    if config.training.compile and stage == 3:
        raise ConfigError(
            f"{path}: zero_optimization.stage",
            stage,
            "at most 2 with training.compile: weights are gathered inside a layer; use deepspeed_config=zero2",
        )
    if config.training.compile and ("flash3" in config.model.attention or "cudnn" in config.model.attention):
        raise ConfigError(
            "model.attention",
            config.model.attention,
            "auto, or without flash3 and cudnn, with training.compile: a compiled graph cannot hold their calls",
        )
    if (reduced_in := reduction_type(settings, config.precision)) not in PRECISIONS:
        raise ConfigError(f"{path}: {REDUCED_IN}", reduced_in, f"one of {', '.join(PRECISIONS)}")
    if config.precision != "fp32" and stage == 0:
        raise ConfigError(
            f"{path}: zero_optimization.stage",
            stage,
            f"at least 1 with precision = {config.precision} (fp32 master weights need a ZeRO optimizer); "
            "use deepspeed_config=zero1",
        )
    return settings
