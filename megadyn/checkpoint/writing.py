"""Writes a snapshot in host memory to files. Uses neither engine nor device, so it can run in the background of training."""

import shutil
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from megadyn.checkpoint import layout
from megadyn.checkpoint.run_averages import Average, write_average
from megadyn.checkpoint.together import CheckpointError, together
from megadyn.config import Config, save_config
from megadyn.files import readable
from megadyn.log import log


class Snapshot(NamedTuple):
    """What a checkpoint will hold: `shards` are this rank's; rank 0 writes `manifest`."""

    iteration: int
    shards: dict[str, dict[str, Tensor]]
    manifest: dict[str, Any]

    @property
    def bytes(self) -> int:
        """Size of this rank's tensors."""
        return sum(tensor.nbytes for shard in self.shards.values() for tensor in shard.values())


def write(snapshot: Snapshot, root: Path, config: Config, group: dist.ProcessGroup | None = None) -> Path:
    """Writes a checkpoint under `root` and returns its folder. Collective over `group`.

    Raises CheckpointError on every rank if any rank could not write. Its files are then removed.
    """
    final = root / layout.folder_name(snapshot.iteration)
    temporary = root / f"{layout.WRITING}{final.name}"
    first, what = dist.get_rank() == 0, f"{root}: checkpoint"

    def prepare() -> None:
        if first:
            layout.clear_leftovers(root)
            temporary.mkdir(parents=True)

    def finish(files: dict[str, Any]) -> None:
        if first:
            save_config(config, temporary / "config.yaml")
            layout.sync_file(temporary / "config.yaml")
            files["config.yaml"] = layout.file_digest(temporary / "config.yaml")
            layout.write_manifest(temporary, snapshot.manifest | {"files": files})
            layout.publish(temporary, final)

    try:
        together(prepare, what, group)
        shards = together(lambda: _write_shards(snapshot, temporary), what, group)
        together(
            lambda: finish({name: digest for shard in shards for name, digest in shard.items()}), what, group
        )
    except CheckpointError:
        if first:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    if first:
        try:
            layout.prune(root, config.checkpoint.keep, config.checkpoint.keep_every)
        # The new checkpoint is complete; the run continues with one old checkpoint too many.
        except OSError as error:
            log.warning("an old checkpoint could not be removed: %s", error)
    return final


def _write_shards(snapshot: Snapshot, folder: Path) -> dict[str, Any]:
    """Writes this rank's part and returns {file name: size and digest}."""
    written = {}
    for name, tensors in snapshot.shards.items():
        save_file(tensors, folder / name)
        readable(folder / name)
        layout.sync_file(folder / name)
        written[name] = layout.file_digest(folder / name)
    return written


class Writer:
    """Writes snapshots one at a time, in a thread if `checkpoint.background` is set. Every method is collective."""

    def __init__(self, root: Path, config: Config):
        self.root, self.config = root, config
        # A separate CPU group: the thread's collectives must not mix with training's.
        self._group = dist.new_group(
            backend="gloo", timeout=timedelta(seconds=config.training.collective_timeout_s)
        )
        self._job: _Job | None = None

    @property
    def is_busy(self) -> bool:
        """Whether this rank is writing in the background."""
        return self._job is not None and self._job.is_alive()

    def start(self, snapshot: Snapshot) -> None:
        """Starts writing; the previous write must have been collected."""
        assert self._job is None
        self._job = _Job(snapshot, self.root, self.config, self._group)
        if self.config.checkpoint.background:
            self._job.start()
        else:
            self._job.run()

    def collect(self) -> "Written | None":
        """Waits for the write in progress, if any, and returns its result. Raises CheckpointError if it failed."""
        if self._job is None:
            return None
        job, self._job = self._job, None
        if job.ident is not None:
            job.join()
        if job.error is not None:
            raise job.error
        assert job.written is not None
        return job.written


class Written(NamedTuple):
    iteration: int
    folder: Path
    write_s: float
    """From the snapshot to the finished checkpoint."""
    bytes: int
    """Size of this rank's tensors."""
    average: Average | None = None
    """The average beside it, if `checkpoint.average` asks for one."""
    average_error: CheckpointError | None = None
    """Why it was not written."""


class _Job(threading.Thread):
    def __init__(self, snapshot: Snapshot, root: Path, config: Config, group: dist.ProcessGroup):
        super().__init__(name="checkpoint", daemon=True)
        self.arguments = snapshot, root, config, group
        self.written: Written | None = None
        self.error: Exception | None = None

    def run(self) -> None:
        began = time.perf_counter()
        try:
            folder = write(*self.arguments)
            taken = self.arguments[0]
            self.written = Written(taken.iteration, folder, time.perf_counter() - began, taken.bytes)
            del taken
        except Exception as error:  # reported when the write is collected
            self.error = error
        config, group = self.arguments[2:]
        del self.arguments  # frees the host memory
        if self.written is not None and config.checkpoint.average.is_wanted:
            self._average(self.written, config, group)

    def _average(self, written: Written, config: Config, group: dist.ProcessGroup) -> None:
        """The checkpoint is complete, whatever becomes of the average."""
        try:
            self.written = written._replace(average=write_average(written.folder, config, group))
        except CheckpointError as error:
            self.written = written._replace(average_error=error)
        except (OSError, RuntimeError) as error:  # ranks that waited too long for each other, for example
            problem = CheckpointError(f"the average beside {written.folder} was not written: {error}")
            self.written = written._replace(average_error=problem)
        except Exception as error:
            self.error = error
