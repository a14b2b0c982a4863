"""The `model` section of the configuration, with `model.routing`: which layers, and which of them skip tokens."""

import math
from dataclasses import dataclass, field

from megadyn.checks import at_least, in_range, one_of
from megadyn.config.rope import RopeConfig
from megadyn.errors import ConfigError
from megadyn.kinds import DENSE, Kind, make_kind

ATTENTION = {
    "flash": ("flash", "flash"),
    "flash3": ("flash3", "flash3"),
    "cudnn": ("cudnn", "varlen"),
    "varlen": ("sdpa", "varlen"),
    "sdpa": ("sdpa", "sdpa"),
    "flash+flash3": ("flash", "flash3"),
    "flash+varlen": ("flash", "varlen"),
    "flash3+flash": ("flash3", "flash"),
    "flash3+varlen": ("flash3", "varlen"),
    "cudnn+flash": ("cudnn", "flash"),
    "cudnn+flash3": ("cudnn", "flash3"),
    "sdpa+flash": ("sdpa", "flash"),
    "sdpa+flash3": ("sdpa", "flash3"),
}
"""Attention backends: what computes whole rows, and what computes segments."""


def attention_parts(name: str) -> tuple[str, str]:
    """The backends of `WHOLE/CHOSEN`, or of one name twice: for sequences, and for the chosen tokens of sequences."""
    whole, _, chosen = name.partition("/")
    return whole, chosen or whole


@dataclass
class ModelConfig:
    """A Qwen2/Llama-style transformer; `routing` says which of its layers skip tokens."""

    shape_from: str | None = None
    """A Hugging Face folder, or an address on the hub, whose config.json says the shape: sizes, biases, norms, rotary positions
    and, unless they are given here, `max_position` and `init_std`. What else is given here must agree with it. A saved
    configuration has the keys themselves in its place."""
    hidden_size: int = 512
    """Width of the residual stream."""
    num_layers: int = 8
    """Transformer layers, routed ones included."""
    num_heads: int = 8
    """Query heads in each layer."""
    num_kv_heads: int | None = None
    """Key/value heads (grouped-query attention); all heads when left out."""
    head_dim: int | None = None
    """Width of a head; `hidden_size / num_heads` when left out."""
    ffn_size: int | None = None
    """Inner width of the SwiGLU; 8/3 of the hidden size, rounded up to 64, when left out."""
    vocab_size: int | None = None
    """The tokenizer's when left out. Larger is allowed; the excess ids never occur in the data."""
    max_position: int | None = None
    """Longest sequence the model is meant for; `training.sequence_length` when left out."""
    norm_eps: float = 1e-6
    """Added to the mean square in RMSNorm. Change it only to match a model that you start from."""
    qkv_bias: bool = False
    """Whether queries, keys and values have a bias, as in Qwen2.5."""
    output_bias: bool = False
    """Whether the output projection of attention has a bias, as in Llama with `attention_bias`."""
    qk_norm: bool = False
    """Whether queries and keys pass an RMSNorm over each head before they are turned to their positions, as in Qwen3."""
    tie_embeddings: bool = False
    """Whether the output head shares the embedding's weight. Saves parameters in small models with large vocabularies."""
    logit_softcap: float | None = None
    """Bound c of the output logits, which become c tanh(logits / c), as in Gemma 2 (30 there). It keeps logits from growing
    without end; unbounded when left out."""
    init_std: float = 0.02
    """Standard deviation of the normal distribution that weights are drawn from."""
    sliding_window: int | None = None
    """Positions that a token sees in the layers of `window_layers`, its own included: a token sees itself and what stands at most
    `sliding_window` - 1 positions before it in the text, however many tokens of these a routed layer left out. All when left
    out."""
    window_layers: list[int] | None = None
    """Layers, counted from 0, whose attention has the sliding window; all layers when left out."""
    normalization: str = "pre"
    """`pre`; `lns` (pre-norms scaled by 1/sqrt(layer), arXiv 2502.05795); `hybridnorm` (norms on q, k, v and after attention,
    arXiv 2503.04598)."""
    attention: str = "auto"
    """Attention backend: `auto` (on a GPU the fastest, measured at the start), `flash` (the flash-attn package), `flash3`
    (flash-attn 3), `cudnn` (torch's SDPA through cuDNN, segments by `varlen`), `varlen` (torch's own, with its kernels for
    segments of different lengths) or `sdpa`, which runs anywhere. `ROWS+SEGMENTS` takes two, for whole rows and for
    segments, and `WHOLE/CHOSEN` two of all these, for sequences and for the chosen tokens of routed layers: the log names
    such a choice, for example `cudnn+flash` or `cudnn+flash/flash`."""
    routing: Kind = field(default_factory=lambda: make_kind(DENSE))
    """Which layers skip tokens, and how: `kind` and the keys that this kind has (`megadyn/kinds`)."""
    rope: RopeConfig = field(default_factory=RopeConfig)
    """Rotary positions: their base, and how they are stretched to longer contexts."""

    def check(self) -> None:
        if self.shape_from is not None:
            raise ConfigError(
                "model.shape_from", self.shape_from, "in a YAML file, whose loading reads the shape"
            )
        self.rope.check()
        if self.qk_norm and self.normalization == "hybridnorm":
            raise ConfigError(
                "model.qk_norm",
                True,
                "false with model.normalization = hybridnorm, which norms queries and keys too",
            )
        if self.logit_softcap is not None and not 0 < self.logit_softcap < math.inf:
            raise ConfigError("model.logit_softcap", self.logit_softcap, "a number above 0")
        for name in (
            "hidden_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "ffn_size",
            "vocab_size",
            "max_position",
        ):
            at_least(f"model.{name}", getattr(self, name), 1)
        if self.num_kv_heads is None:
            self.num_kv_heads = self.num_heads
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                "model.num_kv_heads", self.num_kv_heads, f"a divisor of model.num_heads = {self.num_heads}"
            )
        if self.head_dim is None:
            if self.hidden_size % self.num_heads:
                raise ConfigError(
                    "model.hidden_size",
                    self.hidden_size,
                    f"a multiple of model.num_heads = {self.num_heads} (or give model.head_dim)",
                )
            self.head_dim = self.hidden_size // self.num_heads
        if self.head_dim % 2:
            raise ConfigError("model.head_dim", self.head_dim, "even, because rotary positions turn pairs")
        if self.ffn_size is None:
            self.ffn_size = math.ceil(self.hidden_size * 8 / 3 / 64) * 64
        one_of("model.normalization", self.normalization, ("pre", "lns", "hybridnorm"))
        self._check_attention()
        in_range("model.norm_eps", self.norm_eps, 0, 1)
        if self.rope.type == "dynamic" and self.head_dim < 4:
            raise ConfigError("model.head_dim", self.head_dim, "at least 4 with model.rope.type = dynamic")
        self.rope.skip_layers = self._layers("model.rope.skip_layers", self.rope.skip_layers)
        self._check_window()
        at_least("model.init_std", self.init_std, 0)
        self.routing.check_shape(self)

    def _check_attention(self) -> None:
        if "/" not in self.attention:
            one_of("model.attention", self.attention, ("auto", *ATTENTION))
            return
        if not set(self.attention.split("/", 1)) <= set(ATTENTION):
            raise ConfigError(
                "model.attention", self.attention, f"WHOLE/CHOSEN, each one of {', '.join(ATTENTION)}"
            )
        if self.routing.name == DENSE:
            raise ConfigError(
                "model.attention", self.attention, "one name: no layer of this model chooses tokens"
            )

    def _check_window(self) -> None:
        at_least("model.sliding_window", self.sliding_window, 1)
        if self.sliding_window is None:
            if self.window_layers is not None:
                raise ConfigError(
                    "model.window_layers", self.window_layers, "null without model.sliding_window"
                )
            return
        if self.window_layers is None:
            self.window_layers = list(range(self.num_layers))
        if not self.window_layers:
            raise ConfigError("model.window_layers", [], "some layers with model.sliding_window")
        self.window_layers = self._layers("model.window_layers", self.window_layers)

    def _layers(self, key: str, layers: list[int]) -> list[int]:
        """`layers` in order. Raises ConfigError if one is none of the model's."""
        if absent := [layer for layer in layers if not 0 <= layer < self.num_layers]:
            raise ConfigError(
                key,
                absent[0],
                f"a layer from 0 to {self.num_layers - 1}, as model.num_layers = {self.num_layers}",
            )
        return sorted(set(layers))

    def window_of(self, layer: int) -> int | None:
        """How many positions a token sees in this layer, its own included; None: all."""
        return self.sliding_window if layer in (self.window_layers or ()) else None

    @property
    def layer_types(self) -> list[str]:
        """What each layer is, first to last."""
        return self.routing.layer_types(self.num_layers)
