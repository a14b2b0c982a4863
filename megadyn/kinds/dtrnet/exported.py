"""DTRNet in an exported model: layers in which a token attends or takes a linear bypass."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megadyn.hf.cache_megadyn import LayerCache
from megadyn.hf.configuration_megadyn import ExportedKind, MegadynConfig, Router
from megadyn.hf.layers_megadyn import Context, RoutedLayer, Routing, Stream, WideLinear
from megadyn.hf.packing_megadyn import Packed, pack, put_back, take


class AttendOrBypass(nn.Module):
    """Logits [B, T, 2] for attending and for bypassing attention."""

    def __init__(self, config: MegadynConfig) -> None:
        super().__init__()
        self.fc1 = WideLinear(config.hidden_size, config.hidden_size // 2)
        self.fc2 = WideLinear(config.hidden_size // 2, 2)

    def forward(self, h_BTD: Tensor) -> Tensor:
        return self.fc2(F.silu(self.fc1(h_BTD)))


class DTRNetLayer(RoutedLayer):
    """Only chosen tokens attend, to each other; the others take their own values. Feed-forward for every token.

    The score is the difference of the two logits, because probabilities round to 0 and 1, where tokens tie. Thresholds
    of older exports are probabilities.
    """

    def __init__(self, config: MegadynConfig, number: int) -> None:
        super().__init__(config, number)
        self.router = AttendOrBypass(config)
        self.by_logit = config.routing.get("score", "logit") == "logit"

    def forward(self, stream: Stream, context: Context, cache: LayerCache | None) -> tuple[Stream, Routing]:
        logits_BT2 = self.router(stream.hidden_BCD)
        attend_BT, bypass_BT = logits_BT2.softmax(-1).unbind(-1)
        score_BT = logits_BT2[..., 0] - logits_BT2[..., 1] if self.by_logit or context.topk else attend_BT
        routing = Routing(self.choose(score_BT.detach(), stream.hidden_BCD, context), attend_BT.detach())
        gate_BT = torch.where(routing.processed_BC, attend_BT, bypass_BT)
        chosen = pack(routing.processed_BC, context.tokens)
        h_BTD = self.run(
            self.process_all,
            stream.hidden_BCD,
            gate_BT,
            context.cos_BCK,
            context.sin_BCK,
            chosen,
            cache=cache,
        )
        return Stream(h_BTD), routing

    def process_all(
        self,
        h_BTD: Tensor,
        gate_BT: Tensor,
        cos_BTK: Tensor,
        sin_BTK: Tensor,
        chosen: Packed,
        cache: LayerCache | None,
    ) -> Tensor:
        x_BTD, attention = self.input_layernorm(h_BTD), self.self_attn
        v_BTGK = attention.values(x_BTD)
        mixed_BTHK = v_BTGK.repeat_interleave(attention.num_key_value_groups, dim=2)
        if not chosen.is_empty:
            attended_BCHK, _ = attention.mix(
                take(x_BTD, chosen),
                take(v_BTGK, chosen),
                take(cos_BTK, chosen),
                take(sin_BTK, chosen),
                chosen,
                cache,
            )
            mixed_BTHK = put_back(mixed_BTHK, chosen, attended_BCHK)
        update_BTD = gate_BT.unsqueeze(-1) * attention.o_proj(mixed_BTHK.flatten(2))
        return self.add_mlp(h_BTD + update_BTD.type_as(h_BTD))


EXPORTED = ExportedKind(
    {"dtrnet": DTRNetLayer},
    {
        "token_choice": Router((), {"causal": ("token_choice",)}),
        "expert_choice": Router(("capacity",), {"causal": ("threshold",), "score": ("probability", "logit")}),
    },
)
