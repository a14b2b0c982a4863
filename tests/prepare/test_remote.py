"""Corpora at addresses: the same dataset as from the same files on this machine, whatever happens to connections."""

import gzip
import json
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pyarrow
import pyarrow.parquet
import pytest
from huggingface_hub import constants

from megadyn.commands.preprocess import parse_args
from megadyn.commands.tokenizer import main as train
from megadyn.data.record import Record
from megadyn.errors import UserError
from megadyn.prepare import detect, remote, units
from megadyn.prepare.preprocess import preprocess
from megadyn.prepare.readers import Corpus
from megadyn.prepare.remote import RemoteFile, shown
from tests.helpers.corpora import random_texts
from tests.helpers.servers import COMMIT, FileServer, HubServer, S3Server, serving

Place = Callable[[dict[str, bytes]], str]
"""Puts files, by name, where an address leads; returns the address of their folder."""


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several units and requests per file, and no waiting."""
    monkeypatch.setattr(units, "UNIT_BYTES", 2**16)
    monkeypatch.setattr(remote, "FIRST_BYTES", 2**14)
    monkeypatch.setattr(remote, "BUFFER_BYTES", 2**10)
    monkeypatch.setattr(remote, "BLOCK_BYTES", 2**15)
    monkeypatch.setattr(remote, "RETRY_SECONDS", (0.01,) * 4)


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    """One of each format, sorted by name; the first is cut into several units."""
    texts = random_texts(240, seed=3)
    lines = [json.dumps({"text": text}).encode() + b"\n" for text in texts]
    table = pyarrow.table({"text": texts[120:180], "other": texts[:60]})
    parquet, arrow = pyarrow.BufferOutputStream(), pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(table, parquet, row_group_size=20)
    with pyarrow.ipc.new_file(arrow, table.schema) as writer:
        writer.write_table(table, max_chunksize=20)
    return {
        "a.jsonl": b"".join(lines[:120] * 8),
        "b.jsonl.gz": gzip.compress(b"".join(lines[120:])),
        "c.parquet": parquet.getvalue().to_pybytes(),
        "d.arrow": arrow.getvalue().to_pybytes(),
        "e.txt": texts[7].encode(),
    }


@pytest.fixture(scope="module")
def local(files: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prefix of the dataset from the same files on this machine."""
    folder = tmp_path_factory.mktemp("local")
    (folder / "corpus").mkdir()
    for name, content in files.items():
        (folder / "corpus" / name).write_bytes(content)
    preprocess(Corpus([folder / "corpus"]), "byte", folder / "data", append_eod=True)
    return folder / "data"


@pytest.fixture
def web() -> Iterator[FileServer]:
    server = FileServer()
    with serving(server):
        yield server


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    server = S3Server()
    pytest.importorskip("s3fs", reason="needs s3fs")
    settings = {"endpoint_url": server.url, "key": "a", "secret": "b"}
    monkeypatch.setitem(fsspec.config.conf, "s3", settings)
    with serving(server):
        yield server


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    server = HubServer()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, server.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setitem(fsspec.config.conf, "hf", {"endpoint": server.url})
    with serving(server):
        yield server


def put(server: FileServer, files: dict[str, bytes]) -> list[str]:
    """Addresses of the files on the web."""
    server.files |= {f"/corpus/{name}": content for name, content in files.items()}
    return [f"{server.url}/corpus/{name}" for name in files]


def made(paths: list[str], prefix: Path, **settings: object) -> Record:
    return preprocess(Corpus(paths), "byte", prefix, append_eod=True, **settings)


def assert_equal(prefix: Path, other: Path) -> None:
    for suffix in (".bin", ".idx"):
        assert Path(f"{prefix}{suffix}").read_bytes() == Path(f"{other}{suffix}").read_bytes()


@pytest.mark.parametrize(
    ("protocol", "workers"), [("memory", 1), ("memory", 2), ("web", 1), ("web", 2), ("s3", 2), ("hub", 2)]
)
def test_the_dataset_is_that_of_local_files(
    protocol: str,
    workers: int,
    files: dict[str, bytes],
    local: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    if protocol == "memory":
        fsspec.filesystem("memory").pipe(
            {f"/{tmp_path.name}/{name}": content for name, content in files.items()}
        )
        paths = [f"memory://{tmp_path.name}"]
    else:
        server = request.getfixturevalue(protocol)
        if protocol == "web":
            paths = put(server, files)
        elif protocol == "s3":
            server.files |= {f"/bucket/some/corpus/{name}": content for name, content in files.items()}
            paths = ["s3://bucket/some/corpus"]
        else:
            server.put("datasets/org/corpus", {f"data/{name}": content for name, content in files.items()})
            paths = ["hf://datasets/org/corpus/data"]
    record = made(paths, tmp_path / "data", workers=workers)
    assert_equal(tmp_path / "data", local)
    assert record.source == paths
    if protocol != "memory":
        ranges = [line.rpartition("bytes=")[2].split("-") for line in server.seen if "bytes=" in line]
        assert ranges and max(int(last) - int(first) for first, last in ranges) < remote.BLOCK_BYTES


def test_connections_outlive_a_fork(
    web: FileServer,
    files: dict[str, bytes],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first process reads before its workers start, and again when a limit falls inside a unit."""
    monkeypatch.setattr(remote, "READ_SECONDS", 20.0)
    record = made(put(web, {"a.jsonl": files["a.jsonl"]}), tmp_path / "data", workers=2, max_documents=700)
    assert record.documents == 700
    assert "trying again" not in caplog.text


@pytest.mark.parametrize("is_reset", [False, True])
def test_cut_connections_lose_and_repeat_nothing(
    web: FileServer, files: dict[str, bytes], local: Path, tmp_path: Path, is_reset: bool
) -> None:
    paths, web.is_reset = put(web, files), is_reset
    for name in files:
        web.cuts[f"/corpus/{name}"] = web.failures[f"/corpus/{name}"] = 2
    made(paths, tmp_path / "data")
    assert_equal(tmp_path / "data", local)
    assert not +web.cuts
    assert not +web.failures


def test_hardly_more_is_fetched_than_there_is(
    web: FileServer, files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of lines, whose spans say where they end: beside them the head, and the rest of the last line of each span."""
    monkeypatch.setattr(remote, "FIRST_BYTES", 2**10)
    monkeypatch.setattr(detect, "HEAD_BYTES", 2**10)
    content = files["a.jsonl"]
    made(put(web, {"a.jsonl": content}), tmp_path / "data", engine="reference")
    spans = -(-len(content) // units.UNIT_BYTES)
    assert spans == 3
    assert web.sent["/corpus/a.jsonl"] <= len(content) + (1 + 2 * spans) * remote.FIRST_BYTES


def test_of_a_table_one_column_is_fetched(web: FileServer, tmp_path: Path) -> None:
    texts = random_texts(200, seed=5)
    other = [random.Random(i).randbytes(4000) for i in range(200)]
    table = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({"other": other, "text": texts}), table, row_group_size=50)
    content = table.getvalue().to_pybytes()
    record = made(put(web, {"a.parquet": content}), tmp_path / "data", engine="reference")
    assert record.text_bytes == sum(len(text.encode()) for text in texts)
    assert web.sent["/corpus/a.parquet"] < len(content) / 2


def test_an_interrupted_job_goes_on(
    web: FileServer, files: dict[str, bytes], local: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    paths = put(web, files)
    corpus = Corpus(paths)
    corpus.units()
    web.failures["/corpus/e.txt"] = 99
    with pytest.raises(
        UserError, match=r"/corpus/e.txt: the server answers 503, after 5 attempts; the same command"
    ):
        preprocess(corpus, "byte", tmp_path / "data", append_eod=True)
    assert "trying again in 0.01 s" in caplog.text
    assert not (tmp_path / "data.idx").exists()
    web.failures.clear()
    web.sent.clear()
    made(paths, tmp_path / "data")
    assert_equal(tmp_path / "data", local)
    last = len(files["a.jsonl"]) % units.UNIT_BYTES  # in the unit that failed, with all that follows
    assert web.sent["/corpus/a.jsonl"] <= last + 2 * remote.FIRST_BYTES


def test_what_cannot_be_reached_is_not_skipped(
    web: FileServer, files: dict[str, bytes], tmp_path: Path
) -> None:
    for name in files:
        corpus = Corpus(put(web, {name: files[name]}), on_error="skip")
        corpus.units()
        web.failures[f"/corpus/{name}"] = 99
        with pytest.raises(UserError, match=f"/corpus/{name}: the server answers 503, after 5 attempts"):
            preprocess(corpus, "byte", tmp_path / "data")


def test_a_changed_file_is_refused_and_has_other_parts(web: FileServer, tmp_path: Path) -> None:
    paths = put(web, {"a.jsonl": b'{"text": "one"}\n'})
    corpus = Corpus(paths)
    put(web, {"a.jsonl": b'{"text": "two"}\n'})
    with pytest.raises(UserError, match=r"a.jsonl: changed since it was listed"):
        preprocess(corpus, "byte", tmp_path / "data")
    assert made(paths, tmp_path / "data").tokens == 4


def test_errors_name_file_and_place(web: FileServer, tmp_path: Path) -> None:
    lines = [b'{"text": "%d"}\n' % i for i in range(6000)]
    lines[5900] = b"{\n"
    with pytest.raises(UserError, match=r"/corpus/a.jsonl: line \d+ after byte 65536: invalid JSON"):
        made(put(web, {"a.jsonl": b"".join(lines)}), tmp_path / "data")
    with pytest.raises(UserError, match=r"/corpus/b.jsonl:2: invalid JSON"):
        made(put(web, {"b.jsonl": b'{"text": ""}\n{\n'}), tmp_path / "data")


@pytest.mark.parametrize(
    ("address", "sentence"),
    [
        ("{}/none.jsonl", r"http://\S+/none.jsonl: no such file or folder$"),
        ("{}/*.parquet", r"http://\S+/\*.parquet: no such file or folder$"),
        ("{}/secret.txt?key=abc", r"http://\S+/secret.txt: no permission \(403\)$"),
        (
            "{}/large.jsonl",
            r"large.jsonl: the server does not send parts of files \(byte ranges\).* download it first",
        ),
        ("s4://bucket/a", r"s4://bucket/a: the protocol s4:// is not known; known are https, s3, gs and hf"),
        ("gs://bucket/a", r"gs://bucket/a: gs:// needs a package that is missing \(pip install gcsfs\)"),
        ("memory://nowhere/a.txt", "memory://nowhere/a.txt: no such file or folder$"),
        ("memory://nowhere/*.txt", r"memory://nowhere/\*.txt: no such file or folder$"),
    ],
)
def test_refusals(
    web: FileServer, address: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    web.files |= {"/large.jsonl": b'{"text": "a"}\n' * 6000, "/": b"<html></html>", "/secret.txt": b""}
    web.refusals["/secret.txt"] = 403
    web.has_ranges = False
    with pytest.raises(UserError, match=sentence) as caught:
        made([address.format(web.url)], tmp_path / "data")
    assert "abc" not in str(caught.value)


def test_a_small_file_needs_no_ranges(web: FileServer, tmp_path: Path) -> None:
    web.has_ranges = False
    assert made(put(web, {"a.txt": b"text"}), tmp_path / "data").tokens == 5


def test_folders_and_patterns(web: FileServer, s3: S3Server) -> None:
    names = [
        "a/2.txt",
        "a/1.txt",
        "a.txt",
        "b/.hidden/x.txt",
        ".git/x",
        "b/_SUCCESS",
        "b/README.md",
        "c/3.jsonl",
    ]
    memory = fsspec.filesystem("memory")
    memory.pipe({f"/folders/{name}": b"{}" for name in names})
    s3.files |= {f"/bucket/folders/{name}": b"{}" for name in names}
    web.files |= {f"/folders/{name}": b"{}" for name in ("1.txt", "2.txt", "3.jsonl")}
    web.files["/folders/"] = b'<a href="2.txt">2</a> <a href="1.txt">1</a> <a href="3.jsonl">3</a>'
    web.headers["/folders/"] = {"Content-Type": "text/html"}

    def found(address: str) -> list[str]:
        return [str(file).rpartition("/folders/")[2] for file in Corpus([address])._files]

    for place in ("memory://folders", "s3://bucket/folders"):
        assert found(place) == ["a/1.txt", "a/2.txt", "a.txt", "b/README.md", "c/3.jsonl"]
        assert found(f"{place}/a/*.txt") == ["a/1.txt", "a/2.txt"]
        assert found(f"{place}/**/[13].*") == ["a/1.txt", "c/3.jsonl"]
        assert found(f"{place}/[ac]") == ["a/1.txt", "a/2.txt", "c/3.jsonl"]
    assert found(f"{web.url}/folders/*.txt") == ["1.txt", "2.txt"]
    memory.pipe({"/saved/state.json": b"{}", "/saved/dataset_info.json": b"{}", "/saved/data.arrow": b""})
    with pytest.raises(UserError, match=r"memory:///saved: holds a dataset of save_to_disk; name its files"):
        Corpus(["memory://saved"])


def test_a_hub_repository_without_what_describes_it(hub: HubServer) -> None:
    hub.put(
        "datasets/org/corpus", dict.fromkeys(["README.md", ".gitattributes", "b.txt", "a/c.txt"], b"text")
    )
    for address in ("hf://datasets/org/corpus", "hf://datasets/org/corpus@main/**/*.txt"):
        files = Corpus([address])._files
        assert [str(file).partition("/corpus")[2] for file in files] == [
            f"@{COMMIT}/a/c.txt",
            f"@{COMMIT}/b.txt",
        ]
        # also of a later commit in which they are the same
        assert [remote.identity_of(file)[0] for file in files] == [
            "hf://datasets/org/corpus/a/c.txt",
            "hf://datasets/org/corpus/b.txt",
        ]


def test_refusals_of_the_hub(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.put("datasets/org/corpus", {"a.txt": b"text"})
    for address, sentence in (
        ("hf://datasets/org/none/a.txt", "no such repository, or one that is private or gated"),
        ("hf://datasets/org/corpus@v9/a.txt", "no such revision"),
        ("hf://datasets/org/corpus/b.txt", "no such file or folder"),
    ):
        with pytest.raises(UserError, match=f"^{address}: {sentence}"):
            Corpus([address])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="corpus/c.txt: .*offline"):
        Corpus(["hf://datasets/org/corpus/c.txt"])


def test_nothing_secret_is_shown_or_recorded() -> None:
    assert shown("https://me:secret@host:80/a/b.txt?X-Amz-Signature=secret") == "https://host:80/a/b.txt"
    assert shown("s3://bucket/a?b") == "s3://bucket/a?b"
    assert shown("ftp://me:secret@host/a/b.txt") == "ftp://host/a/b.txt"
    assert shown("hf://datasets/org/name@main/a.txt") == "hf://datasets/org/name@main/a.txt"
    file = RemoteFile("https://host/a/b.jsonl.gz?token=secret", 1, "")
    assert (str(file), file.name) == ("https://host/a/b.jsonl.gz", "b.jsonl.gz")


def test_a_tokenizer_from_the_web(web: FileServer, files: dict[str, bytes], tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(files["a.jsonl"])
    for name, given in (("here", str(tmp_path / "a.jsonl")), ("there", put(web, files)[0])):
        train(["--input", given, "--vocab-size", "300", "--output", str(tmp_path / name)])
    assert (tmp_path / "here/tokenizer.json").read_bytes() == (tmp_path / "there/tokenizer.json").read_bytes()


def test_the_command_takes_paths_and_addresses() -> None:
    args = parse_args(
        ["--input", "https://host//a.txt", "~", "b", "--tokenizer", "byte", "--output-prefix", "out"]
    )
    assert args.input == ["https://host//a.txt", Path.home(), Path("b")]
