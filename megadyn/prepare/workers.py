"""Runs a function on many items in several processes; results are in order, whatever the number of processes."""

import ctypes
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from megadyn.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")

POLL_SECONDS = 0.2
PR_SET_PDEATHSIG = 1


def in_order(
    do: Callable[[Item], Result], items: Sequence[Item], workers: int, on_wait: Callable[[], None]
) -> Generator[Result, None, None]:
    """Results of `do` for each item, in the order of `items`, computed in `workers` other processes (0: in this one).

    `on_wait` is called now and then while waiting.
    A failure is raised when its item's turn comes, so which failure is raised does not depend on the number of workers.
    Raises `UserError` if a worker dies. If the iteration is stopped early, the workers end too.
    """
    if not workers:
        for item in items:
            on_wait()
            yield do(item)
        return
    # Forked, so that they start with the tokenizer and all modules loaded; so no thread may be started before this.
    already = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), start, (do, os.getpid()))
    futures: deque[Future[Result]] = deque(pool.submit(run, item) for item in items)
    started = set(multiprocessing.active_children()) - already
    try:
        while futures:
            future = futures.popleft()
            while wait([future], POLL_SECONDS).not_done:
                on_wait()
            yield future.result()
    except BrokenProcessPool as error:
        raise UserError("a worker process died (out of memory?); fewer --workers need less memory") from error
    finally:
        if futures:
            for process in started:
                process.kill()
        pool.shutdown(cancel_futures=True)


work: Callable[[Any], Any]  # in a worker process; set once when it starts


def start(do: Callable[[Any], Any], parent: int) -> None:
    global work
    work = do
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # workers end if the parent is killed
    if os.getppid() != parent:
        os._exit(1)


def run(item: Any) -> Any:
    return work(item)
