"""Bytes that one rank holds at its fullest moment, in closed form.

Weights, gradients and optimizer states follow DeepSpeed's optimizers as `engine/engine.py` sets them up; activations
follow the tensors that each layer keeps for its backward pass. `tests/planning/test_memory.py` holds both to the peak
of real training steps. What a layer keeps is its kind's to say (`kinds/`), from the pieces in `costs/memory.py`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from megadyn.costs.memory import LOGITS_AT_ONCE, Kept, Workload
from megadyn.errors import ConfigError, UserError
from megadyn.planning.parameters import stage_parameters, vocabulary_rows
from megadyn.planning.schedule import in_flight

ALLREDUCE_BUCKET = 500_000_000
"""DeepSpeed's default of `reduce_bucket_size`, and its fixed size where no ZeRO optimizer reduces; in elements."""
LIVE_PARAMETERS = 1_000_000_000
"""DeepSpeed's default of `stage3_max_live_parameters`."""


class Memory(NamedTuple):
    """Bytes of one rank, by what they hold."""

    weights: float
    gradients: float
    optimizer: float
    """fp32 master weights and Adam's two moments."""
    activations: float
    """Kept for backward passes, and what the fullest of these needs while it runs."""
    buffers: float
    """What reducing gradients and stepping take beyond that."""

    @property
    def total(self) -> float:
        return sum(self)


def layers_kept(work: Workload) -> list[Kept]:
    """Of each transformer layer, at the share of tokens that is planned for it."""
    routing = work.model.routing
    return [routing.kept(layer, work) for layer in work.model.layer_types]


def head_working(work: Workload) -> float:
    """Of the vocabulary head and its loss, above what the layers keep: its backward pass, with the gradient of its weight."""
    d, rows, b = work.model.hidden_size, vocabulary_rows(work.model, work.tensor), work.bytes
    n = work.batch * work.length
    logits = min(rows, max(1, LOGITS_AT_ONCE // n)) * n
    copies = b if b < 4 else 0  # beside float32
    hidden = b * d * n * 2 + 4 * d * n  # final hidden states, scaled, and their summed gradient
    forward = logits * (4 + copies)
    block = logits * (b if logits == n * rows else 4 + copies)
    return hidden + max(forward - 4 * d * n - b * d * n, rows * d * b + max(block, logits * b + b * d * n))


class Moments(NamedTuple):
    """Bytes of activations when a step is fullest."""

    layers: float
    """While a transformer layer's backward pass runs."""
    head: float
    """While the head's does, before there is any gradient of the micro-batch; 0 on a stage without it."""
    end: float
    """When a backward pass ends, with the embedding's gradient, which is not counted here."""


def activations(work: Workload, cuts: Sequence[int], stage: int, micro_batches: int) -> Moments:
    """Of one pipeline stage, under 1F1B."""
    stages, b, d = len(cuts) - 1, work.bytes, work.model.hidden_size
    n = work.batch * work.length
    m = n / work.parts
    layers = layers_kept(work)[cuts[stage] : cuts[stage + 1]]
    again = [
        {"none": 0.0, "selective": layer.inner, "full": layer.inside}[work.recompute] for layer in layers
    ]
    kept = [
        layer.outside + (b * d * m if work.recompute == "full" else layer.input + layer.inside - redone)
        for layer, redone in zip(layers, again, strict=True)
    ]
    # DeepSpeed keeps a micro-batch's input with a copy, and its output; and has buffers to receive into.
    crossing = b * d * m * (2 * (stage > 0) + (stage < stages - 1))
    whole = sum(kept) + crossing + n * 8 * (stage == 0)  # token ids
    # Backward runs last layer first: each finds what the layers before it keep.
    moments = [sum(kept[: i + 1]) + it.working + again[i] for i, it in enumerate(layers)]
    layer = max(moments) + whole - sum(kept)
    head = whole + m * work.norm(d) + n * 8 + head_working(work)
    held = in_flight(stage, stages, micro_batches) - 1
    tables = len(layers) * work.length * 4 * (work.model.head_dim or 0)  # each layer's cosines and sines
    always = held * whole + tables + crossing
    return Moments(always + layer, always + head if stage == stages - 1 else 0.0, always)


class Share(NamedTuple):
    """Bytes per parameter of a rank, by what they hold; `/ data` where a rank holds its part only."""

    weights: float
    gradients: float
    optimizer: float
    reducing: float
    """For a while after the backward passes, when activations are gone."""
    backward: float
    """From the first gradient of a micro-batch on."""


def state_bytes(precision: str, zero_stage: int, data: int) -> Share:
    """What DeepSpeed's optimizer of this precision and ZeRO stage keeps of a parameter."""
    part = 1 / data
    of = {
        # AdamW itself; gradients are joined to be reduced.
        ("fp32", 0): Share(4, 4, 8, 4, 0),
        # DeepSpeedZeroOptimizer: a rank's part of the gradients is copied out, then flattened.
        ("fp32", 1): Share(4, 4, 12 * part, 4 * part, 0),
        ("fp32", 2): Share(4, 4 * part, 12 * part, 4 * part, 4 * part),
        ("fp32", 3): Share(4 * part, 4 * part, 12 * part, 4 * part, 0),
        # BF16_Optimizer: fp32 gradients, joined to be reduced.
        ("bf16", 1): Share(2, 4, 12 * part, 4, 0),
        ("bf16", 2): Share(2, 4 * part, 12 * part, 2 * part, 2 * part),
        ("bf16", 3): Share(2 * part, 4 * part, 12 * part, 4 * part, 0),
        ("fp16", 1): Share(2, 2, 12 * part, 4 * part, 0),
        ("fp16", 2): Share(2, 2 * part, 12 * part, 6 * part, 2 * part),
        ("fp16", 3): Share(2 * part, 2 * part, 12 * part, 4 * part, 0),
    }
    return of[precision, zero_stage]


def fullest(
    work: Workload,
    cuts: Sequence[int],
    stage: int,
    micro_batches: int,
    collected: float = 0.0,
    widened: bool = False,
) -> float:
    """Activations at the fullest moment, with the gradient that a weight has just got.

    Args:
        collected: bytes that the first gradient of a micro-batch brings with it. widened: a gradient is copied to fp32.
    """
    moments, (d, _, _, f) = activations(work, cuts, stage, micro_batches), work.widths
    fresh = work.bytes + 4 * widened
    embedding = vocabulary_rows(work.model, work.tensor) * d if stage == 0 else 0
    return max(
        moments.head, moments.layers + collected + fresh * d * f, moments.end + collected + fresh * embedding
    )


def elements(zero: dict[str, Any], key: str, default: int) -> int:
    """Raises ConfigError for what is not a number of elements."""
    value = zero.get(key, default)
    if not isinstance(value, int | float) or value < 0:
        raise ConfigError(f"zero_optimization.{key}", value, "a number of elements")
    return int(value)


def is_offloaded(zero: dict[str, Any], what: str) -> bool:
    """Whether `what`, `optimizer` or `param`, stands in host memory under DeepSpeed's `zero_optimization`."""
    given = zero.get(f"offload_{what}")
    return isinstance(given, dict) and given.get("device", "none") == "cpu"


def refuse_offloading(zero: dict[str, Any], path: str) -> None:
    """Raises UserError for offloading that is not planned: anywhere but to host memory, in part, or below ZeRO-3."""
    for what in ("optimizer", "param"):
        given = zero.get(f"offload_{what}")
        if given is None or (isinstance(given, dict) and given.get("device", "none") == "none"):
            continue
        if not is_offloaded(zero, what) or given.get("ratio", 1.0) != 1.0 or zero["stage"] != 3:
            raise UserError(f"{path}: offload_{what} is planned only with ZeRO-3, device cpu and ratio 1")


def offloaded(share: Share, zero: dict[str, Any], data: int) -> tuple[Share, float]:
    """What stays on the device of a parameter's share, and bytes per parameter that go into the host's memory.

    With the optimizer its gradients go too, as the micro-batches sum them up and once more in fp32, as Adam reads them.
    """
    host = 0.0
    if is_offloaded(zero, "optimizer"):
        host += share.optimizer + share.gradients + 4 / data
        share = share._replace(optimizer=0, gradients=0, reducing=0)
    if is_offloaded(zero, "param"):
        host += share.weights
        share = share._replace(weights=0)
    return share, host


def host_memory(
    work: Workload, cuts: Sequence[int], stage: int, *, precision: str, zero: dict[str, Any], data: int
) -> float:
    """Bytes that a rank of this stage keeps in its node's memory because of offloading."""
    _, host = offloaded(state_bytes(precision, zero["stage"], data), zero, data)
    return host * stage_parameters(work.model, work.tensor, cuts)[stage]


def rank_memory(
    work: Workload,
    cuts: Sequence[int],
    stage: int,
    *,
    precision: str,
    zero: dict[str, Any],
    data: int,
    micro_batches: int,
) -> Memory:
    """Of a rank of pipeline stage `stage` at its fullest moment.

    Args:
        cuts: stages as boundaries in the layers. zero: `zero_optimization` of DeepSpeed's settings.
    """
    model, kind = work.model, zero["stage"]
    count = stage_parameters(model, work.tensor, cuts)[stage]
    share, _ = offloaded(state_bytes(precision, kind, data), zero, data)
    acts = fullest(work, cuts, stage, micro_batches, share.backward * count, precision == "bf16" and kind < 3)
    running = gathered = 0.0
    bucket = elements(zero, "reduce_bucket_size", ALLREDUCE_BUCKET)
    if kind == 3:
        # Without recomputation every linear layer keeps a view of its gathered weight until its backward pass.
        live = min(count, elements(zero, "stage3_max_live_parameters", LIVE_PARAMETERS))
        gathered = (
            work.bytes
            * (live if work.recompute == "full" else count)
            * (data > 1 or is_offloaded(zero, "param"))
        )
    if kind > 1 or (kind == 1 and precision != "bf16"):
        running += bucket * work.bytes * (2 if zero.get("overlap_comm") and kind == 2 else 1)
    reducing = share.reducing * (min(count, 2 * ALLREDUCE_BUCKET) if kind == 0 else count)
    # Activations and gathered weights are gone when gradients are reduced: they never meet.
    return Memory(
        share.weights * count,
        share.gradients * count,
        share.optimizer * count,
        acts,
        running + max(gathered, reducing - acts),
    )
