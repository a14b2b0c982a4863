"""Where DeepSpeed's optimizers keep this rank's part of each parameter."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from megadyn.parallel.grid import Axis
from megadyn.parallel.params import part_shape


class Place(NamedTuple):
    """The elements of a parameter that this rank's optimizer updates."""

    tensor: Any
    """The optimizer's tensor that holds them; None if this rank has none."""
    start: int
    """Of the first in `tensor`."""
    size: int
    first: int
    """Of the first in the flattened parameter."""


def place_of(param: Any, wrapper: Any, zero_stage: int, dp: Axis) -> Place:
    """`wrapper`: DeepSpeed's optimizer. ZeRO updates flat partitions and knows the position of each parameter in them."""
    if zero_stage == 0:
        return Place(param, 0, param.numel(), 0)
    if zero_stage == 3:
        group, start, size = wrapper.grad_position[wrapper.get_param_id(param)]
        first, count = dp.rank * size, part_shape(param).numel()
        # The last ranks' partitions may be padded, or nothing but padding.
        return Place(
            wrapper.fp32_partitioned_groups_flat[group],
            start,
            max(0, min(size, count - first)),
            min(first, count),
        )
    fragment = param._hp_mapping
    if fragment is None:
        return Place(None, 0, 0, 0)
    address = fragment.get_hp_fragment_address()
    return Place(
        flat_partitions(wrapper)[fragment.param_group_index],
        address.start,
        address.numel,
        fragment.lp_fragment_address.start,
    )


def flat_partitions(wrapper: Any) -> Sequence[Tensor]:
    """The fp32 partitions of ZeRO 1 and 2, one per parameter group."""
    return getattr(wrapper, "single_partition_of_fp32_groups", None) or wrapper.fp32_groups_flat_partition


class Stepped(NamedTuple):
    """What the optimizer updates in one go."""

    group: dict[str, Any]
    """Its parameter group."""
    tensors: list[Any]
    params: list[nn.Parameter]
    """The parameters that the tensors of all data-parallel ranks hold together."""


def stepped_together(wrapper: Any, zero_stage: int) -> list[Stepped]:
    """The same on all ranks of a pipeline stage, in the same order."""
    if zero_stage == 0:
        return [Stepped(group, group["params"], group["params"]) for group in wrapper.param_groups]
    groups = wrapper.optimizer.param_groups
    if zero_stage == 3:
        return [
            Stepped(groups[wrapper.sub_group_to_group_id[index]], [flat], params)
            for index, (flat, params) in enumerate(
                zip(wrapper.fp32_partitioned_groups_flat, wrapper.fp16_groups, strict=True)
            )
        ]
    held = getattr(wrapper, "bit16_groups", None) or wrapper.bf16_groups
    return [
        Stepped(group, [flat], params)
        for group, flat, params in zip(groups, flat_partitions(wrapper), held, strict=True)
    ]
