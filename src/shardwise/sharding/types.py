"""What a rank holds of a tensor, on one mesh axis.

| type | forward value                | gradient                                  |
| S    | each rank holds a part       | each rank holds the same part of it       |
| P    | each rank holds a summand    | every rank holds it whole                 |
| R    | every rank holds it whole    | each rank holds a summand                 |
| I    | every rank holds it whole    | every rank holds it whole                 |

A tensor has one such type on every axis. Where several axes split one dim, they do so in the mesh's order of axes, outermost first; each
later one divides what the earlier ones left.

A part need not be one run of indices. A dim is read as (blocks, pieces, unit), row-major, and the pieces are what is divided:

    Shard(0)                     0 1 2 | 3 4 5
    Shard(0, blocks=2)           0 1 2 3 4 5 6 7  →  0 1 4 5 | 2 3 6 7      (a fused q,k,v weight has blocks=3)
    Shard(0, unit=2), 3 pieces   0 1 2 3 | 4 5                              (heads of 2 over 2 ranks: never half a head)
    Shard(0, owner=1)            – | 0 1 2 3                                (a whole table on one rank)
    Shard(0, shares=(3, 1))      0 1 2 3 4 5 | 6 7                          (samples by the speed of unlike devices)
    Shard(0, mirrored=True)      0 1 6 7 | 2 3 4 5                          (tokens of which each looks at those before it)

Pieces that the ranks do not divide are spread evenly, the first ranks getting one more; shares, where there are some, divide them exactly.
Mirrored, the pieces are spread over twice as many runs, of which a rank has one counted from the front and one from the back.

Rows that are where their experts are, `Routed`, are a split of dim 0 that the data decides: how many a rank holds is known when it runs.
The gradient is split likewise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = [
    "I",
    "Invariant",
    "P",
    "Part",
    "Partial",
    "Placement",
    "R",
    "Replicate",
    "Routed",
    "Shard",
    "Type",
    "by_ranks",
    "closed",
    "in_order",
    "join",
    "local_shape",
    "opened",
    "part",
    "take",
]


@dataclass(frozen=True)
class Shard:
    """Dim `dim`, read as (blocks, pieces, unit), with its pieces divided among the ranks, evenly or in proportion to `shares` (which have
    no common divisor), or evenly with half from each end (`mirrored`); or all of it on the rank `owner`."""

    dim: int
    blocks: int = 1
    unit: int = 1
    owner: int | None = None
    shares: tuple[int, ...] = ()
    mirrored: bool = False

    def __repr__(self) -> str:
        extra = "".join(f", {name}={value}" for name, value in (("blocks", self.blocks), ("unit", self.unit)) if value != 1)
        extra += "" if self.owner is None else f", owner={self.owner}"
        extra += f", shares={':'.join(map(str, self.shares))}" if self.shares else ""
        extra += ", mirrored" if self.mirrored else ""
        return f"S({self.dim}{extra})"


@dataclass(frozen=True)
class Partial:
    """Each rank holds a summand."""

    def __repr__(self) -> str:
        return "P"


@dataclass(frozen=True)
class Replicate:
    """Every rank holds the whole; each one's gradient is a summand."""

    def __repr__(self) -> str:
        return "R"


@dataclass(frozen=True)
class Invariant:
    """Every rank holds the whole, and the whole gradient."""

    def __repr__(self) -> str:
        return "I"


@dataclass(frozen=True)
class Routed:
    """Each rank holds the rows (of dim 0) whose expert it has: expert number i of n is on rank i // (n / ranks).

    by: the name of the tensor that says which expert each row has; home: where the rows are otherwise; experts: n.
    """

    by: str
    home: Shard
    experts: int

    def __repr__(self) -> str:
        return f"E({self.by})"


Placement = Shard | Partial | Replicate | Invariant | Routed
P, R, I = Partial(), Replicate(), Invariant()  # noqa: E741 - the field's letters

Type = Mapping[str, Placement]  # axis → placement, in the mesh's order of axes


@dataclass(frozen=True, kw_only=True)
class Part:
    """A rank's part of a dim of `size`: of each of `blocks` equal blocks the elements from `start` to `stop`, and those of `more`."""

    size: int
    blocks: int
    start: int
    stop: int
    more: tuple[int, int] = (0, 0)

    @property
    def block(self) -> int:
        """Elements of a block."""
        return self.size // self.blocks

    @property
    def length(self) -> int:
        """Elements that the rank holds."""
        return self.blocks * sum(stop - start for start, stop in self.runs)

    @property
    def runs(self) -> tuple[tuple[int, int], ...]:
        """The runs (start, stop) of each block."""
        return ((self.start, self.stop), self.more) if self.more[1] else ((self.start, self.stop),)

    def indices(self, device: torch.device | None = None) -> Tensor:
        """The held elements' indices in the dim, int64 [length]."""
        within = torch.cat([torch.arange(*run, device=device) for run in self.runs])
        return (torch.arange(self.blocks, device=device)[:, None] * self.block + within[None]).reshape(-1)


def part(size: int, shard: Shard, ranks: int, rank: int) -> Part:
    """What `rank` of `ranks` holds of a dim of `size` elements."""
    if shard.owner is not None:
        assert shard.blocks == shard.unit == 1 and shard.owner < ranks, f"{shard} among {ranks} ranks"
        return Part(size=size, blocks=1, start=0 if rank <= shard.owner else size, stop=0 if rank < shard.owner else size)
    pieces, rest = divmod(size, shard.blocks * shard.unit)
    assert rest == 0, f"a dim of {size} does not consist of {shard.blocks} blocks of pieces of {shard.unit}"
    if shard.shares:
        each, rest = divmod(pieces, sum(shard.shares))
        assert rest == 0 and len(shard.shares) == ranks, f"{pieces} pieces in shares of {shard.shares} among {ranks} ranks"
        start, stop = (each * sum(shard.shares[:end]) * shard.unit for end in (rank, rank + 1))
        return Part(size=size, blocks=shard.blocks, start=start, stop=stop)
    if shard.mirrored:
        front, back = (_run(pieces, shard.unit, 2 * ranks, run) for run in (rank, 2 * ranks - 1 - rank))
        return Part(size=size, blocks=shard.blocks, start=front[0], stop=front[1], more=back)
    start, stop = _run(pieces, shard.unit, ranks, rank)
    return Part(size=size, blocks=shard.blocks, start=start, stop=stop)


def _run(pieces: int, unit: int, runs: int, run: int) -> tuple[int, int]:
    """The elements, from and to, of one of so many runs of pieces."""
    each, more = divmod(pieces, runs)
    start = run * each + min(run, more)
    return start * unit, (start + each + (run < more)) * unit


def lengths(size: int, shard: Shard, ranks: int) -> list[int]:
    """How many elements each rank holds."""
    return [part(size, shard, ranks, rank).length for rank in range(ranks)]


def canonical(shard: Shard, size: int, ranks: int) -> Shard:
    """The simplest equal description: the unit is dropped where the ranks divide the pieces evenly anyway."""
    if shard.owner is not None:
        return shard
    pieces = size // (shard.blocks * shard.unit)
    return replace(shard, unit=1) if shard.shares or pieces % (2 * ranks if shard.mirrored else ranks) == 0 else shard


def take(tensor: Tensor, shard: Shard, ranks: int, rank: int) -> Tensor:
    """A rank's part of the whole tensor (a view where blocks == 1)."""
    mine = part(tensor.shape[shard.dim], shard, ranks, rank)
    if mine.blocks == 1:
        return _runs(tensor, shard.dim, mine)
    return closed(_runs(opened(tensor, shard.dim, mine.blocks), shard.dim + 1, mine), shard.dim)


def _runs(block: Tensor, dim: int, mine: Part) -> Tensor:
    runs = [block.narrow(dim, start, stop - start) for start, stop in mine.runs]
    return runs[0] if len(runs) == 1 else torch.cat(runs, dim)


def opened(tensor: Tensor, dim: int, blocks: int) -> Tensor:
    """With the dim as (blocks, what a block has)."""
    sizes = list(tensor.shape)
    return _viewed(tensor, [*sizes[:dim], blocks, sizes[dim] // blocks, *sizes[dim + 1 :]])


def closed(tensor: Tensor, dim: int) -> Tensor:
    """With the dim and the next as one."""
    sizes = list(tensor.shape)
    return _viewed(tensor, [*sizes[:dim], sizes[dim] * sizes[dim + 1], *sizes[dim + 2 :]])


def _viewed(tensor: Tensor, sizes: list[int]) -> Tensor:
    """In another shape; when traced, it takes any number of rows where their dim stays alone."""
    if sizes[0] == tensor.shape[0] and 0 not in sizes[1:]:
        sizes[0] = -1
    return tensor.contiguous().view(sizes)


def join(parts: list[Tensor], shard: Shard) -> Tensor:
    """The whole tensor from all ranks' parts."""
    size = sum(each.shape[shard.dim] for each in parts)
    if shard.blocks == 1:
        return in_order(torch.cat(parts, shard.dim), shard.dim, size, shard, len(parts))
    opened = [each.unflatten(shard.dim, (shard.blocks, -1)) for each in parts]
    return in_order(torch.cat(opened, shard.dim + 1), shard.dim + 1, size, shard, len(parts)).flatten(shard.dim, shard.dim + 1)


def in_order(blocks: Tensor, dim: int, size: int, shard: Shard, ranks: int) -> Tensor:
    """All ranks' parts, one after the other along `dim` in each block of a dim of `size`, as they lie in the whole."""
    if not shard.mirrored:
        return blocks
    runs = [stop - start for rank in range(ranks) for start, stop in part(size, shard, ranks, rank).runs]
    found = blocks.split_with_sizes(runs, dim)
    return torch.cat([*found[::2], *found[::-1][::2]], dim)


def by_ranks(blocks: Tensor, dim: int, size: int, shard: Shard, ranks: int) -> Tensor:
    """What `in_order` takes, from what it gives."""
    if not shard.mirrored:
        return blocks
    parts = [part(size, shard, ranks, rank) for rank in range(ranks)]
    return torch.cat([blocks.narrow(dim, start, stop - start) for each in parts for start, stop in each.runs], dim)


def local_shape(shape: tuple[int, ...], type_: Type, mesh: Mapping[str, int], coordinates: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of what the rank at `coordinates` holds of a tensor of `shape`; of what is routed, were all experts asked for equally."""
    sizes = list(shape)
    for axis, placement in type_.items():
        placement = placement.home if isinstance(placement, Routed) else placement
        if isinstance(placement, Shard):
            sizes[placement.dim] = part(sizes[placement.dim], placement, mesh[axis], coordinates[axis]).length
    return tuple(sizes)
