"""The device that a benchmark runs on, and its clock."""

import argparse
import os
import platform
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch

from megadyn.config import KERNELS
from megadyn.errors import UserError
from megadyn.parallel.params import PRECISIONS
from megadyn.planning.devices import peak_tflops

PRECISION_OF = {dtype: name for name, dtype in PRECISIONS.items()}


def add_device_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--kernels", choices=KERNELS, default="auto", help="as training.kernels (default: auto)"
    )


def device_of(args: argparse.Namespace) -> torch.device:
    """The chosen device. Raises UserError for `--device cuda` without a CUDA device."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no CUDA device")
    return torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")


def machine(device: torch.device) -> str:
    """Header of a table: the device and, on a CPU, how many of its cores are used."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, CUDA {torch.version.cuda}"
    threads = torch.get_num_threads()
    return f"CPU ({cpu_name()}), {threads} thread{'s' * (threads > 1)} of {os.cpu_count()} cores, torch {torch.__version__}"


def cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):  # not Linux, or a different format of /proc/cpuinfo
        return platform.processor() or platform.machine()


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds that `work` takes, from idle device to idle device."""
    wait(device)
    began = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - began


class Laps:
    """Seconds between marks. On a GPU it records events, so the host does not wait at each mark; otherwise it reads the
    clock."""

    def __init__(self, device: torch.device):
        self.device = device
        self.marks: list[Any] = []
        wait(device)
        self.mark()

    def mark(self) -> None:
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        wait(self.device)
        if self.device.type == "cuda":
            return [first.elapsed_time(second) / 1e3 for first, second in pairwise(self.marks)]
        return [second - first for first, second in pairwise(self.marks)]


def device_peak(
    device: torch.device, dtype: torch.dtype, given_tflops: float | None = None
) -> tuple[float, str]:
    """(operations per second, source): the given figure, else the datasheet's, else a matrix product measured here."""
    if given_tflops is not None:
        return given_tflops * 1e12, f"{given_tflops:g} TFLOP/s as given"
    known = (
        peak_tflops(torch.cuda.get_device_name(device), PRECISION_OF[dtype])
        if device.type == "cuda"
        else None
    )
    if known is not None:
        return known * 1e12, f"{known:.1f} TFLOP/s by the datasheet"
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = min(timed(lambda: a @ b, device) for _ in range(8))
    return (
        2 * size**3 / best,
        f"{2 * size**3 / best / 1e12:.3g} TFLOP/s, a {size} x {size} matrix product here",
    )
