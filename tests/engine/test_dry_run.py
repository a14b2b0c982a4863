"""Parts of a model without values: they are an engine's, and a wrong one is found."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

from megadyn.engine import dry_run as module
from megadyn.engine.dry_run import check_cuts, check_stages, dry_run, place_of
from megadyn.errors import RunError, UserError
from megadyn.parallel.params import ParamMaker, normal
from megadyn.parallel.sharding import Sharding
from megadyn.planning.layouts import Machine
from tests.helpers.ranks import run_on_ranks
from tests.helpers.tiny import KINDS, ROOT, VOCAB, tiny_config


def test_ranks_stand_where_deepspeed_puts_them() -> None:
    topology = PipeModelDataParallelTopology(num_pp=3, num_mp=2, num_dp=4)
    for rank in range(24):
        grid, there = place_of(rank, 2, 3, 4), topology.get_coord(rank)
        assert (grid.pp.rank, grid.dp.rank, grid.tp.rank) == (there.pipe, there.data, there.model)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [False, True])
def test_every_rank_of_every_layout_passes(kind: str, tied: bool) -> None:
    """Two key/value heads, whole on four tensor ranks; 61 words, padded."""
    for tensor, pipeline in ((1, 1), (2, 2), (4, 1), (1, 4)):
        if pipeline > 1 and kind == "skip_middle":
            continue  # which it refuses
        config = tiny_config(kind, tensor=tensor, pipeline=pipeline, tied=tied)
        for rank in range(4):
            assert dry_run(config, Machine(4, 80), rank).fits


LAYOUTS = [(2, 1), (1, 2)]


def test_a_rank_holds_what_its_engine_holds(tmp_path: Path) -> None:
    run_on_ranks(_engine_shapes, 2, str(tmp_path))
    for rank in range(2):
        for (tensor, pipeline), built in zip(
            LAYOUTS, json.loads((tmp_path / f"{rank}.json").read_text()), strict=True
        ):
            config = tiny_config("dtf", tensor=tensor, pipeline=pipeline)
            grid = place_of(rank, tensor, pipeline, 1)
            parts = module.parts_of(config, grid.tp)
            bounds = module.part_boundaries(module.stage_cuts(config), len(parts))
            mine = parts[slice(*bounds[grid.pp.rank : grid.pp.rank + 2])]
            assert built == {name: list(shape) for name, shape in module.shapes_of(mine).items()}


def _engine_shapes(folder: str) -> None:
    import torch.distributed as dist

    from megadyn.config import batch_plan
    from megadyn.engine.engine import Engine
    from megadyn.launch import launch
    from megadyn.parallel.grid import make_grid
    from megadyn.parallel.params import name_of

    launch.join()
    found = []
    for tensor, pipeline in LAYOUTS:
        config = tiny_config("dtf", tensor=tensor, pipeline=pipeline)
        engine = Engine(config, batch_plan(config, 2), make_grid(tensor, pipeline))
        found.append({name_of(param): list(param.shape) for param in engine.parameters()})
    (Path(folder) / f"{dist.get_rank()}.json").write_text(json.dumps(found))


def test_nothing_is_drawn_and_nothing_allocated() -> None:
    def refuse(shape: Any, generator: Any) -> torch.Tensor:
        raise AssertionError("drawn")

    make = ParamMaker(Sharding(2, 2), device="meta")
    param = make("model.layers.0.mlp.up_proj.weight", (2**20, 2**20), refuse)
    assert (param.device.type, tuple(param.shape)) == ("meta", (2**19, 2**20))
    assert make("lm_head.weight", (61, 8), normal(1.0)).shape == (31, 8)


WHOLE = {
    "model.embed_tokens.weight": (VOCAB, 8),
    "a.self_attn.q_proj.weight": (8, 8),
    "norm.weight": (8,),
    "lm_head.weight": (VOCAB, 8),
}


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        (
            [["model.embed_tokens.weight", "norm.weight"], ["lm_head.weight"]],
            "q_proj.weight is on stages \\[\\]",
        ),
        ([list(WHOLE)[:3], list(WHOLE)[2:]], "norm.weight is on stages \\[0, 1\\]"),
        ([list(WHOLE)[:2], [*list(WHOLE)[2:], "other"]], "the whole model has no other"),
    ],
)
def test_a_tensor_lost_or_doubled_between_stages_is_found(stages: list[list[str]], said: str) -> None:
    with pytest.raises(RunError, match=said):
        check_stages([{name: WHOLE.get(name, (1,)) for name in names} for names in stages], WHOLE)


def test_a_wrong_cut_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = {"model.embed_tokens.weight": (31, 8), "a.self_attn.q_proj.weight": (4, 8), "norm.weight": (8,)}
    check_cuts(shapes, WHOLE, Sharding(2, 2), 0, VOCAB)
    with pytest.raises(RunError, match=r"shape of norm.weight: built \[4\], planned \[8\]"):
        check_cuts(shapes | {"norm.weight": (4,)}, WHOLE, Sharding(2, 2), 0, VOCAB)
    monkeypatch.setattr(
        Sharding, "cut", lambda self, name, whole, rank: whole.chunk(self.size, self.dim(name))[0]
    )
    with pytest.raises(RunError, match="its parts do not join to the whole"):
        check_cuts(shapes, WHOLE, Sharding(2, 2), 0, VOCAB)


def test_a_wrong_count_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "total_parameters", lambda model: 7)
    with pytest.raises(RunError, match="parameters of the whole model: built .*, planned 7"):
        dry_run(tiny_config("dense"), Machine(1, 80), 0)


def test_ranks_and_layouts_that_are_not_there_are_refused() -> None:
    with pytest.raises(UserError, match=r"--rank -1: must be 0 to 3 on 4 GPUs"):
        dry_run(tiny_config("dense"), Machine(4, 80), -1)
    with pytest.raises(UserError, match="number of processes = 3"):
        dry_run(tiny_config("dense", tensor=2), Machine(3, 80), 0)


ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


def call(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "tools/plan_run.py", *map(str, words)],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_the_tool_prints_layouts_that_fit_80_columns() -> None:
    plain = "training.compile=false"  # or ZeRO-3 is refused
    done = call(
        "examples/dtf_7b/config.yaml", "--gpus", 64, "--gpu-memory", 80, "--json", "--top", 9999, plain
    )
    assert done.returncode == 0, done.stderr
    assert re.search(
        r"^ +1 +1 +64 +3\* .*\n(.*\n)*\n\* offloaded: up to \d+\.\d GiB of each node's",
        done.stdout,
        re.MULTILINE,
    )
    *lines, last = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    records = json.loads(last)
    assert records[0]["fits"] and records[0]["memory_gib"] <= 76
    assert records[0]["memory_gib"] == pytest.approx(sum(records[0]["memory"].values()))
    assert not records[-1]["fits"] and records[-1]["reason"]
    assert [r["reason"] for r in records if "memory" in r and not r["fits"]]


def test_the_tool_builds_ranks() -> None:
    done = call(
        "examples/dtf_3b/config.yaml",
        "parallel.pipeline=4",
        "--gpus",
        1024,
        "--gpu-memory",
        80,
        "--rank",
        0,
        1023,
        "--json",
    )
    assert done.returncode == 0, done.stderr
    first, last = json.loads(done.stdout.splitlines()[-1])
    assert (first["rank"], first["pipeline"], last["pipeline"], last["layers"][1]) == (0, 0, 3, 36)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--gpus", 0, "--gpu-memory", 80), "error: argument --gpus: 0: must be at least 1"),
        (("--gpus", 8, "--gpu-memory", -1), "error: argument --gpu-memory: -1: must be a number above 0"),
        (("--gpus", 8, "--gpu-memory", "x"), "error: argument --gpu-memory: invalid"),
        (("--gpus", 8, "--gpu-memory", 3), "error: --reserve-gib 4 leaves nothing"),
        (("--gpus", 8, "--gpu-memory", 80, "--rank", 9), "error: --rank 9: must be 0 to 7"),
        (("model.hidden_sise=1", "--gpus", 8, "--gpu-memory", 80), "error: model.hidden_sise"),
        (("model.vocab_size=null", "--gpus", 8, "--gpu-memory", 80), "error: model.vocab_size is not set"),
    ],
)
def test_the_tool_says_in_one_line_what_is_wrong(words: tuple[object, ...], said: str) -> None:
    done = call("examples/dtf_3b/config.yaml", *words)
    *stages, error = done.stderr.splitlines()
    assert done.returncode == 2
    assert error.startswith(said)
    assert len(stages) <= 1, "what it was about to do"
