"""Runs layers' inner functions through torch.compile, for fewer kernels and fewer passes over memory."""

import functools
import importlib.util
import os
import shutil
from collections.abc import Callable
from typing import Any

import torch

from megadyn.errors import ConfigError

BACKEND: str | Callable[..., Any] = "inductor"


def check_compiler() -> None:
    """Raises ConfigError if this machine has no compiler for torch.compile."""
    cxx = os.environ.get("CXX", "g++")  # as in torch
    if torch.cuda.is_available() and importlib.util.find_spec("triton") is None:
        raise ConfigError("training.compile", True, "false on this machine: Triton is not installed")
    if not shutil.which(cxx):
        raise ConfigError(
            "training.compile",
            True,
            f"false on this machine: there is no C++ compiler {cxx} (CXX names another)",
        )


def compiled(method: Callable[..., Any], *inputs: Any) -> Any:
    """Calls method(*inputs), a layer's bound method, compiled as a whole; all layers of its class share the code.

    It is an error if it cannot be compiled as a whole; there is no silent fallback.
    """
    return _compiled(method.__func__)(method.__self__, *inputs)  # type: ignore[attr-defined]


def forget_compiled() -> None:
    """Drops all compiled code, before a model of other shapes. Otherwise torch takes the second shape of a function as a sign
    that it varies, and compiles slower code for any shape."""
    if _compiled.cache_info().currsize:
        torch.compiler.reset()
        _compiled.cache_clear()


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, backend=BACKEND, fullgraph=True)
