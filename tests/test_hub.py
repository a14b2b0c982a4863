"""Addresses on the hub: from a cache laid out on disk, and from a server of this machine that speaks its protocol."""

import functools
import json
import multiprocessing
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from megadyn import hub
from megadyn.errors import UserError
from megadyn.hub import COMMIT, INDEX, MODEL, SHAPE, TOKENIZER, WEIGHTS, local_path, once_per_machine
from tests.helpers.crew import wait_until
from tests.helpers.servers import COMMIT as HEAD
from tests.helpers.servers import HubServer, lay_out, serving

SHARDS = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
MODEL_FILES = {
    "config.json": b"{}",
    INDEX: json.dumps({"weight_map": dict(zip("abc", [*SHARDS, SHARDS[0]], strict=True))}).encode(),
    SHARDS[0]: bytes(range(256)) * 2000,
    SHARDS[1]: b"second" * 1000,
}
NOT_NEEDED = {"README.md": b"#", "consolidated.safetensors": b"twice", "pytorch_model.bin": b"x"}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache, empty; offline."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "RETRY_SECONDS", (0.01, 0.01))
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)
    forget()
    return tmp_path / "hub"


@pytest.fixture
def server(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    server = HubServer()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    use(server.url, monkeypatch)
    server.put("org/model", MODEL_FILES | NOT_NEEDED)
    with serving(server):
        yield server


def use(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As HF_ENDPOINT does, which the hub's library reads once."""
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)


def forget() -> None:
    """As in another process."""
    hub._on_this_machine.cache_clear()


@pytest.mark.parametrize("address", ["org/model", "org/model@main", f"org/model@{HEAD}"])
def test_offline_it_is_the_folder_of_the_cache(cache: Path, address: str) -> None:
    folder = lay_out(cache, MODEL_FILES)
    assert local_path(address, "it", MODEL) == folder
    assert local_path(address, "it", SHAPE) == folder


@pytest.mark.parametrize(
    ("address", "lost", "sentence"),
    [
        ("org/other", None, "no config.json of org/other "),
        ("org/model@v2", None, r"no config.json of org/model@v2 .*hf download org/model --revision v2"),
        ("org/model", SHARDS[1], f"no {SHARDS[1]} of org/model"),
        ("org/model", INDEX, f"no {WEIGHTS} of org/model"),
    ],
)
def test_offline_what_is_missing_is_named(cache: Path, address: str, lost: str | None, sentence: str) -> None:
    folder = lay_out(cache, MODEL_FILES)
    if lost:
        (folder / lost).unlink()
    with pytest.raises(
        UserError, match=f"it: no such file .*HF_HUB_OFFLINE is set, and the cache has {sentence}"
    ):
        local_path(address, "it", MODEL)


def test_a_path_that_exists_wins(cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    lay_out(cache, MODEL_FILES)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org/model").mkdir(parents=True)
    assert local_path("org/model", "it", MODEL) == Path("org/model")


@pytest.mark.parametrize(
    "given", ["nowhere", "/no/where", "a/b/c", "../model", "./model", "org/model@", "org/m@a b"]
)
def test_neither_path_nor_address(given: str) -> None:
    with pytest.raises(
        UserError, match=r"it: no such file or folder, and not an address .*ORG/NAME@REVISION"
    ):
        local_path(given, "it", MODEL)


def test_only_what_is_needed_is_downloaded_and_once(server: HubServer, cache: Path) -> None:
    folder = local_path("org/model", "it", MODEL)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == MODEL_FILES
    assert COMMIT.fullmatch(folder.name)
    forget()
    seen = len(server.seen)
    assert local_path(f"org/model@{HEAD}", "it", MODEL) == folder
    assert len(server.seen) == seen  # a commit does not change
    assert local_path("org/model", "it", MODEL) == folder
    assert not [line for line in server.seen[seen:] if line.startswith("GET")]


def test_one_file_of_weights(server: HubServer) -> None:
    files = {"config.json": b"{}", WEIGHTS: b"weights"}
    server.put("org/small", files)
    folder = local_path("org/small", "it", MODEL)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files


@pytest.mark.parametrize("is_reset", [False, True])
def test_a_cut_connection_loses_nothing(server: HubServer, is_reset: bool) -> None:
    path = f"/org/model/resolve/{HEAD}/{SHARDS[0]}"
    server.cuts[path], server.is_reset = 2, is_reset
    folder = local_path("org/model", "it", MODEL)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == MODEL_FILES
    assert server.cuts[path] == 0
    if not is_reset:
        assert sum(server.sent.values()) == sum(map(len, MODEL_FILES.values()))  # continued where it was cut


def test_a_download_that_never_ends_well(server: HubServer) -> None:
    server.failures[f"/org/model/resolve/{HEAD}/{SHARDS[1]}"] = 99
    with pytest.raises(
        UserError, match=rf"it: .*{SHARDS[1]} cannot be downloaded from http://\S+/org/model \(.*503"
    ):
        local_path("org/model", "it", MODEL)
    server.failures.clear()
    forget()
    sent = server.sent[f"/org/model/resolve/{HEAD}/{SHARDS[0]}"]
    local_path("org/model", "it", MODEL)
    assert server.sent[f"/org/model/resolve/{HEAD}/{SHARDS[0]}"] == sent  # complete before


def test_refusals_of_the_hub(server: HubServer) -> None:
    server.put("org/gated", MODEL_FILES)
    server.gated.add("org/gated")
    server.put("org/bin", {"config.json": b"{}", "pytorch_model.bin": b""})
    for address, need, sentence in (
        (
            "org/gated",
            MODEL,
            r"org/gated is gated: accept its terms on http://\S+/org/gated, and give your token",
        ),
        ("org/none", MODEL, r"http://\S+ has no model org/none \(a private one needs your token"),
        ("org/model@v9", MODEL, r"org/model has no revision 'v9' on http"),
        ("org/bin", MODEL, "org/bin has neither model.safetensors nor .* such as .bin files, are not read"),
        ("org/model", TOKENIZER, "org/model has no tokenizer.json on http"),
    ):
        with pytest.raises(
            UserError, match=f"it: no such file or folder here, and as an address on the hub: {sentence}"
        ):
            local_path(address, "it", need)


def test_no_network(
    server: HubServer, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    use("http://127.0.0.1:9", monkeypatch)
    with pytest.raises(
        UserError, match=r"it: .*http://127.0.0.1:9 cannot be reached \(.*, and the cache has no config"
    ):
        local_path("org/model", "it", MODEL)
    folder = lay_out(cache, MODEL_FILES)
    assert local_path("org/model", "it", MODEL) == folder
    assert f"using commit {HEAD} of the cache" in caplog.text


def test_of_the_processes_of_a_launcher_one_does_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "HEAD_START_SECONDS", 60.0)
    for case in ("good", "bad"):
        ranks = [
            multiprocessing.get_context("fork").Process(target=be_rank, args=(rank, tmp_path, case))
            for rank in range(3)
        ]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join(60)
        assert (tmp_path / f"{case} done").read_text() == "0\n"  # by local rank 0
        outcomes = {(tmp_path / f"{case} {rank}").read_text() for rank in range(3)}
        assert outcomes == {"/a/folder" if case == "good" else "no network"}


def test_an_outcome_of_an_earlier_start_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "HEAD_START_SECONDS", 0.0)

    def asked(rank: int, folder: str) -> str:
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        return str(once_per_machine(tmp_path, "org/model", lambda: Path(folder)))

    assert [asked(0, "/a"), asked(1, "/b"), asked(0, "/c"), asked(1, "/d")] == ["/a", "/a", "/c", "/c"]
    os.utime(next(tmp_path.iterdir()), (0, time.time() - 3600))  # before this process began
    assert asked(1, "/e") == "/e"


def test_a_killed_process_holds_nobody_up(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    first = fork.Process(target=be_rank, args=(0, tmp_path, "endless"))
    first.start()
    wait_until((tmp_path / "endless done").exists)
    first.kill()
    first.join()
    second = fork.Process(target=be_rank, args=(0, tmp_path, "good"))
    second.start()
    second.join(60)
    assert (tmp_path / "good 0").read_text() == "/a/folder"


def be_rank(rank: int, folder: Path, case: str) -> None:
    os.environ["LOCAL_RANK"] = str(rank)
    subject = "org/model bad" if case == "bad" else "org/model"

    def do() -> Path:
        with (folder / f"{case} done").open("a") as file:
            file.write(f"{rank}\n")
        if case == "bad":
            raise UserError("no network")
        if case == "endless":
            time.sleep(600)
        return Path("/a/folder")

    try:
        outcome = str(once_per_machine(folder / "locks", subject, do))
    except UserError as error:
        outcome = str(error)
    (folder / f"{case} {rank}").write_text(outcome)


def test_without_locks_every_process_asks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    (tmp_path / "locks").write_text("a file")
    assert once_per_machine(tmp_path / "locks", "org/model", functools.partial(Path, "x")) == Path("x")
    assert "every process asks the hub itself" in caplog.text
