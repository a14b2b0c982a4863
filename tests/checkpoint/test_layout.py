"""Names, publishing, pruning: what stands under a checkpoint's name is whole at any moment."""

from pathlib import Path

import pytest

from megadyn.checkpoint import layout


def make(root: Path, *iterations: int) -> None:
    for iteration in iterations:
        temporary = root / f"{layout.WRITING}{layout.folder_name(iteration)}"
        temporary.mkdir(parents=True)
        (temporary / "content").write_text(str(iteration))
        layout.publish(temporary, root / layout.folder_name(iteration))


def kept(root: Path) -> list[int]:
    assert not list(root.glob(".*"))
    return sorted(layout.iteration_of(path) for path in root.glob("iteration-*"))


@pytest.mark.parametrize(("keep", "keep_every", "left"), [
    (0, 0, [2, 4, 6, 8, 10, 12]), (9, 0, [2, 4, 6, 8, 10, 12]), (0, 4, [2, 4, 6, 8, 10, 12]),
    (1, 0, [12]), (2, 0, [10, 12]), (1, 6, [6, 12]), (2, 4, [4, 8, 10, 12])])
def test_the_newest_and_every_so_many_are_kept(keep: int, keep_every: int, left: list[int], tmp_path: Path) -> None:
    make(tmp_path, 2, 4, 6, 8, 10, 12)
    layout.prune(tmp_path, keep, keep_every)
    assert kept(tmp_path) == left


def test_pruning_leaves_what_lies_beyond_latest(tmp_path: Path) -> None:
    make(tmp_path, 2, 4, 8, 6)                    # back from 8 to 4, and on
    layout.prune(tmp_path, 1)
    assert kept(tmp_path) == [6, 8]


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
    assert (tmp_path / "latest").read_text() == "iteration-00000002\n"


def test_leftovers_of_a_run_that_died_are_no_checkpoints_and_go(tmp_path: Path) -> None:
    make(tmp_path, 2)
    for prefix in (layout.WRITING, layout.REPLACED, layout.REMOVING):
        (tmp_path / f"{prefix}iteration-00000004").mkdir()
    assert layout.complete_checkpoints(tmp_path) == [tmp_path / "iteration-00000002"]
    layout.clear_leftovers(tmp_path)
    assert kept(tmp_path) == [2]
