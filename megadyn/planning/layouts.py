"""Ways to distribute a run over GPUs: which are possible, which fit in memory, and how fast each would be.

Memory and operations follow from the configuration. Speed also depends on the assumptions in `Machine`; nothing is measured.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from megadyn.config import (
    RECOMPUTE,
    BatchPlan,
    Config,
    batch_plan,
    check_together,
    engine_settings,
    reduction_type,
)
from megadyn.config.engine_file import shipped_names
from megadyn.costs.memory import Workload
from megadyn.errors import UserError
from megadyn.planning.flops import head_flops, layer_costs, layer_flops, training_flops
from megadyn.planning.memory import (
    Memory,
    host_memory,
    is_offloaded,
    rank_memory,
    refuse_offloading,
    state_bytes,
)
from megadyn.planning.muon import added_by_muon, muon_number
from megadyn.planning.parameters import stage_parameters
from megadyn.planning.partition import balanced_stages
from megadyn.planning.schedule import simulate

GIB = 2**30
NUMBER_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class Machine:
    """The GPUs to plan for. Everything except their number and memory is an assumption."""

    gpus: int
    memory_gib: float
    tflops: float = 400.0
    """Achieved by one GPU in matrix products."""
    node_gpus: int = 8
    node_gbytes: float = 300.0
    """Achieved between GPUs of a node: 10^9 bytes per second into and out of each."""
    network_gbytes: float = 40.0
    """The same between nodes."""
    link_gbytes: float = 20.0
    """Achieved between a GPU and its node's memory, for offloading."""
    host_gbytes: float = 100.0
    """Speed at which a node's processors read and write memory when they run an offloaded optimizer."""
    reserve_gib: float = 4.0
    """Part of each GPU's memory for CUDA, NCCL and fragmentation."""

    def seconds(self, count: float, span: int) -> float:
        """Seconds to move `count` bytes into or out of a GPU, in a group spread over `span` neighbouring ranks."""
        return count / 1e9 / (self.node_gbytes if span <= self.node_gpus else self.network_gbytes)


@dataclass(frozen=True)
class Layout:
    """One way to distribute a run over all GPUs, and its predicted cost. Bytes and seconds are per step."""

    tensor: int
    pipeline: int
    data: int
    zero_stage: int
    deepspeed_config: str
    micro_batch: int
    """Samples per micro-batch."""
    micro_batches: int
    """Micro-batches per step on each data-parallel rank."""
    recompute: str
    memory: Memory
    """Bytes on the rank that needs most."""
    host: float
    """Bytes of each node's host memory used by offloading."""
    fits: bool
    bubble: float
    """Share of the stages' forward and backward time spent waiting."""
    tensor_bytes: float
    """Sent by one rank per step: all-reduces over tensor ranks, on the busiest stage."""
    pipeline_bytes: float
    """Sent by a middle stage: activations forward, their gradients backward."""
    data_bytes: float
    """Gradients and weights sent over data-parallel ranks, on the largest stage."""
    optimizer_bytes: float
    """Updates that Muon puts together on one rank, and sends back, on the largest stage; 0 with AdamW."""
    step_s: float
    tokens_per_second: float
    """Of the whole job."""
    model_tflops: float
    """Useful TFLOP/s per GPU."""

    def record(self) -> dict[str, Any]:
        """For JSON; memory in GiB, total and by purpose."""
        gib = self.memory.total / GIB
        return asdict(self) | {
            "memory": {name: size / GIB for name, size in self.memory._asdict().items()},
            "memory_gib": gib,
            "host_gib": self.host / GIB,
            "reason": None if self.fits else f"needs {gib:.1f} GiB",
        }


class Refusal(NamedTuple):
    """A combination that cannot run, and the message with which a run would refuse it."""

    tensor: int
    pipeline: int
    zero_stage: int
    reason: str

    def record(self) -> dict[str, Any]:
        return self._asdict() | {"fits": False}


def layouts(config: Config, machine: Machine) -> tuple[list[Layout], list[Refusal]]:
    """Every layout that can run, and the refused ones. Layouts that fit come first; both parts are sorted by step time.

    Raises:
        UserError: the configuration cannot be planned at all.
    """
    if config.model.vocab_size is None:
        raise UserError(
            "model.vocab_size is not set: give it to plan without a tokenizer (model.vocab_size=...)"
        )
    found: list[Layout] = []
    refused: list[Refusal] = []
    for tensor, pipeline in shapes(machine.gpus):
        for settings in engine_files(config):
            stage = settings.zero["stage"]
            trial = replace(
                config,
                parallel=replace(config.parallel, tensor=tensor, pipeline=pipeline),
                training=replace(config.training, micro_batch_size=1),
                deepspeed_config=settings.path,
            )
            try:
                if tensor > machine.node_gpus:
                    raise UserError(f"parallel.tensor is larger than the {machine.node_gpus} GPUs of a node")
                check_together(trial)
                engine_settings(trial)
                refuse_offloading(settings.zero, settings.path)
                plan = batch_plan(trial, machine.gpus)
            except UserError as error:
                refused.append(Refusal(tensor, pipeline, stage, str(error)))
                continue
            for micro in micro_batch_sizes(config, plan):
                for recompute in RECOMPUTE:
                    training = replace(config.training, micro_batch_size=micro, recompute=recompute)
                    found.append(lay_out(replace(trial, training=training), settings, machine))
    return sorted(found, key=lambda it: (not it.fits, it.step_s, it.memory.total)), refused


def shapes(gpus: int) -> Iterator[tuple[int, int]]:
    """Pairs (tensor, pipeline) whose product divides the number of GPUs."""
    for tensor in divisors(gpus):
        for pipeline in divisors(gpus // tensor):
            yield tensor, pipeline


def divisors(number: int) -> list[int]:
    """Divisors in ascending order, including 1 and the number itself."""
    return [n for n in range(1, number + 1) if number % n == 0]


class EngineFile(NamedTuple):
    """A JSON file with DeepSpeed's engine settings."""

    path: str
    zero: dict[str, Any]
    """Its `zero_optimization` section."""
    reduced_in: str = "fp32"
    """Dtype in which gradients are summed over data-parallel ranks."""


def engine_files(config: Config) -> list[EngineFile]:
    """The configuration's own engine settings, and settings for the other ZeRO stages, with and without offloading. For
    these it takes megadyn's file names: from the folder of its own file if they exist there, otherwise megadyn's own files."""
    files: dict[tuple[int, bool], EngineFile] = {}
    own = config.deepspeed_config
    beside = (
        [Path(own).with_name(f"{name}.json") for name in shipped_names()]
        if own not in shipped_names()
        else []
    )
    for path in (own, *(str(path) for path in beside if path.exists()), *shipped_names()):
        alone = replace(
            config,
            parallel=replace(config.parallel, pipeline=1),
            training=replace(config.training, compile=False),
            precision="fp32",
            deepspeed_config=path,
        )
        found = engine_settings(alone)
        zero = found["zero_optimization"]
        offloads = any(is_offloaded(zero, what) for what in ("optimizer", "param"))
        files.setdefault(
            (zero["stage"], offloads),
            EngineFile(path, zero, reduction_type(found, config.precision)),
        )
    return [files[kind] for kind in sorted(files)]


def micro_batch_sizes(config: Config, plan: BatchPlan) -> list[int]:
    """Powers of two that divide a data-parallel rank's samples per step, and the configured size if it divides them."""
    share = plan.global_batch // plan.data_parallel
    sizes = {2**i for i in range(share.bit_length()) if 2**i <= 64} | {config.training.micro_batch_size}
    return sorted(size for size in sizes if share % size == 0)


@cache
def _cuts(layers: tuple[float, ...], head: float, stages: int) -> list[int]:
    return balanced_stages(layers, head, stages)


def stage_cuts(config: Config) -> list[int]:
    """Where the engine cuts the layers into stages."""
    length = config.training.sequence_length
    return _cuts(
        tuple(layer_costs(config.model, length)), head_flops(config.model, length), config.parallel.pipeline
    )


def workload(config: Config) -> Workload:
    """The workload of one rank in this configuration, whose vocabulary size must be known."""
    training = config.training
    return Workload(
        config.model,
        training.micro_batch_size,
        training.sequence_length,
        config.parallel.tensor,
        NUMBER_BYTES[config.precision],
        training.recompute,
        config.data.document_mask,
        config.parallel.sequence and config.parallel.tensor > 1,
        fused=training.kernels != "torch",
    )


def lay_out(config: Config, settings: EngineFile, machine: Machine) -> Layout:
    """Predicted cost of `config`, which must be able to run, on all of the machine's GPUs."""
    plan, cuts, work = batch_plan(config, machine.gpus), stage_cuts(config), workload(config)
    tensor, stages = config.parallel.tensor, config.parallel.pipeline
    states: dict[str, Any] = {
        "precision": config.precision,
        "zero": settings.zero,
        "data": plan.data_parallel,
        "muon": muon_number(config),
    }
    memory = max(
        (
            rank_memory(work, cuts, stage, micro_batches=plan.micro_batches, **states)
            for stage in range(stages)
        ),
        key=lambda it: it.total,
    )
    times = [stage_times(work, cuts, stage, machine) for stage in range(stages)]
    forward, backward = [t.forward for t in times], [t.backward for t in times]
    # 8 bytes per token: a gate and document ids.
    crossing = work.batch * work.length * (work.bytes * config.model.hidden_size / work.parts + 8)
    send = machine.seconds(crossing, machine.gpus)
    passes = simulate(forward, backward, plan.micro_batches, send)
    reduced = data_bytes(work, cuts, settings.zero["stage"], plan, NUMBER_BYTES[settings.reduced_in])
    reducing = machine.seconds(reduced, tensor * plan.data_parallel)
    step = max(passes.step, reducing) if settings.zero.get("overlap_comm") else passes.step + reducing
    step += offloading_s(work, cuts, config.precision, settings.zero, plan, machine)
    flops, sent = added_by_muon(config, cuts, settings.zero["stage"], plan.data_parallel)
    step += flops / (machine.tflops * 1e12) + machine.seconds(sent, tensor * plan.data_parallel)
    ranks = min(machine.node_gpus, machine.gpus)
    useful = training_flops(config.model, work.length) * plan.global_batch
    return Layout(
        tensor,
        stages,
        plan.data_parallel,
        settings.zero["stage"],
        settings.path,
        plan.micro_batch,
        plan.micro_batches,
        work.recompute,
        memory,
        ranks * host_memory(work, cuts, 0, **states),
        memory.total <= (machine.memory_gib - machine.reserve_gib) * GIB,
        bubble=passes.bubble,
        tensor_bytes=max(t.tensor_bytes for t in times) * plan.micro_batches,
        pipeline_bytes=crossing * plan.micro_batches * min(2, stages - 1),
        data_bytes=reduced,
        optimizer_bytes=sent,
        step_s=step,
        tokens_per_second=plan.global_batch * work.length / step,
        model_tflops=useful / step / machine.gpus / 1e12,
    )


class StageTimes(NamedTuple):
    """One stage on one micro-batch."""

    forward: float
    """Seconds."""
    backward: float
    tensor_bytes: float
    """Sent by a rank in both passes."""


def stage_times(work: Workload, cuts: Sequence[int], stage: int, machine: Machine) -> StageTimes:
    """A backward pass takes two forward passes, plus one of whatever is recomputed: the layers, or attention only."""
    model, mine = work.model, slice(cuts[stage], cuts[stage + 1])
    flops = layer_flops(model, work.length)[mine]
    layers = sum(layer.cut / work.tensor + layer.whole / work.parts for layer in flops) * work.batch
    head = head_flops(model, work.length) / work.tensor * work.batch if stage == len(cuts) - 2 else 0.0
    rate = machine.tflops * 1e12
    # An all-reduce over t ranks moves (t - 1) / t of the tensor out of each rank, twice.
    one = work.batch * work.length * model.hidden_size * work.bytes * 2 * (work.tensor - 1) / work.tensor
    sums = 2 * one * sum(shares_summed(work)[mine])
    # The embedding is summed in forward, the head in backward.
    ends = (one * (stage == 0), one * (stage == len(cuts) - 2))
    attention = sum(layer.attention for layer in flops) / work.tensor * work.batch
    again = {"none": 0.0, "selective": attention, "full": layers}[work.recompute]
    moved = (sums + ends[0], sums * (2 if work.recompute == "full" else 1) + ends[1])
    computed = ((layers + head) / rate, (2 * (layers + head) + again) / rate)
    forward, backward = (c + machine.seconds(m, work.tensor) for c, m in zip(computed, moved, strict=True))
    return StageTimes(forward, backward, sum(moved))


def shares_summed(work: Workload) -> list[float]:
    """Per layer, the share of tokens that is all-reduced over tensor ranks, summed over attention and feed-forward."""
    model = work.model
    return [model.routing.summed(layer, work) for layer in model.layer_types]


def data_bytes(work: Workload, cuts: Sequence[int], zero_stage: int, plan: BatchPlan, summed: int) -> float:
    """Bytes per step sent by a rank of the largest stage over its data-parallel group, as in DeepSpeed's optimizers.

    ZeRO 0 and 1 sum gradients, `summed` bytes each, once per step; from ZeRO 1 on, new weights are gathered. ZeRO 2
    sums gradients in every micro-batch. ZeRO 3 gathers weights in both passes of every micro-batch and reduce-scatters
    gradients.
    """
    count = max(stage_parameters(work.model, work.tensor, cuts))
    sent = count * (plan.data_parallel - 1) / plan.data_parallel
    gathered = work.bytes
    numbers = {
        0: 2 * summed,
        1: 2 * summed + gathered,
        2: 2 * summed * plan.micro_batches + gathered,
        3: (2 * gathered + summed) * plan.micro_batches,
    }
    return sent * numbers[zero_stage]


def offloading_s(
    work: Workload,
    cuts: Sequence[int],
    precision: str,
    zero: dict[str, Any],
    plan: BatchPlan,
    machine: Machine,
) -> float:
    """Seconds per step for offloading, assuming no overlap. Gradients are accumulated in host memory, where the
    optimizer runs; weights are copied from there for every pass."""
    share = state_bytes(precision, zero["stage"], plan.data_parallel)
    moved = stepped = 0.0  # bytes per parameter of the stage: over a GPU's link, in its node's memory
    if is_offloaded(zero, "optimizer"):
        # Out in every micro-batch; back in before all but the first; out once more in fp32; then the new weights in.
        moved += share.gradients * (2 * plan.micro_batches - 1) + 4 / plan.data_parallel + share.weights
        # Adam reads all four values per parameter and writes all but the gradient.
        stepped += (4 * 4 + 3 * 4) / plan.data_parallel + share.weights
    if is_offloaded(zero, "param"):
        moved += share.weights * 2 * plan.micro_batches
    count = stage_parameters(work.model, work.tensor, cuts)[0]
    ranks = min(machine.node_gpus, machine.gpus)
    return count * (moved / machine.link_gbytes + ranks * stepped / machine.host_gbytes) / 1e9
