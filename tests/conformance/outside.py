"""A kind of routing in a package of its own, as a researcher would write it, and the same with one promise broken."""

from pathlib import Path

RECORD = '''
"""A sigmoid of a linear score picks tokens and scales their update."""

from dataclasses import dataclass

from megadyn.costs.memory import Kept, Workload, dense_kept, skipping_kept
from megadyn.costs.operations import LayerFlops, flops_of_layer
from megadyn.costs.shape import Shape
from megadyn.kinds import DENSE, Laid, TopK


@dataclass
class Outside(Laid, TopK):
    kind: str = "NAME"
    scale: float = 1.0
    """What the gate is multiplied by."""

    name = "outside"
    title = "Kind of another package"
    sentence = "A routed layer processes the tokens that a linear score selects."
    layers = {"outside": "OutsideLayer"}
    recorded = (*TopK.recorded, "scale")
    default_capacity = 0.3

    def flops(self, layer: str, shape: Shape, length: int, share: float | None = None) -> LayerFlops:
        if layer == DENSE:
            return flops_of_layer(shape, length)
        return flops_of_layer(shape, self.taken(length, share), whole=2 * length * shape.hidden_size,
                              detached=self.predictor_flops(shape, length))

    def parameters(self, layer: str, shape: Shape) -> int:
        return 0 if layer == DENSE else shape.hidden_size + self.predictor_parameters(shape)

    def kept(self, layer: str, work: Workload) -> Kept:
        if layer == DENSE:
            return dense_kept(work)
        reads = self.predictor_kept(work)
        copied = work.part * 4 * work.model.hidden_size * (work.bytes < 4)
        own = work.part * work.bytes * work.model.hidden_size * (work.bytes == 4)
        return skipping_kept(work, self.share, input=max(reads, own), outside=copied + reads + 32 * work.tokens)

    def summed(self, layer: str, work: Workload) -> float:
        return 1.0 if layer == DENSE else self.summed_if_skipping(work)


KIND = Outside
'''

LAYERS = """
from megadyn.model.block import LayerContext, Stream
from megadyn.parallel.grid import Axis
from megadyn.parallel.mappings import whole_sequence
from megadyn.routing.layer import LossScale
from megadyn.routing.choice import LinearRouter, gate_statistics
from megadyn.routing.layer import Step
from megadyn.routing.select import Selection
from megadyn.routing.layer import SkippingLayer


class OutsideLayer(SkippingLayer):
    def __init__(self, ctx: LayerContext, index: int, loss_scale: LossScale):
        super().__init__(ctx, index, loss_scale)
        self.router = LinearRouter(f"{self.name}.router", ctx)
        self.scale = ctx.model.routing.scale

    def choose(self, stream: Stream) -> Selection:
        return self.causal_router(whole_sequence(self.router(stream.hidden).detach(), self.seq), stream.hidden).selection

    def decision_steps(self, stream: Stream) -> list[Step]:
        return [Step("router", self.router, (stream.hidden,))]

    def forward(self, stream: Stream) -> Stream:
        logit = self.router(stream.hidden)
        score = whole_sequence(logit.detach(), self.seq)
        choice = self.causal_router(score, stream.hidden)
        self.monitor.record(choice.statistics | gate_statistics(score.sigmoid(), choice.in_top))
        return self.process(stream, self.scale * logit.sigmoid(), choice)
"""

EXPORTED = """
from torch import Tensor

from megadyn.hf.configuration_megadyn import ExportedKind, MegadynConfig, Router
from megadyn.hf.layers_megadyn import Context, LayerCache, RoutedLayer, Routing, Stream, WideLinear


class OutsideLayer(RoutedLayer):
    def __init__(self, config: MegadynConfig, number: int) -> None:
        super().__init__(config, number)
        self.scale = config.routing["scale"]
        self.router = WideLinear(config.hidden_size, 1, bias=False)

    def forward(self, stream: Stream, context: Context, cache: LayerCache | None) -> tuple[Stream, Routing]:
        logit_BT: Tensor = self.router(stream.hidden_BCD).squeeze(-1)
        return self.route(stream.hidden_BCD, logit_BT, self.scale * logit_BT.sigmoid(), context, cache)


EXPORTED = ExportedKind({"outside": OutsideLayer}, {"linear": Router(("capacity",), {"causal": ("threshold", "predictor")})})
"""

BROKEN = {
    "future": (
        "        logit = self.router(stream.hidden)\n",
        "        logit = self.router(stream.hidden)\n        logit = logit + logit.roll(-1, dims=1)\n",
    ),
    "other_samples": (
        "        logit = self.router(stream.hidden)\n",
        "        logit = self.router(stream.hidden)\n        logit = logit - logit.mean(dim=0)\n",
    ),
    "no_tensor_sum": (
        "        self.scale = ctx.model.routing.scale\n",
        '        self.scale = ctx.model.routing.scale\n        self.mlp.down_proj.tp = Axis("tp")\n',
    ),
    "chooses_anew": (
        "    def forward(self, stream: Stream) -> Stream:\n",
        "    def forward(self, stream: Stream) -> Stream:\n"
        "        hidden = self.run(lambda h: self.decide(stream._replace(hidden=h)).hidden, stream.hidden)\n"
        "        return Stream(hidden, documents=stream.documents)\n\n"
        "    def decide(self, stream: Stream) -> Stream:\n",
    ),
    "ignores_a_replay": (
        "        choice = self.causal_router(score, stream.hidden)\n",
        "        choice = self.causal_router(score, stream.hidden)\n"
        '        if self.causal_router.mode == "topk":\n'
        "            from megadyn.routing.select import choose_top\n"
        "            top = choose_top(score, choice.selection.places.shape[1])\n"
        "            choice = choice._replace(selection=top)\n",
    ),
}
"""What is written in place of what."""


def write_package(folder: Path, name: str, broken: str | None = None) -> str:
    """The package `name` in `folder`; returns its dotted path, as `model.routing.kind` takes it."""
    package = folder / name / "kind"
    package.mkdir(parents=True)
    (folder / name / "__init__.py").write_text("")
    layers = LAYERS
    if broken is not None:
        before, after = BROKEN[broken]
        assert before in layers
        layers = layers.replace(before, after)
    for file, text in (
        ("__init__.py", RECORD.replace("NAME", f"{name}.kind")),
        ("layers.py", layers),
        ("exported.py", EXPORTED),
    ):
        (package / file).write_text(text.lstrip())
    return f"{name}.kind"
