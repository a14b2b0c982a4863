"""Where a tokenizer or a model is: a local path, or an address on the Hugging Face hub, ORG/NAME or ORG/NAME@REVISION.

An address becomes a folder of the hub's own cache (HF_HOME), so it is downloaded once, and HF_HUB_OFFLINE, HF_ENDPOINT and
HF_TOKEN mean what they mean to other tools. Of the processes that a launcher started on one machine one asks the hub and
downloads; the others wait for it and use the same commit.
"""

import fcntl
import json
import os
import re
import time
from collections.abc import Callable
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

from megadyn.errors import UserError, one_line
from megadyn.files import os_errors_named
from megadyn.log import MPI_LOCAL_RANKS, log
from megadyn.progress import BYTES, Bar, waiting

ADDRESS = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:@([^\s@]+))?")
COMMIT = re.compile(r"[0-9a-f]{40}")
RETRY_SECONDS = (1.0, 4.0, 16.0)
"""Waiting times after a failed download. Within one, the hub's library continues a cut connection where it was cut."""
HEAD_START_SECONDS = 5.0
"""Time that local rank 0, which may show its progress, has to begin before another process of the machine does."""
POLL_SECONDS = 0.1
CLOCK_SECONDS = 2.0
"""Between clocks of this machine and of its files."""


class Need(NamedTuple):
    """Which files of a repository are needed. No others are downloaded."""

    first: str
    """Without it the repository is not what was asked for."""
    optional: tuple[str, ...] = ()
    weights: bool = False
    """Also model.safetensors, or its index and the shards that this names."""


SHAPE = Need("config.json")
MODEL = Need("config.json", weights=True)
TOKENIZER = Need(
    "tokenizer.json", ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
)
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


class Address(NamedTuple):
    repository: str
    revision: str

    def __str__(self) -> str:
        return self.repository if self.revision == "main" else f"{self.repository}@{self.revision}"


def local_path(given: str | Path, what: str, need: Need) -> Path:
    """`given` itself if it exists, otherwise the folder of the hub's cache with the needed files of that address.

    Args:
        what: how messages call it, for example `checkpoint.init_from = 'org/name'`.

    Raises:
        UserError: neither a path nor an address; or an address whose files cannot be downloaded: no such repository or
            revision, no permission, no network, not in the cache although HF_HUB_OFFLINE is set.
    """
    if Path(given).exists():
        return Path(given)
    if not (address := address_in(given)):
        raise UserError(
            f"{what}: no such file or folder, and not an address on the Hugging Face hub (ORG/NAME or ORG/NAME@REVISION)"
        )
    try:
        return _on_this_machine(address, need)
    except UserError as error:
        raise UserError(
            f"{what}: no such file or folder here, and as an address on the hub: {error}"
        ) from None


def pinned(given: str, what: str, need: Need) -> str:
    """`given`, or for an address ORG/NAME@COMMIT: what it means today. Raises as `local_path`."""
    folder, address = local_path(given, what, need), address_in(given)
    return given if address is None else f"{address.repository}@{folder.name}"


def address_in(given: str | Path) -> Address | None:
    """The address that `given` is, if it is one and not the path of something that exists."""
    found = None if Path(given).exists() else ADDRESS.fullmatch(str(given))
    return Address(found[1], found[2] or "main") if found else None


@cache
def _on_this_machine(address: Address, need: Need) -> Path:
    """Cached, so that a process asks once: an address without a commit may mean another one a minute later."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return _from_cache(address, need, "HF_HUB_OFFLINE is set")
    with os_errors_named(constants.HF_HUB_CACHE):
        return once_per_machine(
            Path(constants.HF_HUB_CACHE) / ".locks" / "megadyn",
            f"{address} {need.first} {need.weights}",
            lambda: _from_hub(address, need),
        )


def _from_cache(address: Address, need: Need, why: str) -> Path:
    """The folder in the cache; raises UserError unless all that is needed is there. `why` the hub was not asked."""
    first, lacks = _cached(address, need.first), None
    if first is not None:
        lacks = _missing_weights(first.parent) if need.weights else None
    if first is None or lacks:
        revision = "" if address.revision == "main" else f" --revision {address.revision}"
        raise UserError(
            f"{why}, and the cache has no {lacks or need.first} of {address} (fetch it where there is a network: hf download "
            f"{address.repository}{revision})"
        )
    if unknown := [name for name in need.optional if _noted(address, name) is None]:
        log.warning("%s: the cache does not have %s, which it may need", address, " and ".join(unknown))
    return first.parent


def _missing_weights(folder: Path) -> str | None:
    if not (folder / INDEX).exists():
        return None if (folder / WEIGHTS).exists() else WEIGHTS
    return next((name for name in _shards(folder) if not (folder / name).exists()), None)


def _shards(folder: Path) -> list[str]:
    """Files named by the index; none if it is damaged, which its reader will report."""
    try:
        return sorted(set(json.loads((folder / INDEX).read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        return []


def _cached(address: Address, name: str) -> Path | None:
    found = _noted(address, name)
    return Path(found) if isinstance(found, str) else None


def _noted(address: Address, name: str) -> Any:
    """What the cache knows of a file: its path, None for nothing, or a mark that the repository lacks it."""
    from huggingface_hub import constants, try_to_load_from_cache

    return try_to_load_from_cache(
        address.repository, name, revision=address.revision, cache_dir=constants.HF_HUB_CACHE
    )


def _from_hub(address: Address, need: Need) -> Path:
    """Downloads what the cache lacks."""
    from huggingface_hub.errors import EntryNotFoundError

    began = time.monotonic()
    if (problem := _unreachable(address, need.first)) is not None:
        folder = _from_cache(address, need, problem)
        log.warning("%s: %s; using commit %s of the cache", address, problem, folder.name)
        return folder
    folder = _download(address, need.first).parent
    pinned = Address(address.repository, folder.name)
    for name in need.optional:
        _download_if_there(pinned, name)
    if need.weights and (index := _download_if_there(pinned, INDEX)):
        for name in _shards(index.parent):
            _download(pinned, name)
    elif need.weights:
        try:
            _download(pinned, WEIGHTS)
        except EntryNotFoundError:
            raise UserError(
                f"{address} has neither {WEIGHTS} nor {INDEX}: other forms of weights, such as .bin files, are not read"
            ) from None
    log.info("%s: commit %s (%.1f s)", address, folder.name, time.monotonic() - began)
    return folder


def _unreachable(address: Address, name: str) -> str | None:
    """Asks for one file. Returns why the hub does not answer, if it does not; raises UserError for an answer that ends it."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    repository, revision = address
    hub = constants.ENDPOINT
    if COMMIT.fullmatch(revision) and _cached(address, name):
        return None
    try:
        get_hf_file_metadata(hf_hub_url(repository, name, revision=revision, endpoint=hub), endpoint=hub)
    except GatedRepoError:
        raise UserError(
            f"{repository} is gated: accept its terms on {hub}/{repository}, and give your token (hf auth login, or HF_TOKEN)"
        ) from None
    except RepositoryNotFoundError:
        raise UserError(
            f"{hub} has no model {repository} (a private one needs your token: hf auth login, or HF_TOKEN)"
        ) from None
    except RevisionNotFoundError:
        raise UserError(f"{repository} has no revision {revision!r} on {hub}") from None
    except EntryNotFoundError:
        raise UserError(f"{address} has no {name} on {hub}") from None
    except HFValidationError as error:
        raise UserError(one_line(error)) from None
    except HfHubHTTPError as error:
        if error.response.status_code < 500 and error.response.status_code not in (408, 429):
            raise UserError(f"{hub} answers {one_line(error)}") from None
        return f"{hub} answers {error.response.status_code}"
    except Exception as error:  # of the HTTP library, whose name depends on the version of the hub's library
        return f"{hub} cannot be reached ({one_line(error) or type(error).__name__})"
    return None


def _download_if_there(address: Address, name: str) -> Path | None:
    from huggingface_hub import _CACHED_NO_EXIST
    from huggingface_hub.errors import EntryNotFoundError

    if _noted(address, name) is _CACHED_NO_EXIST:
        return None
    try:
        return _download(address, name)
    except EntryNotFoundError:
        return None


def _download(address: Address, name: str) -> Path:
    """One file, in the cache. Raises EntryNotFoundError if the repository lacks it, UserError if it cannot be downloaded."""
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    if COMMIT.fullmatch(address.revision) and (found := _cached(address, name)):
        return found
    for pause in (*RETRY_SECONDS, None):
        try:
            return Path(
                hf_hub_download(
                    address.repository,
                    name,
                    revision=address.revision,
                    endpoint=constants.ENDPOINT,
                    cache_dir=constants.HF_HUB_CACHE,
                    tqdm_class=_bar_of(f"{address.repository}: {name}"),
                )
            )
        except EntryNotFoundError as error:
            if not isinstance(error, LocalEntryNotFoundError):  # that one is about the network
                raise
            problem: Exception = error.__cause__ if isinstance(error.__cause__, Exception) else error
        except Exception as error:  # of several libraries
            is_final = isinstance(error, OSError) and error.errno is not None
            if is_final and not isinstance(error, HfHubHTTPError):
                raise  # no space left, no permission
            problem = error
        reason = one_line(problem) or type(problem).__name__
        if pause is not None:
            log.warning("%s of %s: %s; trying again in %g s", name, address, reason, pause)
            time.sleep(pause)
    raise UserError(
        f"{name} cannot be downloaded from {constants.ENDPOINT}/{address.repository} ({reason}); starting again continues "
        "with what is complete"
    )


def _bar_of(what: str) -> type[Any]:
    """A class by which the hub's library counts bytes, shown as all our work is."""
    from tqdm import tqdm

    class Counted(tqdm):  # type: ignore[misc]  # tqdm ships no types
        monitor_interval = 0  # no thread: processes may be forked later

        def __init__(self, *args: Any, total: int | None = None, **settings: Any) -> None:
            self.shown = Bar(what, total or 0, BYTES)
            super().__init__(*args, total=total, **{**settings, "file": StringIO(), "leave": False})

        def display(self, *_: object, **__: object) -> None:
            self.shown.reach(int(self.n))

        def close(self) -> None:
            super().close()
            self.shown.close()

    return Counted


def once_per_machine(folder: Path, subject: str, do: Callable[[], Path]) -> Path:
    """What `do` returns or raises (a UserError), called by one of the processes that a launcher started on this machine.

    The process that gets the lock of `subject` in `folder` does it, and leaves the outcome there for the others of the same
    start. Local rank 0 always does it, and so does a process that no launcher started.
    """
    ranks = (os.environ[name] for name in ("LOCAL_RANK", *MPI_LOCAL_RANKS) if name in os.environ)
    local_rank = next(ranks, None)
    if local_rank is None or not os.getppid():  # a process of its own, or the first of its container
        return do()
    path = folder / f"{os.uname().nodename} {subject}".replace("/", "--")
    start = _this_start()
    if local_rank != "0":
        end = time.monotonic() + HEAD_START_SECONDS
        while time.monotonic() < end and _outcome(path, start) is None:
            time.sleep(POLL_SECONDS)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = path.open("a")
        with waiting(f"another process downloads {subject.partition(' ')[0]}"):
            fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        log.warning("%s cannot be locked (%s): every process asks the hub itself", path, error.strerror)
        return do()
    with file:
        outcome = None if local_rank == "0" else _outcome(path, start)
        if outcome is None:
            try:
                outcome = {"start": start, "folder": str(do())}
            except UserError as error:
                outcome = {"start": start, "error": str(error)}
            path.write_text(json.dumps(outcome))
    if "error" in outcome:
        raise UserError(outcome["error"])
    return Path(outcome["folder"])


def _outcome(path: Path, start: str) -> dict[str, str] | None:
    """What a process of the same start has left; None if there is nothing yet."""
    try:
        if path.stat().st_mtime < _began() - CLOCK_SECONDS:  # of an earlier start by the same parent
            return None
        outcome = json.loads(path.read_bytes())
    except (OSError, ValueError):  # being written, or never written
        return None
    return outcome if outcome["start"] == start else None


def _this_start() -> str:
    """Equal for processes with the same parent, a launcher, and the same attempt of it. Processes that a script of its own
    starts differ, and each asks the hub."""
    parent = os.getppid()
    return f"{parent} {_ticks(parent)} {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"


def _began() -> float:
    """When this process began, in seconds since 1970. The processes of a start begin at nearly the same time."""
    since_boot = float(Path("/proc/uptime").read_text().split()[0])
    return time.time() - since_boot + _ticks(os.getpid()) / os.sysconf("SC_CLK_TCK")


def _ticks(pid: int) -> int:
    """Time from boot to the beginning of a process."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
