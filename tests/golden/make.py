"""Writes `losses.json`: `python -m tests.golden.make [KIND...]` (all kinds of `tests.helpers.tiny`, or these; others are kept).

It is computed by AVX2 instructions, also on a CPU that has wider ones: those sum in another order, and a rounding may choose
another token.
Run it only where a change of the mathematics is meant, on the tree that has the change, and say so in the commit.
"""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from tests.helpers.tiny import KINDS, ROOT, VARIANTS, tiny_tokens
from tests.parity.curves import STEPS, Case, plain_curve

LOSSES = Path(__file__).with_name("losses.json")
PRINT = "--print"


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


def made_now(kinds: Iterable[str]) -> dict[str, Any]:
    """`made_on`, and `losses` in hexadecimal by kind, of a process of its own: torch chooses its instructions once."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.golden.make", PRINT, *kinds],
        cwd=ROOT,
        env=os.environ | {"ATEN_CPU_CAPABILITY": "avx2"},
        stdout=subprocess.PIPE,
        check=True,
    )
    return json.loads(done.stdout)


def main(words: list[str]) -> None:
    if words[:1] == [PRINT]:
        made = {kind: [loss.hex() for loss in losses(kind)] for kind in words[1:]}
        print(json.dumps({"made_on": machine(), "losses": made}))
        return
    now = made_now(words or (KINDS | VARIANTS))
    known: dict[str, Any] = json.loads(LOSSES.read_text()) if words else now
    if known["made_on"] != now["made_on"]:
        raise SystemExit(
            f"{LOSSES.name} was made on {known['made_on']}, this is {now['made_on']}: make all kinds anew"
        )
    LOSSES.write_text(json.dumps(now | {"losses": known["losses"] | now["losses"]}, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
