"""Names, publishing, pruning: what stands under a checkpoint's name is whole at any moment."""

import zlib
from pathlib import Path

import pytest

from megadyn.checkpoint import layout
from megadyn.log import log


def make(root: Path, *iterations: int) -> None:
    for iteration in iterations:
        temporary = root / f"{layout.WRITING}{layout.folder_name(iteration)}"
        temporary.mkdir(parents=True)
        (temporary / "content").write_text(str(iteration))
        layout.publish(temporary, root / layout.folder_name(iteration))


def kept(root: Path) -> list[int]:
    assert not list(root.glob(".*"))
    return sorted(layout.iteration_of(path) for path in root.glob("iteration-*"))


@pytest.mark.parametrize(
    ("keep", "keep_every", "left"),
    [
        (0, 0, [2, 4, 6, 8, 10, 12]),
        (9, 0, [2, 4, 6, 8, 10, 12]),
        (0, 4, [2, 4, 6, 8, 10, 12]),
        (1, 0, [12]),
        (2, 0, [10, 12]),
        (1, 6, [6, 12]),
        (2, 4, [4, 8, 10, 12]),
    ],
)
def test_the_newest_and_every_so_many_are_kept(
    keep: int, keep_every: int, left: list[int], tmp_path: Path
) -> None:
    make(tmp_path, 2, 4, 6, 8, 10, 12)
    layout.prune(tmp_path, keep, keep_every)
    assert kept(tmp_path) == left


def test_the_best_by_a_validation_loss_is_kept_and_is_one(tmp_path: Path) -> None:
    """Every mark is of the newest checkpoint, as in a run; one of a run that went back goes with its folder."""
    best = []
    for iteration, loss in ((2, 5.0), (4, 3.0), (6, 3.0), (8, float("nan")), (10, 4.0), (12, 2.0), (14, 2.5)):
        make(tmp_path, iteration)
        layout.prune(tmp_path, 1)
        layout.mark_best(tmp_path / layout.folder_name(iteration), "code", loss)
        best.append([layout.iteration_of(path.parent) for path in tmp_path.glob("*/best")])
    assert best == [[2], [4], [4], [4], [4], [12], [12]]
    assert kept(tmp_path) == [12, 14]
    assert layout.best_of(tmp_path / layout.folder_name(12)) == ("code", 2.0)
    assert layout.best_of(tmp_path / layout.folder_name(14)) is None
    assert layout.mark_best(
        tmp_path / layout.folder_name(14), "web", 9.0
    )  # the losses of another set do not count
    (tmp_path / layout.folder_name(14) / "best").write_text("{")
    make(tmp_path, 16)
    layout.prune(tmp_path, 1)
    assert kept(tmp_path) == [14, 16]  # what is marked unreadably is kept until there is a better one
    assert layout.mark_best(tmp_path / layout.folder_name(16), "web", 9.5)
    make(tmp_path, 16)
    assert layout.best_of(tmp_path / layout.folder_name(16)) is None


def test_pruning_leaves_what_lies_beyond_latest(tmp_path: Path) -> None:
    make(tmp_path, 2, 4, 8, 6)  # back from 8 to 4, and on
    layout.prune(tmp_path, 1)
    assert kept(tmp_path) == [6, 8]


def test_any_flipped_bit_of_latest_is_told_and_never_repeats_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Iteration 2 is one bit from 6 ("2" and "6"), and 4 is one from both 5 and 6."""
    monkeypatch.setattr(log, "propagate", True)
    make(tmp_path, 2, 4, 5, 6)
    latest, newest = tmp_path / "latest", tmp_path / "iteration-00000006"
    content = latest.read_bytes()
    assert content == b"iteration-00000006\ncrc32 %08x\n" % zlib.crc32(b"iteration-00000006")
    for place in range(8 * len(content)):
        broken = bytearray(content)
        broken[place // 8] ^= 1 << place % 8
        latest.write_bytes(broken)
        caplog.clear()
        assert layout.complete_checkpoints(tmp_path)[0] == newest, bytes(broken)
        if bytes(broken).split() != content.split():
            assert caplog.messages[0].endswith("ignored; iteration-00000006 is the highest iteration"), bytes(
                broken
            )
    latest.write_bytes(content)
    caplog.clear()
    assert layout.complete_checkpoints(tmp_path)[0] == newest
    assert not caplog.messages


def test_a_latest_without_a_check_counts_as_it_stands(tmp_path: Path) -> None:
    """Earlier versions wrote none."""
    make(tmp_path, 2, 4)
    (tmp_path / "latest").write_text("iteration-00000002\n")
    assert layout.complete_checkpoints(tmp_path) == [tmp_path / "iteration-00000002"]


def test_one_of_the_same_iteration_is_replaced_whole(tmp_path: Path) -> None:
    make(tmp_path, 4)
    (tmp_path / "iteration-00000004/old").touch()
    make(tmp_path, 4)
    assert [path.name for path in (tmp_path / "iteration-00000004").iterdir()] == ["content"]
    assert kept(tmp_path) == [4]


def test_a_failed_rename_leaves_the_old_latest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, 2)
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("no")))
    with pytest.raises(OSError, match="no"):
        make(tmp_path, 4)
    assert (tmp_path / "latest").read_text().splitlines()[0] == "iteration-00000002"


def test_leftovers_of_a_run_that_died_are_no_checkpoints_and_go(tmp_path: Path) -> None:
    make(tmp_path, 2)
    for prefix in (layout.WRITING, layout.REPLACED, layout.REMOVING):
        (tmp_path / f"{prefix}iteration-00000004").mkdir()
    assert layout.complete_checkpoints(tmp_path) == [tmp_path / "iteration-00000002"]
    layout.clear_leftovers(tmp_path)
    assert kept(tmp_path) == [2]


def test_a_checkpoint_saved_after_a_bad_step_does_not_count_as_good(tmp_path: Path) -> None:
    """It is neither what a run goes on from, nor a reason to remove the newest good one."""
    for iteration, is_bad in ((2, False), (4, False), (6, True), (8, True)):
        temporary = tmp_path / f"{layout.WRITING}{layout.folder_name(iteration)}"
        temporary.mkdir(parents=True)
        layout.write_manifest(
            temporary,
            {
                "format": layout.FORMAT,
                "iteration": iteration,
                "consumed_samples": 0,
                "topology": {},
                "model": {},
                "files": {},
                "loss_rule": {"last_was_bad": is_bad},
            },
        )
        layout.publish(temporary, tmp_path / layout.folder_name(iteration))
    layout.prune(tmp_path, 1)
    assert kept(tmp_path) == [4, 8]
    assert layout.resolve(tmp_path).name == "iteration-00000004"
    assert layout.resolve(tmp_path / "iteration-00000008").name == "iteration-00000008"  # asked for by name
    layout.mark_not_good(tmp_path / "iteration-00000004", "its loss is nan")
    assert layout.reservation(tmp_path / "iteration-00000004") == "its loss is nan"
    assert layout.resolve(tmp_path).name == "iteration-00000008"  # no good one is left
