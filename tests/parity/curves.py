"""Loss curves of the tiny model under any layout, many layouts in one launch."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from tests.helpers.networks import end_step
from tests.helpers.plain_muon import PlainMuon
from tests.helpers.ranks import run_on_ranks
from tests.helpers.tiny import micro_batches, tiny_config, tiny_tokens

STEPS, HALF, FEWER = 10, 6, 3
EVERYTHING_CUT = Path(__file__).with_name("zero3_everything_cut.json")
"""By default ZeRO-3 keeps parameters below 100,000 elements whole: here, all of them."""


class Case(NamedTuple):
    kind: str
    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    zero: int = 1
    recompute: str = "none"
    precision: str = "fp32"
    tied: bool = False
    norm: str = "pre"
    documents: bool = False
    sequence: bool = False
    partial: bool = False
    """Some tensors frozen, others at rates of their own."""
    muon: bool = False

    @property
    def world(self) -> int:
        return self.tensor * self.pipeline * self.data

    @property
    def micro_batch(self) -> int:
        """Two micro-batches a step and rank, four where they must fill a long pipeline: enough to accumulate over."""
        return 1 if self.data > 1 or self.pipeline > 2 else 2

    @property
    def is_evaluated(self) -> bool:
        """Evaluation depends neither on ZeRO nor on recomputation: one case of each layout shows it."""
        return (
            self.zero == 1
            and self.precision == "fp32"
            and not (self.recompute != "none" or self.tied or self.documents or self.partial)
            and self.norm == "pre"
        )

    @property
    def steps(self) -> int:
        """The README promises ten steps: plain cases show it. The others' faults would show in the first few, of moments in
        the third; rounding hides some a little longer in half precision."""
        if self.precision != "fp32":
            return HALF
        return STEPS if self.is_evaluated and not self.muon else FEWER

    def __str__(self) -> str:
        marks = {
            self.recompute: self.recompute != "none",
            "tied": self.tied,
            self.precision: self.precision != "fp32",
            self.norm: self.norm != "pre",
            "documents": self.documents,
            "sequence": self.sequence,
            "partial": self.partial,
            "muon": self.muon,
        }
        extras = [word for word, on in marks.items() if on]
        return "-".join(
            [self.kind, f"t{self.tensor}p{self.pipeline}d{self.data}", f"zero{self.zero}", *extras]
        )


KINDS = ("dense", "dtf", "dtf-predictor", "mod", "mod-predictor", "mod-bce", "dtrnet-token", "dtrnet-expert")
"""Tried here under everything a run can be cut by. The conformance suite holds all kinds to the main layouts."""
EOD = 6
SEED = 19
"""Of the samples: a draw in which, for every kind and normalisation, the scores on both sides of the cut lie at least 2e-5 of
their size apart in every step. Closer, rounding may choose between two tokens, and curves part by more than rounding."""


def tokens_of(case: Case) -> torch.Tensor:
    """[STEPS, samples, length + 1]; with documents, three a sample, each beginning with a token of its own.

    A document's first token knows nothing but itself: beginnings alike would tie, and any rounding could choose between them.
    """
    tokens = tiny_tokens(STEPS, seed=SEED)
    if case.documents:
        tokens = tokens.flip(-1).contiguous()
        tokens[tokens == EOD] += 1
        tokens[..., [7, 16]] = EOD
        tokens[..., [0, 8, 17]] = torch.tensor([10, 20, 30])
    return tokens


Curve = dict[str, list[float]]
"""`loss` and `grad_norm` of each step, and `validation`: the last loss under top-k and causal routing."""


def config_of(case: Case) -> Any:
    config = tiny_config(
        case.kind,
        tensor=case.tensor,
        pipeline=case.pipeline,
        zero=case.zero,
        recompute=case.recompute,
        precision=case.precision,
        tied=case.tied,
        micro_batch=case.micro_batch,
        normalization=case.norm,
    )
    if case.zero == 3:
        config.deepspeed_config = str(EVERYTHING_CUT)
    config.parallel.sequence = case.sequence
    if case.partial:
        config.optimizer.freeze = ["model.embed_tokens.*", "*.layers.1.*"]
        config.optimizer.rates = {"*.mlp.*": 0.3, "*.layers.2.*": 2.0}
    if case.muon:
        config.optimizer.name = "muon"
    if case.tied:  # the embedding is the head then, which has these from elsewhere
        config.model.logit_softcap, config.training.z_loss_weight = 5.0, 1e-2
    if hasattr(config.model.routing, "jitter"):
        # noise too depends on no layout
        config.model.routing.jitter = 0.1 if case.kind == "dtrnet-token" else 0.0
    return config


def curves(cases: list[Case], folder: Path) -> dict[str, Curve]:
    """The curve of each case; all have the same world size."""
    output = folder / "curves.json"
    run_on_ranks(_run_cases, cases[0].world, cases, str(output))
    return json.loads(output.read_text())


def _run_cases(cases: list[Case], output: str) -> None:
    from megadyn.launch import launch

    launch.join()
    found = {str(case): _curve(case) for case in cases}
    if dist.get_rank() == 0:
        Path(output).write_text(json.dumps(found))


def _curve(case: Case) -> Curve:
    from megadyn.benchmark.half_on_cpu import widen_products
    from megadyn.config import batch_plan
    from megadyn.engine.engine import Engine
    from megadyn.engine.optimizer import learning_rate
    from megadyn.parallel.grid import make_grid

    if case.precision != "fp32":
        widen_products()
    config = config_of(case)
    plan = batch_plan(config, dist.get_world_size())
    grid = make_grid(case.tensor, case.pipeline)
    engine = Engine(config, plan, grid, EOD if case.documents else None)
    share = plan.global_batch // plan.data_parallel
    curve: Curve = {"loss": [], "grad_norm": []}
    batches = []
    for step, samples in enumerate(tokens_of(case)[: case.steps]):
        batches = micro_batches(samples[grid.dp.rank * share : (grid.dp.rank + 1) * share], case.micro_batch)
        result = engine.train_step(batches, learning_rate(config.optimizer, step, STEPS))
        curve["loss"].append(float(result.loss))
        curve["grad_norm"].append(float(result.grad_norm))
    if case.is_evaluated:
        curve["validation"] = [engine.evaluate(batches, len(batches), mode) for mode in ("topk", "causal")]
    engine.engine.destroy()
    return curve


def plain_network(case: Case) -> Any:
    """The case's whole model on one process."""
    from megadyn.model.block import LayerContext
    from megadyn.network import Network
    from megadyn.parallel.params import ParamMaker
    from megadyn.parallel.sharding import Sharding
    from megadyn.routing.layer import LossScale

    config = config_of(case)
    make = ParamMaker(Sharding(1, 2), config.training.seed)
    ctx = LayerContext(
        config.model, make, eod=EOD if case.documents else None, z_weight=config.training.z_loss_weight
    )
    return Network(ctx, LossScale())


def plain_curve(case: Case, drawn: torch.Tensor | None = None) -> Curve:
    """The same training as a plain PyTorch loop: no DeepSpeed, no ranks, no micro-batches, torch's own clipping.

    `drawn`: samples in place of the case's own.
    """
    from megadyn.engine.optimizer import learning_rate
    from megadyn.parallel.params import name_of

    config, net = config_of(case), plain_network(case)
    groups, matrices = [], []
    for param in net.parameters():
        name, factor = name_of(param), 1.0
        if case.partial and (name.startswith("model.embed_tokens.") or ".layers.1." in name):
            param.requires_grad_(False)
            continue
        if case.partial and ".mlp." in name:
            factor = 0.3
        elif case.partial and ".layers.2." in name:
            factor = 2.0
        if case.muon and name.endswith("_proj.weight") and ".prior." not in name:
            matrices.append(PlainMuon(param, factor))
            continue
        groups.append({"params": [param], "weight_decay": 0.1 if param.ndim >= 2 else 0.0, "factor": factor})
    adam = torch.optim.AdamW(
        groups,
        betas=(config.optimizer.beta1, config.optimizer.beta2),
        eps=config.optimizer.eps,
    )
    curve: Curve = {"loss": [], "grad_norm": []}
    for step, samples in enumerate(tokens_of(case) if drawn is None else drawn):
        rate = learning_rate(config.optimizer, step, STEPS)
        for group in adam.param_groups:
            group["lr"] = rate * group["factor"]
        ((tokens, labels),) = micro_batches(samples, 4)
        loss = net(tokens, labels)
        loss.backward()
        curve["loss"].append(loss.item())
        curve["grad_norm"].append(
            torch.nn.utils.clip_grad_norm_(net.parameters(), config.optimizer.clip_grad).item()
        )
        adam.step()
        for matrix in matrices:
            matrix.step(rate, decay=0.1)
        net.zero_grad()
        end_step(net)
    return curve
