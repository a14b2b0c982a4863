"""What a rank was doing when a fault ended the job, as files in the run's folder."""

import faulthandler
import time
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import Any

import torch

FOLDER = "ended"
PATIENCE_S = 2.0
"""How long the list of collectives may take: it asks the device, which may be stuck."""


def write_post_mortem(output_dir: Path, rank: int, sentence: str) -> None:
    """Writes the stacks of this process's threads to `OUTPUT_DIR/ended/rankN-stacks.txt`, and the last collectives of this rank,
    as torch's flight recorder has them, to `rankN-collectives.json`. Replaces those of an earlier fault. What cannot be
    written is left out, because the job is ending."""
    folder = output_dir / FOLDER
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f"rank{rank}-stacks.txt").open("w") as file:
            print(f"{time.strftime('%Y-%m-%d %H:%M:%S%z')}: {sentence}\n", file=file, flush=True)
            faulthandler.dump_traceback(file=file, all_threads=True)
    writer = Thread(target=_write_collectives, args=(folder / f"rank{rank}-collectives.json",), daemon=True)
    writer.start()
    writer.join(PATIENCE_S)


def _write_collectives(path: Path) -> None:
    recorder: Any = torch._C._distributed_c10d  # whose types do not list this function
    with suppress(OSError, RuntimeError):
        path.unlink(missing_ok=True)
        path.write_bytes(recorder._dump_fr_trace_json())
