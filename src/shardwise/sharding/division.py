"""How data ranks divide what each of them would otherwise hold whole: ZeRO (Rajbhandari et al. 2020).

    zero   parameter   gradient   optimizer's state        0: all whole
    1      whole       whole      part
    2      whole       part       part
    3      part        part       part                     gathered before use, not kept between

A parameter that all ranks of the data axes hold alike (whole, or the same part along the tensor axis) is divided along one of its dims; the
ranks' lengths may differ and may be zero. With `shard` = k the data ranks divide in groups of k neighbours, and hold copies across them:

    6 data ranks, shard=3      0 1 2 | 3 4 5      rank 4 divides with 3 and 5, and holds what rank 1 holds
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from torch import Tensor

from shardwise.sharding.collectives import group_name
from shardwise.sharding.types import Shard, lengths, part, take

__all__ = ["Division", "divided_dim", "division_of"]


@dataclass(frozen=True, kw_only=True)
class Division:
    """One rank's view: it is number `rank` of the `ranks` of `group` that divide `dim`; copies: the group that holds the same part, ""
    where nobody else does."""

    dim: int
    ranks: int
    rank: int
    group: str
    copies: str = ""

    @property
    def shard(self) -> Shard:
        """As a type of the group."""
        return Shard(self.dim)

    def lengths(self, shape: Sequence[int]) -> list[int]:
        """How long the dim is on each rank."""
        return lengths(shape[self.dim], self.shard, self.ranks)

    def shape(self, shape: Sequence[int], rank: int | None = None) -> tuple[int, ...]:
        """Of a rank's part, this one's by default."""
        mine = part(shape[self.dim], self.shard, self.ranks, self.rank if rank is None else rank)
        return (*shape[: self.dim], mine.length, *shape[self.dim + 1 :])

    def take(self, tensor: Tensor, rank: int | None = None) -> Tensor:
        """A rank's part, this one's by default (a view)."""
        return take(tensor, self.shard, self.ranks, self.rank if rank is None else rank)


def divided_dim(shape: Sequence[int], ranks: int) -> int | None:
    """The dim along which ranks divide a tensor: the first that is long enough for all of them, else the longest; None for a scalar.

    Parts along the first dim are one run of memory each, so it goes before dims that divide more evenly.
    """
    if not shape:
        return None
    short = len(list(takewhile(lambda size: size < ranks, shape)))
    return short if short < len(shape) else max(range(len(shape)), key=lambda dim: (shape[dim], -dim))


def division_of(shape: Sequence[int], axes: Sequence[str], members: Sequence[int], rank: int, shard: int = 0) -> Division | None:
    """How `rank` divides a tensor of `shape` with the `members` of the data axes (`axes`, their names): all of them, or groups of `shard`.

    None where there is nothing to divide.
    """
    each, place = shard or len(members), members.index(rank)
    dim = divided_dim(shape, each)
    if each == 1 or dim is None:
        return None
    first = place // each * each
    if each == len(members):
        return Division(dim=dim, ranks=each, rank=place, group=group_name("+".join(axes), members))
    group, copies = members[first : first + each], members[place % each :: each]
    return Division(dim=dim, ranks=each, rank=place - first, group=group_name("shard", group), copies=group_name("copies", copies))
