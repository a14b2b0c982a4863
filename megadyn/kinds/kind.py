"""What a kind of routing is: the keys that `model.routing` has for it, and all that the rest of the house asks of it. No torch.

A kind is one folder, a package:

    __init__.py    KIND, a dataclass derived from Kind: its fields are the keys of the configuration
    layers.py      the training layers, found by the names in KIND.layers
    exported.py    the same layers stand-alone, shipped beside exported weights as routing_<name>.py
    README.md      the mathematics, with sources

Nothing else in megadyn names a kind. `model.routing` of a checked configuration is an instance of the kind's class, so whoever
has a model asks `model.routing` and needs no registry.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from megadyn.checks import in_range
from megadyn.costs.memory import Kept, Workload, dense_kept
from megadyn.costs.operations import LayerFlops, flops_of_layer
from megadyn.costs.shape import Shape
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
    held_in_mean: ClassVar[bool] = False
    """`share` is that of all routed layers together; one layer may take more than another."""
    gate_is_chance: ClassVar[bool] = False
    """The gate in its statistics is the probability that a token is chosen, and multiplies nothing."""
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
            raise ConfigError(
                "training.compile",
                True,
                f"false with {self.describe()}: the number of tokens that a layer takes varies",
            )

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
            raise ConfigError(
                "routing.score", routing["score"], f"{cls.scores[-1]}, or {cls.scores[0]} in older exports"
            )
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
class OwnChoice(Kind):
    """Base of kinds whose tokens each choose for themselves, by one rule in training and in use. Training holds the share that is
    taken to `capacity`, a key that each of them declares with its own default."""

    capacity: float = 0.5
    """Share of tokens that a routed layer is to take."""

    recorded: ClassVar[tuple[str, ...]] = ("capacity",)

    def check(self) -> None:
        in_range("model.routing.capacity", self.capacity, 0, 1)

    @property
    def share(self) -> float:
        return self.capacity

    @property
    def varies(self) -> bool:
        return True

    def describe(self) -> str:
        return f"{self.name} at capacity {self.capacity}"

    def taken(self, length: int, share: float | None) -> float:
        """Tokens of a sequence that a routed layer takes: the measured share of it, or the planned one."""
        return (self.capacity if share is None else share) * length
