"""A layer's parts as functions of tensors, so that each can be run, timed and counted separately."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megadyn.config import ModelConfig
from megadyn.costs.operations import block_flops, mlp_flops
from megadyn.model.block import Layer, Stream
from megadyn.network import Head
from megadyn.parallel.linear import upcast
from megadyn.planning.flops import head_flops, layer_flops
from megadyn.routing.layer import RoutedLayer, SkippingLayer
from megadyn.routing.select import Selection, origins, put_back_shared, take_shared

Outputs = Tensor | tuple[Tensor, ...]
WHOLE = "layer"
"""Name of the part that is the whole layer."""


@dataclass
class TimedPart:
    layer: str
    name: str
    run: Callable[..., Outputs]
    """A function of `inputs`. Outputs that carry gradient are also run backward, into `inputs` and the layer's
    parameters."""
    inputs: tuple[Tensor, ...]
    flops: float = 0.0
    """Forward and backward on the whole batch, by `planning/flops`; 0 if it does not count this part."""
    unseen: float = 0.0
    """What must be added to `flops` to count the whole square of attention."""
    bytes: float = 0.0
    """Least bytes that forward and backward can move: each activation in and out once. 0 if operations dominate."""


def parts_of(
    layer: Layer, kind: str, stream: Stream, model: ModelConfig, selection: Selection | None
) -> list[TimedPart]:
    """The parts of a layer of `kind` for its input, the whole layer last. `selection`: the tokens that it takes
    (`choice_of`)."""
    parts = _Parts(layer, kind, stream, model, selection)
    parts.add_decision()
    parts.add_block()
    inputs = [stream.hidden] if stream.score is None else [stream.hidden, stream.score]
    parts.add(
        WHOLE,
        lambda *given: layer(Stream(*given)).hidden,
        *inputs,
        unseen=parts.unseen,
        forward=layer_flops(model, stream.hidden.shape[1])[model.layer_types.index(kind)].total,
    )
    return parts.found


class _Parts:
    def __init__(
        self, layer: Layer, kind: str, stream: Stream, model: ModelConfig, selection: Selection | None
    ):
        self.layer, self.kind, self.model, self.selection = layer, kind, model, selection
        self.hidden, self.score = stream.hidden.detach(), stream.score
        self.batch, self.length, _ = self.hidden.shape
        self.seen = self.length if selection is None else selection.places.numel() / self.batch
        """Tokens per sequence that attend."""
        assert model.head_dim
        self.unseen = 2 * self.seen * self.seen * model.num_heads * model.head_dim
        self.found: list[TimedPart] = []

    def add(
        self,
        name: str,
        run: Callable[..., Outputs],
        *inputs: Tensor,
        forward: float = 0.0,
        unseen: float = 0.0,
        passes: float = 0.0,
    ) -> None:
        """`forward`, `unseen`: operations of a forward pass on one sequence. `passes`: how often rows of the hidden
        size are read or written in total."""
        self.found.append(
            TimedPart(
                self.kind,
                name,
                run,
                tuple(leaf(x) for x in inputs),
                3 * forward * self.batch,
                3 * unseen * self.batch,
                passes * self.hidden.shape[-1] * self.hidden.element_size(),
            )
        )

    def add_decision(self) -> None:
        """Adds the steps that choose tokens: router, choice, prior."""
        layer, hidden = self.layer, self.hidden
        whole = layer_flops(self.model, self.length)[self.model.layer_types.index(self.kind)]
        if not isinstance(layer, RoutedLayer):
            return
        counted = whole.whole - whole.detached
        for name, run, inputs in layer.decision_steps(Stream(hidden, self.score)):
            self.add(name, run, *inputs, forward=counted)
            counted = 0.0

    def add_block(self) -> None:
        """Adds the computation on the chosen tokens."""
        layer, selection, rows = self.layer, self.selection, self.hidden
        positions, segments, tokens = None, None, self.batch * self.length
        if isinstance(layer, SkippingLayer):
            assert selection is not None
            places, count = selection.places, selection.places.numel()
            positions, segments = origins(Stream(rows), selection, self.length)
            self.add("take", lambda x: take_shared(x, places, layer.seq), rows, passes=3 * count + tokens)
            rows, tokens = take_shared(rows, places, layer.seq)[1].detach(), count
        self.add("norm", layer.input_layernorm, rows, passes=5 * tokens)
        normed = layer.input_layernorm(rows).detach()
        each = tokens / self.batch
        attention = block_flops(self.model, each, self.seen) - mlp_flops(self.model, each)
        mixing = None
        if isinstance(layer, RoutedLayer) and selection is not None:
            mixing = layer.mixing_step(Stream(self.hidden), selection)
        if mixing is not None:
            self.add(mixing.name, mixing.run, normed, forward=attention, unseen=self.unseen)
        else:
            self.add(
                "attention",
                lambda x: layer.self_attn(x, positions, self.length, segments),
                normed,
                forward=attention,
                unseen=self.unseen,
            )
        self.add("add + norm", layer.post_attention_layernorm.of_sum, rows, normed, passes=8 * tokens)
        self.add("MLP", layer.mlp, normed, forward=mlp_flops(self.model, each))
        if isinstance(layer, SkippingLayer):
            gate = upcast(self.hidden[..., 0]).sigmoid()
            self.add(
                "put_back",
                lambda x, gate, u: put_back_shared(x, places, gate, u, layer.seq),
                self.hidden,
                gate,
                normed,
                passes=2 * self.batch * self.length + 4 * tokens,
            )


def loss_part(head: Head, hidden: Tensor, labels: Tensor, model: ModelConfig) -> TimedPart:
    """Head and loss; their forward pass also computes the gradients."""
    return TimedPart(
        "head",
        "loss",
        lambda x: head(Stream(x), labels),
        (leaf(hidden),),
        3 * head_flops(model, hidden.shape[1]) * hidden.shape[0],
    )


@torch.no_grad()
def choice_of(layer: Layer, stream: Stream) -> Selection | None:
    """The tokens that a layer takes from its input; None for a layer that takes all."""
    return layer.choose(stream) if isinstance(layer, RoutedLayer) else None


def leaf(x: Tensor) -> Tensor:
    x = x.detach().clone()
    return x.requires_grad_() if x.is_floating_point() else x
