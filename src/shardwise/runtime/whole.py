"""Parameters of which ranks hold parts and which their optimizer must see whole: one rank gathers parameter and gradient, steps, and
sends the parts back.

    rank 0   a₀ b₀ ──a₀──▶ a ──step──▶ a ──▶ a₀ b₀
    rank 1   a₁ b₁ ──b₁──▶ b ──step──▶ b ──▶ a₁ b₁          rank 0 owns a, rank 1 owns b

The ranks that divide a parameter (along the tensor axis, and the data ranks of ZeRO) share out what they divide by size, so that each has
about its share of the optimizer's states and work. Ranks that hold copies of all parts do the same beside them. Nothing of what is gathered
is kept between steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import prod

import torch
from torch import Tensor, nn

from shardwise.errors import LayoutError
from shardwise.program.program import ParameterPart, Program
from shardwise.runtime.transport import Transport
from shardwise.sharding.collectives import group_ranks
from shardwise.sharding.division import Division, divided_dim
from shardwise.sharding.types import Shard, join, part, take

__all__ = ["WholeParameters", "is_split"]


def is_split(held: ParameterPart) -> bool:
    """Whether ranks hold, or update, parts of the parameter."""
    return held.division is not None or any(isinstance(each, Shard) for axis, each in held.type.items() if axis != "mb")


class WholeParameters:
    """names: of the parameters that are to be updated whole. parts: name → what this rank has of each, with its gradient.

    of: those that this rank owns, for its optimizer; between `collect` and `spread` they and their gradients are there.
    """

    def __init__(
        self, program: Program, parts: Mapping[str, nn.Parameter], names: Iterable[str], transport: Transport, device: torch.device
    ) -> None:
        self.parts, self.rank, self.transport = parts, program.rank, transport
        wanted = set(names)
        grids = [_Grid.of(held, program) for held in sorted(program.parameters, key=lambda each: each.name) if held.name in wanted]
        self.owned = dict(_owners(grids))
        self.grids = grids
        mine = [grid for grid in grids if self.owned[grid.held.name] == self.rank]
        self.of = {grid.held.name: nn.Parameter(torch.empty(grid.held.shape, dtype=grid.held.wide, device=device)) for grid in mine}

    def release(self) -> None:
        """Frees the memory of what is owned, until it is collected."""
        for parameter in self.of.values():
            parameter.data, parameter.grad = parameter.data.new_empty((0,) * max(parameter.dim(), 1)), None

    @torch.no_grad()
    def collect(self) -> None:
        """Parameters and gradients of all ranks' parts, whole on their owners."""
        sends: list[tuple[Tensor, int]] = []
        receives: list[tuple[Tensor, int]] = []
        arriving: dict[str, list[dict[int, Tensor]]] = {}
        for grid in self.grids:
            own = self.parts[grid.held.name]
            assert own.grad is not None, f"{grid.held.name} has no gradient"
            owner = self.owned[grid.held.name]
            for number, mine in enumerate((own.detach(), own.grad)):
                if owner != self.rank:
                    sends += [(mine.contiguous(), owner)] if mine.numel() else []
                    continue
                pieces = {rank: mine if rank == self.rank else mine.new_empty(shape) for rank, shape in grid.shapes()}
                arriving.setdefault(grid.held.name, [{}, {}])[number] = pieces
                receives += [(piece, rank) for rank, piece in pieces.items() if rank != self.rank and piece.numel()]
        self.transport.swap(sends, receives)
        for grid in self.grids:
            if grid.held.name in self.of:
                values, gradients = arriving.pop(grid.held.name)
                self.of[grid.held.name].data = grid.joined(values)
                self.of[grid.held.name].grad = grid.joined(gradients)

    @torch.no_grad()
    def spread(self) -> None:
        """The owners' updated parameters into all ranks' parts."""
        sends: list[tuple[Tensor, int]] = []
        receives: list[tuple[Tensor, int]] = []
        places: list[tuple[Tensor, Tensor]] = []
        for grid in self.grids:
            own, owner = self.parts[grid.held.name].detach(), self.owned[grid.held.name]
            if owner == self.rank:
                pieces = dict(grid.pieces(self.of[grid.held.name].detach()))
                places.append((own, pieces.pop(self.rank)))
                sends += [(piece.contiguous(), rank) for rank, piece in pieces.items() if piece.numel()]
            elif own.numel():
                places.append((own, torch.empty_like(own, memory_format=torch.contiguous_format)))
                receives.append((places[-1][1], owner))
        self.transport.swap(sends, receives)
        for own, piece in places:
            own.copy_(piece)
        self.release()


@dataclass(frozen=True, kw_only=True)
class _Grid:
    """The ranks that divide one parameter: those of the tensor axis, each with the data ranks that divide what it holds of it.

    rows: for each rank of the tensor axis (one, where it holds the whole) the ranks of the division, in their orders.
    """

    held: ParameterPart
    shard: Shard | None
    rows: tuple[tuple[int, ...], ...] = field(default=())

    @staticmethod
    def of(held: ParameterPart, program: Program) -> _Grid:
        split = [(axis, each) for axis, each in held.type.items() if isinstance(each, Shard) and axis != "mb"]
        if len(split) > 1:
            raise LayoutError(
                f"the optimizer needs {held.name} whole, which is split over {' and '.join(axis for axis, _ in split)}; use one of these "
                "axes alone, or an optimizer that treats each element alone, such as AdamW"
            )
        along = program.groups[split[0][0]] if split else (program.rank,)
        division = group_ranks(held.division.group) if held.division else (program.rank,)
        rows = tuple(tuple(rank + first - program.rank for rank in division) for first in along)
        return _Grid(held=held, shard=split[0][1] if split else None, rows=rows)

    @property
    def ranks(self) -> tuple[int, ...]:
        """All of them."""
        return tuple(sorted(rank for row in self.rows for rank in row))

    def _local(self, place: int) -> tuple[int, ...]:
        """What a rank of the tensor axis holds."""
        shape, shard = self.held.shape, self.shard
        if shard is None:
            return shape
        return (*shape[: shard.dim], part(shape[shard.dim], shard, len(self.rows), place).length, *shape[shard.dim + 1 :])

    def _division(self, place: int) -> Division | None:
        """How the data ranks divide that. Ranks that hold unlike lengths may divide other dims."""
        if self.held.division is None:
            return None
        dim = divided_dim(self._local(place), self.held.division.ranks)
        assert dim is not None
        return replace(self.held.division, dim=dim)

    def shapes(self) -> Iterator[tuple[int, tuple[int, ...]]]:
        """Each rank's part."""
        for place, row in enumerate(self.rows):
            division, local = self._division(place), self._local(place)
            for number, rank in enumerate(row):
                yield rank, local if division is None else division.shape(local, number)

    def pieces(self, whole: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Each rank's part of the whole."""
        for place, row in enumerate(self.rows):
            division = self._division(place)
            local = whole if self.shard is None else take(whole, self.shard, len(self.rows), place)
            for number, rank in enumerate(row):
                yield rank, local if division is None else division.take(local, number)

    def joined(self, pieces: Mapping[int, Tensor]) -> Tensor:
        """The whole from all ranks' parts."""
        rows = []
        for place, row in enumerate(self.rows):
            division = self._division(place)
            rows.append(pieces[row[0]] if division is None else torch.cat([pieces[rank] for rank in row], division.dim))
        return rows[0].clone() if self.shard is None else join(rows, self.shard)


def _owners(grids: Iterable[_Grid]) -> Iterator[tuple[str, int]]:
    """Name → owner: the largest first, each to the rank that has least of those that the same ranks divide."""
    loads: dict[tuple[int, ...], dict[int, int]] = {}
    for grid in sorted(grids, key=lambda each: (-prod(each.held.shape), each.held.name)):
        load = loads.setdefault(grid.ranks, dict.fromkeys(grid.ranks, 0))
        owner = min(load, key=lambda rank: (load[rank], rank))
        load[owner] += prod(grid.held.shape)
        yield grid.held.name, owner
