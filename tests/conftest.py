"""No test reaches the network, leaves modules in the user's home, or hears the logger as an earlier test set it up."""

import os
import tempfile
from collections.abc import Iterator

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": tempfile.mkdtemp(prefix="megadyn-tests-")}    # read on import

import pytest

from megadyn.log import log


@pytest.fixture(autouse=True)
def _logger_as_it_was() -> Iterator[None]:
    handlers, level, propagate = list(log.handlers), log.level, log.propagate
    yield
    log.handlers[:], log.propagate = handlers, propagate
    log.setLevel(level)
