"""Matrices that ranks hold in pieces, put together on one rank each and handed back.

A pipeline stage's tensor ranks hold parts of a matrix (`sharding`), and its data-parallel ranks hold pieces of the flattened
part (ZeRO) or all of it. Ranks of a stage are numbered as in the grid: the tensor axis is fastest.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megadyn.parallel.grid import Grid
from megadyn.parallel.sharding import Sharding

Piece = tuple[int, int]
"""(first element, number of elements) of the flattened part that a data-parallel rank holds."""


@dataclass(frozen=True)
class Matrix:
    name: str
    part: tuple[int, int]
    """Shape of a tensor rank's part."""
    whole: tuple[int, int]
    pieces: tuple[Piece, ...]
    """By data-parallel rank, the same on all tensor ranks."""

    @property
    def elements(self) -> int:
        return self.whole[0] * self.whole[1]


@dataclass(frozen=True)
class Stage:
    """The ranks of a pipeline stage, and how matrices are cut over them."""

    grid: Grid
    sharding: Sharding
    group: dist.ProcessGroup | None
    """Of all ranks of the stage; unused if there is only one."""
    copied: bool
    """Data-parallel ranks hold copies, not pieces."""
    device: torch.device
    """Where matrices are sent and put together; pieces may be in host memory."""

    @property
    def size(self) -> int:
        return self.grid.tp.size * self.grid.dp.size

    @property
    def rank(self) -> int:
        return self.grid.dp.rank * self.grid.tp.size + self.grid.tp.rank

    def piece(self, matrix: Matrix, rank: int) -> Piece:
        return matrix.pieces[rank // self.grid.tp.size]

    def gives(self, matrix: Matrix, rank: int, owner: int) -> bool:
        """Whether `rank` sends its piece to `owner`: of copies only one is needed."""
        (data, tensor), (own_data, own_tensor) = (divmod(r, self.grid.tp.size) for r in (rank, owner))
        is_cut = self.sharding.dim(matrix.name) is not None
        return (is_cut or tensor == own_tensor) and (not self.copied or data == own_data)


def stage_group(grid: Grid) -> dist.ProcessGroup | None:
    """The group of a pipeline stage's ranks; None for all ranks, or for one. Collective over the stage."""
    if grid.tp.size == 1 or grid.dp.size == 1:
        return grid.dp.group if grid.tp.size == 1 else grid.tp.group
    if grid.pp.size == 1:
        return None
    size = grid.tp.size * grid.dp.size
    first = grid.pp.rank * size
    return dist.new_group(list(range(first, first + size)), use_local_synchronization=True)


def pieces_of_all(mine: Sequence[Piece], grid: Grid) -> list[tuple[Piece, ...]]:
    """For each matrix the pieces of all data-parallel ranks, from this rank's. Collective."""
    if grid.dp.size == 1:
        return [(piece,) for piece in mine]
    found: list[list[Piece]] = [[] for _ in range(grid.dp.size)]
    dist.all_gather_object(found, list(mine), group=grid.dp.group)
    return list(zip(*found, strict=True))


class Exchange:
    """Some matrices, each with an owner: the rank of the stage that puts it together. Every method is collective."""

    def __init__(self, matrices: Sequence[Matrix], owners: Sequence[int], stage: Stage, dtype: torch.dtype):
        """`dtype`: of what is sent, and of whole matrices."""
        # By owner, so that what a rank packs is in order of whom it is for.
        order = sorted(range(len(matrices)), key=lambda i: owners[i])
        self.matrices = [matrices[i] for i in order]
        self.owners = [owners[i] for i in order]
        self.stage, self.dtype = stage, dtype
        me = stage.rank
        self._mine = [i for i, owner in enumerate(self.owners) if owner == me]
        self._given, self._gathered = self._sizes(gathering=True)
        self._kept, self._returned = self._sizes(gathering=False)
        # (own matrix, rank) -> where that rank's piece begins in what is received, and in what is sent back.
        self._received_at = dict(self._places(gathering=True))
        self._kept_at = dict(self._places(gathering=False))

    def apply(self, pieces: Sequence[Tensor], function: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """`function` of every whole matrix, on its owner; returns this rank's piece of each result, flat.

        Args:
            pieces: this rank's piece of each of `self.matrices`, flat; empty if it has none.
        """
        me, device = self.stage.rank, self.stage.device
        given = [
            piece
            for piece, matrix, owner in zip(pieces, self.matrices, self.owners, strict=True)
            if self.stage.gives(matrix, me, owner)
        ]
        packed = torch.cat([piece.to(device, self.dtype) for piece in given]) if given else self._empty(0)
        received = self._swap(packed, self._given, self._gathered)
        results = self._empty(sum(self._kept))
        for index in self._mine:
            parts = self._parts(index, received)
            whole = self.stage.sharding.uncut(self.matrices[index].name, parts, 0)
            self._put(index, function(whole), results)
        returned = self._swap(results, self._kept, self._returned)
        return list(returned.split([self._size(i, me) for i in range(len(self.matrices))]))

    def _parts(self, index: int, received: Tensor) -> list[Tensor]:
        """The parts of an own matrix on all tensor ranks, put together from the pieces."""
        matrix, tensor = self.matrices[index], self.stage.grid.tp.size
        parts: dict[int, Tensor] = {}
        for rank in range(self.stage.size):
            place = self._received_at.get((index, rank))
            if place is not None:
                first, size = self.stage.piece(matrix, rank)
                part = parts.setdefault(rank % tensor, received.new_empty(matrix.part[0] * matrix.part[1]))
                part[first : first + size] = received[place : place + size]
        return [parts[rank].view(matrix.part) for rank in sorted(parts)]

    def _put(self, index: int, whole: Tensor, results: Tensor) -> None:
        """Writes each rank's piece of an own matrix to where it is sent from."""
        matrix, tensor = self.matrices[index], self.stage.grid.tp.size
        parts = [self.stage.sharding.cut(matrix.name, whole, rank).reshape(-1) for rank in range(tensor)]
        for rank in range(self.stage.size):
            place = self._kept_at.get((index, rank))
            if place is not None:
                first, size = self.stage.piece(matrix, rank)
                results[place : place + size] = parts[rank % tensor][first : first + size]

    def _places(self, gathering: bool) -> Iterator[tuple[tuple[int, int], int]]:
        place = 0
        for rank in range(self.stage.size):
            for index in self._mine:
                is_sent = not gathering or self.stage.gives(self.matrices[index], rank, self.stage.rank)
                if is_sent and (size := self._size(index, rank)):
                    yield (index, rank), place
                    place += size

    def _sizes(self, gathering: bool) -> tuple[list[int], list[int]]:
        """Elements for each rank as its holder of pieces and as an owner: (to owners, from holders) if gathering, otherwise
        (to holders, from owners)."""
        holder, owner = [0] * self.stage.size, [0] * self.stage.size
        for index, (matrix, of) in enumerate(zip(self.matrices, self.owners, strict=True)):
            for rank in range(self.stage.size):
                if gathering and not self.stage.gives(matrix, rank, of):
                    continue
                if rank == self.stage.rank:
                    holder[of] += self._size(index, rank)
                if of == self.stage.rank:
                    owner[rank] += self._size(index, rank)
        return (holder, owner) if gathering else (owner, holder)

    def _size(self, index: int, rank: int) -> int:
        return self.stage.piece(self.matrices[index], rank)[1]

    def _swap(self, packed: Tensor, sent: list[int], received: list[int]) -> Tensor:
        """What every rank has for this one, in order of rank."""
        if self.stage.size == 1:
            return packed
        found = self._empty(sum(received))
        dist.all_to_all_single(found, packed, received, sent, group=self.stage.group)
        return found

    def _empty(self, count: int) -> Tensor:
        return torch.empty(count, dtype=self.dtype, device=self.stage.device)
