"""A web server on this machine that serves files by ranges, breaks connections on demand, and can speak as much of the Hugging
Face hub's protocol as its library needs to download."""

import hashlib
import re
import socket
import struct
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

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
        self.is_reset = False
        """Whether connections are cut by a reset, not by their end."""
        self.has_ranges = True
        self.seen: list[str] = []
        """`HEAD /path`, `GET /path bytes=0-9`, in order."""
        self.sent: Counter[str] = Counter()
        """Bytes of content by path."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def refusal(self, path: str) -> tuple[int, dict[str, str]] | None:
        return None if path in self.files else (404, {})

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
        found = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.*)", path)
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


class Handler(BaseHTTPRequestHandler):
    server: FileServer

    def do_HEAD(self) -> None:
        self.answer(with_content=False)

    def do_GET(self) -> None:
        self.answer(with_content=True)

    def answer(self, with_content: bool) -> None:
        server, path = self.server, self.path.partition("?")[0]
        wanted = self.headers.get("Range", "")
        server.seen.append(f"{self.command} {path} {wanted}".strip())
        if refusal := server.refusal(path):
            return self.head(refusal[0], refusal[1] | {"Content-Length": "0"})
        if with_content and server.failures[path]:
            server.failures[path] -= 1
            return self.head(503, {"Content-Length": "0"})
        content = server.files[path]
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', **server.headers.get(path, {})}
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
