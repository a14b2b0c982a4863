"""One transformer layer token by token, written from `routing.md` alone; gradients flow, so they can be compared too.

One sequence at a time, h [T, D] in float64. `layer` is a layer of the product, of which only parameters are read.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megadyn.config import ModelConfig


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(dim=-1, keepdim=True) + eps).sqrt() * weight


def prior_update(prior: nn.Module, h: Tensor, eps: float = 1e-6) -> Tensor:
    """PriorFFN(RMSNorm(h)) of a DTF Decision layer, h [..., D]."""
    x = rms_norm(h, prior.norm, eps)
    return (F.silu(x @ prior.gate_proj.T) * (x @ prior.up_proj.T)) @ prior.down_proj.T


def turned(x: Tensor, position: int, theta: float) -> Tensor:
    """RoPE on one head's vector: dimension i turns with dimension i + K/2."""
    half = len(x) // 2
    out = []
    for i in range(2 * half):
        angle = position * theta ** (-2 * (i % half) / len(x))
        other = -x[i + half] if i < half else x[i - half]
        out.append(x[i] * math.cos(angle) + other * math.sin(angle))
    return torch.stack(out)


class NaiveLayer:
    def __init__(self, layer: nn.Module, model: ModelConfig):
        self.params = dict(layer.named_parameters())
        self.model = model
        self.scale = 1 / math.sqrt(layer.index + 1) if model.normalization == "lns" else 1.0
        self.hybrid = model.normalization == "hybridnorm"

    def linear(self, x: Tensor, name: str) -> Tensor:
        y = self.params[f"{name}.weight"] @ x
        return y + self.params[f"{name}.bias"] if f"{name}.bias" in self.params else y

    def norm1(self, h: Tensor) -> Tensor:
        return (
            h
            if self.hybrid
            else self.scale * rms_norm(h, self.params["input_layernorm.weight"], self.model.norm_eps)
        )

    def norm2(self, u: Tensor) -> Tensor:
        return self.scale * rms_norm(u, self.params["post_attention_layernorm.weight"], self.model.norm_eps)

    def heads(self, x: Tensor, which: str) -> list[Tensor]:
        """Queries, keys or values of one token, by head."""
        heads = self.linear(x, f"self_attn.{which}_proj").split(self.model.head_dim)
        if not self.hybrid:
            return list(heads)
        return [
            rms_norm(head, self.params[f"self_attn.{which}_norm.weight"], self.model.norm_eps)
            for head in heads
        ]

    def attention(self, x: Sequence[Tensor], chosen: Sequence[int]) -> dict[int, Tensor]:
        """O(Attn) of the chosen tokens among themselves; `x` holds the normed tokens of the sequence."""
        theta, group = self.model.rope.theta, self.model.num_heads // self.model.num_kv_heads
        q = {t: [turned(head, t, theta) for head in self.heads(x[t], "q")] for t in chosen}
        k = {t: [turned(head, t, theta) for head in self.heads(x[t], "k")] for t in chosen}
        v = {t: self.heads(x[t], "v") for t in chosen}
        out = {}
        for t in chosen:
            seen, mixed = [s for s in chosen if s <= t], []
            for head in range(self.model.num_heads):
                scores = torch.stack([q[t][head] @ k[s][head // group] for s in seen]) / math.sqrt(
                    self.model.head_dim
                )
                weights = scores.exp() / scores.exp().sum()
                mixed.append(sum(w * v[s][head // group] for w, s in zip(weights, seen)))
            out[t] = self.linear(torch.cat(mixed), "self_attn.o_proj")
        return out

    def bypass(self, x: Tensor) -> Tensor:
        """O(repeat_kv(V(x)))."""
        group = self.model.num_heads // self.model.num_kv_heads
        return self.linear(
            torch.cat([head for head in self.heads(x, "v") for _ in range(group)]), "self_attn.o_proj"
        )

    def feed_forward(self, u: Tensor) -> Tensor:
        """u + MLP(Norm2(u)); under hybridnorm Z + MLP(Z) with Z = Norm(u)."""
        z = self.norm2(u)
        inner = F.silu(self.linear(z, "mlp.gate_proj")) * self.linear(z, "mlp.up_proj")
        return (z if self.hybrid else u) + self.linear(inner, "mlp.down_proj")

    def block(self, h: Tensor, chosen: Sequence[int]) -> dict[int, Tensor]:
        """Block(h) of the chosen tokens, which see each other alone: what the dense layer adds to h."""
        attended = self.attention([self.norm1(token) for token in h], chosen)
        return {t: self.feed_forward(h[t] + attended[t]) - h[t] for t in chosen}

    def skipping(self, h: Tensor, chosen: Sequence[int], gate: Tensor) -> Tensor:
        """h + gate * Block(h) for the chosen tokens, the others unchanged."""
        update = self.block(h, chosen)
        return torch.stack([h[t] + gate[t] * update[t] if t in update else h[t] for t in range(len(h))])

    def nested(self, once: Tensor, twice: Sequence[int], p: Tensor) -> Tensor:
        """(1 - p) h' + p Layer(h') for the tokens that pass twice, h' = `once` for the others."""
        update = self.block(once, twice)
        return torch.stack(
            [
                (1 - p[t]) * once[t] + p[t] * (once[t] + update[t]) if t in update else once[t]
                for t in range(len(once))
            ]
        )

    def halves(self, h: Tensor, attending: Sequence[int], feeding: Sequence[int], gate: Tensor) -> Tensor:
        """u = h + gate[:, 0] Attn for attending tokens, then u + gate[:, 1] MLP for feeding ones; under hybridnorm the second
        update is Z + MLP(Z) - u."""
        attended = self.attention([self.norm1(token) for token in h], attending)
        u = torch.stack([h[t] + gate[t, 0] * attended[t] if t in attended else h[t] for t in range(len(h))])
        return torch.stack(
            [
                u[t] + gate[t, 1] * (self.feed_forward(u[t]) - u[t]) if t in feeding else u[t]
                for t in range(len(h))
            ]
        )

    def dtrnet(self, h: Tensor, attending: Sequence[int], p: Tensor) -> Tensor:
        """p [T, 2] of (attend, bypass)."""
        x = [self.norm1(token) for token in h]
        attended = self.attention(x, attending)
        a = [p[t, 0] * attended[t] if t in attended else p[t, 1] * self.bypass(x[t]) for t in range(len(h))]
        return torch.stack([self.feed_forward(h[t] + a[t]) for t in range(len(h))])


def best(score: Sequence[float], count: int) -> list[int]:
    """Places of the `count` highest, rising; of equal ones the first."""
    return sorted(sorted(range(len(score)), key=lambda t: (-score[t], t))[:count])
