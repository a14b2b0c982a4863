"""The exported model: a Qwen2-style transformer whose routed layers process only some of the tokens.

Stand-alone: shipped beside the weights with `configuration_megadyn.py`, imports nothing of megadyn. The mathematics
is megadyn's design/routing.md; sources: the DTF thesis ("Dynamic Transformers", eqs. 3.1-3.13), Mixture-of-Depths
(arXiv 2404.02258), DTRNet (2509.00925), LayerNorm Scaling (2502.05795), HybridNorm (2503.04598), Qwen2.

One idea carries the file: tokens are PACKED. At the entrance each row's real tokens are pushed to the left, which
removes the padding; at each routed layer the chosen ones are pushed to the left again. In a packed row plain causal
attention is right whatever was left out, each token keeps its original position for RoPE, and a layer's cache holds
the packed tokens of each row: those that the layer processed, and nothing for the others.

Layers that every kind of routing shares are in `layers_megadyn.py`; those of this model's kind in `routing_<kind>.py`.
"""

# Dims: B rows, T columns as given, C packed columns, D hidden, H query heads, G key/value heads, K head size,
#       P packed tokens in a layer's cache, W moving-average window.

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from .configuration_megadyn import ROUTING_MODES, MegadynConfig, has_topk, one_of
from .layers_megadyn import (
    Context,
    DenseLayer,
    Float32Module,
    MegadynCache,
    MegadynRMSNorm,
    Stream,
    pack,
    put_back,
    rotary_table,
    take,
)
from .routing_of import exported_kind


@dataclass
class MegadynModelOutput(BaseModelOutputWithPast):
    routing: tuple[Tensor, ...] | None = None
    """With output_routing: per layer, bool [B, T], the tokens that it processed; of dtrnet, those that attended."""
    gates: tuple[Tensor | None, ...] | None = None
    """With output_routing: per layer, float [B, T], the score that chooses tokens (G; of mod the logit; of dtrnet the
    probability to attend), 0 for padding; None where all are processed."""


@dataclass
class MegadynOutput(CausalLMOutputWithPast):
    routing: tuple[Tensor, ...] | None = None
    """As in MegadynModelOutput."""
    gates: tuple[Tensor | None, ...] | None = None
    """As in MegadynModelOutput."""


class MegadynPreTrainedModel(PreTrainedModel):
    config_class = MegadynConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DenseLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _keep_in_fp32_modules_strict = ["router", "causal_router"]
    _keep_in_fp32_modules = [".*router"]      # quantizers read this one, as patterns: they leave routers as they are
    _supports_sdpa = True
    _is_stateful = True      # the cache cannot be rolled back, so assisted generation is refused

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Float32Module):
            module.reset(self.config.initializer_range)


class MegadynModel(MegadynPreTrainedModel):
    def __init__(self, config: MegadynConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        layers = {"dense": DenseLayer} | exported_kind(config.routing).layers
        self.layers = nn.ModuleList(layers[kind](config, i) for i, kind in enumerate(config.layer_types, 1))
        self.norm = MegadynRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

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
    ) -> MegadynModelOutput:
        """`attention_mask` [B, past + T] or [B, T] is 0 at padding, on whichever side; `position_ids` count real tokens."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if output_attentions:
            raise ValueError("output_attentions is not supported: routed layers attend among different tokens")
        x_BTD = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cache = self.cache_of_call(past_key_values, use_cache, rows=x_BTD.shape[0])
        context = self.context_of_call(x_BTD, attention_mask, position_ids, cache)
        tokens = context.tokens

        def unpacked(x_BC: Tensor) -> Tensor:
            return put_back(x_BC.new_zeros(*x_BTD.shape[:2], *x_BC.shape[2:]), tokens, x_BC)

        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        stream, hidden_states, routings = Stream(take(x_BTD, tokens)), [], []
        for i, layer in enumerate(self.layers):
            if output_hidden_states:
                hidden_states.append(unpacked(stream.hidden_BCD))
            stream, routing = layer(stream, context, None if cache is None else cache.layers[i])
            routings.append(routing)
        last_hidden_state = unpacked(self.norm(stream.hidden_BCD))
        if cache is not None:
            cache.advance(x_BTD.shape[1], tokens.counts)
        return MegadynModelOutput(
            last_hidden_state=last_hidden_state,
            past_key_values=cache,
            hidden_states=(*hidden_states, last_hidden_state) if output_hidden_states else None,
            routing=tuple(unpacked(r.processed_BC) for r in routings) if output_routing else None,
            gates=tuple(None if r.gate_BC is None else unpacked(r.gate_BC) for r in routings) if output_routing else None,
        )

    @property
    def topk(self) -> bool:
        """Whether layers choose by top-k; read at each call, because the mode may be changed on a loaded model."""
        one_of("config.routing_mode", self.config.routing_mode, ROUTING_MODES)
        return self.config.routing_mode == "topk" and has_topk(self.config.routing)

    def cache_of_call(self, given: Cache | None, use_cache: bool | None, rows: int) -> MegadynCache | None:
        """The given cache, a new one, or none; top-k routing cannot have one, because it looks at the whole sequence."""
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and not self.topk
        if given is None and not use_cache:
            return None
        if self.topk:
            raise ValueError("routing_mode = 'topk' looks at the whole sequence, so it cannot decode with a cache: "
                             "pass use_cache=False, or set config.routing_mode = 'causal'")
        cache = MegadynCache(len(self.layers)) if given is None else given
        if not isinstance(cache, MegadynCache):
            raise ValueError(f"past_key_values is a {type(cache).__name__}: must be a MegadynCache")
        cache.seen = cache.seen or [0] * rows
        if len(cache.seen) != rows:
            raise ValueError(f"past_key_values holds {len(cache.seen)} sequences, but the input has {rows}")
        return cache

    def context_of_call(self, x_BTD: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None,
                        cache: MegadynCache | None) -> Context:
        rows, columns = x_BTD.shape[:2]
        if attention_mask is None:
            attention_mask = torch.ones(rows, columns, device=x_BTD.device)
        if attention_mask.dim() != 2 or attention_mask.shape[0] != rows or attention_mask.shape[1] < columns:
            raise ValueError(f"attention_mask has shape {tuple(attention_mask.shape)}: must be [{rows}, {columns} or more]")
        real_BT = attention_mask[:, -columns:] != 0
        seen_B = torch.tensor([0] * rows if cache is None else cache.seen, device=x_BTD.device)
        if position_ids is None:
            position_ids = seen_B[:, None] + (real_BT.cumsum(1) - 1).clamp(min=0)
        tokens = pack(real_BT, least=1)
        position_BC = take(position_ids.expand(rows, -1), tokens)
        theta = cast(dict, self.config.rope_parameters)["rope_theta"]
        cos_BCK, sin_BCK = rotary_table(position_BC, cast(int, self.config.head_dim), theta, x_BTD.dtype)
        return Context(tokens, cos_BCK, sin_BCK, seen_B > 0, self.topk)


class MegadynForCausalLM(MegadynPreTrainedModel, GenerationMixin):
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
        **kwargs: Any,
    ) -> MegadynOutput:
        """`labels` [B, T] are the input ids (-100: not counted); they are shifted here, as in all of transformers."""
        outputs = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, past_key_values=past_key_values,
            inputs_embeds=inputs_embeds, use_cache=use_cache, output_hidden_states=output_hidden_states,
            output_attentions=output_attentions, output_routing=output_routing)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return MegadynOutput(loss=loss, logits=logits, past_key_values=outputs.past_key_values,
                             hidden_states=outputs.hidden_states, routing=outputs.routing, gates=outputs.gates)

    def _prepare_cache_for_generation(
            self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """transformers' hook: without it `generate` would build a DynamicCache, which holds every token in every layer."""
        if model_kwargs.get("past_key_values") is not None or not generation_config.use_cache:
            return
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ValueError(f"cache_implementation = {generation_config.cache_implementation!r}: a routed model has its own")
        model_kwargs["past_key_values"] = MegadynCache(self.config.num_hidden_layers)


MegadynModel.register_for_auto_class("AutoModel")
MegadynForCausalLM.register_for_auto_class("AutoModelForCausalLM")
