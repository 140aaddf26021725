"""Reshards: from one type to another on one axis, forward and backward.

| from → to   | forward                    | backward                   |
| S → R       | all-gather                 | reduce-scatter             |
| S → I       | all-gather                 | own part                   |
| P → I       | all-reduce                 | –                          |
| P → R       | all-reduce                 | all-reduce                 |
| P → S       | reduce-scatter             | all-gather                 |
| I → R       | –                          | all-reduce                 |
| I → S       | own part                   | all-gather                 |
| S → S'      | all-to-all                 | all-to-all                 |
| S → P       | pad with zeros             | own part                   |
| R → S       | own part                   | pad with zeros             |
| R → I       | –                          | keep on one rank           |
| I → P       | keep on one rank           | –                          |
| R → P       | keep on one rank           | keep on one rank           |

| S → E       | rows to their experts      | rows back                  |
| E → S       | rows back                  | rows to their experts      |

E is `Routed`; `shardwise.sharding.routes` has its moves. The backward of a → b is the move from the type of b's gradient to the type of
a's: the gradient of P is I, of R is P, of I is I, of S is S, of E is E.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from shardwise.sharding.collectives import all_gather, all_reduce, all_to_all, reduce_scatter
from shardwise.sharding.types import I, P, Placement, R, Routed, Shard, by_ranks, closed, in_order, lengths, opened, take

__all__ = ["Axis", "Reshard", "collective_of", "dual", "moves", "reshard", "within"]

Choose = Callable[[str, int, int], str]


@dataclass(frozen=True, kw_only=True)
class Axis:
    """A mesh axis as one rank sees it: its process group, the group's size, and this rank's place in it."""

    name: str
    group: str
    ranks: int
    rank: int


@dataclass(frozen=True, kw_only=True)
class Reshard:
    """From `source` to `target` on `axis`, of a tensor whose dim (where a Shard says so) has `size` elements over all the axis' ranks.

    choose: (kind of collective, bytes of its message as `shardwise.cost.collectives` counts them, ranks) → implementation.
    """

    source: Placement
    target: Placement
    axis: Axis
    source_size: int = 0
    target_size: int = 0
    choose: Choose = lambda kind, nbytes, ranks: "native"

    def forward(self, x: Tensor) -> Tensor:
        return self._move(x, self.source, self.target)

    def backward(self, gradient: Tensor) -> Tensor:
        return self._move(gradient, dual(self.target), dual(self.source))

    def _move(self, x: Tensor, source: Placement, target: Placement) -> Tensor:
        axis = self.axis
        match source, target:
            case Shard(), Shard():
                return self._exchange(x, source, target)
            case Shard(), _ if target == P:
                return self._pad(x, source)
            case Shard(), _:
                return self._gather(x, source)
            case _, Shard() if source == P:
                return self._reduce_scatter(x, target)
            case _, Shard():
                return take(x, target, axis.ranks, axis.rank)
            case _ if source == P and target != P:
                return all_reduce(x, axis.group, "sum", self.choose("all_reduce", x.nbytes, axis.ranks))
            case _ if target == P and source != P:
                return x if axis.rank == 0 else torch.zeros_like(x)
            case _:
                return x

    def _size(self, shard: Shard) -> int:
        return self.source_size if shard == self.source else self.target_size

    def _gather(self, x: Tensor, shard: Shard) -> Tensor:
        sizes = lengths(self._size(shard), shard, self.axis.ranks)
        impl = self.choose("all_gather", _resized_bytes(x, shard.dim, sum(sizes)), self.axis.ranks)
        if shard.blocks == 1:
            return self._in_order(all_gather(x, self.axis.group, shard.dim, sizes, impl), shard.dim, shard)
        pieces = opened(x, shard.dim, shard.blocks)
        whole = all_gather(pieces, self.axis.group, shard.dim + 1, [size // shard.blocks for size in sizes], impl)
        return closed(self._in_order(whole, shard.dim + 1, shard), shard.dim)

    def _in_order(self, blocks: Tensor, dim: int, shard: Shard) -> Tensor:
        return in_order(blocks, dim, self._size(shard), shard, self.axis.ranks)

    def _by_ranks(self, blocks: Tensor, dim: int, shard: Shard) -> Tensor:
        return by_ranks(blocks, dim, self._size(shard), shard, self.axis.ranks)

    def _reduce_scatter(self, x: Tensor, shard: Shard) -> Tensor:
        sizes = lengths(self._size(shard), shard, self.axis.ranks)
        impl = self.choose("reduce_scatter", x.nbytes, self.axis.ranks)
        if shard.blocks == 1:
            return reduce_scatter(self._by_ranks(x, shard.dim, shard), self.axis.group, shard.dim, sizes, self.axis.rank, impl)
        pieces = self._by_ranks(opened(x, shard.dim, shard.blocks), shard.dim + 1, shard)
        part = reduce_scatter(pieces, self.axis.group, shard.dim + 1, [size // shard.blocks for size in sizes], self.axis.rank, impl)
        return closed(part, shard.dim)

    def _exchange(self, x: Tensor, source: Shard, target: Shard) -> Tensor:
        if source.dim == target.dim:
            return take(self._gather(x, source), target, self.axis.ranks, self.axis.rank)
        ranks = self.axis.ranks
        give, get = lengths(self._size(target), target, ranks), lengths(self._size(source), source, ranks)
        impl = self.choose("all_to_all", _resized_bytes(x, source.dim, sum(get)) // ranks, ranks)
        for shard in sorted((source, target), key=lambda each: -each.dim):  # every dim as (blocks, pieces)
            x = opened(x, shard.dim, shard.blocks)
        places = {shard: shard.dim + (2 if shard.dim > min(source.dim, target.dim) else 1) for shard in (source, target)}
        gives, gets = [size // target.blocks for size in give], [size // source.blocks for size in get]
        x = self._by_ranks(x, places[target], target)
        x = all_to_all(x, self.axis.group, places[target], gives, places[source], gets, self.axis.rank, impl)
        x = self._in_order(x, places[source], source)
        for shard in sorted((source, target), key=lambda each: each.dim):
            x = closed(x, shard.dim)
        return x

    def _pad(self, x: Tensor, shard: Shard) -> Tensor:
        """The whole tensor, zero outside this rank's part."""
        sizes = lengths(self._size(shard), shard, self.axis.ranks)
        before, own = sum(sizes[: self.axis.rank]) // shard.blocks, sizes[self.axis.rank] // shard.blocks
        after = self._size(shard) // shard.blocks - before - own
        if shard.blocks == 1:
            return self._in_order(_padded(x, shard.dim, before, after), shard.dim, shard)
        padded = _padded(opened(x, shard.dim, shard.blocks), shard.dim + 1, before, after)
        return closed(self._in_order(padded, shard.dim + 1, shard), shard.dim)


def _resized_bytes(x: Tensor, dim: int, size: int) -> int:
    """Bytes of x, were its dim `size` long: the same on ranks with uneven parts, so that all choose one implementation."""
    others = prod(length for place, length in enumerate(x.shape) if place != dim)
    return x.element_size() * others * size


def _padded(x: Tensor, dim: int, before: int, after: int) -> Tensor:
    """With so many zeros around it along a dim."""
    return torch.constant_pad_nd(x, [0, 0] * (x.dim() - 1 - dim) + [before, after])


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Reshard) -> Tensor:
        ctx.step = step
        result = step.forward(x)
        return x.view_as(x) if result is x else result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.step.backward(gradient), None


def reshard(x: Tensor, step: Reshard) -> Tensor:
    """`x` of the step's source type as its target type; differentiable."""
    return _Function.apply(x, step)


def moves(
    made: Mapping[str, Placement], wanted: Mapping[str, Placement], mesh: Mapping[str, int] | None = None
) -> list[tuple[str, Placement]]:
    """The changes of one axis each, one after the other, that take a value from one type to another (axes outermost first).

    Of the axes that split one dim only the innermost can be changed alone. So an axis that keeps or gets a split of a dim inside another
    one's that changes has the dim whole meanwhile:

        S(0) on cp, S(0) on tp → R on cp, S(0) on tp:     tp to I, cp to R, tp to S(0)

    But where the outer one splits each of blocks of which the inner one's ranks have whole ones, each of these ranks has the same elements
    with and without it (mesh: axis → ranks; without it this is not looked for):

        S(0) on tp = 2 → S(0, blocks=2) on cp, S(0) on tp:     cp to S(0, blocks=2)

    Rows leave their home last and are back there first: how the axes inside split them is that of their home.
    """
    there = {axis: each for axis, each in wanted.items() if isinstance(each, Routed)}
    back = {axis: each for axis, each in made.items() if isinstance(each, Routed)}
    if there == back and all(made[axis] == wanted[axis] or 0 not in _dims(made[axis], wanted[axis]) for axis in made):
        return _moves(made, wanted, mesh)
    homes = [{axis: each.home for axis, each in routed.items()} for routed in (back, there)]
    between = _moves({**made, **homes[0]}, {**wanted, **homes[1]}, mesh)
    return [*homes[0].items(), *between, *there.items()]


def _dims(*placements: Placement) -> set[int]:
    return {each.dim for each in placements if isinstance(each, Shard)}


def _moves(made: Mapping[str, Placement], wanted: Mapping[str, Placement], mesh: Mapping[str, int] | None) -> list[tuple[str, Placement]]:
    axes = list(made)
    first: list[tuple[str, Placement]] = []
    last: list[tuple[str, Placement]] = []
    for index in reversed(range(len(axes))):
        axis, outside = axes[index], [each for each in axes[:index] if made[each] != wanted[each]]
        source, target = made[axis], wanted[axis]
        ranks = mesh[axis] if mesh is not None and source == target else 0
        changing = {
            shard.dim
            for each in outside
            for shard in (made[each], wanted[each])
            if isinstance(shard, Shard) and not _has_blocks(target, shard, ranks)
        }
        if isinstance(target, Shard) and target.dim in changing:
            if isinstance(source, Shard) and source.dim in changing:
                first.append((axis, I))
            last.insert(0, (axis, target))
        elif source != target:
            first.append((axis, target))
    return first + last


def _has_blocks(inner: Placement, outer: Shard, ranks: int) -> bool:
    """Whether each of an inner axis' ranks (0: not known) has whole blocks of what an outer one splits."""
    return ranks > 0 and inner == Shard(outer.dim) and outer.blocks % ranks == 0


def within(placement: Placement, inner: Mapping[str, Placement], mesh: Mapping[str, int]) -> Placement:
    """An outer axis' placement as one of what a rank of the inner axes holds, which splits the same dim into whole blocks of it."""
    if isinstance(placement, Shard):
        ranks = prod(mesh[axis] for axis, each in inner.items() if isinstance(each, Shard) and each.dim == placement.dim)
        assert placement.blocks % ranks == 0, f"{placement} is not in {ranks} times so many blocks"
        return replace(placement, blocks=placement.blocks // ranks)
    return placement


def dual(placement: Placement) -> Placement:
    """The type of the gradient of a value of this type."""
    if isinstance(placement, (Shard, Routed)):
        return placement
    duals: dict[Placement, Placement] = {P: I, R: P, I: I}
    return duals[placement]


def collective_of(source: Placement, target: Placement) -> str:
    """Which collective takes a value from one type to the other; "" for none.

    A gradient's is `collective_of(dual(target), dual(source))`.
    """
    match source, target:
        case (Routed(), _) | (_, Routed()):
            return "" if source == target else "all_to_all"
        case Shard(), Shard():
            if source == target:
                return ""
            return "all_gather" if source.dim == target.dim else "all_to_all"
        case Shard(), _:
            return "" if target == P else "all_gather"
        case _, Shard():
            return "reduce_scatter" if source == P else ""
        case _:
            return "all_reduce" if source == P and target != P else ""
