"""Something of torch or DeepSpeed in place of their own, for a while."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """`owner.name` is `value` inside; of an object whose class has it, afterwards the class's again."""
    own, before = name in vars(owner), getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


def without_compiler() -> AbstractContextManager[None]:
    """`torch.compile` leaves functions as they are.

    DeepSpeed imports its Muon, to see that our optimizer is another; it is compiled as it is imported, and for that torch would
    load its compiler: seconds, of every start.
    """
    # Also as a decorator with options, which gets no function yet.
    return replaced(torch, "compile", lambda function=None, **options: function or (lambda inner: inner))
