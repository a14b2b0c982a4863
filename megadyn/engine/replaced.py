"""Replaces attributes of torch or DeepSpeed, most of them for a while only."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint


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


def spare_dynamo() -> None:
    """Lets optimizers and recomputation run without importing torch's compiler, which takes seconds in every process.

    Some of their functions are wrapped so that the compiler, if one is at work, leaves them alone; the wrapper imports it to
    ask. Each wrapper keeps what it found in an attribute, which is set here to the plain function. Only for a process that
    compiles nothing.
    """
    optimizer = torch.optim.Optimizer
    for wrapper in (
        optimizer.add_param_group,
        optimizer.load_state_dict,
        optimizer.state_dict,
        optimizer.zero_grad,
        checkpoint,
    ):
        if function := getattr(wrapper, "__wrapped__", None):
            function.__dynamo_disable = function
