"""What a kind of routing is: the keys that `model.routing` has for it, and all that the rest of the house asks of it. No torch.

A kind is one folder, a package:

    __init__.py    KIND, a dataclass derived from Kind: its fields are the keys of the configuration
    layers.py      the training layers, found by the names in KIND.layers
    exported.py    the same layers stand-alone, shipped beside exported weights as routing_<name>.py
    README.md      the mathematics, with sources

Nothing else in megadyn names a kind. `model.routing` of a checked configuration is an instance of the kind's class, so whoever
has a model asks `model.routing` and needs no registry.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from megadyn.checks import at_least, in_range, one_of
from megadyn.costs.memory import Kept, Workload, dense_kept
from megadyn.costs.operations import LayerFlops, flops_of_layer, router_flops
from megadyn.costs.shape import Shape, capacity_count
from megadyn.errors import ConfigError

SHAPES = "it decides the shapes of the saved tensors"
TRAINED_SO = "the saved weights were trained that way and mean nothing in another"
"""Why a resumed run may not change a key."""
DENSE = "dense"
"""The layer type that every kind may use beside its own: each token goes through the whole layer."""


@dataclass
class Kind:
    """Base of all kinds, and what a kind without keys of its own would be.

    Class attributes describe the kind to people and to the rest of the house; fields are keys of `model.routing`. Sizes of a
    model come as a `Shape`; a layer is named by its type, one of `layer_types`.
    """

    kind: str = ""
    """Which kind of routing: `dense`, one of the folders in `megadyn/kinds`, the name of an entry point in the group
    `megadyn.kinds`, or the path of a Python package (`package.module`) that holds a kind."""

    name: ClassVar[str]
    """As in `model.routing.kind`; exports carry `routing_<name>.py`."""
    title: ClassVar[str]
    """For cards and reports: `Mixture-of-Depths`."""
    sentence: ClassVar[str]
    """What a routed layer does, for cards and reports."""
    sources: ClassVar[tuple[str, ...]] = ()
    """Papers: `arXiv 2404.02258`."""
    tags: ClassVar[tuple[str, ...]] = ()
    """Of a model card."""
    verb: ClassVar[str] = "was processed"
    """What happened to a token that a routed layer took."""
    legend: ClassVar[Mapping[str, str]] = {}
    """Its own statistics, for the report: name in the metrics -> what it is."""
    layers: ClassVar[Mapping[str, str]] = {}
    """Layer type -> class in `layers.py`."""
    scores: ClassVar[tuple[str, ...]] = ()
    """What thresholds are of, `routing.score` in exports: in older ones, which may leave it out, and today. Empty where that
    never changed."""
    totals: ClassVar[tuple[str, ...]] = ()
    """Trackers of its layers that need their sum over all layers of the model, by name."""
    recorded: ClassVar[tuple[str, ...]] = ()
    """Keys that an export's `config.json` carries."""
    fixed: ClassVar[dict[str, str]] = {}
    """Keys that a run may not change when it goes on from a checkpoint: key -> reason."""
    shared: ClassVar[tuple[str, ...]] = ()
    """Files of `megadyn/hf` that its `exported.py` imports, beside those that every export carries."""
    rules: ClassVar[tuple[str, ...]] = ()
    """Causal rules that can stand in for top-k, the first being the default."""
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Settings that the conformance suite tries beside the defaults and the causal rules: a name -> keys."""
    straight_through: ClassVar[bool] = False
    """Its routers' gradients are not those of the loss, on purpose."""
    benchmark: ClassVar[str] = ""
    """How benchmarks run it unless told otherwise, `NAME:CAPACITY`; by its name alone if empty."""
    equals_dense: ClassVar[bool] = True
    """At capacity 1, with its gate at 1, the model is the dense one."""

    # ---- configuration

    def check(self) -> None:
        """Fills in what was left out. Raises ConfigError for what cannot be."""

    def check_shape(self, shape: Shape) -> None:
        """Raises ConfigError for a model on which this kind cannot run."""

    def check_run(self, *, pipeline: int, compile: bool, documents: bool) -> None:
        """Raises ConfigError for a way of running that this kind does not have: pipeline stages, training.compile,
        data.document_mask."""
        if compile and self.varies:
            raise ConfigError("training.compile", True, f"false with {self.describe()}: any number of tokens is taken")

    def layer_types(self, num_layers: int) -> list[str]:
        """The type of each layer, first to last."""
        raise NotImplementedError

    # ---- what it does

    @property
    def share(self) -> float:
        """Share of tokens that a routed layer is planned to take."""
        return 1.0

    @property
    def holds_share(self) -> bool:
        """Whether something holds routed layers to `share`: top-k, or a controller."""
        return True

    @property
    def has_signed_gate(self) -> bool:
        """Whether gates are any numbers, not shares in [0, 1]."""
        return False

    @property
    def settling_steps(self) -> int:
        """Steps after which its averages and warm-ups have settled."""
        return 0

    @property
    def varies(self) -> bool:
        """How many tokens a layer takes follows from the tokens, not from the configuration."""
        return False

    @property
    def has_topk(self) -> bool:
        """Whether training chooses by top-k, so that a causal rule must stand in for it in use."""
        return False

    @property
    def uses_threshold(self) -> bool:
        """Whether layers keep a running threshold."""
        return False

    def describe(self) -> str:
        """In a few words, for log lines and headings: `mod at capacity 0.125`."""
        return self.name

    def explain(self, measured: Mapping[str, float]) -> str:
        """How tokens are chosen in training and in use, for the model card; `measured`: means over layers of the last report."""
        return self.sentence

    # ---- export

    def to_export(self, shape: Shape) -> dict[str, Any]:
        """`routing` in config.json."""
        module = {} if self.kind == self.name else {"module": self.kind}
        return {"kind": self.name, **module, **{key: getattr(self, key) for key in self.recorded}}

    @classmethod
    def from_export(cls, routing: Mapping[str, Any], layer_types: list[str]) -> Self:
        """The configuration that `routing` of a config.json describes. Raises ConfigError for what cannot be."""
        if cls.scores and routing.get("score", cls.scores[0]) not in cls.scores:
            raise ConfigError("routing.score", routing["score"], f"{cls.scores[-1]}, or {cls.scores[0]} in older exports")
        values = {key: routing[key] for key in cls.recorded if key in routing}
        return cls(kind=routing.get("module", cls.name), **values)

    def sizes(self, shape: Shape) -> dict[str, Any]:
        """What beside the layer types decides which tensors there are: key of the configuration -> what follows from it."""
        return {}

    # ---- costs of a layer

    def flops(self, layer: str, shape: Shape, length: int, share: float | None = None) -> LayerFlops:
        """Forward operations of a layer of type `layer` on a sequence of `length` tokens, of which it takes `share` (measured;
        as planned if None)."""
        return flops_of_layer(shape, length)

    def parameters(self, layer: str, shape: Shape) -> int:
        """Parameters beyond the block's, whole on every tensor rank."""
        return 0

    def kept(self, layer: str, work: Workload) -> Kept:
        """Bytes that a layer keeps for its backward pass, on one micro-batch."""
        return dense_kept(work)

    def summed(self, layer: str, work: Workload) -> float:
        """Share of a micro-batch's hidden states that tensor ranks sum, after attention and again after the feed-forward."""
        return 1.0


@dataclass
class Capped(Kind):
    """Base of kinds whose routed layers take the k = max(1, floor(capacity T)) best tokens of each sequence, by some score."""

    capacity: float | None = None
    """Share of each sequence's tokens that a routed layer takes under top-k, in (0, 1]."""

    default_capacity: ClassVar[float] = 0.5
    recorded: ClassVar[tuple[str, ...]] = ("capacity",)

    def check(self) -> None:
        if self.capacity is None:
            self.capacity = self.default_capacity
        in_range("model.routing.capacity", self.capacity, 0, 1)

    @property
    def rule(self) -> str:
        """The causal rule that stands in for top-k, one of `rules`."""
        return self.rules[0]

    @property
    def share(self) -> float:
        assert self.capacity is not None, "checked"
        return self.capacity

    @property
    def has_topk(self) -> bool:
        return True

    @property
    def uses_threshold(self) -> bool:
        return self.rule == "threshold"

    def describe(self) -> str:
        return f"{self.name} at capacity {self.capacity}"

    def explain(self, measured: Mapping[str, float]) -> str:
        agreed = ""
        if "causal_agreement" in measured:
            agreed = f" At the end of training the two agreed on {measured['causal_agreement']:.1%} of the choices."
        return (f"{self.sentence}\n\n"
                f"**In training** a routed layer takes exactly the {self.share:.1%} of a sequence's tokens with the highest "
                f"scores (top-k), which looks at the whole sequence. **In use** `config.routing_mode = \"causal\"`, the default, "
                f"looks at no later token: {RULES[self.rule]} (`{self.rule}`).{agreed}\n\n"
                "`routing_mode = \"topk\"` scores whole texts as in training. It has no cache, and its choice depends on all "
                "tokens of a row: padding needs an `attention_mask`, and tools that give none (lm_eval) need a batch of one.")

    def taken(self, length: int, share: float | None) -> float:
        """Tokens of a sequence that a routed layer takes: the measured share of it, or top-k's count."""
        return capacity_count(self.share, length) if share is None else share * length

    def summed_if_skipping(self, work: Workload) -> float:
        """`summed` of a layer whose whole block is skipped by the tokens not chosen. Under sequence parallelism the chosen are
        summed once more, when they come together from the parts."""
        return self.share * (1.5 if work.sequence else 1.0)


@dataclass
class TopK(Capped):
    """Base of kinds whose scores are learned, so that a causal rule for them must be learned too."""

    causal: str | None = None
    """The rule that stands in for top-k where the future is unknown: `threshold` (a running average of the lowest score that
    top-k took), `predictor` (a small network trained to tell top-k's choice), or another that the kind has."""
    threshold_momentum: float = 0.99
    """Momentum, per training step, of the running average that becomes the threshold."""
    predictor_loss_weight: float = 0.01
    """Weight of the predictor's binary cross-entropy against the top-k choice; it reaches the predictor alone."""
    choose: str = "topk"
    """How training chooses: `topk`, or `threshold`: each token whose score reaches the threshold that use goes by, which follows
    so that a share `capacity` of all tokens does (arXiv 2603.11535)."""
    threshold_start: int | None = None
    """With `choose: threshold`: steps of top-k before it (default 100)."""
    safe_min: float | None = None
    """With `choose: threshold`, in training: at least this share of each sequence is taken (default: half the capacity)."""
    safe_max: float | None = None
    """With `choose: threshold`, in training: at most this share of each sequence is taken (default: twice the capacity)."""

    rules: ClassVar[tuple[str, ...]] = ("threshold", "predictor")
    recorded: ClassVar[tuple[str, ...]] = (*Capped.recorded, "causal", "threshold_momentum", "choose")

    def check(self) -> None:
        super().check()
        if self.causal is None:
            self.causal = self.rules[0]
        one_of(f"model.routing.causal with model.routing.kind = {self.kind}", self.causal, self.rules)
        if not 0 <= self.threshold_momentum < 1:
            raise ConfigError("model.routing.threshold_momentum", self.threshold_momentum, "in [0, 1)")
        at_least("model.routing.predictor_loss_weight", self.predictor_loss_weight, 0)
        one_of("model.routing.choose", self.choose, ("topk", "threshold"))
        if self.by_threshold:
            self._check_threshold()
            return
        for key in ("threshold_start", "safe_min", "safe_max"):
            if getattr(self, key) is not None:
                raise ConfigError(f"model.routing.{key}", getattr(self, key), "left out unless model.routing.choose is threshold")

    def _check_threshold(self) -> None:
        if self.causal != "threshold":
            raise ConfigError("model.routing.causal", self.causal, "threshold with model.routing.choose = threshold")
        at_least("model.routing.threshold_start", self.threshold_start, 0)
        least, most = self.guards
        if not 0 <= least <= self.share:
            raise ConfigError("model.routing.safe_min", least, f"in [0, model.routing.capacity = {self.share}]")
        if not self.share <= most <= 1:
            raise ConfigError("model.routing.safe_max", most, f"in [model.routing.capacity = {self.share}, 1]")

    @property
    def by_threshold(self) -> bool:
        """Whether training goes by the threshold too, after its first steps."""
        return self.choose == "threshold"

    @property
    def start(self) -> int:
        """Steps of top-k before the threshold."""
        return 100 if self.threshold_start is None else self.threshold_start

    @property
    def guards(self) -> tuple[float, float]:
        """The least and the largest share of a sequence that training takes by threshold."""
        least = self.share / 2 if self.safe_min is None else self.safe_min
        return least, min(1.0, 2 * self.share) if self.safe_max is None else self.safe_max

    @property
    def varies(self) -> bool:
        return self.by_threshold

    @property
    def has_topk(self) -> bool:
        return not self.by_threshold

    def describe(self) -> str:
        return f"{super().describe()}{', by threshold' if self.by_threshold else ''}"

    def explain(self, measured: Mapping[str, float]) -> str:
        if not self.by_threshold:
            return super().explain(measured)
        seen = ""
        if "routed_fraction" in measured:
            seen = f" At the end of training {measured['routed_fraction']:.1%} of tokens did."
        return (f"{self.sentence}\n\nIn training, after {self.start} steps of top-k, and in use alike a token is processed if "
                f"its score reaches the layer's threshold, which training moved so that {self.share:.1%} of all tokens do "
                f"(arXiv 2603.11535).{seen} In training alone a sequence gave at least {self.guards[0]:.1%} and at most "
                f"{self.guards[1]:.1%} of its tokens. There is one routing mode: `topk` and `causal` are the same.")

    @property
    def rule(self) -> str:
        assert self.causal is not None, "checked"
        return self.causal

    @property
    def settling_steps(self) -> int:
        return math.ceil(1 / (1 - self.threshold_momentum))

    def sizes(self, shape: Shape) -> dict[str, Any]:
        return {"model.routing.causal": "a predictor" if self.causal == "predictor" else "no predictor"}

    def predictor_flops(self, shape: Shape, length: int) -> float:
        return router_flops(shape, length) if self.causal == "predictor" else 0.0

    def predictor_parameters(self, shape: Shape) -> int:
        d = shape.hidden_size
        return d * (d // 2) + d // 2 if self.causal == "predictor" else 0

    def predictor_kept(self, work: Workload) -> float:
        """The predictor reads the layer's input."""
        return work.part * work.bytes * work.model.hidden_size * (self.causal == "predictor")


RULES = {
    "threshold": "a token is processed if its score reaches a threshold, the running average in training of the lowest score "
                 "that top-k took",
    "predictor": "a small network, trained to tell which tokens top-k takes, decides for each token alone",
    "bce": "a token is processed if its score, trained by cross-entropy against top-k's choice, is above 0",
    "sign": "a token is processed if its score is above 0",
}
"""Causal rules of `routing/choice.py`, in words."""


@dataclass
class Laid(Kind):
    """Base of kinds whose routed layers may stand anywhere: `layout` says where. Mixed in after another base."""

    layout: str | None = None
    """Which layers are routed: `bilayer` (every second; the default), `zero_attn` (all), `four_attn` (all but 1, 2, L/2,
    L/2 + 1), or a pattern of T (dense) and D (routed) such as `TDTD` or `T2D14`."""

    fixed: ClassVar[dict[str, str]] = {"layout": "it decides which layers have a router"}

    def layer_types(self, num_layers: int) -> list[str]:
        pattern = expand_layout("bilayer" if self.layout is None else self.layout, num_layers)
        (routed,) = self.layers
        return [DENSE if letter == "T" else routed for letter in pattern]

    def check_shape(self, shape: Shape) -> None:
        super().check_shape(shape)
        if set(shape.layer_types) == {DENSE}:
            raise ConfigError("model.routing.layout", self.layout, f"one with a routed layer (D) among {shape.num_layers}")

    @classmethod
    def from_export(cls, routing: Mapping[str, Any], layer_types: list[str]) -> Self:
        kind = super().from_export(routing, layer_types)
        kind.layout = "".join("T" if layer == DENSE else "D" for layer in layer_types)
        return kind


def expand_layout(layout: str, num_layers: int) -> str:
    """A layout as one letter per layer: T dense, D routed. ConfigError unless it describes `num_layers` layers."""
    half = num_layers // 2
    named = {"bilayer": ("TD" * num_layers)[:num_layers], "zero_attn": "D" * num_layers,
             "four_attn": "".join("T" if i in (0, 1, half - 1, half) else "D" for i in range(num_layers))}
    if layout in named:
        return named[layout]
    runs = [(letter, int(count or 1)) for letter, count in re.findall(r"([TD])(\d{0,6})", layout)]
    pattern = "".join(letter * min(count, num_layers + 1) for letter, count in runs)
    if not re.fullmatch(r"([TD]\d{0,6})+", layout) or len(pattern) != num_layers:
        raise ConfigError("model.routing.layout", layout, f"{', '.join(named)}, or letters T and D with counts, such as T2D14, "
                          f"for model.num_layers = {num_layers} layers")
    return pattern
