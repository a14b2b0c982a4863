"""The configuration of a run: `run` puts together the sections that the other modules hold, and reads it from files."""

from megadyn.config.data import DataConfig, Source
from megadyn.config.logging import LoggingConfig
from megadyn.config.model import ModelConfig
from megadyn.config.run import (
    BatchPlan,
    Config,
    ParallelConfig,
    TokenizerConfig,
    batch_plan,
    check_together,
    engine_settings,
    load_config,
    resolved_config,
    save_config,
)
from megadyn.config.training import (
    KERNELS,
    RECOMPUTE,
    CheckpointConfig,
    MultipliersConfig,
    OptimizerConfig,
    TrainingConfig,
)

__all__ = [
    "KERNELS",
    "RECOMPUTE",
    "BatchPlan",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "LoggingConfig",
    "ModelConfig",
    "MultipliersConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "Source",
    "TokenizerConfig",
    "TrainingConfig",
    "batch_plan",
    "check_together",
    "engine_settings",
    "load_config",
    "resolved_config",
    "save_config",
]
