"""The interface of the engine that checkpoints need. They import no engine."""

from typing import Any, Protocol

import torch
from torch import nn

from megadyn.config import Config
from megadyn.parallel.grid import Grid
from megadyn.parallel.sharding import Sharding
from megadyn.routing.layer import RoutedLayer


class Trained(Protocol):
    """A model in training; this rank holds a part of it. Every method is collective."""

    config: Config
    grid: Grid
    sharding: Sharding
    device: torch.device
    zero_stage: int
    engine: Any
    """DeepSpeed's engine, whose `optimizer` holds weights and moments."""
    routed: list[RoutedLayer]
    """This rank's routed layers, which carry state from step to step."""

    def parameters(self) -> list[nn.Parameter]:
        """This rank's parameters, each once, in the same order on all data-parallel ranks."""
        ...

    def loss_scaler_state(self) -> dict[str, float] | None:
        """None in precisions without loss scaling."""
        ...

    def set_loss_scaler_state(self, state: dict[str, float] | None) -> None: ...
