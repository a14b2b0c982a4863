"""Allows one run per output folder: a lock file names its holder and is renewed as long as the holder is alive.

The file is created with O_CREAT | O_EXCL, which is atomic on NFS too. A holder on this machine is looked up in the
process table. A holder elsewhere is alive if it renews the file. Its age is computed from two times by the file server,
so clocks are never compared. The lock of a dead run is taken over. If two starts do so at once, one of them wins, and a
run that finds its lock taken over ends.
"""

import json
import os
import secrets
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import torch.distributed as dist

from megadyn.errors import UserError
from megadyn.files import os_errors_named
from megadyn.launch.processes import here, process_start
from megadyn.log import log

NAME = "run.lock"
RENEWED_S = 5.0
"""How often the holder renews its lock."""
STALE_S = 60.0
"""A lock from another machine is considered dead if it was not renewed for this long."""
ENDING_S = 3.0
"""How long a start waits for a holder on this machine that may just be ending."""
POLL_S = 0.25


@dataclass(frozen=True)
class Holder:
    """The holder of a lock."""

    host: str
    machine: str
    """Equal on machines that share process numbers; empty if processes cannot be looked up."""
    pid: int
    process_start: str
    """Start time in the machine's own units; distinguishes a process from a later one with the same number."""
    since: str
    """When it took the lock, for people."""
    token: str
    """Unique to this run."""

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


class RunLock:
    """The lock of a run's folder. Rank 0 holds it for all ranks, inside `with RunLock(folder)`."""

    def __init__(self, folder: Path):
        self.path = folder / NAME
        place = here()
        self.me = Holder(
            place.host,
            place.machine,
            place.pid,
            process_start(place.pid) or "",
            time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            secrets.token_hex(8),
        )
        self.problem: str | None = None
        """Why we no longer hold the lock, so that the run must end."""
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lock", daemon=True)

    def __enter__(self) -> Self:
        """Collective.

        Raises:
            UserError: on every rank, if another run holds the folder or the lock cannot be written.
        """
        problem: list[str | None] = [None]
        if dist.get_rank() == 0:
            try:
                with os_errors_named(self.path):
                    self.take()
            except UserError as error:
                problem = [str(error)]
        dist.broadcast_object_list(problem)
        if problem[0] is not None:
            raise UserError(problem[0])
        if dist.get_rank() == 0:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread.ident is not None:
            self._released.set()
            self._thread.join(RENEWED_S)
            self.release()

    # ---- taking it -------------------------------------------------------------------------------

    def take(self) -> None:
        """Creates the lock, unless a living run holds it (UserError)."""
        while not self._made():
            holder = self._read(self.path)
            if self._is_alive(holder):
                name = str(holder) if holder else "a process that has not written its name yet"
                raise UserError(
                    f"{self.path.parent} is in use by another run ({name}): end that one, or choose another "
                    f"output_dir (the lock is {self.path})"
                )
            self._clear(holder)

    def release(self) -> None:
        with suppress(OSError):  # the next run will detect that a remaining lock is dead
            if self._read(self.path) == self.me:
                self.path.unlink()

    def _made(self) -> bool:
        try:
            handle = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        with os.fdopen(handle, "w") as file:
            json.dump(asdict(self.me), file)
            file.flush()
            os.fsync(handle)
        return True

    @staticmethod
    def _read(path: Path) -> Holder | None:
        """The holder; None if the lock is gone or is just being written."""
        try:
            return Holder(**json.loads(path.read_text()))
        except (FileNotFoundError, ValueError, TypeError):
            return None

    def _is_alive(self, holder: Holder | None) -> bool:
        if holder and holder.machine and holder.machine == self.me.machine:
            end = time.monotonic() + ENDING_S
            while process_start(holder.pid) == holder.process_start:
                if time.monotonic() > end:
                    return True
                time.sleep(POLL_S)
            return False
        return self._is_renewed()

    def _is_renewed(self) -> bool:
        """Watches the lock of a process that cannot be looked up, until it is renewed, gone or stale."""
        first, told = self._changed(), False
        while True:
            changed = self._changed()
            if changed is None or first is None:
                return False  # its holder has just ended
            if changed != first:
                return True
            if self._now() - changed > STALE_S:
                return False
            if not told:
                log.info(
                    "%s was left by a run that cannot be looked up from here: waiting up to %.0f s for a sign of life",
                    self.path,
                    STALE_S,
                )
                told = True
            time.sleep(POLL_S)

    def _changed(self) -> float | None:
        """When the lock was last renewed, by the file server's clock; None if it is gone. Opens it, so that NFS asks
        the server."""
        try:
            with self.path.open("rb") as file:
                return os.fstat(file.fileno()).st_mtime
        except FileNotFoundError:
            return None

    def _now(self) -> float:
        """The current time by the file server's clock."""
        probe = self.path.with_name(f".{NAME}.{self.me.token}")
        try:
            probe.write_text("")
            return probe.stat().st_mtime
        finally:
            probe.unlink(missing_ok=True)

    def _clear(self, dead: Holder | None) -> None:
        """Removes a dead run's lock, unless another start has already done so and holds it now."""
        grave = self.path.with_name(f".{NAME}.{self.me.token}.dead")
        try:
            self.path.rename(grave)
        except FileNotFoundError:
            return
        taken = self._read(grave)
        if taken != dead:
            with suppress(FileExistsError):  # then a third start has the lock, and the second will notice
                os.link(grave, self.path)
        elif dead:
            log.warning("%s: left by a run that is gone (%s); taken over", self.path, dead)
        grave.unlink()

    # ---- keeping it ------------------------------------------------------------------------------

    def _renew(self) -> None:
        is_failing = False
        while not self._released.wait(RENEWED_S):
            try:
                self.renew()
                is_failing = False
            except OSError as error:
                if not is_failing:
                    log.warning(
                        "%s cannot be renewed (%s): another start may consider this run dead",
                        self.path,
                        error,
                    )
                is_failing = True

    def renew(self) -> None:
        """Renews the lock once. Sets `problem` if another run holds it now."""
        holder = self._read(self.path)
        if holder is None and self._made():
            return  # somebody removed it
        if holder != self.me:
            self.problem = (
                f"{self.path} was taken over by another run ({holder}), which considered this one dead"
            )
            return
        os.utime(self.path)
