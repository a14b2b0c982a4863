"""Configuration of an exported megadyn model. Stand-alone: shipped beside the weights, imports nothing of megadyn.

Qwen2's fields, and thirteen of its own:

    attention_output_bias
                    whether the output projection of attention has a bias; `attention_bias` is of queries, keys and values
    final_logit_softcapping
                    bound c of the logits, which become c tanh(logits / c), as in Gemma 2; null: none
    qk_norm         whether queries and keys pass an RMSNorm over each head, as in Qwen3
    no_rope_layers  per layer, as in SmolLM3: 1 where queries and keys turn to their positions, 0 where they do not; null: all do

    sliding_window  positions of its text that a token sees, its own included; null: all. Places count, not the tokens that a
                    routed layer kept
    sliding_layers  per layer: 1 where attention has the sliding window, 0 where it does not; null: all have it, if there is one

    normalization   where the RMSNorms stand: `pre` (before attention and feed-forward); `lns` (there too, divided by the
                    square root of the layer's number); `hybridnorm` (on queries, keys and values, and after attention)
    routing_mode    how routed layers choose their tokens: `causal` (usable for generation) or `topk`
    routing_static  whether every call has the same shapes whatever layers choose, and reads nothing on the host, as torch.compile
                    and CUDA graphs need: a layer then runs every row, and saves no work. Without it only decoding steps
                    with a static cache do so
    routed_layer_types
                    per layer: `dense`; for dtf `dtf_decision` or `dtf_dynamic` (a decision and its dynamic layer are
                    neighbours); for mod `mod`; for dtrnet `dtrnet`. Older exports call this field `layer_types`, which is
                    read still; transformers keeps that name for kinds of attention, all of which are full here
    document_mask   whether the model was trained with several documents in a sample, each of which attends to itself alone;
                    the model then masks its input the same way. Top-k still counts over the whole sample
    eod_token_id    the token that ends a document; needed with `document_mask`
    routing         a dict; keys by its `kind`, the first value of each being the default:
        dense         router_type   none
        dtf           capacity      share of a sequence's tokens that a layer processes under top-k, in (0, 1]
                      ma_window     tokens in the moving average of the static surprise
                      prior_size    inner width of the prior's feed-forward
                      scale_free    whether surprises are divided by the moving average of the static one (default: false)
                      relative_gate whether the gate is divided by its moving average (default: false)
                      gate          score
                      score         gate | log: what ranks tokens and is held against the threshold: G, in exports of
                                    earlier versions, whose weights hold `router.ce_offset`; or r = -log(1 - G), with
                                    `router.ce_log_offset`
                      router_type   surprise
                      causal        threshold | predictor
        mod           capacity      as in dtf
                      gate          sigmoid | identity: what of the router's logit scales the layer's output
                      router_type   linear
                      causal        threshold | predictor | bce
        dtrnet        router_type   token_choice | expert_choice
                      capacity      as in dtf; only expert_choice has it
                      causal        of token_choice: token_choice; of expert_choice: threshold
                      score         of expert_choice, what its thresholds are of: probability (exports that do not say) | logit,
                                    the difference of the logits of attending and bypassing
    Any other key of `routing` is a record of the training run and changes nothing here.
"""

from collections.abc import Callable
from dataclasses import field
from typing import Any, NamedTuple, cast

from huggingface_hub.dataclasses import strict
from transformers import PretrainedConfig

NORMALIZATIONS = ("pre", "lns", "hybridnorm")

ROUTING_MODES = ("causal", "topk")


class Router(NamedTuple):
    """What the keys of `routing` must be."""

    required: tuple[str, ...] = ()  # numbers that the weights alone do not tell
    choices: dict[str, tuple[str, ...]] = {}  # keys with a fixed set of values; the first is the default
    flags: tuple[str, ...] = ()  # keys that are true or false, the default


class ExportedKind(NamedTuple):
    """What a kind of routing brings to an exported model."""

    layers: dict[str, type]
    """Its own types of layer, beside `dense`."""
    routers: dict[str, Router]
    """By `router_type`, whose default is the first."""
    check_types: Callable[[list[str]], None] | None = None
    """Raises ValueError for an order of layer types that cannot be."""
    convert: Callable[[Any], None] | None = None
    """Gives a model of an earlier version, just loaded, today's form."""
    convert_state: Callable[..., None] | None = None
    """The same for weights alone: a hook before `load_state_dict`."""


def one_of(name: str, got: object, allowed: tuple[str, ...]) -> None:
    if got not in allowed:
        raise ValueError(f"{name} = {got!r}: must be one of {', '.join(allowed)}")


ROPE_NUMBERS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}
"""By `rope_type`: what must be given, each a number above 0."""


def check_rotary(rope_parameters: dict[str, Any] | None, head_dim: int | None) -> None:
    rope = rope_parameters or {}
    rope_type = rope.get("rope_type")
    one_of("rope_parameters.rope_type", rope_type, tuple(ROPE_NUMBERS))
    for key in ROPE_NUMBERS[cast(str, rope_type)]:
        if type(rope.get(key)) not in (int, float) or rope[key] <= 0:
            raise ValueError(f"rope_parameters.{key} = {rope.get(key)!r}: must be a number above 0")
    if rope.get("truncate") is False:
        raise ValueError("rope_parameters.truncate = False: must be left out, or true")
    if rope.get("partial_rotary_factor") not in (None, 1):
        raise ValueError("rope_parameters.partial_rotary_factor: must be left out, or 1")
    if rope_type == "dynamic" and (head_dim or 0) < 4:
        raise ValueError(f"head_dim = {head_dim}: must be at least 4 with rope_type = 'dynamic'")


def check_number(key: str, value: Any) -> None:
    if key == "capacity":
        if type(value) not in (int, float) or not 0 < value <= 1:
            raise ValueError(f"routing.capacity = {value!r}: must be a number in (0, 1]")
    elif type(value) is not int or value < (least := 0 if key == "seed" else 1):
        raise ValueError(f"routing.{key} = {value!r}: must be a whole number, at least {least}")


def kind_of(routing: dict[str, Any]) -> ExportedKind:
    """The kind's own part. Imported here, because its layers import this file."""
    from .routing_of import exported_kind

    return exported_kind(routing)


def check_routing(routing: dict[str, Any]) -> dict[str, Any]:
    """`routing` with its defaults filled in; ValueError for what this file cannot run."""
    kind: str = routing.get("kind", "")
    routers = kind_of(routing).routers
    router_type: str = routing.get("router_type", next(iter(routers)))
    one_of(f"routing.router_type with routing.kind = {kind}", router_type, tuple(routers))
    router = routers[router_type]
    what = f"routing.kind = {kind} with router_type = {router_type}"
    if missing := [key for key in router.required if key not in routing]:
        raise ValueError(f"routing.{missing[0]} is missing: {what} needs {', '.join(router.required)}")
    for key, allowed in router.choices.items():
        one_of(f"routing.{key} with router_type = {router_type}", routing.get(key, allowed[0]), allowed)
    for key in router.required:
        check_number(key, routing[key])
    for key in router.flags:
        if type(routing.get(key, False)) is not bool:
            raise ValueError(f"routing.{key} = {routing[key]!r}: must be true or false")
    defaults = {key: allowed[0] for key, allowed in router.choices.items()} | dict.fromkeys(
        router.flags, False
    )
    return {"router_type": router_type} | defaults | routing


def has_topk(routing: dict[str, Any]) -> bool:
    """Whether layers can choose by top-k; where they cannot, the two routing modes are one."""
    return (
        "capacity" in kind_of(routing).routers[routing["router_type"]].required
        and routing.get("choose") != "threshold"
    )


def check_layer_types(layer_types: list[str], routing: dict[str, Any], num_layers: int) -> None:
    name, kind = "routed_layer_types", kind_of(routing)
    if len(layer_types) != num_layers:
        raise ValueError(f"{name} has {len(layer_types)} entries, but num_hidden_layers = {num_layers}")
    for i, layer_type in enumerate(layer_types):
        one_of(f"{name}[{i}] with routing.kind = {routing['kind']}", layer_type, ("dense", *kind.layers))
    if kind.check_types is not None:
        kind.check_types(layer_types)


def layer_types_of(routed_layer_types: list[str], layer_types: list[str] | None) -> list[str]:
    """`routed_layer_types`, or what an older export has in their place under transformers' name `layer_types`.

    That name may also hold transformers' own value for this model, which says nothing. ValueError if it says anything else.
    """
    if not layer_types or set(layer_types) == {"full_attention"}:
        return routed_layer_types
    if routed_layer_types and list(routed_layer_types) != list(layer_types):
        raise ValueError(
            f"layer_types = {layer_types!r}: must be left out, because routed_layer_types has other values"
        )
    return layer_types


@strict
class MegadynConfig(PretrainedConfig):
    """Fields as in Qwen2Config unless the module's docstring has them; `rope_theta` may stand at the top level too."""

    model_type = "megadyn"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 32000
    hidden_size: int = 512
    intermediate_size: int = 1408
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 1024
    rope_parameters: dict[str, Any] | None = None
    """Filled in from `rope_theta` (else 10000) if left out."""
    rms_norm_eps: float = 1e-6
    attention_bias: bool = False
    """Whether q, k and v have a bias."""
    attention_output_bias: bool = False
    qk_norm: bool = False
    final_logit_softcapping: float | None = None
    no_rope_layers: list[int] | None = None
    sliding_window: int | None = None
    sliding_layers: list[int] | None = None
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    normalization: str = "pre"
    routing_mode: str = "causal"
    routing_static: bool = False
    routed_layer_types: list[str] = field(default_factory=list)
    """May be left out if all layers are dense."""
    document_mask: bool = False
    eod_token_id: int | None = None
    routing: dict[str, Any] = field(default_factory=lambda: {"kind": "dense"})

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        self.routing = check_routing(self.routing)
        self.routed_layer_types = layer_types_of(self.routed_layer_types, kwargs.pop("layer_types", None))
        if self.routing["kind"] == "dense":
            self.routed_layer_types = self.routed_layer_types or ["dense"] * self.num_hidden_layers
        super().__post_init__(**kwargs)
        one_of("hidden_act", self.hidden_act, ("silu",))
        one_of("normalization", self.normalization, NORMALIZATIONS)
        one_of("routing_mode", self.routing_mode, ROUTING_MODES)
        check_rotary(self.rope_parameters, self.head_dim)
        if self.qk_norm and self.normalization == "hybridnorm":
            raise ValueError(
                "qk_norm = True: must be false with normalization = 'hybridnorm', which has these norms"
            )
        cap = self.final_logit_softcapping
        if cap is not None and not cap > 0:
            raise ValueError(f"final_logit_softcapping = {cap}: must be above 0, or null for no cap")
        if self.sliding_layers is not None and self.sliding_window is None:
            raise ValueError(f"sliding_layers = {self.sliding_layers}: needs sliding_window")
        for name in ("no_rope_layers", "sliding_layers"):
            per_layer = getattr(self, name)
            if per_layer is not None and len(per_layer) != self.num_hidden_layers:
                raise ValueError(
                    f"{name} has {len(per_layer)} entries, but num_hidden_layers = {self.num_hidden_layers}"
                )
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(f"sliding_window = {self.sliding_window}: must be at least 1, or null")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads = {self.num_key_value_heads}: must divide "
                f"num_attention_heads = {self.num_attention_heads}"
            )
        self.validate_routed_layers()
        self.validate_documents()

    def validate_routed_layers(self) -> None:
        """Called by transformers on saving too."""
        check_layer_types(self.routed_layer_types, self.routing, self.num_hidden_layers)

    def validate_documents(self) -> None:
        if self.document_mask and self.eod_token_id is None:
            raise ValueError("document_mask = True: needs eod_token_id, the token that ends a document")


MegadynConfig.register_for_auto_class("AutoConfig")
