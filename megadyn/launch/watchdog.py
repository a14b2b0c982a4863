"""Ends the whole job, naming the rank and the cause, when a rank dies or hangs.

Every rank writes a heartbeat into the store that the ranks met through: what it is doing and for how long. Rank 0
reads all of them, the others read rank 0's; a rank of the same machine is also looked up in the process table, so
that its death is known within a second. Who finds a fault leaves a notice in the store, and every rank ends with it; a
silent rank cannot end itself, so the others of its machine kill it. A rank whose launcher is gone asks the run to save and
end, as a signal would: nobody else would end it, and the next start would be a second run.
Two threads: one may wait for the store as long as it likes, the other never waits for anything.
"""

import faulthandler
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any, NamedTuple

import torch.distributed as dist

from megadyn.errors import RunError, UserError
from megadyn.launch.launch import attempt
from megadyn.launch.processes import Place, Process, here, process_state

POLL_S = 0.5
PATIENCE_S = 2.0
"""How long a rank that was told of a fault elsewhere may still end by itself, with its own words."""
STATUS = 1


class Seen(NamedTuple):
    """A rank's last heartbeat."""

    number: int
    doing: str
    for_s: float
    """How long it had been doing so."""
    at: float
    """When a new one was last seen here, by this process's clock."""


class OtherRankFailed(RunError):
    """The fault of another rank, which ended this one."""


class Notice(NamedTuple):
    """Why the job ends."""

    sentence: str
    silent: int | None = None
    """The rank that is not heard from, and so will not read this."""


class Watchdog:
    """Of one rank, around all its work. The rank calls `progress` as it goes."""

    def __init__(
        self,
        timeout_s: float,
        grace_s: float,
        end: Callable[[int], Any] = os._exit,
        *,
        launchers: Sequence[Process] = (),
        lost: Callable[[], str | None] = lambda: None,
    ):
        """Collective.

        Args:
            end: ends the process at once; its main thread may be stuck.
            launchers: whose end is the end of the run. lost: says why the run must not go on, or None.
        """
        self._launchers, self._lost_claim, self._is_orphan = launchers, lost, False
        self.request_stop: Callable[[str], None] | None = None
        """Asks the run to save and end; None while there is nothing to save, and the rank ends at once."""
        self.timeout_s, self.grace_s, self._end = timeout_s, grace_s, end
        self.silence_s = timeout_s / 2  # the silent one is named before the others' own time is over
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self._poll_s = min(POLL_S, timeout_s / 8)
        self._doing, self._since = "building the model", time.monotonic()
        self._notice: Notice | None = None
        self._noticed = 0.0
        self._asked_to_stop: tuple[str, float] | None = None
        self._stopped = threading.Event()
        self._missing_since: dict[int, float] = {}
        self._lost: str | None = None
        self._threads = [threading.Thread(target=self._watch, name="watchdog", daemon=True)]
        if self.world > 1:
            self._store = self._connect()
            self._beat(0)
            self._threads.append(threading.Thread(target=self._exchange, name="heartbeat", daemon=True))
        self.places: list[Place] = [here()] * self.world
        dist.all_gather_object(self.places, here())  # and from here on every heartbeat is there
        machine = self.places[self.rank].machine
        self._neighbours = [
            rank
            for rank, place in enumerate(self.places)
            if rank != self.rank and machine and place.machine == machine
        ]
        watched = range(1, self.world) if self.rank == 0 else [0]
        self._seen = {rank: Seen(0, "building the model", 0.0, time.monotonic()) for rank in watched}
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> "Watchdog":
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        """Tells the others of an error here; raises OtherRankFailed instead where it only follows from theirs."""
        if (
            isinstance(error, Exception)
            and not isinstance(error, (UserError, RunError))
            and (cause := self._cause_elsewhere())
        ):
            self.stop()
            raise OtherRankFailed(cause) from None
        if error is not None and not (isinstance(error, RunError) and error.is_everywhere):
            self._report(error)
        self.stop()

    # ---- what the rank calls ---------------------------------------------------------------------

    def progress(self, doing: str) -> None:
        """The rank lives, and begins `doing`, which may take `timeout_s`."""
        self._doing, self._since = doing, time.monotonic()

    def asked_to_stop(self, signal_name: str) -> None:
        """From now on the rank has `grace_s` to end."""
        self._asked_to_stop = (signal_name, time.monotonic())

    def stop(self) -> None:
        """Before the ranks end in order: one that is gone from now on is no fault."""
        self._stopped.set()
        for thread in self._threads:  # one inside a store call would abort the ending interpreter
            thread.join(PATIENCE_S)

    def _cause_elsewhere(self) -> str | None:
        """The fault of another rank that explains an error of this one, or None. Takes a moment."""
        end = time.monotonic() + PATIENCE_S
        while self._notice is None and self.world > 1 and time.monotonic() < end:
            time.sleep(0.05)
        return self._notice.sentence if self._notice else None

    def _report(self, error: BaseException) -> None:
        if self.world > 1 and self._notice is None:
            what = (
                str(error) if isinstance(error, (UserError, RunError)) else f"{type(error).__name__}: {error}"
            )
            notice = Notice(
                f"rank {self.rank} ({self._where(self.rank)}) failed, {self._doing}: {' '.join(what.split())}"
            )
            self._leave(notice).join(PATIENCE_S)

    # ---- the thread that never waits -------------------------------------------------------------

    def _watch(self) -> None:
        while not self._stopped.wait(self._poll_s):
            now = time.monotonic()
            self._look_for_launchers()
            if problem := self._lost_claim():
                self._end_job(f"rank {self.rank}: {problem}", stacks=False)
            if self._notice:
                if now - self._noticed > PATIENCE_S:
                    self._obey(self._notice)
            elif fault := self._fault(now):
                self._notice, self._noticed = fault, now
                self._leave(fault)
            elif self._asked_to_stop and now - self._asked_to_stop[1] > self.grace_s:
                self._end_job(
                    f"rank {self.rank}: not saved and ended within training.grace_s = {self.grace_s:g} s of "
                    f"{self._asked_to_stop[0]} ({self._doing})",
                    stacks=True,
                )
            elif now - self._since > self.timeout_s:
                self._end_job(
                    f"rank {self.rank} ({self._where(self.rank)}) made no progress for {now - self._since:.0f} s, "
                    f"{self._doing}{self._others()}; raise training.timeout_s if that is usual",
                    stacks=True,
                )

    def _look_for_launchers(self) -> None:
        gone = next((process for process in self._launchers if not process.is_alive), None)
        if gone is None or self._is_orphan:
            return
        self._is_orphan = True
        if self.request_stop is None:
            self._end_job(f"rank {self.rank}: its launcher ({gone}) is gone", stacks=False)
        elif self._asked_to_stop is None:  # else the launcher passed a signal on before it ended
            self.asked_to_stop(f"the end of its launcher ({gone})")
            self.request_stop(f"the end of its launcher ({gone})")

    def _obey(self, notice: Notice) -> None:
        if notice.silent in self._neighbours:
            with suppress(ProcessLookupError):
                os.kill(self.places[notice.silent].pid, signal.SIGKILL)
        self._end_job(notice.sentence, stacks=notice.silent is not None)

    def _fault(self, now: float) -> Notice | None:
        """What is wrong with another rank, as far as seen from here."""
        for rank in self._neighbours:
            if process_state(self.places[rank].pid) not in (None, "Z", "X"):
                continue
            # twice: it may have left a notice
            if now - self._missing_since.setdefault(rank, now) > self._poll_s:
                return Notice(
                    f"rank {rank} ({self._where(rank)}) died: killed from outside, out of memory, or crashed"
                    f"{self._last(rank)}"
                )
        for rank, seen in self._seen.items():
            if now - seen.at > self.silence_s:
                is_stopped = rank in self._neighbours and process_state(self.places[rank].pid) in ("T", "t")
                why = "it is stopped (SIGSTOP)" if is_stopped else "hung, or its machine or network is gone"
                return Notice(
                    f"rank {rank} ({self._where(rank)}) was not heard from for {now - seen.at:.0f} s: {why}"
                    f"{self._last(rank)}",
                    silent=rank,
                )
        if self._lost and not self._missing_since:
            return Notice(
                f"rank {self.rank} ({self._where(self.rank)}) lost the ranks' store at {os.environ['MASTER_ADDR']}, "
                f"with rank 0 ({self._where(0)}) or its launcher: {self._lost}"
            )
        return None

    def _end_job(self, sentence: str, *, stacks: bool) -> None:
        with suppress(OSError):  # the reader of what the rank prints may be what is gone
            sys.stdout.flush()
            print(f"error: {sentence}", file=sys.stderr, flush=True)
        if stacks:
            faulthandler.dump_traceback(all_threads=True)
        self._end(STATUS)

    def _where(self, rank: int) -> str:
        return f"process {self.places[rank].pid} on {self.places[rank].host}"

    def _last(self, rank: int) -> str:
        return f"; last heard from {self._seen[rank].doing}" if rank in self._seen else ""

    def _others(self) -> str:
        """What the ranks seen from here are doing, those that wait least first: one of them holds up the rest."""
        least = sorted(
            (seen.for_s + time.monotonic() - seen.at, rank, seen.doing) for rank, seen in self._seen.items()
        )
        return "".join(f"; rank {rank}: {doing}, {for_s:.0f} s" for for_s, rank, doing in least[:3])

    # ---- the thread that talks to the store ------------------------------------------------------

    def _key(self, name: object) -> str:
        return f"megadyn/{attempt()}/{name}"  # the store of torchrun's agent outlives a restart

    def _connect(self) -> Any:
        return dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=self.timeout_s),
        )

    def _beat(self, number: int) -> None:
        self._store.set(
            self._key(self.rank), json.dumps([number, self._doing, time.monotonic() - self._since])
        )

    def _exchange(self) -> None:
        number, watched = 0, list(self._seen)
        while not self._stopped.wait(self._poll_s):
            number += 1
            try:
                self._beat(number)
                for rank, heard in zip(watched, self._store.multi_get([self._key(rank) for rank in watched])):
                    self._hear(rank, *json.loads(heard))
                if self._notice is None and self._store.check([self._key("notice")]):
                    self._notice, self._noticed = (
                        Notice(*json.loads(self._store.get(self._key("notice")))),
                        time.monotonic(),
                    )
            except RuntimeError as error:  # a connection that broke does not come back
                self._lost = str(error).splitlines()[0]
                return

    def _hear(self, rank: int, number: int, doing: str, for_s: float) -> None:
        if number != self._seen[rank].number:
            self._seen[rank] = Seen(number, doing, for_s, time.monotonic())

    def _leave(self, notice: Notice) -> threading.Thread:
        """Tells the other ranks, in a thread of its own: the store may be what is gone."""

        def put() -> None:
            try:
                # the first one counts
                self._connect().compare_set(self._key("notice"), "", json.dumps(notice))
            except RuntimeError as error:
                print(
                    f"error: the other ranks could not be told: {str(error).splitlines()[0]}",
                    file=sys.stderr,
                    flush=True,
                )

        thread = threading.Thread(target=put, daemon=True)
        thread.start()
        return thread
