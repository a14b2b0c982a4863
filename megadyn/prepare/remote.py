"""Files of a corpus that are elsewhere: at an address of https, s3, gs, hf or another protocol of fsspec.

They are read by ranges of bytes, of which one is in memory at a time. A range that does not arrive whole is requested again,
so a cut connection neither loses nor repeats anything. A `RemoteFile` is plain values: each process opens connections of its
own, because those of another cannot be used after a fork.
"""

import io
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, TypeVar
from urllib.parse import urlsplit

from megadyn.errors import UserError, one_line
from megadyn.log import log
from megadyn.progress import each

ADDRESS = re.compile(r"([a-z][a-z0-9+.-]*)://")
WEB = ("http", "https")
PACKAGES = {"http": "aiohttp", "https": "aiohttp", "s3": "s3fs", "gs": "gcsfs", "hf": "huggingface_hub"}
"""What to install for a protocol. fsspec itself reads others, too, with packages of their own."""
AT_COMMIT = re.compile(r"^(hf://[^@]*)@[0-9a-f]{40}(?=/)")
"""The beginning of an address on the hub whose content does not change."""
RETRY_SECONDS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
"""Waiting times after each failure of a request: two minutes in all."""
CONNECT_SECONDS, READ_SECONDS = 30.0, 60.0
"""How long a web server may take to accept a connection, and to send anything."""
FIRST_BYTES = 2**16
"""Of a file whose reader has not said how far it reads: more than tells its format. Doubled as long as it reads on."""
BLOCK_BYTES = 2**24
"""Largest request, and all of a file that is in memory."""
BUFFER_BYTES = 2**16
REQUESTS = 16
"""Made at a time when many files are looked at."""
VERSIONS = (
    "ETag",
    "etag",
    "md5Hash",
    "blob_id",
    "Last-Modified",
    "LastModified",
    "last_modified",
    "updated",
    "mtime",
)
"""What shows whether a file has changed, by fsspec's file systems; the first that there is."""
TRANSIENT = (408, 425, 429)
"""Status codes below 500 after which to try again."""
FINAL = ("NoCredentialsError", "DefaultCredentialsError", "OfflineModeIsEnabled")
"""Errors of botocore, google-auth and the hub's library, by name, because these may not be installed."""
FINAL_HERE = (
    FileNotFoundError,
    NotADirectoryError,
    IsADirectoryError,
    FileExistsError,
    PermissionError,
    NotImplementedError,
    ValueError,
    TypeError,
)
NOT_FOUND = ("RepositoryNotFoundError", "GatedRepoError")
"""What the hub also answers to those who may not see a repository."""

KEPT: dict[int, Any] = {}
"""Every file system that was used. A forked process must not close its parent's, as it would when it forgets them: it would take
their connections out of what the parent waits for."""

T = TypeVar("T")


def is_address(text: str) -> bool:
    return ADDRESS.match(text) is not None


def shown(address: str) -> str:
    """For messages and records: without a password, or a query, which may hold a signature."""
    if protocol_of(address) == "hf":
        return address  # its @ stands before a revision
    parts = urlsplit(address)
    path = parts.path if protocol_of(address) in WEB else address.partition("://")[2].partition("/")[2]
    host = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
    return f"{host}/{path.lstrip('/')}" if path else host


def protocol_of(address: str) -> str:
    found = ADDRESS.match(address)
    assert found
    return found[1]


@dataclass(frozen=True)
class RemoteFile:
    address: str
    size: int
    version: str
    """Another one if the content has changed; empty if that cannot be told."""

    def __str__(self) -> str:
        return shown(self.address)

    @property
    def name(self) -> str:
        path = urlsplit(self.address).path if protocol_of(self.address) in WEB else self.address
        return PurePosixPath(path).name

    def open(self, mode: str = "rb", buffering: int = -1, until: int | None = None) -> IO[bytes]:
        """As of a `Path`. `until`: a byte up to which all will be read, for fewer requests."""
        raw = RangeReader(self, until)
        # Raw readers lack only methods for text.
        return raw if not buffering else io.BufferedReader(raw, max(buffering, BUFFER_BYTES))  # type: ignore[return-value]


File = Path | RemoteFile


def size_of(file: File) -> int:
    return file.size if isinstance(file, RemoteFile) else file.stat().st_size


def identity_of(file: File) -> list[Any]:
    """Plain values; equal only for the same file with the same content."""
    if isinstance(file, RemoteFile):
        return [AT_COMMIT.sub(r"\1", file.address), file.size, file.version]
    state = file.stat()
    return [str(file.absolute()), state.st_size, state.st_mtime_ns]


class RangeReader(io.RawIOBase):
    """Reads a remote file. Raises UserError if it cannot be read, or has changed since it was listed."""

    def __init__(self, file: RemoteFile, until: int | None) -> None:
        self._file, self._until = file, until
        self._at = self._begin = 0
        self._block = memoryview(b"")  # from byte `_begin`
        self._step = FIRST_BYTES
        self._source: Any = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._file.size}[whence]
        return self._at

    def close(self) -> None:
        self._leave()
        super().close()

    def readinto(self, buffer: Any) -> int:
        if self._at >= self._file.size:
            return 0
        if not self._begin <= self._at < self._begin + len(self._block):
            self._load()
        start = self._at - self._begin
        size = min(len(buffer), len(self._block) - start)
        buffer[:size] = self._block[start : start + size]
        self._at += size
        return size

    def _load(self) -> None:
        """The block that begins here."""
        if not self._at:
            size = self._step = FIRST_BYTES  # its head may be all that is wanted of it here
        elif self._until is not None and self._at < self._until:
            size, self._step = self._until - self._at, FIRST_BYTES
        else:
            reads_on = len(self._block) > 0 and self._at == self._begin + len(self._block)
            size = self._step = min(2 * self._step, BLOCK_BYTES) if reads_on else FIRST_BYTES
        end = min(self._at + min(size, BLOCK_BYTES), self._file.size)
        self._block = memoryview(b"")  # freed first
        self._block = memoryview(patiently(lambda: self._range(self._at, end), str(self._file), self._leave))
        self._begin = self._at

    def _range(self, begin: int, end: int) -> bytes:
        if self._source is None:
            self._source = self._opened()
        self._source.seek(begin)
        raw: bytes = self._source.read(end - begin)
        if len(raw) != end - begin:
            raise ConnectionError(f"{len(raw)} bytes arrived of {end - begin}")
        return raw

    def _opened(self) -> Any:
        system, path = file_system(self._file.address)
        if not AT_COMMIT.match(self._file.address) and self._is_another(described(system, path)):
            raise UserError(
                f"{self._file}: changed since it was listed; the same command begins again with it"
            )
        known = {"size": self._file.size} if protocol_of(self._file.address) in WEB else {}
        return system.open(path, "rb", cache_type="none", **known)

    def _is_another(self, found: RemoteFile) -> bool:
        were, are = self._file.version, found.version
        return found.size != self._file.size or (were != are and bool(were and are))

    def _leave(self) -> None:
        source, self._source = self._source, None
        if source is not None:
            source.close()


def patiently(
    do: Callable[[], T],
    what: str,
    clean: Callable[[], None] = lambda: None,
    advice: str = "; the same command continues from what is finished",
) -> T:
    """What `do` returns; after a failure that may pass, `clean` and again, a while later. `advice` ends the message of the last
    one.

    Raises UserError for a failure that will not pass, or did not.
    """
    for pause in (*RETRY_SECONDS, None):
        try:
            return do()
        except UserError:
            raise
        except Exception as error:  # each file system has its own
            clean()
            problem = cause_of(error)
        if is_final(problem):
            raise UserError(f"{what}: {reason(problem)}") from None
        if pause is not None:
            log.warning("%s: %s; trying again in %g s", what, reason(problem), pause)
            time.sleep(pause)
    raise UserError(f"{what}: {reason(problem)}, after {len(RETRY_SECONDS) + 1} attempts{advice}")


def cause_of(error: Exception) -> Exception:
    """fsspec reports every failure to look at a web page as a missing file, caused by what it was."""
    cause = error.__cause__
    return cause if isinstance(error, FileNotFoundError) and isinstance(cause, Exception) else error


def status_of(error: Exception) -> int | None:
    """The status code of a server's answer, by aiohttp, gcsfs or httpx; None for other errors."""
    for name in ("status", "code"):
        if isinstance(found := getattr(error, name, None), int):
            return found
    found = getattr(getattr(error, "response", None), "status_code", None)
    return found if isinstance(found, int) else None


def is_final(error: Exception) -> bool:
    if type(error).__name__ in FINAL:
        return True
    status = status_of(error)
    if status is not None:
        return 400 <= status < 500 and status not in TRANSIENT
    return isinstance(error, FINAL_HERE)


def reason(error: Exception) -> str:
    status = status_of(error)
    if type(error).__name__ in NOT_FOUND:
        return "no such repository, or one that is private or gated (hf auth login, or HF_TOKEN)"
    if type(error).__name__ == "RevisionNotFoundError":
        return "no such revision"
    if isinstance(error, FileNotFoundError) or status == 404:
        return "no such file or folder"
    if isinstance(error, PermissionError) or status in (401, 403):
        return f"no permission ({status or one_line(error) or 'refused'})"
    if status is not None:
        return f"the server answers {status}"
    if isinstance(error, ValueError) and "range requests" in str(error):
        return "the server does not send parts of files (byte ranges), so that it cannot be read bit by bit: download it first"
    return one_line(error) or type(error).__name__


def file_system(address: str) -> tuple[Any, str]:
    """(fsspec's file system, path in it). Raises UserError for an unknown protocol, and for one whose package is missing."""
    import fsspec

    protocol = protocol_of(address)
    options: dict[str, Any] = {}
    try:
        fsspec.get_filesystem_class(protocol)
        if protocol in WEB:
            import aiohttp

            timeout = aiohttp.ClientTimeout(sock_connect=CONNECT_SECONDS, sock_read=READ_SECONDS)
            options["client_kwargs"] = {
                "timeout": timeout,
                "trust_env": True,  # proxies of the environment, and passwords in ~/.netrc
                "headers": {
                    "Accept-Encoding": "identity"
                },  # ranges are of the file, not of its compressed form
            }
    except ImportError as error:
        package = PACKAGES.get(protocol)
        install = f"pip install {package}" if package else one_line(error)
        raise UserError(
            f"{shown(address)}: {protocol}:// needs a package that is missing ({install})"
        ) from None
    except ValueError:
        raise UserError(
            f"{shown(address)}: the protocol {protocol}:// is not known; known are https, s3, gs and hf, and those of fsspec"
        ) from None
    system, path = fsspec.core.url_to_fs(address, **options)
    KEPT[id(system)] = system
    return system, path


def described(system: Any, path: str, entry: dict[str, Any] | None = None) -> RemoteFile:
    """The file at `path`; `entry`: what its file system says of it, if known."""
    entry = entry or system.info(path)
    address = system.unstrip_protocol(path)
    if urlsplit(address).netloc == "" and protocol_of(address) not in ("memory", "file", "local"):
        raise UserError(
            f"{shown(address)}: fsspec loses the host of {protocol_of(address)}:// addresses: download the file first"
        )
    if entry.get("size") is None:
        raise UserError(f"{shown(address)}: the server does not say how large it is: download it first")
    version = next((str(entry[key]) for key in VERSIONS if entry.get(key)), "")
    return RemoteFile(address, int(entry["size"]), version)


def of_each(do: Callable[[Any], T], files: Sequence[Any]) -> list[T]:
    """`do` of each. For local files one after the other; else several at a time, because each waits for a server."""
    if all(isinstance(file, Path) for file in files):
        return [do(file) for file in files]
    with ThreadPoolExecutor(REQUESTS) as pool:  # ends before any process is forked
        return list(each(pool.map(do, files), "looking at files", len(files)))
