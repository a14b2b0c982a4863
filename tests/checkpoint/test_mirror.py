"""The mirror holds what the run's folder holds, whole or not at all, whatever happens on the way."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from megadyn.checkpoint import layout, mirror, store
from megadyn.checkpoint.mirror import Mirror, copy_export
from megadyn.config import CheckpointConfig
from megadyn.errors import UserError
from megadyn.log import log
from megadyn.prepare import remote
from tests.helpers.servers import S3Server, serving


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "RETRY_SECONDS", (0.01,) * 3)
    monkeypatch.setattr(mirror, "REPLACING_S", 0.0)
    monkeypatch.setattr(store, "CHUNK_BYTES", 2**12)


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    server = S3Server()
    pytest.importorskip("s3fs", reason="needs s3fs")
    config = {"connect_timeout": 2, "read_timeout": 5, "retries": {"max_attempts": 1}}
    settings = {"endpoint_url": server.url, "key": "a", "secret": "b", "config_kwargs": config}
    monkeypatch.setitem(fsspec.config.conf, "s3", settings)
    with serving(server):
        yield server


@pytest.fixture(params=["memory", "file", "s3"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "s3":
        request.getfixturevalue("s3")
        return "s3://bucket/run"
    return f"memory:/{tmp_path}/mirror" if request.param == "memory" else f"file://{tmp_path}/mirror"


def save(
    run: Path, iteration: int, folder: str = "checkpoints", text: str = "", was_bad: bool = False
) -> Path:
    """Publishes a checkpoint with the files of one, small."""
    root = run / folder
    temporary = root / f"{layout.WRITING}{layout.folder_name(iteration)}"
    temporary.mkdir(parents=True)
    names = ["weights-a", "weights-b", "config.yaml"]
    for name in names:
        (temporary / name).write_bytes(f"{iteration} {name} {text} ".encode() * 200)
    manifest = {
        "format": layout.FORMAT,
        "iteration": iteration,
        "consumed_samples": iteration,
        "topology": {},
        "model": {"routing": {"kind": "dense"}},
        "loss_rule": {"last_was_bad": was_bad},
        "files": {name: layout.file_digest(temporary / name) for name in names},
    }
    layout.write_manifest(temporary, manifest)
    layout.publish(temporary, root / layout.folder_name(iteration))
    return root / layout.folder_name(iteration)


def opened(run: Path, address: str, **settings: object) -> Mirror:
    found = Mirror(CheckpointConfig(mirror=address, **settings), run)
    found.claim()
    return found


def contents(run: Path) -> dict[str, bytes]:
    """Of all files of a run's checkpoints."""
    return {
        str(path.relative_to(run)): path.read_bytes()
        for folder in mirror.FOLDERS
        for path in sorted((run / folder).rglob("*"))
        if path.is_file()
    }


def there(address: str) -> dict[str, bytes]:
    """The same at an address."""
    system, root = fsspec.core.url_to_fs(address)
    system.invalidate_cache()
    return {
        name.removeprefix(f"{root}/"): system.cat_file(name)
        for name in sorted(system.find(root))
        if not name.endswith("run.json")
    }


def test_it_equals_the_folder_and_a_new_folder_equals_it(
    address: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Through saves, retention, a run that goes back, marks, and averages; then into an empty folder."""
    run = tmp_path / "run"
    copy = opened(run, address, keep=2, keep_every=4)
    for iteration in (2, 4, 6, 8):
        save(run, iteration)
        save(run, iteration, "averages")
        for folder in mirror.FOLDERS:
            layout.prune(run / folder, 2, 4)
        copy.sync()
        assert there(address) == contents(run)
    assert sorted(path.name[-1] for path in (run / "checkpoints").glob("iteration-*")) == ["4", "6", "8"]
    with caplog.at_level("INFO", log.name):
        save(run, 6, text="again")  # went back: what it has saved later is neither used nor removed
        layout.mark_best(run / "checkpoints" / layout.folder_name(6), "code", 2.0)
        layout.mark_not_good(run / "checkpoints" / layout.folder_name(4), "a NaN")
        copy.sync()
        assert there(address) == contents(run)
        save(run, 10)
        layout.prune(run / "checkpoints", 2, 4)
        layout.mark_best(run / "checkpoints" / layout.folder_name(10), "code", 1.0)
        copy.sync()
    layout.prune(run / "checkpoints", 2, 4)  # the former best
    assert there(address) == contents(run) and copy.behind() == []
    assert f"removed {copy.store}/checkpoints/iteration-00000006" in caplog.text

    new = tmp_path / "new"
    fetched = opened(new, address, keep=2, keep_every=4)
    fetched.restore()
    newest = f"checkpoints/{layout.folder_name(10)}/"
    expected = {name: raw for name, raw in contents(run).items() if name.startswith(newest)}
    assert contents(new) == expected | {"checkpoints/latest": there(address)["checkpoints/latest"]}
    fetched.sync()  # the new folder lacks some that are kept there
    assert there(address) == contents(run)
    with pytest.raises(UserError, match="resume is never"):
        opened(tmp_path / "third", address, resume="never")
    save(tmp_path / "other", 2)
    with pytest.raises(UserError, match="is the mirror of another run than"):
        opened(tmp_path / "other", address)


def test_what_an_average_and_the_mark_of_the_best_need_is_fetched_too(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run, address = tmp_path / "run", f"file://{tmp_path}/mirror"
    for iteration in (1, 2, 3, 4, 5):
        save(run, iteration, was_bad=iteration == 5)
        save(run, iteration, "averages")
        if iteration == 1:
            layout.mark_best(run / "checkpoints" / layout.folder_name(1), "code", 1.0)
    opened(run, address, keep=0).sync()
    for average, expected in (({"last": 2}, "134"), ({"ema": 0.5}, "14"), ({}, "14")):
        new = tmp_path / f"new{average}"
        settings = CheckpointConfig(mirror=address, keep=0)
        for name, value in average.items():
            setattr(settings.average, name, value)
        Mirror(settings, new).restore()
        found = sorted(path.name[-1] for path in (new / "checkpoints").glob("iteration-*"))
        assert "".join(found) == expected
        assert layout.read_latest(new / "checkpoints" / "latest")[0] == layout.folder_name(4)
        assert (new / "averages").exists() == ("ema" in average)
    assert caplog.text.count("iteration-00000005 skipped: it does not count as good") == 3


def test_cut_connections_and_spoiled_bytes_cost_nothing(s3: S3Server, tmp_path: Path) -> None:
    run, address = tmp_path / "run", "s3://bucket/run"
    folder = save(run, 2)
    path = f"/bucket/run/checkpoints/{folder.name}"
    s3.cuts[f"{path}/weights-a"] = 2
    s3.spoils[f"{path}/weights-b"] = 1
    s3.failures[f"{path}/config.yaml"] = 1
    copy = opened(run, address)
    copy.sync()
    assert there(address) == contents(run)
    assert s3.seen.count(f"PUT {path}/weights-b") == 2
    order = [line.rpartition("/")[2] for line in s3.seen if line.startswith(f"PUT {path}")]
    assert order[-2:] == [layout.DIGEST, layout.MANIFEST]

    s3.cuts[f"{path}/weights-a"] = 2
    opened(tmp_path / "new", address).restore()
    assert contents(tmp_path / "new") == contents(run)

    s3.spoils[f"{path}/weights-a"] = 9
    save(run, 2, text="again")
    with pytest.raises(UserError, match=r"weights-a: its sha256 is not that of the manifest"):
        copy.sync()
    assert f"{path}/{layout.MANIFEST}" not in s3.files  # so that nobody takes it for a checkpoint
    assert copy.behind() == [f"checkpoints/{folder.name}"]
    s3.spoils.clear()
    copy.sync()
    assert there(address) == contents(run)


def test_an_interrupted_copy_or_fetch_goes_on(s3: S3Server, tmp_path: Path) -> None:
    run, address = tmp_path / "run", "s3://bucket/run"
    folder = save(run, 2)
    path = f"/bucket/run/checkpoints/{folder.name}"
    s3.refusals[f"{path}/weights-b"] = 403
    with pytest.raises(UserError, match="weights-b: no permission"):
        opened(run, address).sync()
    assert not (folder / layout.HELD).exists()
    s3.refusals.clear()
    (folder / layout.HELD).touch()  # as a killed process leaves it
    opened(run, address).sync()
    assert s3.seen.count(f"PUT {path}/weights-a") == 1
    assert there(address) == contents(run)

    s3.refusals[f"{path}/weights-b"] = 403
    new = tmp_path / "new"
    with pytest.raises(UserError, match="weights-b: no permission"):  # never a new run instead
        opened(new, address).restore()
    assert not list((new / "checkpoints").glob("iteration-*"))
    s3.refusals.clear()
    sent = s3.sent[f"{path}/weights-a"]
    opened(new, address).restore()
    assert s3.sent[f"{path}/weights-a"] == sent and contents(new) == contents(run)


def test_a_damaged_checkpoint_is_passed_over_and_leftovers_are_removed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run, address, place = tmp_path / "run", f"file://{tmp_path}/mirror", tmp_path / "mirror/checkpoints"
    save(run, 2)
    save(run, 4)
    copy = opened(run, address, keep=2)
    copy.sync()
    newest = place / layout.folder_name(4)
    whole = (newest / "weights-a").read_bytes()
    (newest / "weights-a").write_bytes(whole[:-1] + b"#")
    opened(tmp_path / "new", address).restore()
    assert layout.resolve(tmp_path / "new").name == layout.folder_name(2)
    assert "weights-a is damaged" in caplog.text
    (place / layout.folder_name(2) / layout.MANIFEST).write_text("{}")
    with pytest.raises(UserError, match="no checkpoint there is intact"):
        opened(tmp_path / "newer", address).restore()
    (place / layout.folder_name(1)).mkdir()
    (place / layout.folder_name(1) / "weights-a").write_bytes(b"half of it")
    save(run, 6)
    layout.prune(run / "checkpoints", 2)
    copy.sync()
    assert sorted(path.name for path in place.glob("iteration-*")) == [
        layout.folder_name(4),
        layout.folder_name(6),
    ]


def test_a_checkpoint_is_not_removed_while_it_is_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a slow connection would never see a whole one. One that is replaced or gone is given up without a word."""
    run, address, saved = tmp_path / "run", f"file://{tmp_path}/mirror", []
    put = store.Store.put

    def slowly(self: store.Store, file: Path, name: str) -> None:
        if not saved:
            saved.append(save(run, 4))
            layout.prune(run / "checkpoints", 1)
        elif len(saved) == 1 and file.parent == saved[0]:
            saved.append(save(run, 4, text="again"))
        elif len(saved) == 2 and file.parent == saved[1]:
            saved.append(save(run, 6))
            shutil.rmtree(saved[1])
        put(self, file, name)

    monkeypatch.setattr(store.Store, "put", slowly)
    monkeypatch.setattr(store, "FILES_AT_ONCE", 1)
    save(run, 2)
    copy = opened(run, address, keep=1)
    copy.sync()
    assert len(saved) == 3
    layout.prune(run / "checkpoints", 1)
    assert there(address) == contents(run)


def test_an_export_is_copied_whole_and_replaced(address: str, tmp_path: Path) -> None:
    export = tmp_path / "hf"
    export.mkdir()
    (export / "model.safetensors").write_bytes(b"a" * 10_000)
    (export / "old").write_bytes(b"old")
    assert copy_export(export, address) == f"{address}/exports/hf"
    (export / "old").unlink()
    (export / "config.json").write_text("{}")
    copy_export(export, address)
    found = there(address)
    said = json.loads(found.pop("exports/hf/mirror.json"))["files"]
    assert found == {f"exports/hf/{path.name}": path.read_bytes() for path in export.iterdir()}
    assert said == {path.name: layout.file_digest(path) for path in export.iterdir()}


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ("/mnt/mirror", "must be an address such as s3://BUCKET/FOLDER"),
        ("s3:///folder", "must be an address such as s3://BUCKET/FOLDER"),
        ("https://host/folder", "must be an address to which files can be written, which https:// is not"),
        ("hf://datasets/a/b", "must be an address to which files can be written, which hf:// is not"),
    ],
)
def test_what_is_no_address_for_writing_is_refused(given: str, problem: str) -> None:
    with pytest.raises(UserError, match=rf"checkpoint\.mirror = '{given}': {problem}"):
        CheckpointConfig(mirror=given).check()


def test_an_address_that_cannot_be_written_is_refused_at_the_start(s3: S3Server, tmp_path: Path) -> None:
    s3.refusals["/bucket/run/run.json"] = 403
    with pytest.raises(UserError, match="no permission"):
        opened(tmp_path / "run", "s3://bucket/run")
    for place in (tmp_path / "run", tmp_path / "run/mirror"):
        with pytest.raises(UserError, match=r"is in output_dir = .*: give the mirror another place"):
            opened(tmp_path / "run", f"file://{place}")
    with pytest.raises(UserError, match=r"protocol nosuch:// is not known"):
        opened(tmp_path / "run", "nosuch://bucket/run")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file"):
        opened(tmp_path / "run", f"file://{tmp_path}/file/run")
