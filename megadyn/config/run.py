"""The configuration of a run: typed sections, read from YAML and `key=value`, refused early.

`load_config` runs on one CPU before any process group exists. Every error names the key, its value and what it must be.
Relative paths are relative to the working directory, except that paths in `extends` are relative to their file;
`deepspeed_config` may be either.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from megadyn.checks import at_least, one_of
from megadyn.config.data import DataConfig
from megadyn.config.engine_file import found_beside, read_engine_file
from megadyn.config.file import EXTENDS, config_layers
from megadyn.config.kinds import settle_kind
from megadyn.config.logging import LoggingConfig
from megadyn.config.model import ModelConfig
from megadyn.config.numbers import count
from megadyn.config.rope import with_rope_section
from megadyn.config.training import CheckpointConfig, OptimizerConfig, TrainingConfig
from megadyn.errors import ConfigError, UserError, did_you_mean
from megadyn.kinds.older import with_newer_keys
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
    """AdamW and the learning-rate schedule."""
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
            self.training,
            self.checkpoint,
            self.logging,
        ):
            section.check()
        check_together(self)
        return self


def check_together(config: Config) -> None:
    """Rules that span sections, in one function so that they are easy to review."""
    model, parallel, training = config.model, config.parallel, config.training
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
    if parallel.sequence and training.sequence_length % parallel.tensor:
        raise ConfigError(
            "training.sequence_length",
            training.sequence_length,
            f"a multiple of parallel.tensor = {parallel.tensor} with parallel.sequence",
        )
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
    if training.on_bad_step == "rollback" and not config.checkpoint.interval:
        raise ConfigError(
            "training.on_bad_step",
            training.on_bad_step,
            "stop or skip with checkpoint.interval = 0, because there is no checkpoint to go back to",
        )
    if training.compile:
        check_compilable(config)
    if model.rope.type == "dynamic" and config.data.document_mask:
        raise ConfigError(
            "model.rope.type",
            model.rope.type,
            "another one with data.document_mask: its base follows from the length of a sequence, not of a document",
        )
    model.routing.check_run(
        pipeline=parallel.pipeline, compile=training.compile, documents=config.data.document_mask
    )


def check_compilable(config: Config) -> None:
    """Raises ConfigError for settings with which `training.compile` cannot capture a single graph of fixed shapes."""
    if config.parallel.tensor > 1:
        raise ConfigError(
            "parallel.tensor",
            config.parallel.tensor,
            "1 with training.compile: tensor ranks communicate inside a layer",
        )
    if config.data.document_mask:
        raise ConfigError(
            "data.document_mask", True, "false with training.compile: the number of documents varies"
        )


REQUIRED = {
    "output_dir": "a folder for everything that the run writes",
    "data.train": "the prefix of an indexed dataset, or a list of them",
    "tokenizer.path": "a folder with tokenizer.json, a SentencePiece .model file, ORG/NAME on the Hugging Face hub, or byte",
}
"""Keys without a default, and what to give for them."""


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The checked configuration from a YAML file, the files that it `extends`, and `key=value` overrides.

    Raises:
        UserError: missing or malformed file, unknown key, wrong type, invalid value or combination.
    """
    files = config_layers(Path(path))
    for file, content in files:
        found_beside(content, file)
    for word in overrides:
        if not re.match(r"[\w-]+(\.[\w-]+)*=", word):
            raise UserError(f"{word!r} on the command line: must be of the form key=value")
    try:
        words = OmegaConf.to_container(OmegaConf.from_dotlist(list(overrides)))
    except Exception as error:  # the YAML library has no common base for its errors
        raise UserError(f"the command line: not valid YAML: {' '.join(str(error).split())}") from None
    layers = []
    for source, given in (*files, ("the command line", words)):
        _check_sections(Config, given, "", str(source))
        _read_counts(given)
        layers.append((source, with_newer_keys(with_rope_section(given, str(source)), str(source))))
    kind = settle_kind(layers)
    try:
        defaults = OmegaConf.structured(Config(model=ModelConfig(routing=kind())))
        merged = OmegaConf.merge(defaults, *(given for _, given in layers))
        config = OmegaConf.to_object(merged)
    except ConfigKeyError as error:
        raise _unknown_key(str(error.full_key)) from None
    except MissingMandatoryValue as error:
        key = str(error.full_key)
        raise UserError(f"{key} is missing in {path}: give {REQUIRED.get(key, 'it')}") from None
    except OmegaConfBaseException as error:
        reason = str(error.msg or error).splitlines()[0]
        raise UserError(f"{error.full_key or path}: {reason}") from None
    assert isinstance(config, Config)
    return config.checked()


def _check_sections(section: Any, given: Any, name: str, source: str) -> None:
    """Checks that sections hold keys, because OmegaConf's error for a plain value does not name the section."""
    if not isinstance(given, dict):
        known = ", ".join(f.name for f in fields(section))
        raise UserError(
            f"{name or source}: must hold keys ({known}), is {given!r}" + (f" in {source}" if name else "")
        )
    for f in fields(section):
        if f.name in given and is_dataclass(f.default_factory):
            _check_sections(f.default_factory, given[f.name], f"{name}.{f.name}".lstrip("."), source)


def _read_counts(given: dict[str, Any]) -> None:
    """Converts counts such as 3e9 or 300B to numbers. References to other keys are left for the merge to resolve."""
    training = given.get("training", {})
    for name in ("tokens", "samples"):
        value = training.get(name)
        if value is not None and not (isinstance(value, str) and "${" in value):
            training[name] = count(f"training.{name}", value)


def _unknown_key(full_key: str) -> UserError:
    if full_key == EXTENDS:
        return UserError(f"{EXTENDS}: is a key of configuration files, not of the command line")
    section: Any = Config
    *path, name = full_key.split(".")
    for part in path:
        section = next(f.default_factory for f in fields(section) if f.name == part)
        assert is_dataclass(section)
    where = f"section {'.'.join(path)!r}" if path else "the configuration"
    return UserError(
        f"{full_key}: {where} has no such key{did_you_mean(name, [f.name for f in fields(section)])}"
    )


def resolved_config(config: Config) -> dict[str, Any]:
    """The configuration as plain values. The length of the run is kept in its original unit, so that a run resumed with
    another batch size still means the same number of tokens."""
    resolved: dict[str, Any] = _plain(asdict(config))
    if length := config.training.length:
        resolved["training"] |= {"iterations": None, length.unit: length.amount}
    return resolved


def _plain(value: Any) -> Any:
    """With lists for tuples, as YAML has it."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def save_config(config: Config, path: Path) -> None:
    OmegaConf.save(OmegaConf.create(resolved_config(config)), path)


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
