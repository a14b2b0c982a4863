"""Where a step's time goes: parts that add up, on a host's clock and on a device's."""

import threading
import time
from types import SimpleNamespace

import pytest
import torch

from megadyn.engine.step_clock import PARTS, StepClock

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def clock(monkeypatch) -> StepClock:
    """Of a host whose clock goes on by what `spend` says."""
    now = [100.0]
    monkeypatch.setattr("megadyn.engine.step_clock.time.perf_counter", lambda: now[0])
    clock = StepClock(CPU)
    clock.spend = lambda milliseconds: now.__setitem__(0, now[0] + milliseconds / 1e3)
    return clock


def test_an_inner_part_interrupts_the_outer(clock):
    library = SimpleNamespace(all_reduce=lambda spent: clock.spend(spent) or "summed", untouched=1)
    original = library.all_reduce
    clock.watch(library, ("all_reduce", "of_another_version"))
    with clock.measuring():
        clock.spend(1)
        with clock.part("forward"):
            clock.spend(2)
            assert library.all_reduce(30) == "summed"
            clock.spend(4)
        library.all_reduce(500)
        with clock.part("optimizer"):
            clock.spend(6000)
    assert library.all_reduce is original
    assert clock.read() == pytest.approx(
        {"data": 0, "forward": 6, "backward": 0, "communication": 530, "optimizer": 6000, "other": 1}
    )
    assert clock.read() == {}  # once


def test_a_thread_in_the_background_is_no_part_of_a_step(clock):
    """Of one that writes a checkpoint while steps are measured: it may begin in a step and end after it."""
    begun, ended = threading.Event(), threading.Event()

    def all_gather(spent: float) -> None:
        begun.set()
        ended.wait(10)
        clock.spend(spent)

    library = SimpleNamespace(all_gather=all_gather)
    clock.watch(library, ["all_gather"])
    with clock.measuring():
        thread = threading.Thread(target=lambda: library.all_gather(500))
        thread.start()
        assert begun.wait(10)
        with clock.part("forward"):
            clock.spend(2)
        clock.spend(1)
    ended.set()
    thread.join()
    assert clock.read() == pytest.approx(
        {"data": 0, "forward": 2, "backward": 0, "communication": 0, "optimizer": 0, "other": 1}
    )


def test_parts_add_up_to_the_step():
    clock = StepClock(CPU)
    began = time.perf_counter()
    with clock.measuring():
        for part in PARTS[:-1] * 3:
            with clock.part(part), clock.part("communication"):
                time.sleep(0.001)
    spent, split = (time.perf_counter() - began) * 1e3, clock.read()
    assert tuple(split) == PARTS
    assert sum(split.values()) == pytest.approx(spent, abs=1)
    assert split["communication"] >= 15


def test_a_step_that_fails_leaves_nothing_replaced(clock):
    class Backend:
        def send(self) -> str:
            return "sent"

    def step() -> None:
        with clock.measuring(), clock.part("forward"):
            assert "send" in vars(backend)
            raise ZeroDivisionError

    backend = Backend()
    clock.watch(backend, ("send",))
    with pytest.raises(ZeroDivisionError):
        step()
    assert vars(backend) == {} and backend.send() == "sent"


def test_on_a_stream_only_reading_waits(monkeypatch):
    """Events are recorded on the step's own stream, whatever stream DeepSpeed reduces on, and only the last is waited for."""
    made, waited = [], []

    class Event:
        def __init__(self, enable_timing: bool):
            assert enable_timing

        def record(self, stream: str) -> None:
            assert stream == "compute"
            self.at = 2.0 ** len(made)
            made.append(self)

        def elapsed_time(self, later: "Event") -> float:
            assert waited == [made[-1]]
            return later.at - self.at

        def synchronize(self) -> None:
            waited.append(self)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    streams = iter(["compute", "reduction"])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: next(streams))
    monkeypatch.setattr(torch.cuda, "synchronize", None)
    clock = StepClock(CUDA)
    with clock.measuring(), clock.part("backward"), clock.part("communication"):
        pass
    assert not waited
    assert clock.read() == {
        "data": 0,
        "forward": 0,
        "backward": 2 + 8,
        "communication": 4,
        "optimizer": 0,
        "other": 1 + 16,
    }
