"""Ends an engine whose process goes on with another one."""

import gc

import torch

from megadyn.engine.engine import Engine
from megadyn.model.compiled import forget_compiled


def release(engine: Engine) -> None:
    """Takes DeepSpeed's hooks off the model, so that the engine's memory is free once nobody refers to it, and drops compiled
    code. The engine must not be used afterwards."""
    engine.engine.destroy()
    forget_compiled()


def collect_memory() -> None:
    """Frees what engines left that nobody refers to any more. Python alone would not at once: their parts refer to each other."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
