"""What can happen to a checkpoint on disk is noticed, and nothing in it is ever run."""

import json
import pickle
import random
import shutil
from pathlib import Path

import pytest

from megadyn.checkpoint import layout
from megadyn.checkpoint.merge import ShardedTensors
from megadyn.errors import UserError

CASES = 200


@pytest.fixture
def checkpoint(saved: Path, tmp_path: Path) -> Path:
    """A copy to be broken."""
    folder = tmp_path / "checkpoints/iteration-00000002"
    shutil.copytree(saved / "checkpoints/iteration-00000002", folder)
    return folder


def problem_of(checkpoint: Path) -> str | None:
    try:
        return layout.damage(checkpoint, sorted(layout.read_manifest(checkpoint)["files"]))
    except UserError as error:
        return str(error)


def test_a_whole_checkpoint_holds_these_files(checkpoint: Path) -> None:
    assert {path.name for path in checkpoint.iterdir()} == {
        "manifest.json",
        "manifest.sha256",
        "config.yaml",
        *(f"{kind}-pp00-tp0{rank}-dp00.safetensors" for kind in ("weights", "optimizer") for rank in (0, 1)),
    }
    assert problem_of(checkpoint) is None


def test_every_flipped_bit_cut_or_missing_file_is_noticed_and_named(checkpoint: Path) -> None:
    draw = random.Random(5)
    files = sorted(checkpoint.iterdir())
    for case in range(CASES):
        path = files[case % len(files)]
        content = path.read_bytes()
        how = ("flip", "flip", "cut", "grow", "remove")[case // len(files) % 5]
        if how == "flip":
            place = draw.randrange(len(content))
            broken = content[:place] + bytes([content[place] ^ 1 << draw.randrange(8)]) + content[place + 1 :]
        else:
            broken = content[: draw.randrange(len(content))] if how == "cut" else content + b"\0"
        if how == "remove":
            path.unlink()
        else:
            path.write_bytes(broken)
        problem = problem_of(checkpoint)
        assert problem, f"{how} {path.name}, case {case}"
        assert path.name in problem or path.name.startswith("manifest"), problem
        path.write_bytes(content)
    assert problem_of(checkpoint) is None


@pytest.mark.parametrize(
    "content", [b"", b"\n", b"iteration-00000009\n", b"\xff\xfe", b"iteration-0000\x002\n", b"../../etc\n"]
)
def test_a_damaged_latest_hides_no_checkpoint(content: bytes, checkpoint: Path) -> None:
    (checkpoint.parent / "latest").write_bytes(content)
    assert layout.complete_checkpoints(checkpoint.parent) == [checkpoint]
    assert layout.resolve(checkpoint.parent.parent) == checkpoint


def test_a_folder_in_place_of_latest_hides_no_checkpoint(checkpoint: Path) -> None:
    (checkpoint.parent / "latest").mkdir()
    assert layout.resolve(checkpoint.parent) == checkpoint


def test_latest_counts_where_a_run_went_back(checkpoint: Path) -> None:
    abandoned = checkpoint.with_name("iteration-00000004")
    shutil.copytree(checkpoint, abandoned)
    assert layout.complete_checkpoints(checkpoint.parent) == [abandoned, checkpoint]
    (checkpoint.parent / "latest").write_text("iteration-00000002\n")
    assert layout.complete_checkpoints(checkpoint.parent) == [checkpoint]


class Payload:
    """Unpickled, it would leave a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.path), "w")


def test_a_pickle_is_refused_and_not_run(checkpoint: Path, tmp_path: Path) -> None:
    """Even with its digest in a manifest that is sound."""
    harm = tmp_path / "harm"
    shard = checkpoint / "weights-pp00-tp00-dp00.safetensors"
    shard.write_bytes(pickle.dumps(Payload(harm)))
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"][shard.name] = layout.file_digest(shard)
    layout.write_manifest(checkpoint, manifest)
    assert problem_of(checkpoint) is None
    with pytest.raises(UserError, match="not a safetensors file"):
        ShardedTensors(checkpoint, "weights")
    assert not harm.exists()
    pickle.loads(shard.read_bytes()).close()
    assert harm.exists()  # the payload does work


def test_another_format_is_refused_as_such(checkpoint: Path) -> None:
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    (checkpoint / "manifest.json").write_text(json.dumps(manifest | {"format": 1}))
    assert problem_of(checkpoint) == f"{checkpoint}/manifest.json: not a checkpoint of format {layout.FORMAT}"
