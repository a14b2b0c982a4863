"""What an exported model tells transformers' `generate`. Stand-alone: ships with the weights, imports nothing from megadyn."""

from typing import Any, cast

from torch import Tensor, nn
from transformers import GenerationMixin

from .cache_megadyn import MegadynCache
from .static_megadyn import MegadynStaticCache, MegadynStep


class MegadynGeneration(GenerationMixin):
    """Uses the model's own caches, which hold different tokens in each layer."""

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """Overrides transformers' hook: by default `generate` creates a DynamicCache, which holds every token in every layer."""
        if model_kwargs.get("past_key_values") is not None or not generation_config.use_cache:
            return
        wanted = generation_config.cache_implementation
        if wanted not in (None, "dynamic", "static"):
            raise ValueError(
                f"cache_implementation = {wanted!r}: a routed model uses its own caches, dynamic or static"
            )
        if wanted != "static" and not (wanted is None and self.config.routing_static):
            model_kwargs["past_key_values"] = MegadynCache(self.config.num_hidden_layers)
            return
        # As in transformers: not smaller than before, so that a compiled step stays valid.
        length = max(
            max_cache_length,
            getattr(generation_config, "max_cache_len", None) or 0,
            getattr(self, "_previous_max_cache_length", 0),
        )
        self._previous_max_cache_length = length
        rows = batch_size * max(generation_config.num_beams, generation_config.num_return_sequences)
        model_kwargs["past_key_values"] = self.static_cache(rows, length)

    def static_cache(self, rows: int, length: int) -> MegadynStaticCache:
        """A cache of fixed size for this model: so many sequences of at most `length` columns, padding included.

        Raises ValueError for a model on several devices."""
        devices = sorted({str(parameter.device) for parameter in self.parameters()})
        if len(devices) > 1:
            raise ValueError(
                f"a static cache needs the model on one device, but it is on {', '.join(devices)}"
            )
        return MegadynStaticCache(self.config, rows, length, self.dtype, self.device)

    def decoding_step(self, cache: MegadynStaticCache) -> MegadynStep:
        """One step as a module for `torch.export`. The cache must hold the prompt."""
        return MegadynStep(cast(nn.Module, self), cache)

    @staticmethod
    def create_masks_for_generate(
        config: Any,
        attention_mask: Tensor | None,
        inputs_embeds: Tensor | None = None,
        input_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor | None:
        """transformers asks for the mask of a call with a static cache: of the new columns alone, so that its shape stays.

        `input_embeds`: the name of `inputs_embeds` in early versions.
        """
        given = inputs_embeds if input_embeds is None else input_embeds
        assert given is not None
        return None if attention_mask is None else attention_mask[:, -given.shape[1] :]

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Always raises: this is transformers' entry point to continuous batching."""
        raise ValueError(
            "continuous batching (generate_batch) is not supported: its paged cache holds every token in every "
            "layer, but routed layers hold only those that they process; use generate with a padded batch"
        )

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        return self.init_continuous_batching()
