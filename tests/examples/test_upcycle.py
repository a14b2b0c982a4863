"""The upcycling examples: each has the shape of its published base model, fits eight GPUs, and is in the table as it is."""

from pathlib import Path

import pytest

from megadyn.config import load_config
from megadyn.engine.dry_run import dry_run
from megadyn.planning.flops import dense_twin, training_flops
from megadyn.planning.layouts import GIB, Machine
from megadyn.planning.parameters import total_parameters
from tests.examples.test_configs import EXAMPLES, plan, text
from tests.helpers.published import CONFIGS, PARAMETERS, write_models

FOLDER = EXAMPLES / "upcycle"
EIGHT = Machine(8, 80)


@pytest.fixture(autouse=True)
def at_the_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_models(tmp_path)
    monkeypatch.chdir(tmp_path)


def described(path: Path) -> list[str]:
    config, base = load_config(path), path.read_text().partition("shape_from: ")[2].partition("}")[0]
    assert total_parameters(dense_twin(config.model)) == PARAMETERS[base]
    assert config.tokenizer.path == config.checkpoint.init_from == base
    multipliers = config.optimizer.multipliers
    assert (multipliers.router, multipliers.prior, multipliers.base) == (10, 10, 1)
    length, layout = config.training.sequence_length, plan(config, EIGHT)
    assert layout.fits
    flops = training_flops(config.model, length)
    return [
        f"`{path.name}`",
        base.partition("/")[2],
        f"{total_parameters(config.model) / 1e9:.3f}G",
        f"{flops / length / 1e9:.2f}",
        f"{flops / training_flops(dense_twin(config.model), length):.1%}",
        f"{layout.tensor} x {layout.pipeline} x {layout.data}",
        f"{layout.memory.total / GIB:.1f}",
    ]


def test_the_table_states_each_example_as_it_is() -> None:
    lines = [line for line in (FOLDER / "README.md").read_text().splitlines() if line.startswith("|")]
    stated = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    found = [described(path) for path in sorted(FOLDER.glob("*.yaml"))]
    assert stated == found, "the table is to say:\n" + text(found)
    assert {row[1] for row in found} == {name.partition("/")[2] for name in CONFIGS}


def test_the_last_rank_of_the_largest_can_be_built() -> None:
    assert dry_run(load_config(FOLDER / "qwen2.5_7b.yaml"), EIGHT, 7).fits
