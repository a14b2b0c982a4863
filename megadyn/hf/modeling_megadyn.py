"""The exported model: a Qwen2-style transformer whose routed layers process only some of the tokens.

Stand-alone: ships with the weights and `configuration_megadyn.py`; imports nothing from megadyn. The mathematics
is in megadyn's docs/routing.md; sources: the DTF thesis ("Dynamic Transformers", eqs. 3.1-3.13), Mixture-of-Depths
(arXiv 2404.02258), DTRNet (2509.00925), LayerNorm Scaling (2502.05795), HybridNorm (2503.04598), Qwen2.

The main idea of this file: tokens are PACKED. On entry, each row's real tokens are shifted to the left, which removes
the padding. Each routed layer shifts its chosen tokens to the left again. In a packed row plain causal attention is
correct whichever tokens were left out, because each token keeps its original position for RoPE. A layer's cache holds
the packed tokens of each row: those that the layer processed, and nothing for the others.

A row may hold several texts. SEQUENCES of a padding-free batch (`position_ids` that start again, `cu_seq_lens_q`, `seq_idx`)
are independent: each is computed as if it were alone. DOCUMENTS (`config.document_mask`, for models trained with it) end with
`eod_token_id` and are parts of one sequence: attention and averages stay within a document, but top-k spans the sequence.

Layers that every kind of routing shares are in `layers_megadyn.py`; those of this model's kind in `routing_<kind>.py`. Packing is
in `packing_megadyn.py`, rotary positions in `rope_megadyn.py`, the caches in `cache_megadyn.py` (over `room_megadyn.py`) and
`static_megadyn.py`, what is made of a call's arguments in `inputs_megadyn.py`, and the side of `generate` in
`generation_megadyn.py`.
"""

# Dims: B rows, T columns as given, C packed columns, D hidden, H query heads, G key/value heads, K head size,
#       P packed tokens in a layer's cache, W moving-average window, L columns seen so far.

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from .cache_megadyn import MegadynCache
from .configuration_megadyn import ROUTING_MODES, MegadynConfig, check_rotary, has_topk, one_of
from .generation_megadyn import MegadynGeneration
from .inputs_megadyn import (
    context_of_call,
    mask_of_call,
    refuse_unknown,
    sequences_of_call,
    static_of_call,
    tokens_of_call,
)
from .layers_megadyn import Context, DenseLayer, Float32Module, MegadynRMSNorm, Routing, Stream
from .packing_megadyn import Packed, pack, put_back, take
from .routing_of import exported_kind


@dataclass
class MegadynModelOutput(BaseModelOutputWithPast):
    """`attentions` [B, H, T, L]: with output_attentions, one per layer, over all columns seen so far; 0 for padding."""

    routing: tuple[Tensor, ...] | None = None
    """With output_routing: per layer, bool [B, T], True for tokens that it processed (for dtrnet, that attended)."""
    gates: tuple[Tensor | None, ...] | None = None
    """With output_routing: per layer, float [B, T], the score that chooses tokens, 0 for padding. It is r = -log(1 - G)
    for dtf, the logit for mod, the probability to attend for dtrnet. None for a layer that processes all tokens."""


@dataclass
class MegadynOutput(CausalLMOutputWithPast):
    routing: tuple[Tensor, ...] | None = None
    """As in MegadynModelOutput."""
    gates: tuple[Tensor | None, ...] | None = None
    """As in MegadynModelOutput."""


LOSS_KEYWORDS = ("num_items_in_batch", "ignore_index", "shift_labels")
"""Keywords of transformers' loss function."""


def unpacked_weights(
    weight_BHCP: Tensor, tokens: Packed, keys: Packed, columns: int, past_columns: int
) -> Tensor:
    """Attention weights [B, H, T, L] over the original columns; returns the same tensor if nothing was packed."""
    rows, heads = weight_BHCP.shape[:2]
    total = past_columns + columns
    if min(tokens.known()) == columns and min(keys.known()) == total:
        return weight_BHCP
    index_BHCP = keys.columns()[:, None, None, :].expand_as(weight_BHCP)
    weight_BHCL = weight_BHCP.new_zeros(rows, heads, weight_BHCP.shape[2], total).scatter(
        3, index_BHCP, weight_BHCP
    )
    weight_BCHL = weight_BHCL.transpose(1, 2)
    return put_back(weight_BCHL.new_zeros(rows, columns, heads, total), tokens, weight_BCHL).transpose(1, 2)


class MegadynPreTrainedModel(PreTrainedModel):
    config_class = MegadynConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DenseLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_attention_backend = True

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # a tuple with output_loading_info=True
        convert = exported_kind(model.config.routing).convert
        if convert is not None:
            convert(model)
        return loaded

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Float32Module):
            module.reset(self.config.initializer_range)


class MegadynModel(MegadynPreTrainedModel):
    def __init__(self, config: MegadynConfig) -> None:
        super().__init__(config)
        check_rotary(
            config.rope_parameters, config.head_dim
        )  # it may have been changed since the configuration was made
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        kind = exported_kind(config.routing)
        layers = {"dense": DenseLayer} | kind.layers
        self.layers = nn.ModuleList(
            layers[name](config, i) for i, name in enumerate(config.routed_layer_types, 1)
        )
        self.norm = MegadynRMSNorm(config.hidden_size, config.rms_norm_eps)
        if kind.convert_state is not None:
            self.register_load_state_dict_pre_hook(kind.convert_state)
        routers = {part for name in self.state_dict() for part in name.split(".")} & {
            "router",
            "causal_router",
        }
        self._keep_in_fp32_modules_strict = sorted(routers)
        # Tells quantizers not to touch these modules.
        self._keep_in_fp32_modules = [".*router"] if routers else []
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: MegadynCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        output_routing: bool = False,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
        seq_idx: Tensor | None = None,
        **kwargs: Any,
    ) -> MegadynModelOutput:
        """`attention_mask` [B, past + T] or [B, T] is 0 for padding, on either side; `position_ids` count real tokens.

        Sequences of a padding-free batch, each computed as if alone, are given by `position_ids` that start again; or by
        `cu_seq_lens_q` and `max_length_q` as in FlashAttention (those for k must be equal); or by `seq_idx` [B, T], one number
        per sequence.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        x_BTD = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cache = self.cache_of_call(past_key_values, use_cache, rows=x_BTD.shape[0])
        refuse_unknown(kwargs, cache, x_BTD.shape[1])
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        output_attentions = self.attentions_asked(output_attentions)
        is_static = static_of_call(self.config, cache, x_BTD.shape[1], output_attentions, cu_seq_lens_q)
        given = sequences_of_call(
            (cu_seq_lens_q, cu_seq_lens_k), (max_length_q, max_length_k), seq_idx, x_BTD, cache
        )
        mask_BL = mask_of_call(attention_mask, x_BTD, cache)
        context, call = context_of_call(
            self.config,
            x_BTD,
            tokens_of_call(mask_BL, x_BTD, is_static),
            input_ids,
            position_ids,
            given,
            cache,
            self.topk,
            output_attentions,
        )
        tokens = call.tokens

        def unpacked(x_BC: Tensor) -> Tensor:
            if tokens.index_BC is None and not tokens.is_static:
                return x_BC
            return put_back(x_BC.new_zeros(*x_BTD.shape[:2], *x_BC.shape[2:]), tokens, x_BC)

        if cache is not None:
            cache.make_room(x_BTD.shape[1], is_static)
            cache.begin_call()  # after all checks, so that a refused call does not change the cache
        hidden_states: list[Tensor] | None = [] if output_hidden_states else None
        stream, routings = self._through_layers(x_BTD, tokens, context, cache, unpacked, hidden_states)
        last_hidden_state = unpacked(self.norm(stream.hidden_BCD))
        attentions = (
            self.attentions_of_call(routings, tokens, mask_BL, x_BTD, cache) if output_attentions else None
        )
        routing = gates = None
        if output_routing:
            routing = tuple(unpacked(r.processed_BC) for r in routings)
            gates = tuple(None if r.gate_BC is None else unpacked(r.gate_BC) for r in routings)
        if cache is not None:
            cache.advance(call)
        return MegadynModelOutput(
            last_hidden_state=last_hidden_state,
            past_key_values=cache,
            hidden_states=None if hidden_states is None else (*hidden_states, last_hidden_state),
            attentions=attentions,
            routing=routing,
            gates=gates,
        )

    def _through_layers(
        self,
        x_BTD: Tensor,
        tokens: Packed,
        context: Context,
        cache: MegadynCache | None,
        unpacked: Callable[[Tensor], Tensor],
        hidden_states: list[Tensor] | None,
    ) -> tuple[Stream, list[Routing]]:
        """The stream behind the last layer, and each layer's routing. Adds to `hidden_states` what goes into each layer,
        [B, T, D]."""
        stream, routings = Stream(take(x_BTD, tokens)), []
        for i, layer in enumerate(self.layers):
            if hidden_states is not None:
                hidden_states.append(unpacked(stream.hidden_BCD))
                # continue from the returned tensor, so that its gradients are right
                stream = stream._replace(hidden_BCD=take(hidden_states[-1], tokens))
            stream, routing = layer(stream, context, None if cache is None else cache.layers[i])
            routings.append(routing)
        return stream, routings

    @property
    def topk(self) -> bool:
        """Whether layers choose by top-k. Read at each call, because the mode of a loaded model can be changed."""
        one_of("config.routing_mode", self.config.routing_mode, ROUTING_MODES)
        return self.config.routing_mode == "topk" and has_topk(self.config.routing)

    def attentions_asked(self, given: bool | None) -> bool:
        """Whether this call must return attention weights. Raises ValueError if layers cannot return them."""
        asked = bool(self.config.output_attentions if given is None else given)
        if asked:
            self.check_attentions()
        return asked

    def check_attentions(self) -> None:
        """Raises ValueError if layers cannot return attention weights."""
        if self.config.routing["kind"] != "dense":
            raise ValueError(
                "output_attentions is not supported: routed layers attend among different tokens"
            )
        if self.config._attn_implementation != "eager":
            raise ValueError(
                f"output_attentions needs attn_implementation = 'eager': "
                f"{self.config._attn_implementation!r} returns no weights"
            )

    def attentions_of_call(
        self,
        routings: list[Routing],
        tokens: Packed,
        mask_BL: Tensor | None,
        x_BTD: Tensor,
        cache: MegadynCache | None,
    ) -> tuple[Tensor, ...]:
        """Each layer's attention weights over the original columns. `mask_BL`: see `mask_of_call`."""
        columns, past = x_BTD.shape[1], 0 if cache is None else cache.columns
        if mask_BL is None:
            mask_BL = torch.ones(x_BTD.shape[0], past + columns, dtype=torch.bool, device=x_BTD.device)
        if mask_BL.shape[1] != past + columns:
            raise ValueError(
                f"attention_mask has {mask_BL.shape[1]} columns: with output_attentions it must have {past + columns}, "
                "including those in the cache"
            )
        keys = pack(mask_BL, all_rows=True)
        return tuple(
            unpacked_weights(cast(Tensor, r.weight_BHCP), tokens, keys, columns, past) for r in routings
        )

    def cache_of_call(self, given: Cache | None, use_cache: bool | None, rows: int) -> MegadynCache | None:
        """The given cache, a new one, or None. Top-k routing cannot use a cache, because it looks at the whole sequence."""
        if use_cache is None:
            use_cache = self.config.use_cache and not (
                self.training or self.topk or self.config.routing_static
            )
        if given is None and not use_cache:
            return None
        if self.topk:
            raise ValueError(
                "routing_mode = 'topk' looks at the whole sequence, so it cannot decode with a cache: "
                "pass use_cache=False, or set config.routing_mode = 'causal'"
            )
        cache = MegadynCache(len(self.layers)) if given is None else given
        if not isinstance(cache, MegadynCache):
            raise ValueError(
                f"past_key_values is a {type(cache).__name__}, which cannot hold different tokens in each layer: "
                "leave it out, and the model creates a MegadynCache"
            )
        if not cache.rows:
            cache.begin_rows(rows)
        if cache.rows != rows:
            raise ValueError(f"past_key_values holds {cache.rows} sequences, but the input has {rows}")
        return cache


class MegadynForCausalLM(MegadynPreTrainedModel, MegadynGeneration, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: MegadynConfig) -> None:
        super().__init__(config)
        self.model = MegadynModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: MegadynCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        output_routing: bool = False,
        logits_to_keep: int | Tensor = 0,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
        seq_idx: Tensor | None = None,
        **kwargs: Any,
    ) -> MegadynOutput:
        """`labels` [B, T] are the input ids (-100: ignored). They are shifted here, as everywhere in transformers, unless
        `shift_labels` is given, already shifted. Other arguments as in `MegadynModel.forward`."""
        of_loss = {name: kwargs.pop(name) for name in LOSS_KEYWORDS if name in kwargs}
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            output_routing=output_routing,
            cu_seq_lens_q=cu_seq_lens_q,
            cu_seq_lens_k=cu_seq_lens_k,
            max_length_q=max_length_q,
            max_length_k=max_length_k,
            seq_idx=seq_idx,
            return_dict=True,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        if (cap := self.config.final_logit_softcapping) is not None:
            logits = ((logits.float() / cap).tanh() * cap).to(logits.dtype)
        loss = None
        if labels is not None or of_loss.get("shift_labels") is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **of_loss
            )
        return MegadynOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            routing=outputs.routing,
            gates=outputs.gates,
        )


MegadynModel.register_for_auto_class("AutoModel")
MegadynForCausalLM.register_for_auto_class("AutoModelForCausalLM")
