"""Runs with `checkpoint.mirror`: what is copied while they train, what they resume from, and what they say."""

import json
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import pytest

from megadyn.checkpoint import layout, store
from megadyn.commands import export
from megadyn.training import mirroring
from tests.helpers.crew import Crew, last_step, resumed_at, wait_until

put = store.Store.put


def hangs_at(rank: int, *, file: str, ending_s: float = 5.0) -> None:
    """The connection is as good as dead when this file of a checkpoint is copied."""
    mirroring.ENDING_S = ending_s

    def put_or_hang(self: store.Store, path: Path, name: str) -> None:
        if path.name.startswith(file):
            time.sleep(1000)
        put(self, path, name)

    store.Store.put = put_or_hang


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_in_an_empty_folder_goes_on_from_the_mirror(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As if it had never stopped, also if the newest copy was cut off before its manifest was written."""
    settings = ["checkpoint.interval=2", "data.validation_fraction=0", "parallel.tensor=2"]
    settings += ["checkpoint.background=true", "checkpoint.average.ema=0.5", "checkpoint.keep=0"]
    places, runs = [tmp_path / "mirror", tmp_path / "other"], [tmp_path / "out", tmp_path / "new"]
    crew = Crew(config_file, *settings, f"checkpoint.mirror=file://{places[0]}", world=2)
    assert crew.wait() == [0, 0], crew.output()
    assert f"file://{places[0]} has no checkpoint yet: a new run" in crew.output()
    assert f"file://{places[0]} has everything" in crew.output()
    for folder in ("checkpoints", "averages"):
        assert contents(places[0] / folder) == contents(runs[0] / folder)

    newest = runs[0] / "checkpoints" / layout.folder_name(6)
    assert export.main(["--checkpoint", str(newest), "--output", str(tmp_path / "hf"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said["mirror"] == f"file://{places[0]}/exports/hf"
    copied = contents(places[0] / "exports/hf")
    assert json.loads(copied.pop("mirror.json"))["files"].keys() == copied.keys()
    assert copied == contents(tmp_path / "hf")

    shutil.copytree(*places)
    (places[1] / "checkpoints" / layout.folder_name(6) / layout.MANIFEST).unlink()
    more = [f"checkpoint.mirror=file://{places[1]}", f"output_dir={runs[1]}"]
    crew = Crew(config_file, *settings, *more, world=2)
    assert crew.wait() == [0, 0], crew.output()
    assert resumed_at(crew.output()) == 4
    for folder in ("checkpoints", "averages"):
        for name in (layout.folder_name(4), layout.folder_name(6)):
            one, other = (contents(run / folder / name) for run in runs)
            weights = [file for file in one if file.endswith(".safetensors")]
            assert weights and all(one[file] == other[file] for file in weights), (folder, name)
    assert contents(places[1] / "checkpoints").keys() == contents(places[0] / "checkpoints").keys()


def test_a_copy_is_cut_off_by_a_kill_and_by_the_end_of_waiting(config_file: Path, tmp_path: Path) -> None:
    place = tmp_path / "mirror/checkpoints" / layout.folder_name(2)
    settings = ["training.iterations=2", "data.validation_fraction=0", "training.eval_interval=0"]
    settings += [f"checkpoint.mirror=file://{tmp_path}/mirror", "checkpoint.mirror_wait_s=1"]
    hanging = partial(hangs_at, file="weights")
    crew = Crew(config_file, *settings, "checkpoint.mirror_wait_s=1000", sabotage=hanging)
    wait_until(lambda: list(place.glob("optimizer-*")))
    crew.signal(0, signal.SIGKILL)
    assert crew.wait() == [-signal.SIGKILL]
    assert not (place / layout.MANIFEST).exists()

    # Told to stop, it saves, and leaves time to end.
    stopped = partial(hangs_at, file="weights", ending_s=119.0)
    more = ["checkpoint.mirror_wait_s=1000", "training.grace_s=120", "training.iterations=100000"]
    crew = Crew(config_file, *settings, *more, "parallel.tensor=2", world=2, sabotage=stopped)
    wait_until(lambda: last_step(tmp_path / "out") > 2)
    crew.signal(1, signal.SIGTERM)
    assert crew.wait(60) == [0, 0], crew.output()
    saved = layout.resolve(tmp_path / "out")
    assert f"s: checkpoints/{saved.name}" in " ".join(crew.output().split())
    assert not list((tmp_path / "out").rglob(layout.HELD)), "held by the killed run, or by this one"

    settings.append(f"training.iterations={layout.iteration_of(saved)}")
    crew = Crew(config_file, *settings, sabotage=hanging)
    assert crew.wait() == [0], crew.output()
    assert "nothing to do: the run is at iteration" in crew.output()
    said = f"not copied within 1 s: checkpoints/{saved.name}, checkpoints/{place.name}; the same command"
    assert said in " ".join(crew.output().split())
    assert not list((tmp_path / "mirror").rglob(layout.MANIFEST))

    crew = Crew(config_file, *settings)
    assert crew.wait() == [0], crew.output()
    assert contents(tmp_path / "mirror/checkpoints") == contents(tmp_path / "out/checkpoints")


def test_a_mirror_that_cannot_be_used_ends_the_start(config_file: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    given = f"file://{tmp_path}/file/run"
    crew = Crew(config_file, f"checkpoint.mirror={given}", world=2)
    assert crew.wait() == [2, 2], crew.output()
    assert [crew.errors(rank)[0].count(f"checkpoint.mirror = '{given}': ") for rank in range(2)] == [1, 1]
    assert not (tmp_path / "out/checkpoints").exists()
