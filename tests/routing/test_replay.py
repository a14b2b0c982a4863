"""What a recording holds, how two are compared, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megadyn.config import Config
from megadyn.errors import UserError
from megadyn.network import Network, choosing_layers, routed_layers
from megadyn.parallel.grid import Grid
from megadyn.routing.choice import Decisions, Tape, cut_of
from megadyn.routing.recording import Recorded, Recording, flips
from megadyn.routing.replay import Replay, refuse_replay
from megadyn.routing.select import choose_top
from tests.helpers.networks import end_step, make_network
from tests.helpers.tiny import tiny_config, tiny_tokens

STEPS = 2


def run(config: Config, network: Network | None = None, steps: int = STEPS) -> None:
    """Steps of two micro-batches on one process, whose weights stay."""
    network = network or make_network(config)
    replay = Replay(config, routed_layers(network), choosing_layers(config.model), Grid(), "data")
    for step, samples in enumerate(tiny_tokens(steps)):
        with replay.step(step + 1, 4 * step):
            for part in samples.split(2):
                network(part[:, :-1], part[:, 1:]).backward()
        end_step(network)


def config_of(
    kind: str = "dtf",
    *,
    record: Path | None = None,
    replay: Path | None = None,
    output_dir: str = "unused",
    **model: Any,
) -> Config:
    config = tiny_config(kind, iterations=STEPS, output_dir=output_dir, **model)
    config.training.routing_record, config.training.routing_replay = (
        record and str(record),
        replay and str(replay),
    )
    return config.checked()


def refuse(config: Config, iteration: int = 0, data: str = "data") -> None:
    refuse_replay(config, choosing_layers(config.model), data, iteration)


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    folder = tmp_path / "recorded"
    run(config_of(record=folder))
    return folder


def test_a_recording_has_a_file_for_each_layer_that_chooses_and_step(recorded: Path) -> None:
    files = sorted(path.relative_to(recorded).as_posix() for path in recorded.rglob("*.*"))
    assert files == [
        *(f"layer-00{layer}/step-0000000{step}.npz" for layer in (1, 3) for step in (1, 2)),
        "recording.json",
    ]
    found = Recording(recorded).read(3, 2)
    assert found.chosen.shape == found.score.shape == (4, 24)
    assert found.chosen.sum(axis=1).tolist() == [12] * 4
    assert (found.score.dtype, found.cut.dtype, found.cut.shape, found.first) == (
        "float32",
        "float32",
        (4,),
        4,
    )
    assert (found.chosen == (found.score >= found.cut[:, None])).all()


def test_nothing_is_recorded_unless_asked_for(tmp_path: Path) -> None:
    network = make_network(config_of())
    run(config_of(), network)
    assert all(layer.decisions.tape is None for layer in routed_layers(network))
    assert not list(tmp_path.iterdir())


def test_a_run_that_replays_notes_what_it_would_have_chosen(recorded: Path, tmp_path: Path) -> None:
    other = make_network(config_of())
    for layer in routed_layers(other):
        for param in layer.parameters():
            torch.nn.init.normal_(param, std=0.3)
    again = tmp_path / "again"
    run(config_of(record=again, replay=recorded), other)
    assert flips(recorded, again).changed
    assert Recording(again).read(1, 1).chosen.sum(axis=1).tolist() == [12] * 4


def test_flips_are_counted_with_their_distance_from_the_cut(recorded: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    run(config_of(record=other))
    assert flips(recorded, other).changed == 0
    assert flips(recorded, other).compared == 2 * 2 * 4 * 24
    found = Recording(other).read(3, 2)
    highest_left = np.where(found.chosen[1], -np.inf, found.score[1]).argmax()
    lowest = np.where(found.chosen[1], found.score[1], np.inf).argmin()
    found.chosen[1, [highest_left, lowest]] = True, False
    Recording(other).write(3, 2, found)
    moved = flips(recorded, other)
    assert (moved.changed, moved.steps.tolist(), moved.layers.tolist()) == (2, [2, 2], [3, 3])
    apart = found.cut[1] - found.score[1, highest_left]
    assert moved.farthest == pytest.approx(apart / np.sqrt(np.square(found.score).mean()), rel=1e-5)
    assert moved.first.changed == 2


def test_recordings_of_different_runs_are_not_compared(recorded: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    run(config_of("mod", record=other))
    with pytest.raises(UserError, match=r"cannot be compared with .*other: kind dtf, but the other has mod"):
        flips(recorded, other)
    about = Recording(recorded).about()
    Recording(tmp_path / "empty").begin(about)
    with pytest.raises(UserError, match="have no step in common"):
        flips(recorded, tmp_path / "empty")


@pytest.mark.parametrize(
    ("chosen", "cut", "want"),
    [
        ([True, True, False], None, 2.0),  # top-k: the lowest that was taken
        ([True, True, False], 1.5, 1.5),
        ([True, True, True], 1.5, 1.0),  # a guard took one more
        ([True, False, False], 1.5, 2.0),  # a guard took one less
        ([False, False, False], 4.0, 4.0),
    ],
    ids=str,
)
def test_the_cut_lies_between_what_was_taken_and_what_was_left(
    chosen: list[bool], cut: float | None, want: float
) -> None:
    assert cut_of(torch.tensor([chosen]), torch.tensor([[3.0, 2.0, 1.0]]), cut).tolist() == [want]


# ---- what is refused -----------------------------------------------------------------------------


def test_a_fitting_recording_is_not_refused(recorded: Path) -> None:
    refuse(config_of(replay=recorded))
    refuse(config_of(replay=recorded, output_dir="elsewhere"))
    refuse(config_of(record=recorded))  # the run goes on


@pytest.mark.parametrize("key", ["record", "replay"])
def test_a_kind_that_does_not_choose_is_refused(key: str, tmp_path: Path) -> None:
    with pytest.raises(
        UserError,
        match=rf"training\.routing_{key} = .*: must be left out with dense, because no layer chooses",
    ):
        refuse(config_of("dense", **{key: tmp_path}))


def test_one_folder_for_both_is_refused(recorded: Path) -> None:
    with pytest.raises(
        UserError,
        match=r"training\.routing_record = .*: must be another folder than training\.routing_replay",
    ):
        config_of(record=recorded.parent / "." / "recorded", replay=recorded)


def test_the_folder_of_another_run_is_not_written_to(recorded: Path) -> None:
    with pytest.raises(
        UserError, match=r"must be an empty folder, or this run's own: it holds a recording of .*unused"
    ):
        refuse(config_of(record=recorded, output_dir="elsewhere"))
    with pytest.raises(
        UserError, match=r"unused: layers 1 \(dtf_dynamic\), 3 \(dtf_dynamic\), but this run has"
    ):
        refuse(config_of(record=recorded, num_layers=2))


def other_shape(config: Config) -> Config:
    config.training.sequence_length = 12
    return config


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (
            lambda folder: config_of("mod", replay=folder),
            "does not fit this run: kind dtf, but this run has mod",
        ),
        (
            lambda folder: config_of(replay=folder, num_layers=2),
            r"layers 1 .*, 3 .*, but this run has 1 \(dtf_dynamic\)$",
        ),
        (lambda folder: other_shape(config_of(replay=folder)), "length 24, but this run has 12"),
        (
            lambda folder: config_of(replay=folder / "layer-001"),
            "recording.json: No such file or directory; not a recording",
        ),
    ],
)
def test_what_does_not_fit_is_not_replayed(
    config: Callable[[Path], Config], problem: str, recorded: Path
) -> None:
    with pytest.raises(UserError, match=problem):
        refuse(config(recorded))


def test_other_data_are_not_replayed(recorded: Path) -> None:
    with pytest.raises(UserError, match="the training data or their order differ from this run's"):
        refuse(config_of(replay=recorded), data="others")


def test_a_missing_step_is_refused_unless_the_run_is_past_it(recorded: Path) -> None:
    Recording(recorded).path(3, 1).unlink()
    with pytest.raises(
        UserError, match=r"layer-003/step-00000001.npz: missing .*, like 0 more of the steps 1 to 2"
    ):
        refuse(config_of(replay=recorded))
    refuse(config_of(replay=recorded), iteration=1)


@pytest.mark.parametrize("text", ["no json", "[]", json.dumps({"kind": "dtf"})])
def test_a_damaged_description_is_refused(text: str, recorded: Path) -> None:
    (recorded / "recording.json").write_text(text)
    with pytest.raises(UserError, match=r"recording.json: damaged, or not a recording"):
        refuse(config_of(replay=recorded))


def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def another(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, np.zeros(3))


def rewritten(change: Callable[[Recorded], Recorded]) -> Callable[[Path], None]:
    def rewrite(path: Path) -> None:
        recording = Recording(path.parents[1])
        recording.write(1, 2, change(recording.read(1, 2)))

    return rewrite


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (half, "damaged, or not a recorded step"),
        (Path.unlink, "missing from the recording"),
        (lambda path: path.write_text(""), "damaged, or not a recorded step"),
        (another, "damaged, or not a recorded step"),
        (
            rewritten(lambda it: it._replace(first=0)),
            "recorded from sample 0 of its run on, but the step begins at sample 4",
        ),
        (
            rewritten(lambda it: it._replace(chosen=it.chosen[:, :7])),
            r"holds bool \[4, 7\]: must be bool \[4, 24\]",
        ),
        (rewritten(lambda it: it._replace(chosen=it.score)), r"holds float32 \[4, 24\]: must be bool"),
        (
            rewritten(lambda it: it._replace(chosen=np.stack([it.chosen] * 2, axis=-1))),
            r"\[24, 2\] .* the layer makes \[24\]",
        ),
        (
            rewritten(lambda it: it._replace(chosen=~it.chosen & False)),
            "must choose 12 tokens of each sequence, as the layer does",
        ),
    ],
    ids=range(9),
)
def test_a_damaged_step_stops_the_run(damage: Callable[[Path], None], problem: str, recorded: Path) -> None:
    damage(Recording(recorded).path(1, 2))
    with pytest.raises(UserError, match=rf"layer-001/step-00000002.npz: .*{problem}"):
        run(config_of(replay=recorded))


def test_a_layer_whose_choices_pass_elsewhere_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Decisions, "settle_top", lambda self, top, score: top)
    with pytest.raises(
        UserError, match=r"layer 1 \(dtf_dynamic\) cannot be recorded or replayed: .* but 0 did"
    ):
        run(config_of(record=tmp_path / "recorded"))


def test_the_choices_of_a_step_are_read_in_the_order_of_its_samples() -> None:
    score = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    wanted = choose_top(score, 2)
    decisions = Decisions()
    decisions.tape = Tape(
        4,
        torch.zeros(4, 6, dtype=torch.bool).view(-1).index_fill(0, wanted.places.flatten(), True).view(4, 6),
    )
    parts = [decisions.settle_top(choose_top(-part, 2), -part).places for part in score.split(2)]
    assert torch.equal(torch.cat([parts[0], parts[1] + 12]), wanted.places)
