"""Ends the whole job if a rank dies or hangs, and names the rank and the cause.

Every rank writes heartbeats to the store through which the ranks met: what it is doing, and for how long. Rank 0 reads
all of them; the others read rank 0's. Ranks on the same machine are also looked up in the process table, so that a
death is noticed within a second. A rank that detects a fault, or that it makes no progress itself, leaves a notice in
the store, and every rank ends when it sees that. A silent rank cannot end itself, so the other ranks on its machine
kill it. A rank whose launcher is gone asks the run to save and end, as a signal would: nothing else would end it, and
the next start would be a second run. After a fault every rank that still can writes its stacks and last collectives to
the run's folder.
There are two threads: one may block in calls to the store, the other never blocks.
"""

import faulthandler
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

from megadyn.errors import RunError, UserError
from megadyn.launch.launch import attempt
from megadyn.launch.post_mortem import write_post_mortem
from megadyn.launch.processes import Place, Process, here, process_state

POLL_S = 0.5
PATIENCE_S = 2.0
"""How long a rank that was told of a fault elsewhere may take to end by itself, with its own message."""
STATUS = 1


class Seen(NamedTuple):
    """A rank's last heartbeat."""

    number: int
    doing: str
    for_s: float
    """How long it had been doing that."""
    at: float
    """When a new heartbeat was last seen, by this process's clock."""


class OtherRankFailed(RunError):
    """This rank ends because of another rank's fault."""


class Notice(NamedTuple):
    """Why the job ends."""

    sentence: str
    silent: int | None = None
    """The rank that no longer responds, and so will not read this."""
    is_stuck: bool = False
    """Whether a rank makes no progress. Others may be the cause, so that each shows where it stands."""

    def is_own(self, rank: int) -> bool:
        """Whether it is about this rank."""
        return self.sentence.startswith(f"rank {rank} (")


class Watchdog:
    """Watches over one rank; wraps all its work. The rank calls `progress` regularly."""

    def __init__(
        self,
        timeout_s: float,
        grace_s: float,
        end: Callable[[int], Any] = os._exit,
        *,
        output_dir: Path,
        launchers: Sequence[Process] = (),
        lost: Callable[[], str | None] = lambda: None,
    ):
        """Collective.

        Args:
            end: ends the process at once, even if its main thread is stuck.
            output_dir: where ranks write what they were doing when a fault ends the job.
            launchers: processes whose end must end the run. lost: says why the run must stop, or None.
        """
        self._output_dir = output_dir
        self._launchers, self._lost_claim, self._is_orphan = launchers, lost, False
        self.request_stop: Callable[[str], None] | None = None
        """Asks the run to save and end. None while there is nothing to save; the rank then ends at once."""
        self.timeout_s, self.grace_s, self._end = timeout_s, grace_s, end
        self.silence_s = timeout_s / 2  # shorter, so that a silent rank is named before the others time out
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
        dist.all_gather_object(self.places, here())  # after this, every rank has written a heartbeat
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
        """Reports this rank's error to the others. If the error only results from another rank's, raises
        OtherRankFailed instead."""
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
        """Reports that the rank is alive and begins `doing`, which may take `timeout_s`."""
        self._doing, self._since = doing, time.monotonic()

    def asked_to_stop(self, signal_name: str) -> None:
        """From now on the rank has `grace_s` to end."""
        self._asked_to_stop = (signal_name, time.monotonic())

    def seconds_left(self) -> float:
        """How long this rank may go on after it was asked to stop; infinite if it was not."""
        if self._asked_to_stop is None:
            return math.inf
        return self._asked_to_stop[1] + self.grace_s - time.monotonic()

    def stop(self) -> None:
        """Called before the ranks end normally: from now on a missing rank is not a fault."""
        self._stopped.set()
        for thread in self._threads:  # a thread inside a store call would crash the interpreter's shutdown
            thread.join(PATIENCE_S)

    def _cause_elsewhere(self) -> str | None:
        """The fault of another rank that explains this rank's error, or None. Waits a moment for it."""
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

    # ---- the thread that never blocks ------------------------------------------------------------

    def _watch(self) -> None:
        while not self._stopped.wait(self._poll_s):
            now = time.monotonic()
            self._look_for_launchers()
            if problem := self._lost_claim():
                self._end_job(f"rank {self.rank}: {problem}")
            if self._notice:
                if now - self._noticed > PATIENCE_S:
                    self._obey(self._notice)
            elif fault := self._fault(now) or self._stuck(now):
                self._notice, self._noticed = fault, now
                if self.world > 1:
                    self._leave(fault)
            elif self._asked_to_stop and now - self._asked_to_stop[1] > self.grace_s:
                self._end_with_record(
                    f"rank {self.rank}: not saved and ended within training.grace_s = {self.grace_s:g} s of "
                    f"{self._asked_to_stop[0]} ({self._doing})"
                )

    def _look_for_launchers(self) -> None:
        gone = next((process for process in self._launchers if not process.is_alive), None)
        if gone is None or self._is_orphan:
            return
        self._is_orphan = True
        if self.request_stop is None:
            self._end_job(f"rank {self.rank}: its launcher ({gone}) is gone")
        elif self._asked_to_stop is None:  # otherwise the launcher passed on a signal before it ended
            self.asked_to_stop(f"the end of its launcher ({gone})")
            self.request_stop(f"the end of its launcher ({gone})")

    def _obey(self, notice: Notice) -> None:
        if notice.silent in self._neighbours:
            with suppress(ProcessLookupError):
                os.kill(self.places[notice.silent].pid, signal.SIGKILL)
        # Rank 0 alone hears what all ranks do.
        more = self._others() if notice.is_stuck and self.rank == 0 and not notice.is_own(0) else ""
        self._end_with_record(f"{notice.sentence}{more}", show=notice.silent is not None or notice.is_stuck)

    def _fault(self, now: float) -> Notice | None:
        """A fault of another rank, as seen from here, or None."""
        for rank in self._neighbours:
            if process_state(self.places[rank].pid) not in (None, "Z", "X"):
                continue
            # Only if still missing at the next poll, because it may have left a notice.
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
                    f"rank {rank} ({self._where(rank)}) sent no heartbeat for {now - seen.at:.0f} s: {why}"
                    f"{self._last(rank)}",
                    silent=rank,
                )
        if self._lost and not self._missing_since:
            return Notice(
                f"rank {self.rank} ({self._where(self.rank)}) lost the ranks' store at {os.environ['MASTER_ADDR']}, "
                f"with rank 0 ({self._where(0)}) or its launcher: {self._lost}"
            )
        return None

    def _stuck(self, now: float) -> Notice | None:
        """That this rank makes no progress, or None."""
        if now - self._since <= self.timeout_s:
            return None
        return Notice(
            f"rank {self.rank} ({self._where(self.rank)}) made no progress for {now - self._since:.0f} s, "
            f"{self._doing}{self._others()}; raise training.timeout_s if that is normal",
            is_stuck=True,
        )

    def _end_with_record(self, sentence: str, *, show: bool = True) -> None:
        """Ends the job after a fault; writes what this rank was doing, and with `show` also prints its stacks."""
        write_post_mortem(self._output_dir, self.rank, sentence)
        self._end_job(sentence, stacks=show)

    def _end_job(self, sentence: str, *, stacks: bool = False) -> None:
        with suppress(OSError):  # whatever reads this output may be gone
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
        """What the other known ranks are doing, shortest wait first: one of those is holding up the rest."""
        least = sorted(
            (seen.for_s + time.monotonic() - seen.at, rank, seen.doing) for rank, seen in self._seen.items()
        )
        return "".join(f"; rank {rank}: {doing}, {for_s:.0f} s" for for_s, rank, doing in least[:3])

    # ---- the thread that uses the store ----------------------------------------------------------

    def _key(self, name: object) -> str:
        return f"megadyn/{attempt()}/{name}"  # by attempt, because the store of torchrun's agent survives a restart

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
            except RuntimeError as error:  # a broken connection does not come back
                self._lost = str(error).splitlines()[0]
                return

    def _hear(self, rank: int, number: int, doing: str, for_s: float) -> None:
        if number != self._seen[rank].number:
            self._seen[rank] = Seen(number, doing, for_s, time.monotonic())

    def _leave(self, notice: Notice) -> threading.Thread:
        """Tells the other ranks, in a separate thread, because the store may be gone."""

        def put() -> None:
            try:
                # The first notice wins.
                self._connect().compare_set(self._key("notice"), "", json.dumps(notice))
            except RuntimeError as error:
                print(
                    f"error: the other ranks could not be notified: {str(error).splitlines()[0]}",
                    file=sys.stderr,
                    flush=True,
                )

        thread = threading.Thread(target=put, daemon=True)
        thread.start()
        return thread
