"""Tiny networks on any tensor size, with every parameter random, equal under every cut."""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from megadyn.config import Config
from megadyn.model.block import Layer, LayerContext
from megadyn.network import Network, layer_list, routed_layers, trackers_of
from megadyn.parallel.grid import Axis
from megadyn.parallel.params import ParamMaker
from megadyn.parallel.sharding import Sharding
from megadyn.routing.layer import LossScale, RoutedLayer
from megadyn.routing.tracker import Statistic

ALONE = Axis("tp")
Module = TypeVar("Module", bound=nn.Module)


def numbers(statistics: Mapping[str, Any]) -> dict[str, Tensor]:
    """What a layer records, as numbers."""
    return {
        name: value.value if isinstance(value, Statistic) else value for name, value in statistics.items()
    }


def known(config: Config, **fields: Any) -> dict[str, Any]:
    """Those of `fields` that the configuration's kind of routing has."""
    return {name: value for name, value in fields.items() if hasattr(config.model.routing, name)}


def make_layer(config: Config, index: int, loss_scale: LossScale | None = None, *, tp: Axis = ALONE) -> Layer:
    """The layer at `index` of the model, alone."""
    part = layer_list(layer_context(config, tp), loss_scale or LossScale())[index + 1]
    return part.build(*part.arguments)


def with_routing(config: Config, **fields: Any) -> Config:
    """`config` with other values in `model.routing`."""
    config.model.routing = replace(config.model.routing, **fields)
    return config.checked()


def param_maker(
    config: Config, tp: Axis = ALONE, dtype: torch.dtype = torch.float64, seed: int = 1
) -> ParamMaker:
    seq = tp if config.parallel.sequence else Axis("seq")
    return ParamMaker(Sharding(tp.size, config.model.num_kv_heads), seed, tp, seq, dtype=dtype)


def layer_context(config: Config, tp: Axis = ALONE, dtype: torch.dtype = torch.float64) -> LayerContext:
    return LayerContext(
        config.model,
        param_maker(config, tp, dtype),
        "sdpa",
        recompute=config.training.recompute,
        compile=config.training.compile,
    )


def make_network(
    config: Config, tp: Axis = ALONE, dtype: torch.dtype = torch.float64, loss_scale: float = 1.0
) -> Network:
    """The network of `config`; what starts as a constant (biases, norms, router scalars) is random too."""
    return disturb(Network(layer_context(config, tp, dtype), LossScale(loss_scale)), param_maker(config, tp))


def disturb(module: Module, make: ParamMaker) -> Module:
    """Adds noise to all vectors, the same under every cut: constants would hide a wrong slice."""
    for param in module.parameters():
        if param.ndim == 1:
            name, whole = param.global_name, list(param.shape)
            if make.sharding.dim(name) == 0:
                whole[0] *= make.tp.size
            noise = 0.2 * torch.randn(
                whole, generator=torch.Generator().manual_seed(zlib.crc32(name.encode()))
            )
            with torch.no_grad():
                param += make.sharding.cut(name, noise, make.tp.rank).to(param.dtype)
    return module


def gradients(network: nn.Module) -> dict[str, Tensor]:
    """By the parameters' Hugging Face names; fails for one without a gradient."""
    found = {}
    for param in network.parameters():
        assert param.grad is not None, f"{param.global_name} has no gradient"
        found[param.global_name] = param.grad
    return found


def loads_of(layers: Sequence[RoutedLayer]) -> dict[int, Any]:
    """DTRNet's attention loads, by layer."""
    return trackers_of(layers).get("loads", {})


def end_step(network: Network) -> None:
    """What the engine does behind a step, on one process."""
    for name, trackers in trackers_of(routed_layers(network)).items():
        means = {index: tracker.take_step_mean() for index, tracker in trackers.items()}
        total = torch.stack(list(means.values())).sum() if name in network.config.routing.totals else None
        for index, tracker in trackers.items():
            tracker.end_step(means[index], total)
