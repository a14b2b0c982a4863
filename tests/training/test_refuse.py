"""What is refused before the ranks meet."""

import pytest
from deepspeed.accelerator import get_accelerator

from megadyn.errors import ConfigError
from megadyn.training.refuse import check_precision


def test_a_precision_that_the_device_does_not_train_in_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed says so too, but with a traceback, once the model is built."""
    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: False)
    with pytest.raises(ConfigError, match=r"precision = 'fp16': must be fp32 or bf16 on this device \(cpu\)"):
        check_precision("fp16")
    check_precision("bf16")
    check_precision("fp32")
