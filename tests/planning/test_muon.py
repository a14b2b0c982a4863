"""What Muon is planned to cost, against what it does."""

import math
from typing import Any

import pytest
import torch

from megadyn.config import Config
from megadyn.engine.muon import cost_of, in_rounds, orthogonalised, owners_of
from megadyn.parallel.grid import Axis, Grid
from megadyn.parallel.params import is_matrix
from megadyn.parallel.sharding import Sharding
from megadyn.parallel.whole import Exchange, Matrix, Stage
from megadyn.planning.layouts import EngineFile, Machine, lay_out
from megadyn.planning.muon import added_by_muon, block_matrices, matrix_parameters, orthogonalisation_flops
from tests.engine.test_muon import held
from tests.helpers.networks import make_network
from tests.helpers.tiny import tiny_config


@pytest.mark.parametrize("shape", [(16, 16), (8, 24), (24, 8)])
def test_operations_are_those_of_the_products(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = []

    def counting(product: Any) -> Any:
        def call(*args: Any, **factors: Any) -> Any:
            left, right = args[-2:]
            counted.append(2 * left.shape[0] * left.shape[1] * right.shape[1])
            return product(*args, **factors)

        return call

    monkeypatch.setattr(torch, "addmm", counting(torch.addmm))
    monkeypatch.setattr(torch.Tensor, "__matmul__", counting(torch.Tensor.__matmul__))
    orthogonalised(torch.randn(shape), 5)
    assert len(counted) == 15
    assert sum(counted) == orthogonalisation_flops(*shape, 5)


@pytest.mark.parametrize("kind", ["dtf", "dtrnet-token", "subskip", "stt"])
def test_matrices_are_those_of_the_built_model(kind: str) -> None:
    model = tiny_config(kind).model
    built = sum(p.numel() for p in make_network(tiny_config(kind)).parameters() if is_matrix(p))
    assert matrix_parameters(model, 1, model.num_layers) == built


def muon_config(**parallel: int) -> Config:
    config = tiny_config("dense", **parallel)
    config.optimizer.name = "muon"
    return config


@pytest.mark.parametrize(
    ("tensor", "data", "copied"), [(2, 2, False), (4, 1, False), (1, 4, True), (2, 2, True)]
)
def test_bytes_are_those_that_ranks_exchange(tensor: int, data: int, copied: bool) -> None:
    """Mean over ranks; the plan divides evenly. Fewer key/value heads than four tensor ranks are among the cases."""
    config = muon_config(tensor=tensor)
    sent = [0] * (tensor * data)
    for rank in range(tensor * data):
        grid = Grid(Axis("tp", rank % tensor, tensor), Axis("pp"), Axis("dp", rank // tensor, data))
        stage = Stage(grid, Sharding(tensor, 2), None, copied, torch.device("cpu"))
        for matrices in rounds_of(config, stage):
            owners = owners_of([cost_of(matrix, 5) for matrix in matrices], stage.size)
            exchange = Exchange(matrices, owners, stage, torch.float32)
            for other, (given, kept) in enumerate(zip(exchange._given, exchange._kept, strict=True)):
                sent[rank] += (given + kept) * 4 * (other != rank)
    planned = added_by_muon(config, [0, 4], 0 if copied else 1, data)
    assert planned.sent == pytest.approx(sum(sent) / len(sent), rel=0.15)


def rounds_of(config: Config, stage: Stage) -> list[list[Matrix]]:
    names = [f"self_attn.{name}_proj" for name in "qkvo"] + [
        f"mlp.{name}_proj" for name in ("gate", "up", "down")
    ]
    tensor, data = stage.grid.tp.size, stage.grid.dp.size
    found = []
    for layer in range(config.model.num_layers):
        for name, whole in zip(names, block_matrices(config.model), strict=True):
            full = f"model.layers.{layer}.{name}.weight"
            part, dim = list(whole), stage.sharding.dim(full)
            if dim is not None:
                part[dim] //= tensor
            share = -(-math.prod(part) // data)
            pieces = tuple(
                (0, math.prod(part)) if stage.copied else (share * d, min(share, math.prod(part) - share * d))
                for d in range(data)
            )
            found.append(Matrix(full, tuple(part), whole, pieces))
    by_name = {str(i): matrix for i, matrix in enumerate(found)}
    return [
        [by_name[one.matrix.name] for one in some]
        for some in in_rounds(held(*(m.whole for m in found)), stage.size, 5)
    ]


def planned(**settings: Any) -> Any:
    config = tiny_config("dense", precision="bf16", hidden_size=256, ffn_size=768, num_layers=8)
    for key, value in settings.items():
        setattr(config.optimizer, key, value)
    return lay_out(
        config, EngineFile("zero1", {"stage": 1, "reduce_bucket_size": 1000}), Machine(4, 80, tflops=1e-4)
    )


def test_the_plan_shows_fewer_states_more_operations_and_what_is_sent() -> None:
    adamw, muon = planned(), planned(name="muon")
    matrices = 8 * sum(
        math.prod(shape)
        for shape in block_matrices(tiny_config("dense", hidden_size=256, ffn_size=768).model)
    )
    assert (
        adamw.memory.optimizer - muon.memory.optimizer == matrices
    )  # 4 bytes of a second moment, over 4 ranks
    assert adamw.optimizer_bytes == 0 < muon.optimizer_bytes
    assert muon.step_s > adamw.step_s
    assert muon.record()["optimizer_bytes"] == muon.optimizer_bytes
    # More ranks share the iteration.
    config = muon_config(hidden_size=256)
    assert added_by_muon(config, [0, 4], 1, 4).flops < added_by_muon(config, [0, 4], 1, 1).flops / 2
