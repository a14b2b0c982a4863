"""The optimizer's parameter groups, and the learning rate of each iteration."""

import math
from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from megadyn.config import OptimizerConfig
from megadyn.engine.adamw import AdamW
from megadyn.engine.muon import ADAMW, MUON, Muon
from megadyn.errors import ConfigError
from megadyn.parallel.grid import Axis, Grid
from megadyn.parallel.mappings import sum_over
from megadyn.parallel.params import component, counts_here, is_matrix, mark, name_of


class GroupKey(NamedTuple):
    """What the parameters of a group have in common."""

    component: str
    decay: bool
    """Whether weight decay applies."""
    factor: float
    """Of the learning rate, by name; 0 for frozen parameters."""
    algorithm: str = ADAMW

    def __str__(self) -> str:
        name = MUON if self.algorithm == MUON else self.component
        return name if self.factor == 1 else f"{name} x {self.factor:g}"


def group_key(param: nn.Parameter, cfg: OptimizerConfig) -> GroupKey:
    if hasattr(param, "stands_for"):
        key: GroupKey = param.stands_for
        return key
    name = name_of(param)
    algorithm = MUON if cfg.name == "muon" and is_matrix(param) else ADAMW
    return GroupKey(component(name), param.ndim >= 2, factor_of(name, cfg), algorithm)


def factor_of(name: str, cfg: OptimizerConfig) -> float:
    """What `optimizer.rates` and `optimizer.freeze` multiply the learning rate of a parameter by."""
    if any(fnmatchcase(name, pattern) for pattern in cfg.freeze):
        return 0.0
    return next((factor for pattern, factor in cfg.rates.items() if fnmatchcase(name, pattern)), 1.0)


def refuse_unmatched(module: nn.Module, cfg: OptimizerConfig, pp: Axis) -> None:
    """Raises ConfigError for a pattern of `rates` or `freeze` that decides about no parameter of any stage. Collective if there
    are patterns."""
    if not (cfg.rates or cfg.freeze):
        return
    names = [name_of(param) for param in module.parameters()]
    if pp.size > 1:
        stages: list[Any] = [None] * pp.size
        dist.all_gather_object(stages, names, group=pp.group)
        names = [name for stage in stages for name in stage]
    for pattern in cfg.freeze:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ConfigError("optimizer.freeze", pattern, f"a pattern that matches a tensor, as {names[0]}")
    left = [name for name in names if factor_of(name, cfg)]
    for pattern in cfg.rates:
        if not any(fnmatchcase(name, pattern) for name in left):
            raise ConfigError(
                "optimizer.rates",
                pattern,
                f"a pattern that matches a tensor, as {names[0]}, which is not frozen and no pattern before it matches",
            )
        left = [name for name in left if not fnmatchcase(name, pattern)]


def freeze(module: nn.Module, cfg: OptimizerConfig) -> None:
    """From now on gradients of frozen parameters are zeros."""
    for param in module.parameters():
        if group_key(param, cfg).factor == 0 and param.requires_grad:
            param.register_hook(torch.zeros_like)


def even_out_groups(module: nn.Module, cfg: OptimizerConfig, pp: Axis) -> None:
    """Gives each pipeline stage a member of every parameter group that any stage has.

    DeepSpeed's ZeRO optimizer computes the gradient norm with one all-reduce per group, so stages with different
    numbers of groups would wait for each other forever. The stand-in parameter is a zero that gets no gradient.
    """
    if pp.size == 1:
        return
    mine = {group_key(param, cfg) for param in module.parameters()}
    stages: list[Any] = [None] * pp.size
    dist.all_gather_object(stages, mine, group=pp.group)
    for number, key in enumerate(sorted(set().union(*stages) - mine)):
        zero = torch.zeros((1, 1) if key.decay else (1,), device=next(module.parameters()).device)
        stand_in: Any = nn.Parameter(zero)  # Any, because it gets attributes of ours
        mark(stand_in, f"{STAND_IN}.{key.component}", is_cut=False)
        stand_in.stands_for = key
        module.register_parameter(f"{STAND_IN}_{number}", stand_in)


STAND_IN = "stand_in"


def make_optimizer(module: nn.Module, cfg: OptimizerConfig) -> AdamW:
    """The optimizer with groups by component, weight decay, rate and algorithm; vectors, scalars and what is frozen do not
    decay. Muon must be attached before its first step."""
    groups: dict[GroupKey, list[nn.Parameter]] = {}
    for param in module.parameters():
        groups.setdefault(group_key(param, cfg), []).append(param)
    described = [
        {
            "params": params,
            "weight_decay": cfg.weight_decay if key.decay and key.factor else 0.0,
            "component": str(key),
            "algorithm": key.algorithm,
            "lr_multiplier": getattr(cfg.multipliers, key.component)
            * key.factor
            * (cfg.muon.multiplier if key.algorithm == MUON else 1.0),
        }
        for key, params in sorted(groups.items())
    ]
    adamw: dict[str, Any] = {
        "lr": cfg.learning_rate,
        "betas": (cfg.beta1, cfg.beta2),
        "eps": cfg.eps,
        "fused": True,
    }
    return Muon(described, cfg.muon, **adamw) if cfg.name == "muon" else AdamW(described, **adamw)


class Schedule(NamedTuple):
    """The progress that a step's learning rate depends on, in steps of the current batch size."""

    warmup: float
    """Progress at the end of the warm-up."""
    passed: float
    """Progress so far."""
    end: float
    """Length of the whole schedule."""
    decay: float
    """Length of wsd's decay."""


def learning_rate(
    cfg: OptimizerConfig, iteration: int, iterations: int, schedule: Schedule | None = None
) -> float:
    """Learning rate of the 0-based step `iteration` in a run of `iterations` steps: linear warm-up, then the schedule, from
    `schedule_begin` to `schedule_end`, which by default are those of the run.

    The rate rises to `learning_rate` over the first `warmup_iterations` steps, or `warmup_tokens`; a run no longer than that
    ends within the warm-up and never decays. After that, `cosine` and `linear` decay to `min_learning_rate` over all remaining
    steps. `wsd` decays over the last `decay_iterations` steps, or `decay_tokens` (arXiv 2404.06395), or over the steps after
    the warm-up if these are fewer, in the form `decay_shape`. The last step uses `min_learning_rate`. `constant` stays at
    `learning_rate`. `schedule_problem` reports a schedule that does not fit into the run.

    Args:
        schedule: progress of a run whose length, or a part of whose schedule, is not given in steps; by default all steps
            have the same size, and the schedule ends with the run.
    """
    iteration, iterations = max(0, iteration - cfg.schedule_begin), cfg.span(iterations)
    if schedule is None:
        assert cfg.warmup_tokens is cfg.decay_tokens is None, "their progress was not given"
        schedule = Schedule(cfg.warmup_steps(1), iteration, iterations, cfg.decay_steps(1, iterations))
    start, passed, end, decay = schedule
    if cfg.warmup_tokens is not None and passed < start:
        return cfg.learning_rate * min(1.0, (passed + 1) / start)
    if cfg.warmup_tokens is None and iteration < (warmup := cfg.warmup_steps(1)):
        return cfg.learning_rate * (iteration + 1) / warmup
    if cfg.schedule == "wsd":
        start = max(start, end - decay)
    done = min(1.0, max(0, passed + 1 - start) / max(1, end - start))
    name = cfg.decay_shape if cfg.schedule == "wsd" else cfg.schedule
    left = {"constant": 1.0, "cosine": (1 + math.cos(math.pi * done)) / 2, "sqrt": 1 - math.sqrt(done)}
    shape = left.get(name, 1 - done)
    return cfg.min_learning_rate + (cfg.learning_rate - cfg.min_learning_rate) * shape


def length_of(cfg: OptimizerConfig, part: str, steps: int) -> str:
    """The length of the `warmup` or `decay` of `steps`, as it was given: `optimizer.warmup_iterations = 100`."""
    tokens = getattr(cfg, f"{part}_tokens")
    if tokens is None:
        return f"optimizer.{part}_iterations = {steps}"
    return f"optimizer.{part}_tokens = {tokens} ({steps} steps)"


def schedule_problem(cfg: OptimizerConfig, iterations: int, tokens_per_step: int) -> str | None:
    """A sentence on what does not fit into a run of `iterations` steps; None if everything fits."""
    warmup = cfg.warmup_steps(tokens_per_step)
    if warmup > iterations:
        highest = cfg.learning_rate * iterations / warmup
        return (
            f"{length_of(cfg, 'warmup', warmup)} is longer than the run of {iterations} iterations: the learning "
            f"rate only rises, to {highest:.3g} instead of {cfg.learning_rate:.3g}, and never decays"
        )
    if cfg.schedule == "constant":
        return None
    if warmup == iterations:
        return (
            f"{length_of(cfg, 'warmup', warmup)} is the whole run: the learning rate reaches {cfg.learning_rate:.3g} in "
            "the last step and never decays"
        )
    decay = cfg.decay_steps(tokens_per_step, iterations)
    if cfg.schedule == "wsd" and decay > iterations - warmup:
        return (
            f"{length_of(cfg, 'decay', decay)} does not fit after a warm-up of {warmup} into {iterations} iterations: "
            f"the decay takes {iterations - warmup}"
        )
    return None


class GradientClipper:
    """Clips by the true global norm at ZeRO-0, where DeepSpeed would use each rank's own norm.

    Runs before every optimizer step. Cut parameters count on every tensor rank, whole ones only on the first;
    a tied embedding counts only on its first stage. A NaN or infinite norm makes the optimizer skip the step.
    """

    def __init__(self, module: nn.Module, max_norm: float, grid: Grid):
        self.params, self.max_norm, self.grid = list(module.parameters()), max_norm, grid
        self.norm = torch.zeros(())
        self.gate: Callable[[torch.Tensor], torch.Tensor] | None = None
        """Makes a norm that is a spike infinite."""

    def __call__(self, optimizer: Any = None, *_: object) -> None:
        grads = [p.grad for p in self.params if p.grad is not None]
        counted = [
            p.grad.square().sum() for p in self.params if p.grad is not None and counts_here(p, self.grid.tp)
        ]
        total = torch.stack(counted).sum() if counted else grads[0].new_zeros(())
        self.norm = sum_over(sum_over(total, self.grid.tp), self.grid.pp).sqrt()
        if self.max_norm > 0:
            scale = (self.max_norm / (self.norm + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_(grads, scale)
        if optimizer is not None:
            overflow = ~torch.isfinite(self.norm if self.gate is None else self.gate(self.norm))
            optimizer.found_inf = overflow.float()  # makes torch's fused AdamW do nothing
            optimizer.overflow = bool(overflow)  # tells DeepSpeed's engine, and Muon
