"""SkipGPT in an exported model: layers in which each token skips attention, the feed-forward, both or neither."""

import torch.nn.functional as F
from torch import Tensor, nn

from megadyn.hf.cache_megadyn import LayerCache
from megadyn.hf.configuration_megadyn import ExportedKind, MegadynConfig, Router
from megadyn.hf.layers_megadyn import Context, DenseLayer, Routing, Stream, WideLinear
from megadyn.hf.packing_megadyn import Packed, pack, put_back, take


class HalfRouter(nn.Module):
    """The logit for keeping minus that for skipping, [B, T]."""

    def __init__(self, config: MegadynConfig) -> None:
        super().__init__()
        self.fc1 = WideLinear(config.hidden_size, config.hidden_size // 4)
        self.fc2 = WideLinear(config.hidden_size // 4, 2)

    def forward(self, h_BTD: Tensor) -> Tensor:
        keep_BT, skip_BT = self.fc2(F.relu(self.fc1(h_BTD))).unbind(-1)
        return keep_BT - skip_BT


class SubskipLayer(DenseLayer):
    """A token goes through attention, and through the feed-forward, if the router of that half keeps it. Reports show
    the tokens that attended."""

    def __init__(self, config: MegadynConfig, number: int) -> None:
        super().__init__(config, number)
        self.router = nn.ModuleDict({half: HalfRouter(config) for half in ("attn", "mlp")})

    def forward(self, stream: Stream, context: Context, cache: LayerCache | None) -> tuple[Stream, Routing]:
        h_BTD, valid_BT = stream.hidden_BCD, context.tokens.valid_BC
        attention_BT, mlp_BT = (router(h_BTD).detach() for router in self.router.values())
        attending, feeding = (
            pack((lead_BT > 0) & valid_BT, context.tokens) for lead_BT in (attention_BT, mlp_BT)
        )
        h_BTD = self.run(
            self.halves, h_BTD, context.cos_BCK, context.sin_BCK, attending, feeding, cache=cache
        )
        return Stream(h_BTD), Routing((attention_BT > 0) & valid_BT, attention_BT.sigmoid())

    def halves(
        self,
        h_BTD: Tensor,
        cos_BTK: Tensor,
        sin_BTK: Tensor,
        attending: Packed,
        feeding: Packed,
        cache: LayerCache | None,
    ) -> Tensor:
        if not attending.is_empty:
            h_BCD, cos_BCK, sin_BCK = (take(x, attending) for x in (h_BTD, cos_BTK, sin_BTK))
            update_BCD, _ = self.self_attn(self.input_layernorm(h_BCD), cos_BCK, sin_BCK, attending, cache)
            h_BTD = put_back(h_BTD, attending, h_BCD + update_BCD)
        if not feeding.is_empty:
            h_BTD = put_back(h_BTD, feeding, self.add_mlp(take(h_BTD, feeding)))
        return h_BTD


EXPORTED = ExportedKind({"subskip": SubskipLayer}, {"two_halves": Router()})
