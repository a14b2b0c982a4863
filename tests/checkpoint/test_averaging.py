"""An average of checkpoints: the plain mean of what they hold, from any layouts, complete or absent, and used like any other."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megadyn.checkpoint import averaging, layout
from megadyn.checkpoint.averaging import terms_of
from megadyn.checkpoint.merge import ShardedTensors, thresholds
from megadyn.checkpoint.start import starting_point
from megadyn.commands import main
from megadyn.config import CheckpointConfig
from megadyn.errors import UserError
from megadyn.evaluation.losses import evaluate
from tests.helpers.crew import Crew, lines

NAME = "iteration-00000002"


def rewritten(source: Path, folder: Path, change: Callable[[dict[str, Any]], None], seed: int = 0) -> Path:
    """A copy of a checkpoint with other weights, drawn from `seed`, and a manifest that `change` changed."""
    shutil.copytree(source, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    draw = torch.Generator().manual_seed(seed)
    for name in [name for name in manifest["files"] if name.startswith("weights-")]:
        tensors = load_file(folder / name)
        save_file(
            {key: tensor + torch.randn(tensor.shape, generator=draw) for key, tensor in tensors.items()},
            folder / name,
        )
    change(manifest)
    manifest["files"] = {name: layout.file_digest(folder / name) for name in manifest["files"]}
    layout.write_manifest(folder, manifest)
    return folder


def later(iteration: int, tau: float) -> Callable[[dict[str, Any]], None]:
    def change(manifest: dict[str, Any]) -> None:
        manifest |= {"iteration": iteration, "consumed_samples": 2 * iteration}
        for state in manifest["routing"]["thresholds"].values():
            state |= {"average": tau * (1 - 0.99**iteration), "steps": iteration}

    return change


@pytest.fixture
def three(saved: Path, tmp_path: Path) -> list[Path]:
    """Checkpoints of two tensor ranks after steps 2, 4 and 6, with thresholds 1, 2 and 6."""
    first = saved / "checkpoints" / NAME
    return [
        rewritten(first, tmp_path / f"of-{step}", later(step, tau), seed=step)
        for step, tau in ((2, 1.0), (4, 2.0), (6, 6.0))
    ]


def whole(folder: Path) -> dict[str, torch.Tensor]:
    source = ShardedTensors(folder, "weights")
    return {name: source.whole(name) for name in source.names()}


@pytest.mark.parametrize(("words", "weights"), [([], [1 / 3] * 3), (["--ema", "0.8"], [0.64, 0.16, 0.2])])
def test_an_average_is_the_mean_of_whole_tensors_and_of_thresholds(
    words: list[str], weights: list[float], three: list[Path], tmp_path: Path, capsys: Any
) -> None:
    output = tmp_path / "mean"
    given = [three[1], three[2], three[0]]  # they count by their iteration
    assert main(["average", *map(str, given), *words, "--output", str(output), "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["iteration"] == 6
    assert [one["weight"] for one in result["averaged"]] == pytest.approx(weights)
    assert [one["iteration"] for one in result["averaged"]] == [2, 4, 6]
    parts, found = [whole(folder) for folder in three], whole(output)
    assert found.keys() == parts[0].keys()
    for name, tensor in found.items():
        mean = sum(weight * part[name].double() for weight, part in zip(weights, parts))
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor, mean.float(), rtol=1e-6, atol=1e-7)
    (tau,) = {float(one.value) for one in thresholds(layout.read_manifest(output)).values()}
    assert tau == pytest.approx(sum(weight * value for weight, value in zip(weights, (1, 2, 6))))
    manifest = layout.read_manifest(output)
    assert manifest["consumed_samples"] == 12
    assert set(manifest["files"]) == {"config.yaml", "weights-pp00-tp00-dp00.safetensors"}
    assert layout.damage(output, sorted(manifest["files"])) is None
    assert main(["checkpoint", str(output)]) == 0
    assert "average of 3 checkpoints, 2 files, all intact" in capsys.readouterr().out


def test_averages_of_averages_name_what_runs_saved(three: list[Path], tmp_path: Path) -> None:
    averaging.average(three[:2], tmp_path / "two")
    outer = averaging.average([tmp_path / "two", three[2]], tmp_path / "outer")["averaged"]
    assert [(one["iteration"], one["weight"]) for one in outer] == [(2, 0.25), (4, 0.25), (6, 0.5)]


def test_any_number_of_ranks_and_files_gives_the_same_tensors(three: list[Path], tmp_path: Path) -> None:
    terms, output = terms_of(three, None), tmp_path / "parts"
    output.mkdir()
    files: dict[str, Any] = {}
    for rank in range(3):
        files |= averaging.write_part(terms, output, rank, 3, shard_bytes=1500)[0]
    assert len(files) > 3
    averaging.write_rest(terms, output, files, None)
    averaging.average(three, tmp_path / "one")
    for name, tensor in whole(output).items():
        assert torch.equal(tensor, whole(tmp_path / "one")[name])


def test_moving_averages_take_steps_that_a_run_can_take_one_by_one() -> None:
    folders = [Path(name) for name in "abcd"]
    mean = 0.0
    for place, value in enumerate((3.0, 5.0, -1.0, 8.0)):
        mean = value if place == 0 else 0.9 * mean + 0.1 * value
    terms = terms_of(folders, 0.9)
    assert sum(term.weight for term in terms) == pytest.approx(1)
    assert sum(term.weight * value for term, value in zip(terms, (3.0, 5.0, -1.0, 8.0))) == pytest.approx(
        mean
    )


def test_equal_checkpoints_average_to_themselves_and_score_the_same(saved: Path, tmp_path: Path) -> None:
    first = saved / "checkpoints" / NAME
    shutil.copytree(first, tmp_path / "again")
    averaging.average([first, tmp_path / "again"], tmp_path / "mean")
    assert all(torch.equal(tensor, whole(first)[name]) for name, tensor in whole(tmp_path / "mean").items())
    modes = {"modes": ("topk", "causal"), "samples": 4}
    scores = [evaluate(path, saved.parent / "bytes", **modes) for path in (first, tmp_path / "mean")]
    assert scores[0] == scores[1]


def test_an_export_of_an_average_says_so(three: list[Path], tmp_path: Path) -> None:
    averaging.average(three, tmp_path / "mean")
    assert main(["export", "--checkpoint", str(tmp_path / "mean"), "--output", str(tmp_path / "hf")]) == 0
    card = (tmp_path / "hf/README.md").read_text()
    assert "The weights are the average of 3 checkpoints of steps 2 to 6." in card
    assert "not of their average" in card


def refused(words: list[object], said: str, capsys: Any) -> None:
    assert main(["average", *map(str, words)]) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert said in error


def test_what_cannot_be_averaged_is_refused_and_leaves_nothing(
    three: list[Path], saved: Path, tmp_path: Path, capsys: Any
) -> None:
    new = ["--output", tmp_path / "mean"]
    refused([three[0], *new], "one checkpoint is no average", capsys)
    refused([three[0], three[0], *new], "named twice", capsys)
    refused([saved, "--last", 2, *new], "1 good checkpoints, fewer than --last 2", capsys)
    refused([*three, "--last", 2, *new], "takes one run's folder", capsys)
    refused([*three, "--ema", 1, *new], "must be between 0 and 1", capsys)
    refused([*three, "--output", tmp_path / "checkpoints/mean"], "a checkpoint of its own", capsys)
    refused([*three, "--output", three[0]], "exists", capsys)
    layout.mark_not_good(three[1], "its loss is nan")
    refused([*three, *new], "is not good: its loss is nan", capsys)
    (three[1] / layout.NOT_GOOD).unlink()
    weights = next(three[1].glob("weights-*"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    refused([*three, *new], "damaged", capsys)
    config = three[2] / "config.yaml"
    config.write_text(config.read_text().replace("ma_window: 100", "ma_window: 50"))
    manifest = layout.read_manifest(three[2])
    manifest["files"]["config.yaml"] = layout.file_digest(config)
    layout.write_manifest(three[2], manifest)
    refused(
        [three[0], three[2], *new],
        "different models: model.routing.ma_window is 100 in one and 50 in the other",
        capsys,
    )
    assert not (tmp_path / "mean").exists() and not list(tmp_path.glob(".*"))


def test_a_full_disk_leaves_nothing(three: list[Path], tmp_path: Path, monkeypatch: Any) -> None:
    def no_room(tensors: Any, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(averaging, "save_file", no_room)
    with pytest.raises(UserError, match="not written: .*No space left"):
        averaging.average(three, tmp_path / "mean")
    assert not list(tmp_path.glob("*mean"))


def test_a_run_forks_from_an_average_with_fresh_moments(
    saved: Path, three: list[Path], tmp_path: Path
) -> None:
    averaging.average(three, tmp_path / "mean")
    crew = Crew(
        saved.parent / "config.yaml",
        f"checkpoint.fork_from={tmp_path}/mean",
        f"output_dir={tmp_path}/out",
        "training.iterations=7",
        "parallel.tensor=1",
    )
    assert crew.wait() == [0], crew.output()
    assert "is an average: the optimizer's moments start from zero" in crew.output()
    assert [line["iteration"] for line in lines(tmp_path / "out") if "lm_loss" in line] == [7]
    new = tmp_path / "out/checkpoints/iteration-00000007"
    assert layout.read_manifest(new)["optimizer_steps"] == 1
    assert "averaged" not in layout.read_manifest(new)


def test_a_run_can_go_back_to_an_average_of_its_own(tmp_path: Path) -> None:
    own = tmp_path / "checkpoints" / NAME
    mine, others = (folder / "averages" / NAME for folder in (tmp_path, tmp_path / "other"))
    assert starting_point(CheckpointConfig(fork_from=str(mine)), own) == mine
    assert starting_point(CheckpointConfig(fork_from=str(others)), own) == own
    assert starting_point(CheckpointConfig(fork_from=str(others)), None) == others
