"""SkipGPT (arXiv 2506.04179): each token skips attention, the feed-forward, both or neither."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megadyn.costs.operations import attention_flops, block_flops, mlp_flops, seen_share
from megadyn.costs.shape import capacity_count
from megadyn.kinds.subskip import Subskip
from megadyn.model.block import LayerContext, Stream
from megadyn.parallel.mappings import own_part, whole_sequence
from megadyn.routing.choice import TwoLayerRouter, gate_statistics, share_statistics
from megadyn.routing.layer import LossScale, RoutedLayer, Step
from megadyn.routing.noise import uniform_by_sample
from megadyn.routing.select import Selection, choose_where, origins, put_back_shared, take_shared
from megadyn.routing.tracker import StepTracker


class KeptShare(StepTracker):
    """Share of all halves that the routed layers of the whole model kept in the previous step, and the number of steps."""

    def __init__(self, layers: int, target: float, temperature_end: float, temperature_steps: int):
        super().__init__()
        self.layers, self.target = layers, target
        self.end, self.duration = temperature_end, temperature_steps
        self.share = torch.tensor(target)
        self.steps = 0

    @property
    def temperature(self) -> float:
        return 1 - (1 - self.end) * min(1.0, self.steps / self.duration)

    def loss(self, kept: Tensor) -> Tensor:
        """A layer's term of the loss. It is linear in `kept`, the layer's share in this micro-batch, so it does not
        depend on how a step is split. Its gradient is that of (share kept - target)^2 at the previous step's share."""
        return 2 * (self.share.to(kept) - self.target) * kept

    def end_step(self, mean: Tensor, total: Tensor | None, rate: float = 0.0) -> None:
        assert total is not None, "a name in Kind.totals"
        self.share = total / self.layers
        self.steps += 1

    def state(self) -> dict[str, float]:
        return {"share": float(self.share), "steps": self.steps}

    def set_state(self, state: dict[str, float], device: torch.device) -> None:
        self.share, self.steps = torch.tensor(state["share"], device=device), int(state["steps"])


class SubskipLayer(RoutedLayer):
    """u = h + Attn(Norm1(h)) for tokens that keep attention, which attend only to each other; u = h for the others.
    Then h_out = u + MLP(Norm2(u)) for tokens that keep the feed-forward, and u for the others. Both routers read h."""

    block_is_split = False

    def __init__(self, ctx: LayerContext, index: int, loss_scale: LossScale):
        super().__init__(ctx, index, loss_scale)
        model, routing = ctx.model, ctx.model.routing
        assert isinstance(routing, Subskip)
        self.router = nn.ModuleDict(
            {
                half: TwoLayerRouter(f"{self.name}.router.{half}", ctx, model.hidden_size // 4, 2, F.relu)
                for half in ("attn", "mlp")
            }
        )
        self.kept = KeptShare(
            self.like_this, routing.capacity, routing.temperature_end, routing.temperature_steps
        )
        self.loss_weight = routing.keep_loss_weight
        self.model = model
        self.seed_for, self.first_sample = ctx.make.seed_for, ctx.first_sample

    def trackers(self) -> dict[str, StepTracker]:
        return {"kept": self.kept}

    def leads(self, hidden: Tensor) -> Tensor:
        """[B, T/seq, 2]: logit for keeping minus logit for skipping, for attention and feed-forward."""
        logits = torch.stack([router(hidden) for router in self.router.values()], dim=-2)
        return logits[..., 0] - logits[..., 1]

    def noise(self, leads: Tensor) -> Tensor:
        """The difference of two Gumbel variables (a logistic one) for each lead, [B, T/seq, 2]."""
        first = self.first_sample + self.kept.micro_batches * len(leads)
        uniform = uniform_by_sample(
            leads, self.seq, self.seed_for, f"{self.name}.gumbel/{self.kept.steps}", first
        )
        return uniform.clamp(1e-7, 1 - 1e-7).logit()

    def decide(self, leads: Tensor) -> tuple[Tensor, Tensor]:
        """Leads [B, T/seq, 2] -> the halves that tokens keep, [B, T, 2], and gates [B, T/seq, 2]. Gates are 1; in
        training they have the gradient of the Gumbel-softmax."""
        if not torch.is_grad_enabled():
            return whole_sequence(leads, self.seq) > 0, torch.ones_like(leads)
        leads = leads + self.noise(leads)
        soft = (leads / self.kept.temperature).sigmoid()
        whole = whole_sequence(leads.detach(), self.seq)
        return self.decisions.settle(whole > 0, whole, 0.0), soft - soft.detach() + 1

    def decision_steps(self, stream: Stream) -> list[Step]:
        leads = self.leads(stream.hidden).detach()
        return [
            Step("routers", self.leads, (stream.hidden,)),
            Step("choose", lambda x: self.decide(leads)[0], (stream.hidden,)),
        ]

    @torch.no_grad()
    def set_share(self, stream: Stream, share: float) -> None:
        """Sets the share of each half."""
        leads = self.leads(stream.hidden).flatten(0, 1).sort(dim=0, descending=True).values
        count = capacity_count(share, len(leads))
        for half, middle in zip(("attn", "mlp"), leads[count - 1 : count + 1].mean(dim=0), strict=True):
            bias = self.get_parameter(f"router.{half}.fc2.bias")
            bias[1] += middle.to(bias.dtype)

    def work(self, attention: Tensor, mlp: Tensor) -> Tensor:
        """Masks [B, T] -> [B, 1]: the share of tokens that would cost as many operations if each were kept in both halves."""
        length = attention.shape[1]
        attended, fed = (mask.double().mean(dim=1, keepdim=True) for mask in (attention, mlp))
        square, of_mlp = attention_flops(self.model, length), mlp_flops(self.model, length)
        linear = block_flops(self.model, length) - square  # c tokens cost linear c/T + square (c/T)^2
        square *= seen_share(self.model, self.index, length)
        spent = square * attended.square() + (linear - of_mlp) * attended + of_mlp * fed
        return ((linear**2 + 4 * square * spent).sqrt() - linear) / (2 * square)

    def forward(self, stream: Stream) -> Stream:
        leads = self.leads(stream.hidden)
        kept, gates = self.decide(leads)
        attention, mlp = kept.unbind(-1)
        share = kept.float().mean()
        self.monitor.record(
            share_statistics(self.work(attention, mlp))
            | gate_statistics(whole_sequence(leads[..., 0].detach(), self.seq).sigmoid(), attention)
            | {
                "attention_fraction": attention.float().mean(),
                "mlp_fraction": mlp.float().mean(),
                "kept": share,
                "temperature": torch.full_like(share, self.kept.temperature),
            }
        )
        out = self.run(self.halves, stream, gates, choose_where(attention), choose_where(mlp))
        if torch.is_grad_enabled():
            # The value of the hard choice, with the gradient of the soft one.
            soft = own_part(kept, self.seq).to(gates.dtype) + (gates - 1)
            out = self.attach(out, self.kept.loss(soft.mean()), weight=self.loss_weight)
            self.kept.observe(share)
        return Stream(out, documents=stream.documents)

    def halves(self, stream: Stream, gates: Tensor, attending: Selection, feeding: Selection) -> Tensor:
        """h_out [B, T/seq, D], for gates [B, T/seq, 2]. `run` may recompute this: both choices are already fixed."""
        length = self.length(stream.hidden)
        positions, segments = origins(stream, attending, length)
        hidden, taken = take_shared(stream.hidden, attending.places, self.seq)
        update = self.self_attn(self.input_layernorm(taken), positions, length, segments)
        hidden = put_back_shared(hidden, attending.places, gates[..., 0], update, self.seq)
        hidden, taken = take_shared(hidden, feeding.places, self.seq)
        normed = self.post_attention_layernorm(taken)
        update = self.mlp(normed)
        if self.hybrid:
            update = normed - taken + update  # Z + MLP(Z) - u
        return put_back_shared(hidden, feeding.places, gates[..., 1], update, self.seq)
