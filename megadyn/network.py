"""The model as one ordered list of layers; a pipeline stage is a contiguous part of the list.

The list consists of Embed, the layers of `ModelConfig.layer_types`, FinalNorm and Head.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from megadyn.config import ModelConfig
from megadyn.kinds import DENSE, find_kind, module_of
from megadyn.model.block import Layer, LayerContext, Stream
from megadyn.model.documents import documents_of
from megadyn.model.norm import RMSNorm
from megadyn.parallel.linear import VocabParallelEmbedding
from megadyn.parallel.loss import capped, linear_cross_entropy
from megadyn.parallel.mappings import enter_tp, gather_from_tp
from megadyn.parallel.params import ParamMaker, normal
from megadyn.routing.layer import LossScale, RoutedLayer
from megadyn.routing.tracker import RunningThreshold, StepTracker


class Embed(VocabParallelEmbedding):
    """Tokens [B, T] -> Stream."""

    def __init__(self, ctx: LayerContext):
        model = ctx.model
        assert model.vocab_size is not None
        super().__init__(
            "model.embed_tokens",
            model.vocab_size,
            model.hidden_size,
            make=ctx.make,
            init=normal(model.init_std),
        )
        self.eod, self.options = ctx.eod, ctx.logits

    def forward(self, tokens: Tensor) -> Stream:  # type: ignore[override]
        return Stream(
            super().forward(tokens), documents=None if self.eod is None else documents_of(tokens, self.eod)
        )


class FinalNorm(RMSNorm):
    def __init__(self, model: ModelConfig, make: ParamMaker):
        super().__init__("model.norm", model.hidden_size, model.norm_eps, make=make)

    def forward(self, stream: Stream) -> Stream:  # type: ignore[override]
        return Stream(super().forward(stream.hidden))


class Head(nn.Module):
    """Hidden states -> mean next-token loss; the vocabulary is cut over tensor ranks."""

    def __init__(self, ctx: LayerContext, tied_to: nn.Parameter | None = None):
        super().__init__()
        model, make = ctx.model, ctx.make
        assert model.vocab_size is not None
        self.options = ctx.logits
        self.vocab_size, self.tp, self.seq = model.vocab_size, make.tp, make.seq
        shape = (model.vocab_size, model.hidden_size)
        self.weight = make("lm_head.weight", shape, normal(model.init_std)) if tied_to is None else tied_to

    def forward(self, stream: Stream, labels: Tensor | None = None) -> Tensor:
        return read_out(self, stream, labels)


def read_out(head: "Head | Embed", stream: Stream, labels: Tensor | None = None) -> Tensor:
    """Mean loss for labels [B, T]; without labels all logits [B, T, V]. `head` may be the Embed, if it is tied."""
    hidden = enter_tp(stream.hidden, head.tp, head.seq)
    if labels is None:
        logits = capped(F.linear(hidden, head.weight), head.options.softcap).to(hidden.dtype)
        return gather_from_tp(logits, head.tp)[..., : head.vocab_size]
    return linear_cross_entropy(
        hidden, head.weight, labels, vocab_size=head.vocab_size, tp=head.tp, options=head.options
    )


class LayerMaker(NamedTuple):
    """One entry of the list: `build`, called with `arguments`, creates the module."""

    build: type[nn.Module]
    arguments: tuple[Any, ...]


def layer_classes(model: ModelConfig) -> dict[str, type[Layer]]:
    """The class of each layer type that the model may contain: those of its kind, and the dense one."""
    kinds = (find_kind(DENSE), type(model.routing))
    return {
        layer: getattr(module_of(kind, "layers"), name)
        for kind in kinds
        for layer, name in kind.layers.items()
    }


def layer_list(ctx: LayerContext, loss_scale: LossScale) -> list[LayerMaker]:
    """The whole model, first to last, without allocating anything."""
    model, make = ctx.model, ctx.make
    classes = layer_classes(model)
    layers = []
    for index, layer in enumerate(model.layer_types):
        build = classes[layer]
        layers.append(
            LayerMaker(build, (ctx, index, loss_scale) if issubclass(build, RoutedLayer) else (ctx, index))
        )
    return [
        LayerMaker(Embed, (ctx,)),
        *layers,
        LayerMaker(FinalNorm, (model, make)),
        LayerMaker(Head, (ctx,)),
    ]


def choosing_layers(model: ModelConfig) -> dict[int, str]:
    """The layers of the whole model that choose tokens, with their types."""
    classes = layer_classes(model)
    routed = {layer for layer, build in classes.items() if issubclass(build, RoutedLayer) and build.chooses}
    return {index: layer for index, layer in enumerate(model.layer_types) if layer in routed}


class Network(nn.Module):
    """Runs the whole list in order, for every run without pipeline stages."""

    def __init__(self, ctx: LayerContext, loss_scale: LossScale):
        super().__init__()
        self.config = ctx.model
        *body, last = layer_list(ctx, loss_scale)
        self.layers = nn.ModuleList(part.build(*part.arguments) for part in body)
        embed = self.layers[0]
        assert isinstance(embed, Embed)
        self.head = last.build(*last.arguments, embed.weight if ctx.model.tie_embeddings else None)

    def forward(self, tokens: Tensor, labels: Tensor | None = None) -> Tensor:
        """tokens, labels [B, T] -> mean loss; without labels the logits [B, T, V]."""
        stream: Any = tokens
        for layer in self.layers:
            stream = layer(stream)
        return self.head(stream, labels)


def routed_layers(module: nn.Module) -> list[RoutedLayer]:
    """Layers of this stage that keep routing statistics, in order."""
    return [layer for layer in module.modules() if isinstance(layer, RoutedLayer)]


def set_routing_mode(layers: Sequence[RoutedLayer], mode: str) -> None:
    """Sets `topk` or `causal` in every layer that chooses by top-k."""
    for layer in layers:
        if layer.causal_router is not None:
            layer.causal_router.mode = mode


def trackers_of(layers: Sequence[RoutedLayer]) -> dict[str, dict[int, StepTracker]]:
    """State that these layers carry from step to step: by name, then by layer."""
    found: dict[str, dict[int, StepTracker]] = {}
    for layer in layers:
        for name, tracker in layer.trackers().items():
            found.setdefault(name, {})[layer.index] = tracker
    return found


def thresholds_of(layers: Sequence[RoutedLayer]) -> dict[int, RunningThreshold]:
    """The running thresholds of these layers, by layer."""
    found = trackers_of(layers).get("thresholds", {})
    return {index: threshold for index, threshold in found.items() if isinstance(threshold, RunningThreshold)}
