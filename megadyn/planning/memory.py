"""Peak memory of one rank in bytes, in closed form.

Weights, gradients and optimizer states follow DeepSpeed's optimizers as `engine/engine.py` configures them. Activations
are the tensors that each layer keeps for backward. `tests/planning/test_memory.py` compares both with the peak of real
training steps. Each kind states what its layers keep (`kinds/`), using the pieces in `costs/memory.py`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from megadyn.costs.memory import KERNEL_LOGITS_AT_ONCE, LOGITS_AT_ONCE, Kept, Workload
from megadyn.errors import ConfigError, UserError
from megadyn.planning.muon import matrix_parameters, working_memory
from megadyn.planning.parameters import stage_parameters, vocabulary_rows
from megadyn.planning.schedule import in_flight

ALLREDUCE_BUCKET = 500_000_000
"""DeepSpeed's default `reduce_bucket_size`, and its fixed size without a ZeRO optimizer; in elements."""
LIVE_PARAMETERS = 1_000_000_000
"""DeepSpeed's default `stage3_max_live_parameters`."""


class Memory(NamedTuple):
    """Bytes of one rank, by purpose."""

    weights: float
    gradients: float
    optimizer: float
    """fp32 master weights and the optimizer's states: AdamW's two moments, Muon's one momentum."""
    activations: float
    """Kept for backward passes, plus the working memory of the largest backward pass."""
    buffers: float
    """Additional memory for reducing gradients and for the optimizer step."""

    @property
    def total(self) -> float:
        return sum(self)


def layers_kept(work: Workload) -> list[Kept]:
    """What each transformer layer keeps, at its planned share of tokens."""
    routing = work.model.routing
    return [routing.kept(layer, work) for layer in work.model.layer_types]


def head_working(work: Workload) -> float:
    """Working memory of the head and its loss beyond what the layers keep: its backward pass, including its weight gradient."""
    d, rows, b = work.model.hidden_size, vocabulary_rows(work.model, work.tensor), work.bytes
    n = work.batch * work.length
    at_once = KERNEL_LOGITS_AT_ONCE if work.fused else LOGITS_AT_ONCE
    logits = min(rows, max(1, at_once // n)) * n
    copies = b if b < 4 else 0  # half-precision copies in addition to float32
    hidden = b * d * n * 2 + 4 * d * n  # final hidden states, scaled, and their summed gradient
    # Without kernels a cap takes three float32 numbers per logit at once: capped, its square, and the slope.
    unfused = 4 + copies if work.model.logit_softcap is None else 12
    computing = b if work.fused else unfused
    forward = logits * computing
    block = logits * (b if logits == n * rows else computing)
    return hidden + max(forward - 4 * d * n - b * d * n, rows * d * b + max(block, logits * b + b * d * n))


class Moments(NamedTuple):
    """Bytes of activations at the moments when a step may reach its peak."""

    layers: float
    """During the backward pass of a transformer layer."""
    head: float
    """During the head's backward pass, before the micro-batch has any gradients; 0 on a stage without head."""
    end: float
    """At the end of a backward pass. The embedding's gradient exists then too, but is not counted here."""


def activations(work: Workload, cuts: Sequence[int], stage: int, micro_batches: int) -> Moments:
    """Activations of one pipeline stage, under 1F1B."""
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
    # DeepSpeed keeps a micro-batch's input twice, and its output; it also has receive buffers.
    crossing = b * d * m * (2 * (stage > 0) + (stage < stages - 1))
    whole = sum(kept) + crossing + n * 8 * (stage == 0)  # token ids
    # Backward starts with the last layer; at layer i, the layers up to i still keep theirs.
    moments = [sum(kept[: i + 1]) + it.working + again[i] for i, it in enumerate(layers)]
    layer = max(moments) + whole - sum(kept)
    head = whole + m * work.norm(d) + n * 8 + head_working(work)
    held = in_flight(stage, stages, micro_batches) - 1
    tables = len(layers) * work.length * 4 * (work.model.head_dim or 0)  # cosines and sines of each layer
    always = held * whole + tables + crossing
    return Moments(always + layer, always + head if stage == stages - 1 else 0.0, always)


class Share(NamedTuple):
    """Bytes per parameter on a rank, by purpose; `/ data` where a rank holds only its part."""

    weights: float
    gradients: float
    optimizer: float
    reducing: float
    """Used briefly after the backward passes, when activations are freed."""
    backward: float
    """Used from the first gradient of a micro-batch on."""


def state_bytes(precision: str, zero_stage: int, data: int) -> Share:
    """Bytes per parameter that DeepSpeed's optimizer keeps for this precision and ZeRO stage."""
    part = 1 / data
    of = {
        # Plain AdamW; gradients are joined for reduction.
        ("fp32", 0): Share(4, 4, 8, 4, 0),
        # DeepSpeedZeroOptimizer: a rank's part of the gradients is copied out, then flattened.
        ("fp32", 1): Share(4, 4, 12 * part, 4 * part, 0),
        ("fp32", 2): Share(4, 4 * part, 12 * part, 4 * part, 4 * part),
        ("fp32", 3): Share(4 * part, 4 * part, 12 * part, 4 * part, 0),
        # BF16_Optimizer: fp32 gradients, joined for reduction.
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
    """Peak of activations, including the gradient that a weight has just received.

    Args:
        collected: bytes allocated with the first gradient of a micro-batch. widened: whether gradients are copied to fp32.
    """
    moments, (d, _, _, f) = activations(work, cuts, stage, micro_batches), work.widths
    fresh = work.bytes + 4 * widened
    embedding = vocabulary_rows(work.model, work.tensor) * d if stage == 0 else 0
    return max(
        moments.head, moments.layers + collected + fresh * d * f, moments.end + collected + fresh * embedding
    )


def elements(zero: dict[str, Any], key: str, default: int) -> int:
    """Reads a number of elements. Raises ConfigError for anything else."""
    value = zero.get(key, default)
    if not isinstance(value, int | float) or value < 0:
        raise ConfigError(f"zero_optimization.{key}", value, "a number of elements")
    return int(value)


def is_offloaded(zero: dict[str, Any], what: str) -> bool:
    """Whether DeepSpeed's `zero_optimization` keeps `what`, `optimizer` or `param`, in host memory."""
    given = zero.get(f"offload_{what}")
    return isinstance(given, dict) and given.get("device", "none") == "cpu"


def refuse_offloading(zero: dict[str, Any], path: str) -> None:
    """Raises UserError for unsupported offloading: to anything but host memory, partial, or below ZeRO-3."""
    for what in ("optimizer", "param"):
        given = zero.get(f"offload_{what}")
        if given is None or (isinstance(given, dict) and given.get("device", "none") == "none"):
            continue
        if not is_offloaded(zero, what) or given.get("ratio", 1.0) != 1.0 or zero["stage"] != 3:
            raise UserError(f"{path}: offload_{what} is planned only with ZeRO-3, device cpu and ratio 1")


def offloaded(share: Share, zero: dict[str, Any], data: int) -> tuple[Share, float]:
    """The share of a parameter that stays on the device, and bytes per parameter that move to host memory.

    Offloading the optimizer also moves gradients: the accumulated ones, and their fp32 copy that Adam reads.
    """
    host = 0.0
    if is_offloaded(zero, "optimizer"):
        host += share.optimizer + share.gradients + 4 / data
        share = share._replace(optimizer=0, gradients=0, reducing=0)
    if is_offloaded(zero, "param"):
        host += share.weights
        share = share._replace(weights=0)
    return share, host


def muon_spares(work: Workload, cuts: Sequence[int], stage: int, zero_stage: int, data: int) -> float:
    """Bytes of a rank's second moments that matrices under Muon do not have."""
    matrices = matrix_parameters(work.model, work.tensor, cuts[stage + 1] - cuts[stage])
    return 4 * matrices / (data if zero_stage else 1)


def host_memory(
    work: Workload,
    cuts: Sequence[int],
    stage: int,
    *,
    precision: str,
    zero: dict[str, Any],
    data: int,
    muon: int = 0,
) -> float:
    """Bytes of its node's host memory that a rank of this stage uses for offloading. `muon`: as in `rank_memory`."""
    _, host = offloaded(state_bytes(precision, zero["stage"], data), zero, data)
    spared = muon_spares(work, cuts, stage, zero["stage"], data) if muon else 0.0
    return host * stage_parameters(work.model, work.tensor, cuts)[stage] - spared * is_offloaded(
        zero, "optimizer"
    )


def rank_memory(
    work: Workload,
    cuts: Sequence[int],
    stage: int,
    *,
    precision: str,
    zero: dict[str, Any],
    data: int,
    micro_batches: int,
    muon: int = 0,
) -> Memory:
    """Peak memory of a rank of pipeline stage `stage`.

    Args:
        cuts: stages as boundaries between layers. zero: `zero_optimization` of DeepSpeed's settings.
        muon: bytes of a number in Muon's iteration; 0 with another optimizer.
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
    states = share.optimizer * count
    if muon:
        # Some optimizers join gradients for their reduction alone, others keep the joined ones for their step.
        freed = kind == 0 or (precision == "bf16" and kind == 1)
        working = working_memory(model, muon)
        reducing = max(reducing, working) if freed else reducing + working
        states -= muon_spares(work, cuts, stage, kind, data) * (not is_offloaded(zero, "optimizer"))
    # Activations and gathered weights are freed before gradients are reduced, so the two never add up.
    return Memory(
        share.weights * count,
        share.gradients * count,
        states,
        acts,
        running + max(gathered, reducing - acts),
    )
