"""Statistics of one routed layer, summed on the device and read only when asked for."""

from torch import Tensor


class Monitor:
    """Means of scalar tensors over the micro-batches since the last reading. Recording never synchronises."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._count = 0

    def record(self, values: dict[str, Tensor]) -> None:
        """One micro-batch's scalars; the names must be the same in every call of a window."""
        for name, value in values.items():
            value = value.detach().float()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._count += 1

    def read(self) -> dict[str, Tensor]:
        """Means since the last reading, and starts anew; empty when nothing was recorded."""
        means = {name: total / self._count for name, total in self._sums.items()}
        self._sums, self._count = {}, 0
        return means
