"""The main job records its routing choices, and under another layout replays them, or says why not."""

from pathlib import Path

import pytest

from megadyn.routing.recording import Recording, flips
from tests.helpers.crew import Crew, lines


def losses(run: Path) -> dict[int, tuple[float, float]]:
    return {
        line["iteration"]: (line["lm_loss"], line["grad_norm"]) for line in lines(run) if "lm_loss" in line
    }


def test_a_recording_of_one_process_is_replayed_by_ranks_and_continued_by_its_own_run(
    config_file: Path, tmp_path: Path
) -> None:
    choices, one, two = (tmp_path / name for name in ("choices", "out", "two"))
    record = f"training.routing_record={choices}"
    first = Crew(config_file, record, "training.iterations=4")
    assert first.wait() == [0], first.output()
    again = Crew(config_file, record, "data.validation_fraction=0.1")  # goes on from its checkpoint
    assert again.wait() == [0], again.output()
    assert Recording(choices).steps(1) == Recording(choices).steps(3) == set(range(1, 7))

    crew = Crew(
        config_file,
        f"training.routing_replay={choices}",
        f"training.routing_record={tmp_path / 'own'}",
        "training.iterations=4",
        f"output_dir={two}",
        "parallel.pipeline=2",
        world=2,
    )
    assert crew.wait() == [0, 0], crew.output()
    assert list(losses(two)) == [1, 2, 3, 4]
    for step, found in losses(two).items():
        assert found == pytest.approx(losses(one)[step], rel=1e-5)
    assert flips(choices, tmp_path / "own").compared == 2 * 4 * 4 * 48


def test_a_recording_that_does_not_fit_is_one_sentence(config_file: Path, tmp_path: Path) -> None:
    crew = Crew(config_file, f"training.routing_replay={tmp_path / 'none'}")
    assert crew.wait() == [2]
    assert crew.errors() == [
        f"error: {tmp_path}/none/recording.json: No such file or directory; not a recording of routing choices"
    ]
    assert "Traceback" not in crew.output()
