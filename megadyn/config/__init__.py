"""The configuration of a run. `run` combines the sections defined in the other modules, and `load`
reads them from files."""

from megadyn.config.checkpoint import AverageConfig, CheckpointConfig
from megadyn.config.data import DataConfig, Source
from megadyn.config.load import load_config, resolved_config, save_config
from megadyn.config.logging import LoggingConfig
from megadyn.config.model import ATTENTION, ModelConfig, attention_parts
from megadyn.config.optimizer import MultipliersConfig, MuonConfig, OptimizerConfig
from megadyn.config.phase import Phase
from megadyn.config.phases import config_at, named, phase_configs
from megadyn.config.rope import RopeConfig
from megadyn.config.run import (
    REDUCED_IN,
    BatchPlan,
    Config,
    ParallelConfig,
    TokenizerConfig,
    batch_plan,
    check_together,
    engine_settings,
    reduction_type,
)
from megadyn.config.training import KERNELS, RECOMPUTE, TrainingConfig

__all__ = [
    "ATTENTION",
    "KERNELS",
    "RECOMPUTE",
    "REDUCED_IN",
    "AverageConfig",
    "BatchPlan",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "LoggingConfig",
    "ModelConfig",
    "MultipliersConfig",
    "MuonConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "Phase",
    "RopeConfig",
    "Source",
    "TokenizerConfig",
    "TrainingConfig",
    "attention_parts",
    "batch_plan",
    "check_together",
    "config_at",
    "engine_settings",
    "load_config",
    "named",
    "phase_configs",
    "reduction_type",
    "resolved_config",
    "save_config",
]
