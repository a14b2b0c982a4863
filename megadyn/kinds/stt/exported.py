"""STT in an exported model: a predictor decides which tokens a layer updates (see megadyn/kinds/stt/README.md)."""

from typing import cast

import torch
from torch import Tensor

from megadyn.hf.cache_megadyn import LayerCache
from megadyn.hf.configuration_megadyn import ExportedKind, MegadynConfig, Router
from megadyn.hf.layers_megadyn import Context, RoutedLayer, Routing, Stream, wide
from megadyn.hf.packing_megadyn import (
    best_of_each_row,
    changes,
    pack,
    put_back,
    take,
    take_rows,
)
from megadyn.hf.surprise_megadyn import Prior, SurpriseRouter, gate_of, moving_average


class SubjectiveLayer(RoutedLayer):
    """Updates chosen tokens by G times the block's update; in causal mode it sees only the chosen tokens."""

    def __init__(self, config: MegadynConfig, number: int) -> None:
        super().__init__(config, number)
        self.window = config.routing["ma_window"]
        self.prior = Prior(config)
        self.router = SurpriseRouter(config)

    def forward(self, stream: Stream, context: Context, cache: LayerCache | None) -> tuple[Stream, Routing]:
        h_BTD, mask_BT = stream.hidden_BCD, context.tokens.valid_BC
        if not context.topk:  # the predictor needs no score
            mask_BT = self.causal_router(h_BTD[..., 0], h_BTD) & mask_BT
        seen = pack(mask_BT, context.tokens, all_rows=context.topk)
        none_BT, score_BT = torch.zeros_like(mask_BT), torch.zeros_like(wide(h_BTD[..., 0]))
        if seen.is_empty:
            return stream, Routing(none_BT, score_BT)
        h_BCD, cos_BCK, sin_BCK = (take(x, seen) for x in (h_BTD, context.cos_BCK, context.sin_BCK))
        continues_B = torch.zeros_like(seen.valid_BC[:, 0]) if cache is None else cache.continues(seen)
        post_BCD, _ = self.run(self.process, h_BCD, cos_BCK, sin_BCK, seen, cache=cache)
        score_BC = self.surprise(
            h_BCD, post_BCD, context._replace(tokens=seen, continues_B=continues_B), cache
        )
        chosen_BC = seen.valid_BC
        if context.topk:
            chosen_BC = best_of_each_row(
                score_BC.detach(), seen, cast(float, self.capacity), context.sequence_BC
            )
        h_BCD = h_BCD + (gate_of(score_BC) * chosen_BC).unsqueeze(-1) * (post_BCD - h_BCD)
        return (
            Stream(put_back(h_BTD, seen, h_BCD.type_as(h_BTD))),
            Routing(put_back(none_BT, seen, chosen_BC), put_back(score_BT, seen, score_BC.detach())),
        )

    def surprise(self, h_BCD: Tensor, post_BCD: Tensor, context: Context, cache: LayerCache | None) -> Tensor:
        """The score r of consecutive tokens; each is compared with a prediction from the previous one."""
        seen, made_BCD = context.tokens, post_BCD.detach()
        last_BD = torch.zeros_like(made_BCD[:, 0])
        if cache is not None and cache.last_BD is not None:
            last_BD = take_rows(cache.last_BD, seen)
        line_BCD = torch.cat((last_BD[:, None], made_BCD), dim=1)  # shifted by one column against the tokens
        begins_BC = torch.zeros_like(seen.valid_BC) if seen.segment_BC is None else changes(seen.segment_BC)
        begins_BC[:, 0] = ~context.continues_B
        before_BCD = line_BCD[:, :-1].masked_fill(begins_BC.unsqueeze(-1), 0)
        if cache is not None:
            cache.keep_latest("last_BD", made_BCD, last_BD, seen)
        update_BCD = wide(post_BCD) - wide(h_BCD)
        static_BC = update_BCD.square().mean(-1)
        change_BC = (update_BCD - wide(self.prior(before_BCD))).square().mean(-1)
        return self.router(
            static_BC, change_BC, moving_average(static_BC.detach(), self.window, context, cache)
        )


EXPORTED = ExportedKind(
    {"stt": SubjectiveLayer},
    {
        "surprise": Router(
            ("capacity", "ma_window", "prior_size"),
            {"gate": ("score",), "score": ("log",), "causal": ("predictor",)},
            ("scale_free",),
        )
    },
)
