"""No test reaches the network, leaves modules in the user's home, or hears the logger as an earlier test set it up.

Without a GPU, Triton's kernels run in its interpreter.
"""

import os
import tempfile
from collections.abc import Iterator

# read on import
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": tempfile.mkdtemp(prefix="megadyn-tests-")}

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported

from megadyn.log import log


@pytest.fixture(autouse=True)
def _logger_as_it_was() -> Iterator[None]:
    handlers, level, propagate = list(log.handlers), log.level, log.propagate
    yield
    log.handlers[:], log.propagate = handlers, propagate
    log.setLevel(level)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--kind", action="append", help="tests/conformance: a kind of routing to try (default: all)"
    )
