"""Temporarily replaces attributes of torch or DeepSpeed."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Sets `owner.name` to `value` inside the context. If the attribute comes from the object's class, it is restored
    by deletion."""
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
    """Makes `torch.compile` return functions unchanged.

    DeepSpeed imports its Muon optimizer to check that ours is a different one. Muon is compiled on import, for which
    torch would load its compiler. That would add seconds to every start.
    """
    # Used as a decorator with options, it is first called without a function.
    return replaced(torch, "compile", lambda function=None, **options: function or (lambda inner: inner))
