"""Counts the bytes and operations of all that torch runs, on tensors without values (`meta` device), as on a GPU.

An operation reads each input once and writes each output once. Views and allocations move nothing. A broadcast input counts
with the elements that it has. What takes or places rows by their index touches these rows only. Norms and attention count as the
one kernel that a GPU has for them; our own kernels say themselves what they move (`kernels/launch.py`). Operations are those
of matrix products and of attention, causal attention at half.
"""

import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import megadyn
from megadyn.kernels.launch import counters

PRODUCTS, ATTENTION, SUMS, OTHER = "products", "attention", "sums", "other"
PLACES = {
    "parallel/loss.py": "loss head",
    "model/rope.py": "RoPE",
    "model/norm.py": "norms",
    "model/block.py:swiglu": "SwiGLU",
    "model/block.py": SUMS,
    "routing/": "routing",
    "kinds/": "routing",
    "model/": OTHER,
    "network.py": OTHER,
}
"""Where code stands in the package, with a function's name where that decides -> the group of what it runs: the first match.
Other code, such as linear layers, counts for its caller."""
GROUPS = (PRODUCTS, ATTENTION, *dict.fromkeys(PLACES.values()))
"""`sums` are those of the residual stream, and of gradients of what is used more than once."""
ELEMENTWISE = tuple(group for group in GROUPS if group not in (PRODUCTS, ATTENTION))

_aten = torch.ops.aten
ALLOCATING = {_aten.empty, _aten.empty_like, _aten.empty_strided, _aten.new_empty, _aten.new_empty_strided}
FILLING = {
    _aten.copy_,
    _aten.fill_,
    _aten.zero_,
    _aten.uniform_,
    _aten.zeros_like,
    _aten.ones_like,
    _aten.full_like,
    _aten.new_zeros,
    _aten.new_ones,
    _aten.new_full,
}
"""Do not read their first argument: they write it, or only take its shape."""
TAKING = {_aten.index_select, _aten.gather, _aten.index, _aten.embedding}
"""Read of their first argument what they put out."""
PLACING = {_aten.scatter_: 1, _aten.index_copy_: 1, _aten.index_put_: 1, _aten.index_fill_: 1}
ADDING = {_aten.scatter_add_: 2, _aten.index_add_: 2}
"""How often they pass over the elements of their first argument that they are given a value or an index for."""


class Traffic(TorchDispatchMode):
    """Counts bytes, operations and launches by group while it is active. A model without values runs inside of
    `with Traffic(share) as traffic, OneKernelEach(traffic):`, forward and backward.

    Backward is counted in the group of what it belongs to: autograd numbers its nodes in the order in which forward makes them.
    """

    def __init__(self, share: float):
        """`share`: of all tokens, taken wherever tokens choose for themselves, because masks have no values."""
        super().__init__()
        self.share = share
        self.bytes: Counter[str] = Counter()
        self.flops: Counter[str] = Counter()
        self.launches = 0
        self._of_node: dict[int, str] = {}

    def __enter__(self) -> "Traffic":
        counters.append(self.launched)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        counters.remove(self.launched)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _aten.nonzero.default:
            out = args[0].new_empty(
                max(1, int(self.share * args[0].numel())), args[0].ndim, dtype=torch.int64
            )
        else:
            out = func(*args, **kwargs)
        group = self.group(func)
        self._of_node.setdefault(torch._C._autograd._get_sequence_nr() - 1, group)
        packet, moved = func.overloadpacket, moved_by(func, args, kwargs, out)
        if func.namespace == "torch_attn":
            self.add(ATTENTION, moved, segments_flops(func, args))
        elif packet in flop_registry:
            self.add(PRODUCTS, moved, flop_registry[packet](*args, **kwargs, out_val=out))
        else:
            self.add(group, moved)
        return out

    def launched(self, moved: int, group: str | None = None, flops: float = 0.0) -> None:
        """Counts a kernel that is no operation of torch's, in the group of the code that calls it unless one is given."""
        self.add(group or self.group(), moved, flops)

    def add(self, group: str, moved: int, flops: float = 0.0) -> None:
        self.bytes[group] += moved
        self.flops[group] += int(flops)
        self.launches += bool(moved)

    def group(self, func: Any = None) -> str:
        """The group of the innermost of our functions that runs, or in backward of the node that runs. No node adds two tensors
        in its own backward, so that a sum there is autograd's, of gradients."""
        frame: Any = sys._getframe(1)
        while frame is not None:
            found = group_of(frame.f_code.co_filename, frame.f_code.co_name)
            if found is not None:
                return found
            frame = frame.f_back
        node: Any = torch._C._current_autograd_node()
        if func in (_aten.add.Tensor, _aten.add_.Tensor):
            return SUMS
        return OTHER if node is None else self._of_node.get(node._sequence_nr(), OTHER)


_PACKAGE = f"{Path(megadyn.__file__).parent}/"


def group_of(file: str, function: str) -> str | None:
    if not file.startswith(_PACKAGE):
        return None
    place = f"{file.removeprefix(_PACKAGE)}:{function}"
    return next((group for start, group in PLACES.items() if place.startswith(start)), None)


# ---- what an operation moves --------------------------------------------------------------------------


def moved_by(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    """Bytes that an operation reads and writes."""
    packet, given = func.overloadpacket, list(operands(func, args, kwargs))
    held = {storage_of(x) for _, x, _ in given}
    created = sum(stored(x) for x in tensors_in(out) if storage_of(x) not in held)
    writes = sum(stored(x) for _, x, is_written in given if is_written)
    if packet in ALLOCATING or not created + writes:
        return 0
    inputs = [(place, stored(x)) for place, x, is_written in given if not (is_written and place is None)]
    reads = sum(size for _, size in inputs)
    first = next((size for place, size in inputs if place == 0), 0)
    if packet in FILLING:
        reads -= first
    elif packet in TAKING:
        reads -= first - min(first, created)
    elif passes := PLACING.get(packet, 0) or ADDING.get(packet, 0):
        touched = max(x.numel() for place, x, _ in given if place != 0)
        reads, writes = reads - first, passes * touched * args[0].element_size()
    return reads + created + writes


def operands(func: Any, args: Any, kwargs: Any) -> Iterator[tuple[int | None, Tensor, bool]]:
    """Each tensor that an operation is given: its position (None: only a name, as `out` has), and whether it is written."""
    for place, argument in enumerate(func._schema.arguments):
        value = args[place] if place < len(args) else kwargs.get(argument.name)
        is_written = argument.alias_info is not None and argument.alias_info.is_write
        for x in tensors_in(value):
            yield None if argument.kwarg_only else place, x, is_written


def tensors_in(value: Any) -> list[Tensor]:
    return [x for x in tree_leaves(value) if isinstance(x, Tensor)]


def stored(x: Tensor) -> int:
    """Bytes of the elements that x has, not of what it is broadcast to."""
    elements = x.element_size()
    for size, stride in zip(x.shape, x.stride(), strict=True):
        elements *= size if stride or not size else 1
    return elements


def storage_of(x: Tensor) -> int:
    return x.untyped_storage()._cdata


# ---- what a GPU has one kernel for --------------------------------------------------------------------


class OneKernelEach(TorchFunctionMode):
    """Counts norms and unsegmented attention as one kernel each: without a GPU torch takes them apart."""

    def __init__(self, traffic: Traffic):
        super().__init__()
        self.traffic = traffic

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.rms_norm:
            return _norm(self.traffic, *args, **kwargs)
        if func is F.scaled_dot_product_attention:
            return _attention(self.traffic, *args, **kwargs)
        return func(*args, **kwargs)


def _norm(traffic: Traffic, x: Tensor, shape: Any, weight: Tensor, eps: float) -> Tensor:
    moved = 2 * stored(x) + stored(weight) + 4 * x.numel() // x.shape[-1]
    return _Kernel.apply(traffic, None, moved, moved + stored(x) + stored(weight), 0.0, x, weight)


def _attention(
    traffic: Traffic, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **options: Any
) -> Tensor:
    """q [B, H, S, K], k and v [B, G, S, K]. Backward is given the output and its gradient too, and puts out three gradients."""
    given, sums = stored(q) + stored(k) + stored(v), 4 * q.numel() // q.shape[-1]
    mask = 0 if attn_mask is None else stored(attn_mask)
    flops = 4.0 * q.numel() * k.shape[-2] / (2 if options.get("is_causal") else 1)
    forward, backward = given + stored(q) + sums + mask, 2 * given + 2 * stored(q) + sums + mask
    return _Kernel.apply(traffic, ATTENTION, forward, backward, flops, q, k, v)


class _Kernel(torch.autograd.Function):
    """A kernel forward, whose output is like the first of its inputs, and one backward with twice its operations."""

    @staticmethod
    def forward(
        ctx: Any,
        traffic: Traffic,
        group: str | None,
        forward: int,
        backward: int,
        flops: float,
        *inputs: Tensor,
    ) -> Tensor:
        ctx.traffic, ctx.group, ctx.moved, ctx.flops = traffic, group, backward, flops
        ctx.save_for_backward(*inputs)
        out = torch.empty_like(inputs[0])
        traffic.launched(forward, group, flops)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        ctx.traffic.launched(ctx.moved, ctx.group, 2 * ctx.flops)
        return None, None, None, None, None, *(torch.empty_like(x) for x in ctx.saved_tensors)


def segments_flops(func: Any, args: Any) -> float:
    """Operations of torch's attention in segments, of equal length, because they have no values: half of each one's square."""
    is_backward = "backward" in str(func)
    q, ends = (args[1], args[6]) if is_backward else (args[0], args[3])
    runs = max(1, ends.numel() - 1)
    return 2.0 * q.numel() * q.shape[0] / runs * (2 if is_backward else 1)
