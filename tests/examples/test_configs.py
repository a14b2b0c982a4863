"""Every configuration in examples/ can be planned, fits the GPUs that the index names, and is described there as it is."""

import re
from pathlib import Path
from typing import NamedTuple

import pytest

from megadyn.config import Config, engine_settings, load_config
from megadyn.engine.dry_run import dry_run
from megadyn.planning.flops import dense_twin, training_flops
from megadyn.planning.layouts import GIB, EngineFile, Layout, Machine, lay_out
from megadyn.planning.parameters import total_parameters
from tests.helpers.tiny import ROOT

EXAMPLES = ROOT / "examples"
INDEX = (EXAMPLES / "README.md").read_text()
CONFIGS = sorted(
    path.relative_to(EXAMPLES).as_posix()
    for path in EXAMPLES.rglob("*.yaml")
    if path.parent.name not in ("bases", "tasks", "upcycle")
)
"""Those in `upcycle/` have a table and a test of their own."""
ON_A_CPU = {
    "quickstart/config.yaml": ["model.vocab_size=4096"],
    "study/config.yaml": ["model.vocab_size=4096"],
    "study/grid.yaml": ["model.vocab_size=8192", "training.micro_batch_size=4"],
    "study/gate.yaml": ["model.vocab_size=4096", "training.micro_batch_size=4"],
    "phases/config.yaml": ["model.vocab_size=4096"],
    **{
        f"probe/{path.name}": ["model.vocab_size=79", "training.micro_batch_size=16"]
        for path in (EXAMPLES / "probe").glob("*.yaml")
    },
}
"""With what their tokenizers add, and with enough micro-batches for the two processes of the test."""


class Run(NamedTuple):
    name: str
    gpus: int
    memory_gb: int
    overrides: list[str]


def table(first_column: str, second_column: str) -> list[list[str]]:
    """Cells of the index's table with these columns, without its head."""
    lines = INDEX.partition(f"| {first_column} | {second_column} |")[2].splitlines()[2:]
    rows = lines[: next((i for i, line in enumerate(lines) if not line.startswith("|")), None)]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in rows]


MODELS, LAYOUTS = table("configuration", "model"), table("configuration", "GPUs")
RUNS = [
    Run(
        name.strip("`"),
        int(gpus.partition(" x ")[0].replace(",", "")),
        int(gpus.split()[2]),
        overrides.strip("`").split(),
    )
    for name, gpus, overrides, *_ in LAYOUTS
]


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def load(run: Run) -> Config:
    return load_config(EXAMPLES / run.name, run.overrides)


def plan(config: Config, machine: Machine) -> Layout:
    return lay_out(
        config, EngineFile(config.deepspeed_config, engine_settings(config)["zero_optimization"]), machine
    )


def test_the_index_names_each_configuration_and_no_other() -> None:
    assert sorted({row[0].strip("`") for row in MODELS} | set(ON_A_CPU)) == CONFIGS
    assert {run.name for run in RUNS} == set(CONFIGS) - set(ON_A_CPU)
    for run in RUNS:
        script = (EXAMPLES / run.name).parent / "run.sh"
        assert script.readlink() == Path("../launch/run.sh")


def test_the_index_states_each_model_as_it_is() -> None:
    found = []
    for row in MODELS:
        config = load_config(EXAMPLES / row[0].strip("`"))
        length = config.training.sequence_length
        flops = training_flops(config.model, length)
        share = flops / training_flops(dense_twin(config.model), length)
        found.append(
            [
                *row[:2],
                f"{total_parameters(config.model) / 1e9:.3f}G",
                f"{flops / length / 1e9:.2f}",
                f"{share:.1%}",
            ]
        )
    assert found == MODELS, "the index is to say:\n" + text(found)


def test_each_run_fits_its_gpus_and_the_index_states_it_as_the_planner_has_it() -> None:
    found = []
    for row, run in zip(LAYOUTS, RUNS, strict=True):
        layout = plan(load(run), Machine(run.gpus, run.memory_gb))
        assert layout.fits, f"{run} needs {layout.memory.total / GIB:.1f} GiB"
        rate = f"{layout.tokens_per_second / 1e3:,.0f}k" if run.memory_gb == 80 else "-"
        found.append(
            [
                *row[:3],
                f"{layout.tensor} x {layout.pipeline} x {layout.data}",
                str(layout.zero_stage),
                f"{layout.micro_batches} x {layout.micro_batch}",
                layout.recompute,
                f"{layout.memory.total / GIB:.1f}",
                f"{layout.bubble:.0%}",
                rate,
            ]
        )
    assert found == LAYOUTS, "the index is to say:\n" + text(found)


def text(rows: list[list[str]]) -> str:
    return "\n".join(re.sub(r"\|\s+\|", "| |", f"| {' | '.join(row)} |") for row in rows)


@pytest.mark.parametrize("run", {run.name: run for run in reversed(RUNS)}.values(), ids=lambda run: run.name)
def test_the_first_and_the_last_rank_of_each_run_can_be_built(run: Run) -> None:
    """Of the smallest machine that the index names."""
    config, machine = load(run), Machine(run.gpus, run.memory_gb)
    first, last = (dry_run(config, machine, rank) for rank in (0, run.gpus - 1))
    assert (first.first_layer, last.end_layer) == (0, config.model.num_layers)
    assert first.fits and last.fits


@pytest.mark.parametrize(("name", "words"), ON_A_CPU.items(), ids=ON_A_CPU.keys())
def test_what_runs_on_a_cpu_fits_into_four_gib(name: str, words: list[str]) -> None:
    config, machine = load_config(EXAMPLES / name, words), Machine(2, 4, reserve_gib=0.5)
    assert plan(config, machine).fits
    assert dry_run(config, machine, 1).fits


def test_twins_differ_in_their_routing_alone() -> None:
    for size in ("3b", "7b"):
        dense = load_config(EXAMPLES / f"dense_{size}/config.yaml")
        for kind in ("dtf", "mod", "dtrnet"):
            twin = load_config(EXAMPLES / f"{kind}_{size}/config.yaml")
            assert twin.model.routing.kind == kind
            twin.model.routing, twin.output_dir = dense.model.routing, dense.output_dir
            assert twin == dense


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("qwen2.5_0.5b", (896, 24, 14, 2, 4864, 151936)),
        ("qwen2.5_3b", (2048, 36, 16, 2, 11008, 151936)),
        ("qwen2.5_7b", (3584, 28, 28, 4, 18944, 152064)),
    ],
)
def test_shapes_are_those_of_qwen(name: str, shape: tuple[int, ...]) -> None:
    model = load_config(EXAMPLES / f"bases/{name}.yaml", ["output_dir=unused"]).model
    assert (
        model.hidden_size,
        model.num_layers,
        model.num_heads,
        model.num_kv_heads,
        model.ffn_size,
        model.vocab_size,
    ) == shape
    assert (model.qkv_bias, model.tie_embeddings, model.rope.theta, model.norm_eps) == (
        True,
        name != "qwen2.5_7b",
        1e6,
        1e-6,
    )
