"""Scores how surprisingly a layer changed each token (thesis "Dynamic Transformers", eqs. 3.1-3.13)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megadyn.kinds.surprise import Surprising
from megadyn.model.block import LayerContext
from megadyn.model.documents import Documents
from megadyn.parallel.grid import Axis
from megadyn.parallel.linear import upcast
from megadyn.parallel.mappings import copy_to_tp, enter_tp, own_part, whole_sequence
from megadyn.parallel.params import constant


def running_sums(x: Tensor) -> Tensor:
    """Sums of x [B, T] over the tokens so far. torch's own on a GPU may add in another order each time; where that is not wanted,
    log2(T) additions of shifted copies take its place."""
    if not torch.are_deterministic_algorithms_enabled():
        return x.cumsum(dim=1)
    reach = 1
    while reach < x.shape[1]:
        x = x + F.pad(x[:, :-reach], (reach, 0))
        reach *= 2
    return x


def moving_average(x: Tensor, window: int, documents: Documents | None = None) -> Tensor:
    """Mean of x [B, T] over the last `window` tokens, including the current one. Before the start of the sample, or of
    the token's document, its first value is repeated.

    Uses running sums in float64: their differences are precise enough at any length, and document borders cost nothing.
    """
    place = torch.arange(x.shape[1], device=x.device).expand(x.shape)
    since = place if documents is None else documents.positions  # earlier tokens in the same document
    sums = F.pad(running_sums(x.double()), (1, 0))  # sums[t] = x[0] + ... + x[t - 1]
    inside = since.clamp(max=window - 1)  # how many of these are in the window
    total = sums.gather(1, place + 1) - sums.gather(1, place - inside)
    first = x.gather(1, place - since).double()
    return ((total + (window - 1 - inside) * first) / window).to(x.dtype)


class SurpriseRouter(nn.Module):
    """The score r = -log(1 - G) of G = S_CE + S_CU - S_CE S_CU, the probability that a token's change was expected-but-late
    or unexpected.

    S_CE = sigmoid(a) with a = softplus(beta_ce) (D_st - D_ch + lambda_ce), S_CU = sigmoid(b) with b = softplus(beta_cu) (D_st -
    m_cu MA(D_st)), and four learnable scalars: beta_ce, beta_cu, lambda_ce (`ce_log_offset`) and m_cu (`cu_multiplier`).
    1 - G = sigmoid(-a) sigmoid(-b), so r = softplus(a) + softplus(b). r orders tokens as G does, but still separates
    those whose G rounds to 1. The parameter is lambda_ce, not its exponential, because training would drive that below
    0, where log is undefined.

    With `model.routing.scale_free`, D_st and D_ch are first divided by MA(D_st), which is held constant; MA is then 1.
    """

    def __init__(self, name: str, ctx: LayerContext, routing: Surprising):
        super().__init__()
        self.window, self.seq, self.scale_free = routing.ma_window, ctx.make.seq, routing.scale_free
        self.beta_ce = ctx.make(f"{name}.beta_ce", (1,), constant(routing.beta_ce_init))
        self.beta_cu = ctx.make(f"{name}.beta_cu", (1,), constant(routing.beta_cu_init))
        self.ce_log_offset = ctx.make(f"{name}.ce_log_offset", (1,), constant(routing.ce_log_offset_init))
        self.cu_multiplier = ctx.make(f"{name}.cu_multiplier", (1,), constant(routing.cu_multiplier_init))

    def forward(
        self, static: Tensor, change: Tensor, documents: Documents | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """D_st, D_ch [B, T/seq] -> r [B, T/seq], and scalars to report."""
        scalars = (self.beta_ce, self.beta_cu, self.ce_log_offset, self.cu_multiplier)
        beta_ce, beta_cu, log_offset, multiplier = (
            upcast(copy_to_tp(scalar, self.seq)) for scalar in scalars
        )
        average = moving_average(whole_sequence(static.detach(), self.seq), self.window, documents)
        average = own_part(average, self.seq)
        expected, unexpected = static - change, static - multiplier * average
        if self.scale_free:
            expected, unexpected = expected / at_least(average), unexpected / at_least(average)
        a = F.softplus(beta_ce) * (expected + log_offset)
        b = F.softplus(beta_cu) * unexpected
        watched = {
            "D_st": static.mean(),
            "D_ch": change.mean(),
            "S_CE": a.sigmoid().mean(),
            "S_CU": b.sigmoid().mean(),
            "beta_ce": beta_ce,
            "beta_cu": beta_cu,
            "ce_log_offset": log_offset,
            "cu_multiplier": multiplier,
        }
        # softplus(x) as -logsigmoid(-x): above 20, torch's softplus drops the exponential term, which is visible in float64.
        score = -(F.logsigmoid(-a) + F.logsigmoid(-b))
        return score, {name: x.detach().squeeze().clone() for name, x in watched.items()}


def at_least(average: Tensor) -> Tensor:
    """`average`, a divisor: not below 1e-12, so that a layer which changes nothing divides 0 by a number."""
    return average.clamp(min=1e-12)


def relative_gate(score: Tensor, window: int, seq: Axis, documents: Documents | None = None) -> Tensor:
    """r [B, T/seq] -> G over its moving average in the sample or document, [B, T/seq].

    A factor common to all gates cancels, in the value and in the gradient: training cannot close all gates alike.
    """
    gate = gate_of(score)
    average = moving_average(enter_tp(gate, Axis("whole"), seq), window, documents)
    return gate / at_least(own_part(average, seq))


def gate_of(score: Tensor) -> Tensor:
    """G = 1 - exp(-r). Each branch is accurate in value and gradient on its side: `expm1` computes its gradient from
    its value, which rounds to -1 for large r."""
    return torch.where(score < 1, -torch.expm1(-score), 1 - torch.exp(-score))
