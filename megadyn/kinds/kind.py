"""The interface of a kind of routing: its keys in `model.routing`, and everything that other packages need from it. No torch.

A kind is one folder, a package:

    __init__.py    KIND, a dataclass derived from Kind: its fields are the keys of the configuration
    layers.py      the training layers, found by the names in KIND.layers
    exported.py    the same layers stand-alone, shipped with exported weights as routing_<name>.py
    README.md      the mathematics, with sources

Nothing else in megadyn names a kind. `model.routing` of a checked configuration is an instance of the kind's class, so
code that has a model uses `model.routing` and needs no registry.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from megadyn.checks import in_range
from megadyn.costs.memory import Kept, Workload, dense_kept
from megadyn.costs.operations import LayerFlops, flops_of_layer
from megadyn.costs.shape import Shape
from megadyn.errors import ConfigError

SHAPES = "it determines the shapes of the saved tensors"
TRAINED_SO = "the saved weights were trained with it and are useless with another value"
"""Reasons why a resumed run may not change a key."""
DENSE = "dense"
"""The layer type that every kind may use in addition to its own: the whole layer processes every token."""


@dataclass
class Kind:
    """Base class of all kinds; its defaults are those of a dense model.

    Class attributes describe the kind to people and to other packages; fields are keys of `model.routing`. Sizes of a
    model are passed as a `Shape`; a layer is identified by its type, one of `layer_types`.
    """

    kind: str = ""
    """Which kind of routing: `dense`, one of the folders in `megadyn/kinds`, the name of an entry point in the group
    `megadyn.kinds`, or the path of a Python package (`package.module`) that holds a kind."""

    name: ClassVar[str]
    """The value of `model.routing.kind`; exports contain `routing_<name>.py`."""
    title: ClassVar[str]
    """For model cards and reports: `Mixture-of-Depths`."""
    sentence: ClassVar[str]
    """What a routed layer does, for model cards and reports."""
    sources: ClassVar[tuple[str, ...]] = ()
    """Papers: `arXiv 2404.02258`."""
    tags: ClassVar[tuple[str, ...]] = ()
    """Tags of the model card."""
    verb: ClassVar[str] = "was processed"
    """Completes "a token that a routed layer took ..."."""
    legend: ClassVar[Mapping[str, str]] = {}
    """The kind's own statistics, for the report: name in the metrics -> description."""
    layers: ClassVar[Mapping[str, str]] = {}
    """Layer type -> class in `layers.py`."""
    scores: ClassVar[tuple[str, ...]] = ()
    """Score on which thresholds are defined (`routing.score` in exports): that of older exports, which may leave the
    key out, and the current one. Empty if it never changed."""
    totals: ClassVar[tuple[str, ...]] = ()
    """Names of its layers' trackers that need their sum over all layers of the model."""
    recorded: ClassVar[tuple[str, ...]] = ()
    """Keys that an export's `config.json` contains."""
    fixed: ClassVar[dict[str, str]] = {}
    """Keys that a run may not change when it resumes from a checkpoint: key -> reason."""
    shared: ClassVar[tuple[str, ...]] = ()
    """Files of `megadyn/hf` that its `exported.py` imports, in addition to those in every export."""
    rules: ClassVar[tuple[str, ...]] = ()
    """Causal rules that can replace top-k; the first is the default."""
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Settings that the conformance suite tests in addition to the defaults and the causal rules: name -> keys."""
    straight_through: ClassVar[bool] = False
    """Whether its routers' gradients intentionally differ from those of the loss."""
    held_in_mean: ClassVar[bool] = False
    """Whether `share` is an average over all routed layers; one layer may take more than another."""
    gate_is_chance: ClassVar[bool] = False
    """Whether the gate in its statistics is the probability that a token is chosen, and multiplies nothing."""
    benchmark: ClassVar[str] = ""
    """Default for benchmarks, `NAME:CAPACITY`; empty: just its name."""
    equals_dense: ClassVar[bool] = True
    """Whether the model equals the dense one at capacity 1 with a gate of 1."""

    # ---- configuration

    def check(self) -> None:
        """Fills in defaults. Raises ConfigError for invalid values."""

    def check_shape(self, shape: Shape) -> None:
        """Raises ConfigError for a model that this kind does not support."""

    def check_run(self, *, pipeline: int, documents: bool) -> None:
        """Raises ConfigError for run settings that this kind does not support: pipeline stages, data.document_mask."""

    def layer_types(self, num_layers: int) -> list[str]:
        """The type of each layer, first to last."""
        raise NotImplementedError

    # ---- behaviour

    @property
    def share(self) -> float:
        """Planned share of tokens that a routed layer takes."""
        return 1.0

    @property
    def has_capacity(self) -> bool:
        """Whether the key `capacity` sets `share`, so that a run may anneal it."""
        return False

    @property
    def holds_share(self) -> bool:
        """Whether top-k or a controller keeps routed layers at `share`."""
        return True

    @property
    def has_signed_gate(self) -> bool:
        """Whether gates can be any number, not only values in [0, 1]."""
        return False

    @property
    def settling_steps(self) -> int:
        """Steps until its averages and warm-ups have settled."""
        return 0

    @property
    def varies(self) -> bool:
        """Whether the number of tokens that a layer takes depends on the tokens, not only on the configuration."""
        return False

    @property
    def has_topk(self) -> bool:
        """Whether training chooses by top-k, so that use needs a causal rule."""
        return False

    @property
    def uses_threshold(self) -> bool:
        """Whether layers keep a running threshold."""
        return False

    def describe(self) -> str:
        """A short description for log lines and headings: `mod at capacity 0.125`."""
        return self.name

    def explain(self, measured: Mapping[str, float]) -> str:
        """Model card text on how tokens are chosen in training and in use. `measured`: means over layers of the last report."""
        return self.sentence

    # ---- export

    def to_export(self, shape: Shape) -> dict[str, Any]:
        """The `routing` entry of config.json."""
        module = {} if self.kind == self.name else {"module": self.kind}
        return {"kind": self.name, **module, **{key: getattr(self, key) for key in self.recorded}}

    @classmethod
    def from_export(cls, routing: Mapping[str, Any], layer_types: list[str]) -> Self:
        """The configuration described by `routing` of a config.json. Raises ConfigError for invalid values."""
        if cls.scores and routing.get("score", cls.scores[0]) not in cls.scores:
            raise ConfigError(
                "routing.score", routing["score"], f"{cls.scores[-1]}, or {cls.scores[0]} in older exports"
            )
        values = {key: routing[key] for key in cls.recorded if key in routing}
        return cls(kind=routing.get("module", cls.name), **values)

    def sizes(self, shape: Shape) -> dict[str, Any]:
        """What determines the model's tensors apart from the layer types: key of the configuration -> its effect."""
        return {}

    # ---- costs of a layer

    def flops(self, layer: str, shape: Shape, length: int, share: float | None = None) -> LayerFlops:
        """Forward operations of a layer of type `layer` on a sequence of `length` tokens, of which it takes the
        measured `share` (None: the planned share)."""
        return flops_of_layer(shape, length)

    def parameters(self, layer: str, shape: Shape) -> int:
        """Parameters in addition to the block's; they are not cut over tensor ranks."""
        return 0

    def kept(self, layer: str, work: Workload) -> Kept:
        """Bytes that a layer keeps for backward, for one micro-batch."""
        return dense_kept(work)

    def summed(self, layer: str, work: Workload) -> float:
        """Share of a micro-batch's hidden states that is all-reduced over tensor ranks, after attention and again after
        the MLP."""
        return 1.0


@dataclass
class OwnChoice(Kind):
    """Base of kinds whose tokens choose for themselves, by the same rule in training and in use. Training keeps the
    share of chosen tokens at `capacity`, a key for which each kind declares its own default."""

    capacity: float = 0.5
    """Share of tokens that a routed layer should take."""

    recorded: ClassVar[tuple[str, ...]] = ("capacity",)

    def check(self) -> None:
        in_range("model.routing.capacity", self.capacity, 0, 1)

    @property
    def share(self) -> float:
        return self.capacity

    @property
    def has_capacity(self) -> bool:
        return True

    @property
    def varies(self) -> bool:
        return True

    def describe(self) -> str:
        return f"{self.name} at capacity {self.capacity}"

    def taken(self, length: int, share: float | None) -> float:
        """Tokens of a sequence that a routed layer takes, at the measured share or, if None, the planned one."""
        return (self.capacity if share is None else share) * length
