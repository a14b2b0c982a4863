"""SwiGLU feed-forward (arXiv 2002.05202)."""

import torch.nn.functional as F
from torch import Tensor, nn

from megadyn.config import ModelConfig
from megadyn.model.recompute import recomputed
from megadyn.parallel.linear import ColumnParallelLinear, RowParallelLinear
from megadyn.parallel.mappings import enter_tp
from megadyn.parallel.params import ParamMaker, normal


class Mlp(nn.Module):
    """down(silu(gate(x)) * up(x)), x [..., D]; the inner width is cut over tensor ranks."""

    def __init__(
        self, name: str, model: ModelConfig, *, make: ParamMaker, output_std: float, recompute: bool = False
    ):
        super().__init__()
        assert model.ffn_size is not None
        d, width, init = model.hidden_size, model.ffn_size, normal(model.init_std)
        self.tp, self.seq, self.recompute = make.tp, make.seq, recompute
        self.gate_proj = ColumnParallelLinear(f"{name}.gate_proj", d, width, make=make, init=init)
        self.up_proj = ColumnParallelLinear(f"{name}.up_proj", d, width, make=make, init=init)
        self.down_proj = RowParallelLinear(f"{name}.down_proj", width, d, make=make, init=normal(output_std))

    def forward(self, x: Tensor) -> Tensor:
        """[B, T/seq, D] -> [B, T/seq, D]."""
        x = enter_tp(x, self.tp, self.seq)
        return self.down_proj.sum_of(
            recomputed(self.down, self.gate_proj(x), self.up_proj(x), when=self.recompute)
        )

    def down(self, gate: Tensor, up: Tensor) -> Tensor:
        """Both [B, T, F/tp] -> this rank's term of the output, [B, T, D]."""
        return self.down_proj.term(F.silu(gate) * up)
