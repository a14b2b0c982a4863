"""No test reaches the network, leaves modules in the user's home, or hears the logger as an earlier test set it up.

Without a GPU, Triton's kernels run in its interpreter.
"""

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

# read on import
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": tempfile.mkdtemp(prefix="megadyn-tests-")}

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported

if (
    signal.getsignal(signal.SIGINT) == signal.SIG_IGN
):  # a shell's background job, whose programs would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

from megadyn.log import log

pytest_plugins = ("tests.helpers.datasets",)


HANDLERS, LEVEL, PROPAGATE = list(log.handlers), log.level, log.propagate


def _reset_logger() -> None:
    log.handlers[:], log.propagate = HANDLERS, PROPAGATE
    log.setLevel(LEVEL)


@pytest.fixture(autouse=True)
def _logger_as_it_was() -> Iterator[None]:
    """Also after a fixture of a module or a session, which runs before this one and may start logging."""
    _reset_logger()
    yield
    _reset_logger()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--kind", action="append", help="tests/conformance: a kind of routing to try (default: all)"
    )


LONGEST = (
    "end_to_end/test_deaths.py",
    "conformance/test_layouts.py",
    "parity/test_split_equals_whole.py",
    "end_to_end/test_two_nodes.py",
    "planning/test_memory.py",
    "parity/test_resume.py",
    "routing/test_replay_layouts.py",
    "conformance/test_exported.py",
    "parity/test_topologies.py",
    "end_to_end/test_launch_scripts.py",
    "end_to_end/test_going_on.py",
    "end_to_end/test_wheel.py",
    "docs/test_commands.py",
    "engine/test_loss_gate.py",
    "benchmark/test_gpu_script.py",
    "benchmark/test_soak.py",
    "prepare/test_preprocess_processes.py",
    "end_to_end/test_faults.py",
    "conformance/test_conformance.py",
    "end_to_end/test_pretrain.py",
    "end_to_end/test_tools.py",
    "parallel/test_split_equals_whole.py",
    "conformance/test_outside.py",
)
"""Files whose tests take longest, in this order. They come first (`make test` hands out whole files, in order), or one would
keep a single core busy at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    places = {here / name: place for place, name in enumerate(LONGEST)}
    assert all(path.exists() for path in places)
    items.sort(key=lambda item: places.get(item.path, len(places)))
