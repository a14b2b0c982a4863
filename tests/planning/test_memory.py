"""Planned memory against the peak of real training steps: every tensor alive, counted on a CPU."""

import gc
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from megadyn.benchmark.half_on_cpu import widen_products
from megadyn.config import RECOMPUTE, Config
from megadyn.costs.memory import Workload
from megadyn.model.block import LayerContext
from megadyn.network import Network
from megadyn.parallel.params import PRECISIONS, ParamMaker
from megadyn.parallel.sharding import Sharding
from megadyn.planning.layouts import stage_cuts, workload
from megadyn.planning.memory import fullest, host_memory, layers_kept, rank_memory
from megadyn.planning.muon import muon_number
from megadyn.planning.parameters import total_parameters
from megadyn.routing.layer import LossScale
from tests.helpers.live_bytes import LiveBytes
from tests.helpers.networks import known, with_routing
from tests.helpers.ranks import run_on_ranks
from tests.helpers.tiny import micro_batches, tiny_config, tiny_tokens

SHAPES: dict[str, dict[str, Any]] = {
    "activations": {"hidden_size": 64, "num_layers": 6, "ffn_size": 192, "vocab_size": 500},
    "weights": {"hidden_size": 256, "num_layers": 6, "ffn_size": 768, "vocab_size": 3000},
    "words": {"hidden_size": 64, "num_layers": 4, "ffn_size": 192, "vocab_size": 20000},
}
"""By what most of the memory holds."""
TOKENS = {"activations": (4, 256), "weights": (1, 24), "words": (1, 24)}
"""Samples of a micro-batch, and their length."""
EOD = 6


def sized_config(kind: str, heavy: str, **settings: Any) -> Config:
    """With TOKENS, on capacities that token choice shows too when it begins: near a half."""
    config = tiny_config(kind, **SHAPES[heavy], **settings)
    config = with_routing(config, **known(config, capacity=0.5 if kind.startswith("dtrnet") else 0.25))
    config.training.micro_batch_size, config.training.sequence_length = TOKENS[heavy]
    config.model.max_position = config.training.sequence_length
    return config


def on_a_cpu(config: Config) -> Workload:
    return replace(workload(config), fused=False)


@pytest.fixture(scope="module", autouse=True)
def _settled() -> Iterator[None]:
    """What stands in memory before need not be searched for tensors again and again."""
    widen_products()
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.parametrize(
    ("kind", "heavy", "precision", "recompute", "extra"),
    [
        *(
            (kind, "activations", "bf16", recompute, {})
            for kind in ("dense", "dtf", "mod", "dtrnet-token")
            for recompute in RECOMPUTE
        ),
        *((kind, "weights", "bf16", "none", {}) for kind in ("dense", "dtf", "mod", "dtrnet-token")),
        ("dense", "activations", "fp32", "none", {}),
        ("mod-predictor", "activations", "fp32", "selective", {}),
        ("dtf", "activations", "fp32", "full", {}),
        ("dtrnet-token", "activations", "fp32", "full", {}),
        ("dtf-predictor", "activations", "bf16", "none", {}),
        ("dtf", "activations", "bf16", "none", {"documents": True}),
        ("dtrnet-token", "activations", "bf16", "none", {"router_type": "expert_choice"}),
        ("dtf", "activations", "bf16", "full", {"normalization": "hybridnorm"}),
        ("dense", "activations", "bf16", "none", {"qk_norm": True}),
        ("dense", "words", "bf16", "none", {"logit_softcap": 5.0}),
    ],
)
def test_a_step_of_the_whole_model(
    kind: str, heavy: str, precision: str, recompute: str, extra: dict[str, Any]
) -> None:
    """Weights, gradients, and activations of a forward and backward pass, without DeepSpeed."""
    shape = {
        key: value for key, value in extra.items() if key in ("normalization", "qk_norm", "logit_softcap")
    }
    config = sized_config(kind, heavy, precision=precision, recompute=recompute, **shape)
    config = with_routing(config, **{key: value for key, value in extra.items() if key == "router_type"})
    config.data.document_mask = extra.get("documents", False)
    (batch, length), model = TOKENS[heavy], config.model
    tokens = tiny_tokens(2, batch, length, SHAPES[heavy]["vocab_size"])
    with LiveBytes() as before:
        pass
    make = ParamMaker(Sharding(1, 2), dtype=PRECISIONS[precision])
    network = Network(
        LayerContext(model, make, eod=EOD if config.data.document_mask else None, recompute=recompute),
        LossScale(),
    )
    (first,), (second,) = (micro_batches(step, batch) for step in tokens)
    network(*first).backward()
    with LiveBytes() as step:
        network(*second).backward()
    work = on_a_cpu(config)
    planned = 2 * work.bytes * total_parameters(model) + fullest(work, [0, 6], 0, 1)
    assert planned == pytest.approx(step.peak - before.now, rel=0.1)


class Case(NamedTuple):
    """Two ranks under DeepSpeed."""

    kind: str
    heavy: str
    precision: str = "bf16"
    zero: int = 1
    recompute: str = "none"
    tensor: int = 1
    pipeline: int = 1
    sequence: bool = False
    offload: bool = False
    muon: bool = False


CASES = [
    Case("dtf", "activations", tensor=2),
    Case("mod", "activations", tensor=2, recompute="full"),
    Case("dtf", "activations", pipeline=2),
    Case("dense", "activations", pipeline=2, recompute="full"),
    *(Case(kind, "activations", tensor=2, sequence=True) for kind in ("dtf", "mod", "dtrnet-token")),
    Case("dense", "weights", zero=3, offload=True),
    Case("dense", "weights", muon=True),
    Case("mod", "weights", pipeline=2),
    Case("dense", "words", pipeline=2),
    *(
        Case("dense", "weights", precision, zero)
        for precision, zero in (("fp32", 0), ("bf16", 2), ("bf16", 3), ("fp16", 1))
    ),
]


def test_a_step_under_deepspeed(tmp_path: Path) -> None:
    """Everything: optimizer states and buffers too, on each of two tensor, pipeline or data-parallel ranks."""
    run_on_ranks(_measure, 2, CASES, str(tmp_path))
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        ratios = {
            str((rank, *case)): planned / measured
            for case, (measured, planned) in zip(CASES, found, strict=True)
        }
        assert not {case: ratio for case, ratio in ratios.items() if not 0.9 < ratio < 1.1}


def _measure(cases: list[Case], folder: str) -> None:
    """[bytes at the peak of a second step, bytes planned] of each case on this rank."""
    import torch.distributed as dist

    from megadyn.launch import launch

    launch.join()
    widen_products()
    gc.freeze()  # what imports left behind need not be searched again before every case
    found = [_measure_one(case, Path(folder)) for case in cases]
    (Path(folder) / f"{dist.get_rank()}.json").write_text(json.dumps(found))


def _measure_one(case: Case, folder: Path) -> tuple[float, float]:
    import torch.distributed as dist

    from megadyn.config import batch_plan
    from megadyn.engine.engine import Engine
    from megadyn.parallel.grid import make_grid

    config = sized_config(
        case.kind,
        case.heavy,
        precision=case.precision,
        recompute=case.recompute,
        tensor=case.tensor,
        pipeline=case.pipeline,
    )
    config.optimizer.name = "muon" if case.muon else "adamw"
    (batch, length), micro = TOKENS[case.heavy], 4 if case.pipeline > 1 else 2
    config.training.global_batch_size = batch * micro * (2 // (case.tensor * case.pipeline))
    # Buckets as large as by default would hide all else.
    zero = {"stage": case.zero, "reduce_bucket_size": 1000, "overlap_comm": case.zero == 2}
    if case.zero == 3:
        zero |= {"stage3_param_persistence_threshold": 1000, "stage3_prefetch_bucket_size": 1000}
    if case.offload:
        zero |= {f"offload_{what}": {"device": "cpu"} for what in ("optimizer", "param")}
    config.parallel.sequence = case.sequence
    path = folder / f"settings-{dist.get_rank()}.json"
    path.write_text(json.dumps({"zero_optimization": zero}))
    config.deepspeed_config = str(path)
    plan, grid = batch_plan(config, 2), make_grid(case.tensor, case.pipeline)
    tokens = tiny_tokens(2, batch * micro, length, SHAPES[case.heavy]["vocab_size"])
    gc.collect()
    with LiveBytes() as before:
        pass
    engine = Engine(config, plan, grid)
    engine.set_loss_scaler_state({"cur_scale": 1.0})  # fp16's first scale overflows, and no step is taken
    engine.train_step(micro_batches(tokens[0], batch), 1e-4)  # makes the optimizer's states
    with LiveBytes() as step:
        engine.train_step(micro_batches(tokens[1], batch), 1e-4)
    engine.engine.destroy()
    planned = rank_memory(
        on_a_cpu(config),
        stage_cuts(config),
        grid.pp.rank,
        precision=case.precision,
        zero=zero,
        data=plan.data_parallel,
        micro_batches=micro,
        muon=muon_number(config),
    )
    # On a CPU the host's memory is the device's, and both count.
    host = host_memory(
        on_a_cpu(config),
        stage_cuts(config),
        grid.pp.rank,
        precision=case.precision,
        zero=zero,
        data=plan.data_parallel,
        muon=muon_number(config),
    )
    return step.peak - before.now, planned.total + host


def plan(**changes: Any) -> float:
    config = tiny_config("dtf", num_layers=8)
    settings = {"batch": 2, "length": 100, "tensor": 1, "bytes": 2, "recompute": "none"} | changes
    return rank_memory(
        Workload(config.model, **settings),
        [0, 8],
        0,
        precision="bf16",
        zero={"stage": 1},
        data=2,
        micro_batches=2,
    ).activations


def test_activations_shrink_by_recomputation_fused_kernels_and_tensor_ranks() -> None:
    assert plan(recompute="full") < plan() / 2 < plan(recompute="selective") < plan()
    assert plan(fused=True) < plan(fused=False)
    assert plan(tensor=2) < plan()
    assert plan(batch=4) > 1.5 * plan()


@pytest.mark.parametrize(
    ("normalization", "by_hand"),
    [
        # Bytes a token of 2 layers of d = 32, f = 96 (48 on a rank), q = 16 and k = 8 there, 2 heads, in bf16 with fused kernels:
        # norms' inputs and scales and the layer's input are of half the tokens; what linears read is not, for it was gathered.
        ("pre", 2 * (32 * 2 / 2 + (4 + 4 + 64) / 2 + 2 * 64 + 2 * (2 * 16 + 2 * 8) + 4 * 2 + 3 * 2 * 48)),
        (
            "hybridnorm",
            2
            * (64 + (4 + 64) / 2 + (4 + 32) + 2 * (4 + 16) + 64 + 2 * (2 * 16 + 2 * 8) + 4 * 2 + 3 * 2 * 48),
        ),
    ],
)
def test_sequence_parallelism_divides_norms_and_residuals(normalization: str, by_hand: float) -> None:
    config = tiny_config("dense", num_layers=2, ffn_size=96, normalization=normalization)
    found = layers_kept(Workload(config.model, 3, 100, 2, 2, "none", sequence=True))
    assert sum(layer.input + layer.inside for layer in found) == 300 * by_hand


def test_an_earlier_stage_holds_more_micro_batches() -> None:
    config = tiny_config("dense", num_layers=8)
    work = Workload(config.model, 4, 200, 1, 2, "none")
    held = [
        rank_memory(
            work, [0, 2, 4, 6, 8], stage, precision="bf16", zero={"stage": 1}, data=1, micro_batches=8
        ).activations
        for stage in range(3)
    ]
    assert held[0] > held[1] > held[2]
