"""Runs a run's mirror (`checkpoint.mirror`): fetches from it at the start, copies to it in the background, waits for it at the
end. Rank 0 does it all; the others wait where it matters."""

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from megadyn.checkpoint import layout
from megadyn.checkpoint.mirror import FOLDERS, Mirror
from megadyn.config import Config
from megadyn.errors import RunError, UserError, one_line
from megadyn.files import os_errors_named
from megadyn.launch.watchdog import Watchdog
from megadyn.log import log
from megadyn.parallel.objects import all_gather

POLL_S = 1.0
"""Between looks at the run's folder."""
ASKS_S = 0.2
"""Between questions of ranks that wait for rank 0."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 15.0, 600.0
"""After a failure that followed all attempts of single requests; doubled each time."""
ENDING_S = 5.0
"""Of the time that a stopped run has, what is left for ending."""


class Copying(threading.Thread):
    """Keeps the mirror equal to the run's folder, from `start` until all is copied after `finish`."""

    def __init__(self, mirror: Mirror) -> None:
        super().__init__(name="mirror", daemon=True)
        self.mirror, self._finishing = mirror, threading.Event()
        self.has_ended = False
        """Whether all was copied after `finish`."""

    def run(self) -> None:
        done, pause = "", FIRST_PAUSE_S
        while not self.has_ended:
            is_last = self._finishing.is_set()
            try:
                state = self._state()
                if state != done or is_last:
                    self.mirror.sync()
                    done, pause, self.has_ended = state, FIRST_PAUSE_S, is_last
                if not is_last:
                    self._finishing.wait(POLL_S)
            except Exception as error:  # whatever it is must not end the run, nor the copying
                pause = FIRST_PAUSE_S if is_last else pause
                what = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
                log.warning(
                    "checkpoint.mirror: %s%s; the run goes on, and it is tried again in %g s",
                    what,
                    one_line(error),
                    pause,
                )
                time.sleep(pause) if is_last else self._finishing.wait(pause)
                pause = min(2 * pause, LONGEST_PAUSE_S)

    def finish(self) -> None:
        """Ends it after another look at the folder that succeeds."""
        self._finishing.set()

    def _state(self) -> str:
        """Another one if the run's checkpoints, or their marks, have changed."""
        found = []
        for folder in FOLDERS:
            root = self.mirror.output_dir / folder
            for path in layout.complete_checkpoints(root, quiet=True):
                for name in (layout.MANIFEST, layout.NOT_GOOD, layout.BEST):
                    try:
                        found.append(f"{path}/{name} {(path / name).stat().st_mtime_ns}")
                    except OSError:
                        continue
        return "\n".join(found)


@contextmanager
def mirrored(config: Config, watchdog: Watchdog) -> Iterator[None]:
    """Around all that a run does in its folder. Collective.

    Raises UserError on every rank for an address that cannot be written, or is another run's, and if a run that must resume
    from it cannot.
    """
    settings, moves = config.checkpoint, Moves()
    if dist.get_rank() == 0:
        with os_errors_named(config.output_dir):
            layout.release_held(Path(config.output_dir))
    if settings.mirror is None:
        yield
        return
    copying: Copying | None = None

    def begin() -> None:
        nonlocal copying
        mirror = Mirror(settings, Path(config.output_dir), moves.note)
        mirror.claim()
        mirror.restore()
        copying = Copying(mirror)

    _begin_together(begin, settings.mirror, moves, watchdog)
    if copying is not None:
        copying.start()
    try:
        yield
    except RunError as error:
        if error.is_everywhere:  # what the ranks agree on, such as a mark on the last checkpoint
            _end_together(copying, config, moves, watchdog)
        raise
    _end_together(copying, config, moves, watchdog)


class Moves:
    """Counts what moves to or from the mirror, so that waiting for it can be told from hanging."""

    def __init__(self) -> None:
        self.count = 0

    def note(self) -> None:
        self.count += 1


def _begin_together(begin: Callable[[], None], address: str, moves: Moves, watchdog: Watchdog) -> None:
    """Runs `begin` on rank 0, in a thread; raises what it raises as a UserError, on every rank."""
    problem: list[BaseException] = []

    def work() -> None:
        try:
            begin()
        except BaseException as error:
            problem.append(error)

    thread = threading.Thread(target=work, name="mirror", daemon=True) if dist.get_rank() == 0 else None
    if thread is not None:
        thread.start()
    _wait_together(thread, "fetching from checkpoint.mirror", moves, watchdog, math.inf)
    text = said(problem[0]) if problem else None
    if (text := all_gather(text)[0]) is not None:
        raise UserError(f"checkpoint.mirror = {address!r}: {text}")


def said(error: BaseException) -> str:
    """In one line; a UserError is a sentence, others need their names."""
    name = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
    return name + one_line(error)


def _end_together(copying: Copying | None, config: Config, moves: Moves, watchdog: Watchdog) -> None:
    """Waits until all is copied, at most as long as configured, or as a signal allows, and says what was not."""
    if copying is not None:
        copying.finish()
    began, wait_s = time.monotonic(), config.checkpoint.mirror_wait_s
    _wait_together(copying, "waiting for checkpoint.mirror", moves, watchdog, wait_s)
    if copying is None:
        return
    with_s = time.monotonic() - began
    if copying.has_ended:
        log.info("%s has everything (waited %.2f s)", copying.mirror.store, with_s)
        _remove_held(copying.mirror)
        return
    behind = copying.mirror.behind()
    layout.release_held(copying.mirror.output_dir)
    log.warning(
        "checkpoint.mirror: not copied within %.0f s: %s; the same command, also of a complete run, copies the rest",
        with_s,
        ", ".join(behind) or "marks of checkpoints, or removals",
    )


def _remove_held(mirror: Mirror) -> None:
    """Removes what the last save left for the sake of copying."""
    try:
        for folder in FOLDERS:
            layout.prune(mirror.output_dir / folder, mirror.settings.keep, mirror.settings.keep_every)
    except OSError as error:
        log.warning("an old checkpoint could not be removed: %s", error)


def _wait_together(
    thread: threading.Thread | None, doing: str, moves: Moves, watchdog: Watchdog, wait_s: float
) -> None:
    """Until rank 0's `thread` has ended, or for `wait_s`, or as long as a rank that was told to stop may take. Collective."""
    end, seen = time.monotonic() + wait_s, -1
    watchdog.progress(doing)
    while True:
        is_waiting = thread is not None and thread.is_alive() and time.monotonic() < end
        states = all_gather((is_waiting, moves.count, watchdog.seconds_left()))
        if not states[0][0] or min(state[2] for state in states) < ENDING_S:
            return
        if states[0][1] != seen:
            seen = states[0][1]
            watchdog.progress(doing)
        if thread is not None:
            thread.join(ASKS_S)
        else:
            time.sleep(ASKS_S)
