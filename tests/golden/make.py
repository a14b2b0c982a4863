"""Writes `losses.json`: `python -m tests.golden.make [KIND...]` (all kinds of `tests.helpers.tiny`, or these; others are kept).

Run it only where a change of the mathematics is meant, on the tree that has the change, and say so in the commit.
"""

import json
import platform
import sys
from pathlib import Path
from typing import Any

import torch

from tests.helpers.tiny import KINDS, VARIANTS, tiny_tokens
from tests.parity.curves import STEPS, Case, plain_curve

LOSSES = Path(__file__).with_name("losses.json")


def machine() -> dict[str, str]:
    """What bits of a float32 result depend on, besides the program."""
    return {
        "torch": torch.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "machine": platform.machine(),
    }


def losses(kind: str) -> list[float]:
    """Loss of each of 10 steps of a plain loop on one process and one thread, in float32."""
    threads, strict = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    try:
        return plain_curve(Case(kind), tiny_tokens(STEPS))["loss"]
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(strict)


def main(kinds: list[str]) -> None:
    known: dict[str, Any] = json.loads(LOSSES.read_text()) if kinds else {"losses": {}}
    if kinds and known["made_on"] != machine():
        raise SystemExit(
            f"{LOSSES.name} was made on {known['made_on']}, this is {machine()}: make all kinds anew"
        )
    made = {kind: [loss.hex() for loss in losses(kind)] for kind in kinds or (KINDS | VARIANTS)}
    LOSSES.write_text(json.dumps({"made_on": machine(), "losses": known["losses"] | made}, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
