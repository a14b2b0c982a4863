"""Muon under every layout (https://kellerjordan.github.io/posts/muon, arXiv 2502.16982): each matrix is updated as a whole.

Momentum stays where ZeRO keeps the weights, in flat partitions, because it is element-wise. In each step the ranks of a pipeline
stage put every update together on one of them (`parallel/whole.py`), which makes it orthogonal and hands it back. Matrices go in
rounds of similar cost, about one per rank, so that no rank idles and none holds more than a few.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from megadyn.config import MuonConfig
from megadyn.engine.adamw import AdamW, adamw_step
from megadyn.engine.placement import Place, Stepped, place_of, stepped_together
from megadyn.parallel.params import name_of, part_shape
from megadyn.parallel.whole import Exchange, Matrix, Stage, pieces_of_all
from megadyn.planning.muon import orthogonalisation_flops

ADAMW, MUON = "adamw", "muon"
"""A parameter group's `algorithm`."""
MOMENTUM = "momentum"
"""The optimizer state of a matrix."""

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Keller Jordan's. Of an odd polynomial that takes singular values in (0, 1] to about 1 when it is repeated."""
SMALLEST = 1e-7
"""Norm below which an update is not scaled up further."""
RMS = 0.2
"""Root mean square of AdamW's updates, to which Muon's are scaled (arXiv 2502.16982, section 2.2)."""


def orthogonalised(update: Tensor, steps: int) -> Tensor:
    """The matrix [m, n] with its singular values taken to about 1: `steps` Newton-Schulz steps in its own dtype."""
    a, b, c = COEFFICIENTS
    wide = update if update.shape[0] <= update.shape[1] else update.T
    x = wide / wide.norm().clamp(min=SMALLEST)
    for _ in range(steps):
        square = x @ x.T
        x = torch.addmm(x, torch.addmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x if wide is update else x.T


def update_scale(rows: int, columns: int) -> float:
    """With it, an orthogonal matrix has the root mean square RMS."""
    return RMS * math.sqrt(max(rows, columns))


class Muon(AdamW):
    """Muon for parameter groups whose `algorithm` is MUON, AdamW for the others. One object, because DeepSpeed wraps one.

    Its matrices have a momentum for state, m <- momentum * m + gradient, and no second moment. An update is the orthogonal
    matrix next to gradient + momentum * m (Nesterov), scaled to the root mean square of AdamW's updates.
    """

    def __init__(self, groups: list[dict[str, Any]], cfg: MuonConfig, **adamw: Any):
        super().__init__(groups, **adamw)
        self.cfg = cfg
        self.overflow = False
        """Set by `GradientClipper` at ZeRO-0: the step must not happen. Under other stages DeepSpeed then does not call it."""
        self._rounds: dict[int, list[Round]] = {}

    def attach(self, wrapper: Any, zero_stage: int, stage: Stage, dtype: torch.dtype) -> int:
        """Finds the matrices in DeepSpeed's optimizer and decides which rank makes which orthogonal, in `dtype`. Returns how
        many there are. Collective over the stage."""
        found = 0
        for stepped in stepped_together(wrapper, zero_stage):
            if stepped.group["algorithm"] != MUON:
                continue
            held = _held(stepped, wrapper, zero_stage, stage)
            for tensor in stepped.tensors:
                self._rounds[id(tensor)] = []
            # At ZeRO-0 a group has a tensor for each matrix, otherwise one for all: the first stands for the group.
            self._rounds[id(stepped.tensors[0])] = [
                Round(some, stage, dtype, self.cfg.steps)
                for some in in_rounds(held, stage.size, self.cfg.steps)
            ]
            found += len(held)
        return found

    def state_of(self, tensor: Tensor) -> dict[str, Tensor]:
        if id(tensor) not in self._rounds:
            return super().state_of(tensor)
        state: dict[str, Tensor] = self.state[tensor]
        if not state:
            state[MOMENTUM] = torch.zeros_like(tensor)
        return state

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # a closure is never given, so no loss returned
        if self.overflow:
            return
        every = self.param_groups
        self.param_groups = [group for group in every if group["algorithm"] != MUON]
        try:
            adamw_step(self)
        finally:
            self.param_groups = every
        for group in every:
            if group["algorithm"] == MUON and group["params"]:
                self._step_matrices(group)

    def _step_matrices(self, group: dict[str, Any]) -> None:
        rate, momentum = group["lr"], self.cfg.momentum
        for tensor in group["params"]:
            state = self.state_of(tensor)
            state[MOMENTUM].mul_(momentum)
            if tensor.grad is not None:  # none counts as zero, as in ZeRO's partitions
                state[MOMENTUM].add_(tensor.grad)
            tensor.mul_(1 - rate * group["weight_decay"])
        if rate == 0:  # frozen: what would be made orthogonal would move nothing
            return
        for some in self._rounds[id(group["params"][0])]:
            some.step(self, rate)

    def update_of(self, tensor: Tensor, start: int, size: int) -> Tensor:
        """Elements of this rank's update before it is made orthogonal, flat."""
        momentum = self.state[tensor][MOMENTUM].view(-1)[start : start + size]
        if tensor.grad is None:
            return momentum * self.cfg.momentum
        return torch.add(tensor.grad.reshape(-1)[start : start + size], momentum, alpha=self.cfg.momentum)


class Held(NamedTuple):
    """A matrix, and where this rank's piece of it is."""

    matrix: Matrix
    place: Place


def _held(stepped: Stepped, wrapper: Any, zero_stage: int, stage: Stage) -> list[Held]:
    """The matrices that are stepped together. Collective over data-parallel ranks."""
    params = [param for param in stepped.params if not hasattr(param, "stands_for")]
    places = [place_of(param, wrapper, zero_stage, stage.grid.dp) for param in params]
    pieces = pieces_of_all([(place.first, place.size) for place in places], stage.grid)
    return [
        Held(Matrix(name_of(param), *_shapes(param, stage), of_all), place)
        for param, place, of_all in zip(params, places, pieces, strict=True)
    ]


def _shapes(param: nn.Parameter, stage: Stage) -> tuple[tuple[int, int], tuple[int, int]]:
    """Of a tensor rank's part, and of the whole."""
    rows, columns = part_shape(param)
    cut, tensor = stage.sharding.dim(name_of(param)), stage.grid.tp.size
    whole = (rows * (tensor if cut == 0 else 1), columns * (tensor if cut == 1 else 1))
    return (rows, columns), whole


def cost_of(matrix: Matrix, steps: int) -> float:
    rows, columns = matrix.whole
    return orthogonalisation_flops(rows, columns, steps)


def in_rounds(held: Sequence[Held], ranks: int, steps: int) -> Iterator[list[Held]]:
    """Parts of `held`, the costliest first. Each has at most as many elements as `ranks` times the largest matrix."""
    most = ranks * max((one.matrix.elements for one in held), default=0)
    some: list[Held] = []
    elements = 0
    for one in sorted(held, key=lambda it: -cost_of(it.matrix, steps)):
        if elements + one.matrix.elements > most:
            yield some
            some, elements = [], 0
        some.append(one)
        elements += one.matrix.elements
    if some:
        yield some


def owners_of(costs: Sequence[float], ranks: int) -> list[int]:
    """A rank for each matrix of a round: the one with least to do so far. The same on all ranks."""
    work, owners = [0.0] * ranks, []
    for cost in costs:
        owners.append(work.index(min(work)))
        work[owners[-1]] += cost
    return owners


class Round:
    """Matrices whose updates are made orthogonal at the same time, each on one rank."""

    def __init__(self, held: Sequence[Held], stage: Stage, dtype: torch.dtype, steps: int):
        costs = [cost_of(one.matrix, steps) for one in held]
        self.exchange = Exchange([one.matrix for one in held], owners_of(costs, stage.size), stage, dtype)
        places = {one.matrix.name: one.place for one in held}
        self.places = [places[matrix.name] for matrix in self.exchange.matrices]
        self.steps = steps
        self._nothing = torch.empty(0, device=stage.device)

    def step(self, optimizer: Muon, rate: float) -> None:
        """Moves this rank's pieces. Collective over the stage."""
        updates = [
            optimizer.update_of(place.tensor, place.start, place.size) if place.size else self._nothing
            for place in self.places
        ]
        results = self.exchange.apply(updates, lambda whole: orthogonalised(whole, self.steps))
        for place, matrix, result in zip(self.places, self.exchange.matrices, results, strict=True):
            if place.size:
                piece = place.tensor.view(-1)[place.start : place.start + place.size]
                piece.add_(result.to(piece.device, piece.dtype), alpha=-rate * update_scale(*matrix.whole))
