"""What checkpoints ask of the engine whose state they hold. They import no engine."""

from typing import Any, Protocol

import torch
from torch import nn

from megadyn.config import Config
from megadyn.parallel.grid import Grid
from megadyn.parallel.sharding import Sharding
from megadyn.routing.layer import RoutedLayer


class Trained(Protocol):
    """A model in training, of which this rank holds a part. Every method is collective."""

    config: Config
    grid: Grid
    sharding: Sharding
    device: torch.device
    zero_stage: int
    engine: Any
    """DeepSpeed's, whose `optimizer` holds weights and moments."""
    routed: list[RoutedLayer]
    """This rank's routed layers, which carry state from step to step."""

    def parameters(self) -> list[nn.Parameter]:
        """This rank's, each once, in an order that is the same on all data-parallel ranks."""
        ...

    def loss_scaler_state(self) -> dict[str, float] | None:
        """None in precisions that scale no loss."""
        ...

    def set_loss_scaler_state(self, state: dict[str, float] | None) -> None: ...
