"""Bytes of tensors alive, and their peak, on a CPU: what `torch.cuda.max_memory_allocated` tells on a GPU."""

import gc
import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts each storage once, from the operation that makes it until it is freed, with those alive at the start.

    What a kernel allocates and frees inside itself is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: dict[int, weakref.ref[Any]] = {}

    def __enter__(self) -> "LiveBytes":
        gc.collect()
        for found in gc.get_objects():
            if issubclass(type(found), Tensor):
                self._count(found)
                if found.is_leaf and found.grad is not None:  # no Python object before it is asked for
                    self._count(found.grad)
        self.peak = self.now
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._count(leaf)
        self.peak = max(self.peak, self.now)
        return out

    def _count(self, tensor: Tensor) -> None:
        if tensor.device.type == "meta":
            return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        known = self._seen.get(key)
        if known is not None and known() is not None:
            return

        def freed(_: Any) -> None:
            self.now -= size
            if self._seen.get(key) is mine:
                del self._seen[key]

        self._seen[key] = mine = weakref.ref(storage, freed)
        self.now += size
