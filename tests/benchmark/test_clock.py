"""The device of a benchmark, its peak and its clock."""

import argparse
import time

import pytest
import torch

from megadyn.benchmark import clock
from megadyn.errors import UserError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_a_peak_is_given_or_a_datasheet_s_or_measured(monkeypatch):
    assert clock.device_peak(CPU, torch.float32, 0.5) == (5e11, "0.5 TFLOP/s as given")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert clock.device_peak(CUDA, torch.bfloat16) == (989.5e12, "989.5 TFLOP/s by the datasheet")
    monkeypatch.setattr(clock, "timed", lambda work, device: 0.5)
    assert clock.device_peak(CPU, torch.float32) == (
        4 * 2048**3,
        "0.0344 TFLOP/s, a 2048 x 2048 matrix product here",
    )


def test_laps_are_what_lies_between_marks():
    laps = clock.Laps(CPU)
    time.sleep(0.02)
    laps.mark()
    laps.mark()
    first, second = laps.seconds()
    assert 0.02 <= first < 1
    assert 0 <= second < 0.02


def test_a_gpu_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--device cuda: this machine has no CUDA device"):
        clock.device_of(argparse.Namespace(device="cuda"))
    assert clock.device_of(argparse.Namespace(device="auto")) == CPU
