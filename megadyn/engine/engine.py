"""Turns the layer list into something that trains. The only caller of `deepspeed.initialize`.

Without pipeline stages the list runs as a plain module, under any ZeRO stage. With them it becomes a
`PipelineModule` (1F1B), under ZeRO 0 or 1. The layers are the same objects in both.
"""

import io
import logging
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext, redirect_stdout
from typing import Any, NamedTuple

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.pipe import schedule
from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS
from torch import Tensor, nn

from megadyn.config import REDUCED_IN, BatchPlan, Config, engine_settings, reduction_type
from megadyn.engine.gradient_norms import COMPONENTS, GradientNorms, unclipped
from megadyn.engine.loss_gate import LossGate, problem_of
from megadyn.engine.mpu import Mpu
from megadyn.engine.muon import Muon
from megadyn.engine.norm_gate import norm_gate
from megadyn.engine.optimizer import (
    STAND_IN,
    GradientClipper,
    even_out_groups,
    freeze,
    make_optimizer,
    refuse_unmatched,
)
from megadyn.engine.pipeline import Stages
from megadyn.engine.replaced import replaced, spare_dynamo, without_compiler
from megadyn.engine.statistics import memory_gib, over_ranks
from megadyn.engine.step_clock import COLLECTIVES, PARTS, StepClock
from megadyn.kernels.rule import use_kernels
from megadyn.log import log
from megadyn.model.attention_choice import choose_attention
from megadyn.model.block import LayerContext
from megadyn.network import Network, layer_list, routed_layers, set_routing_mode, trackers_of
from megadyn.parallel.grid import Axis, Grid
from megadyn.parallel.mappings import max_over, sum_over
from megadyn.parallel.objects import all_gather
from megadyn.parallel.params import PRECISIONS, ParamMaker, name_of
from megadyn.parallel.sharding import Sharding
from megadyn.parallel.whole import Stage, stage_group
from megadyn.planning.flops import head_flops, layer_costs
from megadyn.planning.partition import balanced_stages, stage_table
from megadyn.routing.layer import LossScale
from megadyn.routing.tracker import Monitor, StepTracker

MicroBatch = tuple[Tensor, Tensor]
"""tokens and labels, [b, T] int64 each."""

LOSS_SCALER_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")

STAGE_PARTS = {
    schedule.LoadMicroBatch: "data",
    schedule.ForwardPass: "forward",
    schedule.BackwardPass: "backward",
    schedule.ReduceGrads: "communication",
    schedule.ReduceTiedGrads: "communication",
    schedule.OptimizerStep: "optimizer",
}
"""Maps instructions of a pipeline schedule to parts of a step. Sends and receives count as collectives."""


class StepResult(NamedTuple):
    loss: Tensor
    """Mean over the step's samples, equal on all ranks; a scalar on the device."""
    grad_norm: Tensor
    """Global norm before clipping."""
    problem: str | None = None
    """Why the step was bad. A bad step changes neither weights nor optimizer nor routing state."""


class Engine:
    """The model and its optimizer, run in parallel. Every method is collective."""

    def __init__(self, config: Config, plan: BatchPlan, grid: Grid, eod: int | None = None):
        """`eod`: the token that ends a document, if samples are masked by document."""
        self.config, self.plan, self.grid, self.eod = config, plan, grid, eod
        self.device = torch.device(get_accelerator().current_device_name())
        self.settings = engine_settings(config)
        self.zero_stage: int = self.settings["zero_optimization"]["stage"]
        assert config.model.num_kv_heads is not None
        self.sharding = Sharding(grid.tp.size, config.model.num_kv_heads)
        self.loss_scale = LossScale()
        self.gate = LossGate(plan.micro_batches, grid.dp)
        self.module = self._build_module()
        self.routed = routed_layers(self.module)
        refuse_unmatched(self.module, config.optimizer, grid.pp)
        even_out_groups(self.module, config.optimizer, grid.pp)
        if not config.training.compile:
            spare_dynamo()
        optimizer = make_optimizer(self.module, config.optimizer)
        if type(optimizer) not in ZERO_SUPPORTED_OPTIMIZERS:  # or DeepSpeed calls it untested at every start
            ZERO_SUPPORTED_OPTIMIZERS.append(type(optimizer))
        self.clipper: GradientClipper | None = None
        if self.zero_stage == 0:
            self.clipper = GradientClipper(self.module, config.optimizer.clip_grad, grid)
            optimizer.register_step_pre_hook(self.clipper)
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        # DeepSpeed's bf16 optimizer prints memory usage for each group.
        with without_compiler(), redirect_stdout(io.StringIO()):
            # A PipelineModule brings its own mpu.
            self.engine, *_ = deepspeed.initialize(
                model=self.module,
                optimizer=optimizer,
                config=self._deepspeed_config(),
                mpu=Mpu(grid) if grid.pp.size == 1 else None,
            )
        freeze(self.module, config.optimizer)
        if isinstance(optimizer, Muon):
            self._attach(optimizer)
        self.norm_gate = norm_gate(config, self.clipper or self.engine.optimizer, self.device)
        # DeepSpeed would raise when the loss scale cannot fall further; `problem_of` reports this instead.
        if config.precision == "fp16":
            self.engine.optimizer.loss_scaler.raise_error_at_min_scale = False
        self.clock = StepClock(self.device)
        self.part: Callable[[str], AbstractContextManager[Any]] = nullcontext
        """Attributes time to a part of the step; the clock's method in a measured step, otherwise it does nothing."""
        self.clock.watch(dist, COLLECTIVES)
        self.clock.watch(deepspeed.comm.comm.cdb, COLLECTIVES)
        self.clock.watch(dist.Work, ("wait",))  # of a collective that was started early
        self.norms = GradientNorms(self.parameters(), self.engine.optimizer, optimizer, self.zero_stage, grid)

    def _attach(self, optimizer: Muon) -> None:
        settings, precision = self.config.optimizer.muon, self.config.precision
        number = settings.iterates_in(precision)
        stage = Stage(self.grid, self.sharding, stage_group(self.grid), self.zero_stage == 0, self.device)
        found = optimizer.attach(self.engine.optimizer, self.zero_stage, stage, PRECISIONS[number])
        why = f"auto: precision = {precision}" if settings.precision == "auto" else "optimizer.muon.precision"
        log.info("optimizer: muon in %s (%s), %d matrices in this stage", number, why, found)

    def _build_module(self) -> nn.Module:
        model, grid = self.config.model, self.grid
        backend = choose_attention(self.config, all_gather)
        log.info("kernels: %s (%s)", *use_kernels(self.config.training.kernels, model.hidden_size))
        seq = grid.tp if self.config.parallel.sequence else Axis("seq")
        make = ParamMaker(self.sharding, self.config.training.seed, grid.tp, seq, self.device)
        first = self.plan.global_batch // grid.dp.size * grid.dp.rank
        ctx = LayerContext(
            model,
            make,
            backend,
            self.eod,
            first,
            self.config.training.recompute,
            self.config.training.compile,
            self.config.training.z_loss_weight,
        )
        if grid.pp.size == 1:
            return Network(ctx, self.loss_scale)
        length = self.config.training.sequence_length
        costs, head = layer_costs(model, length), head_flops(model, length)
        cuts = balanced_stages(costs, head, grid.pp.size)
        log.info("pipeline stages:\n%s", stage_table(costs, head, cuts))
        with redirect_stdout(io.StringIO()):  # every rank of DeepSpeed prints the topology
            return Stages(
                layer_list(ctx, self.loss_scale),
                cuts,
                grid,
                seq=seq,
                tied=model.tie_embeddings,
                by_document=self.eod is not None,
                gate=self.gate,
            )

    def _deepspeed_config(self) -> dict[str, Any]:
        """The user's engine settings plus those decided elsewhere in the configuration."""
        precision = self.config.precision
        decided: dict[str, Any] = {
            "train_batch_size": self.plan.global_batch,
            "train_micro_batch_size_per_gpu": self.plan.micro_batch,
            "gradient_accumulation_steps": self.plan.micro_batches,
            "gradient_clipping": 0.0 if self.zero_stage == 0 else self.config.optimizer.clip_grad,
            "steps_per_print": 10**9,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,  # torch's AdamW also works for offloaded states
            # DeepSpeed's timer waits for the device twice per micro-batch; `StepClock` measures without waiting.
            "timers": {"throughput": {"enabled": False}},
            # By default activations are split over tensor ranks for transport, which breaks our packed tensor.
            "pipeline": {"pipe_partitioned": False, "grad_partitioned": False},
        }
        if precision == "fp16":
            decided["fp16"] = {"enabled": True}
        if precision == "bf16":
            # immediate_grad_update: by default DeepSpeed clears half-precision gradients when backward enters the
            # module. By then the last stage's head, which is part of the loss function, already has its gradient.
            decided["bf16"] = {"enabled": True, "immediate_grad_update": True}
            decided["data_types"] = {"grad_accum_dtype": "fp32"}
        return self.settings | decided | {REDUCED_IN: reduction_type(self.settings, precision)}

    def train_step(
        self,
        batches: Iterable[MicroBatch],
        rate: float,
        loss_limit: float = math.inf,
        norm_limit: float = math.inf,
        *,
        measure: bool = False,
    ) -> StepResult:
        """Forward and backward of this rank's micro-batches, then one optimizer step at learning rate `rate`.

        Skips the step if its loss or gradient is NaN or infinite, its loss above `loss_limit`, or its norm above `norm_limit`
        (with `training.norm_spike_factor`). With `measure`, `step_statistics` then reports on the step.
        """
        if self.norm_gate is not None:
            self.norm_gate.limit = norm_limit
        if not measure:
            return self._train_step(batches, rate, loss_limit)
        with ExitStack() as stack:
            stack.enter_context(self.norms.measuring())
            stack.enter_context(self.clock.measuring())
            stack.enter_context(replaced(self, "part", self.clock.part))
            if isinstance(self.module, Stages):
                does = self.engine._INSTRUCTION_MAP
                timed = {step: self.clock.timed(part, does[step]) for step, part in STAGE_PARTS.items()}
                stack.enter_context(replaced(self.engine, "_INSTRUCTION_MAP", does | timed))
            return self._train_step(batches, rate, loss_limit)

    def _train_step(self, batches: Iterable[MicroBatch], rate: float, loss_limit: float) -> StepResult:
        self.gate.limit = loss_limit
        set_learning_rate(self.engine.optimizer, rate)
        scaler = self.engine.optimizer.loss_scaler if self.config.precision == "fp16" else None
        can_scale_down = scaler is not None and scaler.cur_scale > scaler.min_scale
        self.loss_scale.value = (scaler.cur_scale if scaler else 1.0) / self.plan.micro_batches
        if isinstance(self.module, Stages):
            loss = self.engine.train_batch(iter(batches))
        else:
            self.engine.train()
            total = torch.zeros((), device=self.device)
            for tokens, labels in self._loaded(batches):
                with self.part("forward"):
                    micro_loss = self.engine(tokens, labels)
                    gated = self.gate(micro_loss)
                with self.part("backward"):
                    self.engine.backward(gated)
                with self.part("optimizer"):
                    self.engine.step()
                total += micro_loss.detach()
            loss = self._mean_over_ranks(total, self.plan.micro_batches)
        norm = torch.as_tensor(self.clipper.norm if self.clipper else self.engine.get_global_grad_norm())
        # Waits for the device, but no longer than the optimizer already did to read the norm.
        norm, spike = self.norm_gate.take(norm) if self.norm_gate else (norm, None)
        problem = spike or problem_of(
            float(loss),
            float(norm),
            loss_limit,
            was_applied=self.engine.was_step_applied(),
            can_scale_down=can_scale_down,
        )
        self._end_step(rate, counts=problem is None)
        return StepResult(loss.squeeze(), norm, problem)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[MicroBatch], count: int, mode: str) -> float:
        """Mean loss of `count` micro-batches per rank, with routing mode `topk` or `causal`."""
        set_routing_mode(self.routed, mode)
        monitors = [layer.monitor for layer in self.routed]
        for layer in self.routed:
            layer.monitor = Monitor()  # keep evaluation out of the training statistics
        try:
            if isinstance(self.module, Stages):
                loss = self.engine.eval_batch(iter(batches), num_micro_batches=count, bcast_loss=True)
            else:
                self.engine.eval()
                total = torch.zeros((), device=self.device)
                for tokens, labels in self._loaded(batches):
                    total += self.engine(tokens, labels)
                loss = self._mean_over_ranks(total, count)
        finally:
            for layer, monitor in zip(self.routed, monitors):
                layer.monitor = monitor
            set_routing_mode(self.routed, "topk")
            self.engine.train()
        return float(loss)

    def parameters(self) -> list[nn.Parameter]:
        """This rank's parameters, each once, in the same order on all data-parallel ranks."""
        return sorted(
            (param for param in self.module.parameters() if not name_of(param).startswith(STAND_IN)),
            key=name_of,
        )

    def run_line(self) -> str:
        """A one-line summary of the run."""
        config, model, grid, training = self.config, self.config.model, self.grid, self.config.training
        return (
            f"{model.routing.describe()}: "
            f"{model.num_layers} layers of {model.hidden_size}, {config.precision}, ZeRO-{self.zero_stage}, "
            f"tensor {grid.tp.size} x pipeline {grid.pp.size} x data {grid.dp.size}; {config.last_iteration} iterations of "
            f"{training.tokens_per_step:,} tokens ({self.plan.micro_batches} x {self.plan.micro_batch} samples per rank)"
            + ("" if training.seconds is None else f", ended after {training.seconds:g} s of steps")
        )

    def loss_scaler_state(self) -> dict[str, float] | None:
        """fp16's dynamic loss scale; None in other precisions."""
        if self.config.precision != "fp16":
            return None
        scaler = self.engine.optimizer.loss_scaler
        return {name: getattr(scaler, name) for name in LOSS_SCALER_STATE}

    def set_loss_scaler_state(self, state: dict[str, float] | None) -> None:
        if state is not None and self.config.precision == "fp16":
            for name, value in state.items():
                setattr(self.engine.optimizer.loss_scaler, name, value)

    def routing_statistics(self) -> dict[int, dict[str, float]]:
        """Means over ranks and micro-batches since the last call, by layer; complete on rank 0 only."""
        mine = {layer.index: layer.monitor.take() for layer in self.routed}
        # Data-parallel ranks see different tokens, and so do tensor ranks that split the sequence.
        axes = [self.grid.dp, *([self.grid.tp] if self.config.parallel.sequence else [])]
        whole = over_ranks([statistic for record in mine.values() for statistic in record.values()], axes)
        values = iter(torch.stack([statistic.value for statistic in whole]).tolist() if whole else [])
        local = {index: {name: next(values) for name in record} for index, record in mine.items()}
        if self.grid.pp.size == 1:
            return local
        stages: list[Any] = [None] * self.grid.pp.size
        dist.all_gather_object(stages, local, group=self.grid.pp.group)
        return {index: record for stage in stages for index, record in stage.items()}

    def step_statistics(self, grad_norm: float) -> dict[str, Any]:
        """Statistics of the last step, which was measured and had this gradient norm, over all ranks. `grad_norms`: by
        COMPONENTS, before clipping. `step_split_ms`: by PARTS, mean over ranks; the sum is the step's time.
        `memory_gib`: maximum over ranks. `rank_ms`: of each rank, the step without its communication, in which it also
        waits for others. Collective; measuring needs no other collectives."""
        squares, split = self.norms.take(self.device), self.clock.read()
        # Each rank's own time in a place of its own, so that the sum holds those of all.
        own = [0.0] * dist.get_world_size()
        own[dist.get_rank()] = sum(split.values()) - split["communication"]
        times = [split[part] for part in PARTS] + own
        sums = torch.cat([squares, torch.tensor(times, dtype=torch.float64, device=self.device)])
        dist.all_reduce(sums)
        memory = memory_gib(self.device)
        peaks = torch.tensor(list(memory.values()), dtype=torch.float64, device=self.device)
        dist.all_reduce(peaks, op=dist.ReduceOp.MAX)
        norms = unclipped(sums[: len(COMPONENTS)], grad_norm, self.config.optimizer.clip_grad)
        spent = sums[len(COMPONENTS) :].tolist()
        return {
            "grad_norms": dict(zip(COMPONENTS, norms)),
            "step_split_ms": {part: total / len(own) for part, total in zip(PARTS, spent)},
            "rank_ms": spent[len(PARTS) :],
            "memory_gib": dict(zip(memory, peaks.tolist())),
        }

    def learning_rates(self) -> dict[str, float]:
        """Learning rates of the last step, by component with a multiplier of its own."""
        return {group["component"]: group["lr"] for group in self.engine.optimizer.param_groups}

    def _end_step(self, rate: float, counts: bool) -> None:
        """One small all-reduce per step keeps the layers' state equal on all data-parallel ranks. Ignores a bad step."""
        by_name = trackers_of(self.routed)
        trackers = [tracker for of_layers in by_name.values() for tracker in of_layers.values()]
        if trackers:
            own = [tracker.take_step_mean() for tracker in trackers]
        if not counts:
            return
        means: dict[StepTracker, Tensor] = {}
        if trackers:
            mean = sum_over(torch.cat([x.reshape(-1) for x in own]), self.grid.dp) / self.grid.dp.size
            # Each tensor rank reduced over its own data-parallel group, which may round differently. They must choose alike.
            parts = max_over(mean, self.grid.tp).split([x.numel() for x in own])
            means = {tracker: part.view_as(x).to(x.dtype) for tracker, part, x in zip(trackers, parts, own)}
        totals: dict[str, Tensor] = {}
        # Also on stages without routed layers: the sum is collective.
        for name in self.config.model.routing.totals:
            here = [means[tracker] for tracker in by_name.get(name, {}).values()]
            totals[name] = sum_over(
                torch.stack(here).sum() if here else torch.zeros((), device=self.device), self.grid.pp
            )
        for name, of_layers in by_name.items():
            for tracker in of_layers.values():
                tracker.end_step(
                    means[tracker], totals.get(name), rate * self.config.optimizer.multipliers.router
                )

    def _loaded(self, batches: Iterable[MicroBatch]) -> Iterator[MicroBatch]:
        """The micro-batches on the device; copies from pinned memory do not block."""
        left = iter(batches)
        while True:
            with self.part("data"):
                if (batch := next(left, None)) is None:
                    return
                tokens, labels = (part.to(self.device, non_blocking=True) for part in batch)
            yield tokens, labels

    def _mean_over_ranks(self, total: Tensor, count: int) -> Tensor:
        return sum_over(total, self.grid.dp) / (count * self.grid.dp.size)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_multiplier"]
