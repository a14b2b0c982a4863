"""What can end a run from outside or inside: signals and divergence."""

import signal
import threading

import torch
import torch.distributed as dist


class TrainingDiverged(RuntimeError):
    """The loss is no longer a number. Nothing is saved; the last checkpoint is intact."""


class StopSignal:
    """SIGTERM or SIGINT asks the run to save and end after the step in progress, on every rank in the same step."""

    def __init__(self) -> None:
        self.received: str | None = None
        # A host-side group: asking every step must not wait for the device.
        self._group = dist.new_group(backend="gloo") if dist.get_world_size() > 1 else None
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, self._note)

    def _note(self, number: int, _frame: object) -> None:
        self.received = signal.Signals(number).name
        signal.signal(number, signal.SIG_DFL)          # asked twice, it ends at once

    def asked(self) -> bool:
        """True when any rank was asked to stop. Collective."""
        flag = torch.tensor([float(self.received is not None)])
        if self._group is not None:
            dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group)
        return bool(flag)
