"""The models to compare: ours of every kind, and transformers' Qwen2 with the dense model's weights."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megadyn.arguments import positive
from megadyn.benchmark.clock import PRECISION_OF
from megadyn.config import Config, DataConfig, ModelConfig, TokenizerConfig, TrainingConfig
from megadyn.config.config_map import to_dense_config
from megadyn.errors import ConfigError, UserError
from megadyn.kinds import BUILT_IN, DENSE, Kind, find_kind, make_kind
from megadyn.model.attention_choice import choose_attention
from megadyn.model.block import LayerContext
from megadyn.network import Network
from megadyn.parallel.params import ParamMaker, name_of
from megadyn.parallel.sharding import Sharding
from megadyn.routing.layer import LossScale, RoutedLayer

REFERENCE = "qwen2"
DEFAULT_MODELS = tuple(find_kind(name).benchmark or name for name in BUILT_IN)
"""Every built-in kind as KIND[:CAPACITY], dense first."""


@dataclass
class Model:
    name: str
    module: nn.Module
    config: ModelConfig
    """Kinds whose tokens choose for themselves have their routers set to take the planned share."""

    def loss(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Mean loss of tokens [B, T] against the next tokens, labels [B, T]."""
        if isinstance(self.module, Network):
            loss: Tensor = self.module(tokens, labels)
            return loss
        return self.module(tokens, labels=labels, shift_labels=labels, use_cache=False).loss


SIZES = {"hidden": 1024, "layers": 4, "heads": 16, "kv_heads": 4, "ffn": 2816, "vocab": 8192}
"""Default sizes of a model."""


def add_size_arguments(parser: argparse.ArgumentParser, **defaults: int) -> None:
    """Adds arguments for a model's sizes; `defaults` change or extend them."""
    for name, default in (SIZES | defaults).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=positive, default=default, metavar="N")


def add_shape_arguments(parser: argparse.ArgumentParser, **defaults: int) -> None:
    """Adds arguments for a model's sizes and its batch; `defaults` as in `add_size_arguments`."""
    add_size_arguments(parser, **{"sequence": 2048, "batch": 1} | defaults)


def shape_line(args: argparse.Namespace) -> str:
    return (
        f"{args.layers} layers, hidden {args.hidden}, heads {args.heads} and {args.kv_heads}, ffn {args.ffn}, "
        f"vocabulary {args.vocab}, {args.batch} x {args.sequence} tokens"
    )


def config_of(name: str, args: argparse.Namespace, *, compile: bool = False, **sections: Any) -> Config:
    """The configuration of KIND[:CAPACITY] at the sizes in `args`; `sections` extend or replace its sections."""
    kind, _, capacity = name.partition(":")
    try:
        keys = {"capacity": float(capacity)} if capacity else {}
    except ValueError:
        raise UserError(f"--models {name}: {capacity!r} is not a number") from None
    model = ModelConfig(
        hidden_size=args.hidden,
        num_layers=args.layers,
        num_heads=args.heads,
        num_kv_heads=args.kv_heads,
        ffn_size=args.ffn,
        vocab_size=args.vocab,
        qkv_bias=True,
        routing=routing_of(name, kind, keys),
    )
    training = TrainingConfig(
        iterations=1, global_batch_size=1, micro_batch_size=1, sequence_length=args.sequence, compile=compile
    )
    chosen: dict[str, Any] = {
        "model": model,
        "data": DataConfig(train="none"),
        "tokenizer": TokenizerConfig(path="byte"),
        "output_dir": "none",
        "training": training,
    }
    return Config(**(chosen | sections)).checked()


def routing_of(name: str, kind: str, keys: dict[str, Any]) -> Kind:
    """Raises UserError, worded for the command line, for an unknown kind or one without a capacity."""
    try:
        return make_kind(kind, **keys)
    except ConfigError as error:
        raise UserError(f"--models {name}: must be KIND[:CAPACITY] or {REFERENCE} ({error})") from None


def build(
    name: str,
    args: argparse.Namespace,
    device: torch.device,
    dtype: torch.dtype,
    tokens: Tensor,
    others: Sequence[Model],
    *,
    compile: bool = False,
) -> Model:
    """`name`: KIND[:CAPACITY], or `qwen2`, which copies the weights of the dense model among `others`."""
    kind = name.partition(":")[0]
    if kind == REFERENCE:
        dense = next((model for model in others if model.config.routing.name == DENSE), None)
        if dense is None:
            raise UserError(
                "--models: qwen2 copies the weights of the dense model, which must come before it"
            )
        return Model(name, qwen2_like(dense, args.recompute == "full"), dense.config)
    config = config_of(name, args, compile=compile, precision=PRECISION_OF[dtype])
    model, config.training.micro_batch_size = config.model, tokens.shape[0]
    backend = choose_attention(config)
    make = ParamMaker(Sharding(1, args.kv_heads), device=device, dtype=dtype)
    network = Network(
        LayerContext(model, make, backend, recompute=args.recompute, compile=compile), LossScale()
    )
    set_shares(network, tokens, model.routing.share)
    return Model(name, network, model)


def qwen2_like(dense: Model, recompute: bool) -> nn.Module:
    """transformers' Qwen2 with the same shapes and weights, using torch's scaled dot-product attention."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config, parameter = dense.config, next(dense.module.parameters())
    theirs = Qwen2Config.from_dict(to_dense_config(config, REFERENCE, "float32"), attn_implementation="sdpa")
    model = Qwen2ForCausalLM(theirs)
    model.load_state_dict({name_of(param): param.detach() for param in dense.module.parameters()})
    if recompute:
        model.gradient_checkpointing_enable()
    return model.to(device=parameter.device, dtype=parameter.dtype).train()


@torch.no_grad()
def set_shares(network: Network, tokens: Tensor, share: float) -> None:
    """Sets routers, first layer to last, so that layers whose tokens choose for themselves take about `share` of `tokens`."""
    stream: Any = tokens
    for layer in network.layers:
        if isinstance(layer, RoutedLayer):
            layer.set_share(stream, share)
        stream = layer(stream)
