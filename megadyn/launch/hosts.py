"""Checks whether a run can start on its hosts. The launch scripts do this once, before any process starts."""

import re
import shutil
import socket
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from megadyn.errors import UserError

SSH_TIMEOUT_S = 10
SSH_AT_ONCE = 64


class Host(NamedTuple):
    name: str
    slots: int
    """Number of processes, one per GPU."""


def read_hostfile(path: Path) -> list[Host]:
    """Reads hosts as `name slots=8`, one per line; `#` begins a comment. The deepspeed and Open MPI launchers use the
    same format.

    Raises:
        UserError: the file cannot be read, is empty, has an invalid line, or names a host twice.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {getattr(error, 'strerror', None) or 'not a text file'}") from None
    hosts: dict[str, Host] = {}
    for number, line in enumerate(lines, 1):
        if not (text := line.partition("#")[0].strip()):
            continue
        found = re.fullmatch(r"([\w:][\w.:-]*)\s+slots=([1-9]\d{0,5})", text)
        if not found:
            raise UserError(
                f"{path}, line {number}: {text!r} must be of the form `name slots=8`, with as many slots as GPUs"
            )
        name = found[1]
        if name in hosts:
            raise UserError(
                f"{path}, line {number}: host {name!r} is named twice; give it one line with all its slots"
            )
        hosts[name] = Host(name, int(found[2]))
    if not hosts:
        raise UserError(f"{path}: names no host; write one per line, as `name slots=8`")
    if "localhost" in hosts and len(hosts) > 1:
        raise UserError(
            f"{path}: localhost means a different machine on each of {len(hosts)} hosts; give the name that the others know"
        )
    for name in hosts:
        try:
            socket.getaddrinfo(name, None)
        except OSError as error:
            raise UserError(
                f"{path}: host {name!r} is unknown here ({error.strerror}); correct it, or add it to "
                "DNS or /etc/hosts"
            ) from None
    return list(hosts.values())


def check_ssh(hosts: Sequence[Host]) -> None:
    """Raises UserError unless each host can be reached as the deepspeed launcher does: by pdsh over ssh, without a password."""
    for command in ("pdsh", "ssh"):
        if shutil.which(command) is None:
            raise UserError(
                f"the deepspeed launcher needs {command}, which is not installed: install it, or run the script on "
                "each host with NODE_RANK=0, 1, ..., or use examples/launch/mpi.sh or torchrun.sh"
            )
    with ThreadPoolExecutor(SSH_AT_ONCE) as pool:
        failed = [found for found in pool.map(_ssh_failure, hosts) if found]
    if failed:
        more = f" (and {len(failed) - 1} more hosts)" if len(failed) > 1 else ""
        raise UserError(
            f"{failed[0]}{more}; set up ssh without a password, or run the script on each host with "
            "NODE_RANK=0, 1, ..."
        )


def _ssh_failure(host: Host) -> str | None:
    try:
        done = subprocess.run(
            ["ssh", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={SSH_TIMEOUT_S}", host.name, "true"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=3 * SSH_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"host {host.name!r} did not answer ssh within {3 * SSH_TIMEOUT_S} s"
    if done.returncode == 0:
        return None
    said = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
    return f"host {host.name!r} cannot be reached by ssh: {said[-1]}"
