"""Garbage is collected at fixed steps, and Python's own collections are back afterwards."""

import gc
import weakref

import pytest

from megadyn.training.garbage import Garbage


class Node:
    """Part of a cycle, which only a collection frees."""

    def __init__(self) -> None:
        self.me = self


def steps(garbage: Garbage, count: int) -> list[bool]:
    """Whether what a step leaves behind is still there after each of `count` steps; a new one each time it is not."""
    there, seen = weakref.ref(Node()), []
    for number in range(1, count + 1):
        garbage.after_step(number)
        seen.append(there() is not None)
        if there() is None:
            there = weakref.ref(Node())
    return seen


def test_what_steps_leave_behind_goes_at_every_third() -> None:
    with Garbage(3) as garbage:
        assert not gc.isenabled()
        assert steps(garbage, 7) == [True, True, False, True, True, False, True]
    assert gc.isenabled()


def test_python_collects_by_itself_unless_asked() -> None:
    with Garbage(0) as garbage:
        assert gc.isenabled()
        assert steps(garbage, 2) == [True, True]


def test_python_collects_again_after_a_failure() -> None:
    with pytest.raises(RuntimeError, match="in a step"), Garbage(3):
        raise RuntimeError("in a step")
    assert gc.isenabled()
