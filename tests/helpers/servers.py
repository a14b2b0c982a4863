"""A web server on this machine that serves files by ranges and breaks connections on demand. It can speak as much of the Hugging
Face hub's protocol, or of S3's, as their libraries need to list and to download, and of S3's to upload."""

import hashlib
import json
import re
import socket
import struct
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qsl, unquote

JSON = "application/json"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FileServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        """By path, which begins with `/`."""
        self.headers: dict[str, dict[str, str]] = {}
        """More of them for a path."""
        self.cuts: Counter[str] = Counter()
        """How many of the next responses with a file's content end in the middle."""
        self.failures: Counter[str] = Counter()
        """How many of the next requests for a file's content are answered 503."""
        self.refusals: dict[str, int] = {}
        """Status codes by path."""
        self.is_reset = False
        """Whether connections are cut by a reset, not by their end."""
        self.has_ranges, self.is_writable = True, False
        self.spoils: Counter[str] = Counter()
        """How many of the next uploads to a path arrive with another byte."""
        self.seen: list[str] = []
        """`HEAD /path`, `GET /path bytes=0-9`, in order."""
        self.sent: Counter[str] = Counter()
        """Bytes of content by path."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def refusal(self, path: str) -> tuple[int, dict[str, str]] | None:
        """Why a file is not sent, if it is not: a status code, and headers."""
        status = self.refusals.get(path, 200 if path in self.files else 404)
        return None if status == 200 else (status, {})

    def page(self, path: str, query: dict[str, str], body: bytes) -> tuple[bytes, str] | None:
        """A computed answer and its type, if there is one for this path."""
        return None

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that leaves early is none of our errors."""


class HubServer(FileServer):
    """Repositories of one commit each, under `main` and the commit."""

    def __init__(self) -> None:
        super().__init__()
        self.gated: set[str] = set()

    def put(self, repository: str, files: dict[str, bytes], commit: str = COMMIT) -> None:
        for name, content in files.items():
            for revision in ("main", commit):
                path = f"/{repository}/resolve/{revision}/{name}"
                self.files[path] = content
                self.headers[path] = {"X-Repo-Commit": commit}

    def refusal(self, path: str) -> tuple[int, dict[str, str]] | None:
        found = re.fullmatch(
            r"(?:/api)?/((?:datasets/)?[^/]+/[^/]+)/(?:resolve|revision)/([^/]+)(/.*)?", path
        )
        repository, revision = found.groups()[:2] if found else ("", "")
        if repository in self.gated:
            return 403, {"X-Error-Code": "GatedRepo"}
        if path in self.files:
            return None
        known = [file for file in self.files if file.startswith(f"/{repository}/")]
        if not known:
            return 401, {"X-Error-Code": "RepoNotFound"}
        if not any(file.startswith(f"/{repository}/resolve/{revision}/") for file in known):
            return 404, {"X-Error-Code": "RevisionNotFound"}
        commit = next(self.headers[file]["X-Repo-Commit"] for file in known)
        return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}

    def page(self, path: str, query: dict[str, str], body: bytes) -> tuple[bytes, str] | None:
        """Of the API for data sets: a repository's commit, its tree below a folder, and what some paths are."""
        asks = r"/api/(datasets/[^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+)(/.*)?)?"
        if not (found := re.fullmatch(asks, path)):
            return None
        repository, ask, revision = found[1], found[2] or "revision", found[3] or "main"
        folder = (found[4] or "").strip("/")
        start = f"/{repository}/resolve/{COMMIT}/"
        names = [file.removeprefix(start) for file in self.files if file.startswith(start)]
        if not names or revision not in ("main", COMMIT):
            return None
        if ask == "revision":
            name = repository.removeprefix("datasets/")
            return json.dumps({"id": name, "sha": COMMIT, "siblings": [], "tags": []}).encode(), JSON
        if ask == "tree":
            below = [name for name in names if name.startswith(f"{folder}/" if folder else "")]
            parents = {str(parent) for name in below for parent in PurePosixPath(name).parents} - {
                ".",
                folder,
            }
            wanted = sorted({*below, *parents})
            if query.get("recursive") not in ("true", "True"):
                wanted = [name for name in wanted if str(PurePosixPath(name).parent) == (folder or ".")]
        else:
            wanted = (
                dict(parse_qsl(body.decode())).get("paths", "").split(",")
                if b"=" in body
                else json.loads(body)["paths"]
            )
        entries = [self.entry(start, name, names) for name in wanted]
        return json.dumps([entry for entry in entries if entry]).encode(), JSON

    def entry(self, start: str, name: str, names: list[str]) -> dict[str, Any] | None:
        if name in names:
            content = self.files[start + name]
            oid = hashlib.sha1(content).hexdigest()
            return {"type": "file", "path": name, "size": len(content), "oid": oid}
        if any(other.startswith(f"{name}/") for other in names):
            return {"type": "directory", "path": name, "size": 0, "oid": "0" * 40}
        return None


class S3Server(FileServer):
    """Buckets: the first part of a path. Signatures are not checked. Its files can be written."""

    def __init__(self) -> None:
        super().__init__()
        self.is_writable = True

    def page(self, path: str, query: dict[str, str], body: bytes) -> tuple[bytes, str] | None:
        if "list-type" not in query:
            return None
        bucket, prefix, delimiter = path.strip("/"), query.get("prefix", ""), query.get("delimiter", "")
        contents, folders = "", dict[str, None]()
        for file, content in sorted(self.files.items()):
            key = file.removeprefix(f"/{bucket}/")
            if key == file or not key.startswith(prefix):
                continue
            head, found, _ = key.removeprefix(prefix).partition(delimiter) if delimiter else ("", "", "")
            if found:
                folders[f"{prefix}{head}{delimiter}"] = None
                continue
            contents += (
                f"<Contents><Key>{key}</Key><Size>{len(content)}</Size><ETag>&quot;{etag(content)}&quot;</ETag>"
                "<LastModified>2026-01-01T00:00:00.000Z</LastModified><StorageClass>STANDARD</StorageClass></Contents>"
            )
        common = "".join(f"<CommonPrefixes><Prefix>{name}</Prefix></CommonPrefixes>" for name in folders)
        return (
            f"<ListBucketResult><Name>{bucket}</Name><Prefix>{prefix}</Prefix><IsTruncated>false</IsTruncated>"
            f"{contents}{common}</ListBucketResult>"
        ).encode(), "application/xml"


def etag(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    server: FileServer
    protocol_version = "HTTP/1.1"  # connections stay open, as those of most servers
    disable_nagle_algorithm = True  # else an answer waits for 40 ms behind its own head

    def do_HEAD(self) -> None:
        self.answer(with_content=False)

    def do_GET(self) -> None:
        self.answer(with_content=True)

    do_POST = do_GET

    def do_PUT(self) -> None:
        """An upload; like a response, one that is cut ends in the middle."""
        server, path = self.server, unquote(self.path.partition("?")[0])
        server.seen.append(f"PUT {path}")
        size = int(self.headers["Content-Length"])
        if server.cuts[path] > 0:
            server.cuts[path] -= 1
            self.rfile.read(size // 2)
            self.close_connection = True
            return
        content = self.rfile.read(size)
        status = server.refusals.get(path, 200 if server.is_writable else 405)
        if status == 200:
            if server.spoils[path] > 0:
                server.spoils[path] -= 1
                content = bytes([content[0] ^ 1]) + content[1:]
            server.files[path] = content
        self.head(status, {"ETag": f'"{etag(content)}"', "Content-Length": "0"})

    def do_DELETE(self) -> None:
        path = unquote(self.path.partition("?")[0])
        self.server.seen.append(f"DELETE {path}")
        self.server.files.pop(path, None)
        self.head(204, {"Content-Length": "0"})

    def answer(self, with_content: bool) -> None:
        server, (path, _, query) = self.server, self.path.partition("?")
        path = unquote(path)
        wanted = self.headers.get("Range", "")
        server.seen.append(f"{self.command} {path} {wanted}".strip())
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if page := server.page(path, dict(parse_qsl(query)), body):
            self.head(200, {"Content-Type": page[1], "Content-Length": str(len(page[0]))})
            self.wfile.write(page[0])
            return None
        if refusal := server.refusal(path):
            return self.head(refusal[0], refusal[1] | {"Content-Length": "0"})
        if with_content and server.failures[path]:
            server.failures[path] -= 1
            return self.head(503, {"Content-Length": "0"})
        content = server.files[path]
        headers = {
            "ETag": f'"{etag(content)}"',
            "Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT",
            **server.headers.get(path, {}),
        }
        status = 200
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", wanted)
        if server.has_ranges:
            headers["Accept-Ranges"] = "bytes"
        if found and server.has_ranges:
            first, last = int(found[1]), int(found[2] or len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{min(last, len(content) - 1)}/{len(content)}"
            content, status = content[first : last + 1], 206
        self.head(status, headers | {"Content-Length": str(len(content))})
        if with_content:
            self.send(path, content)
        return None

    def head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def send(self, path: str, content: bytes) -> None:
        is_cut = len(content) > 1 and self.server.cuts[path] > 0
        if is_cut:
            self.server.cuts[path] -= 1
            content = content[: len(content) // 2]
            self.close_connection = True
        self.server.sent[path] += len(content)
        self.wfile.write(content)
        if is_cut and self.server.is_reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

    def log_message(self, *_: object) -> None:
        """Not into the output of tests."""


@contextmanager
def serving(server: FileServer) -> Iterator[None]:
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def lay_out(cache: Path, files: dict[str, bytes], repository: str = "org/model") -> Path:
    """The repository in the hub's cache, as its library would leave it; returns the folder of its commit."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    snapshot = folder / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    for name, content in files.items():
        (snapshot / name).write_bytes(content)
    return snapshot
