"""The collectives that a program may hold, as torch operators: `torch.ops.shardwise.all_reduce(x, group, …)` and so on.

Declared here with their shapes, so that programs can be traced, printed, checked and costed without any process group;
`shardwise.runtime.transport` gives them their implementation. `group` names the process group (`tp:0,1` is axis tp over ranks 0 and 1);
`impl` is one of the implementations that the cost model chose among. None changes its input or returns an alias of it.

A shift is under way while the rank computes: `begin_shift` returns a ticket, which `end_shift` exchanges for what has arrived.

A message that other work goes on beside is begun by one operator and awaited by another. Between them its source must stay as it is, and
nobody may read what is begun; so `arrived` is given the source, too:

    begun = begin_all_gather(part, …)    …    whole = arrived(begun, part)        whole is begun's memory
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "ARRIVED",
    "BEGINS",
    "COLLECTIVES",
    "LIBRARY",
    "all_gather",
    "all_reduce",
    "all_reduce_sum",
    "all_to_all",
    "begin_shift",
    "end_shift",
    "exchange_rows",
    "group_name",
    "group_ranks",
    "is_end_of_shift",
    "is_shift",
    "reduce_scatter",
]

LIBRARY = torch.library.Library("shardwise", "DEF")
LIBRARY.define("all_reduce(Tensor x, str group, str op, str impl) -> Tensor")
LIBRARY.define("all_gather(Tensor x, str group, int dim, int[] sizes, str impl) -> Tensor")
LIBRARY.define("reduce_scatter(Tensor x, str group, int dim, int[] sizes, int rank, str impl) -> Tensor")
LIBRARY.define(
    "all_to_all(Tensor x, str group, int split_dim, int[] split_sizes, int cat_dim, int[] cat_sizes, int rank, str impl) -> Tensor"
)
LIBRARY.define("exchange_rows(Tensor x, str group, Tensor send, Tensor receive, int rows, str impl) -> Tensor")
LIBRARY.define("begin_shift(Tensor x, str group, int dim, int[] sizes, int step, int rank, str impl) -> Tensor")
LIBRARY.define("end_shift(Tensor ticket, Tensor x, int dim, int size) -> Tensor")
LIBRARY.define("begin_all_gather(Tensor x, str group, int dim, int[] sizes, str impl) -> Tensor")
LIBRARY.define("begin_reduce_scatter(Tensor x, str group, int dim, int[] sizes, int rank, str impl) -> Tensor")
LIBRARY.define("arrived(Tensor(a) begun, Tensor source) -> Tensor(a)")

_ops = torch.ops.shardwise
COLLECTIVES = {
    _ops.all_reduce.default: "all_reduce",
    _ops.all_gather.default: "all_gather",
    _ops.reduce_scatter.default: "reduce_scatter",
    _ops.all_to_all.default: "all_to_all",
    _ops.exchange_rows.default: "exchange_rows",
    _ops.begin_shift.default: "shift",
    _ops.begin_all_gather.default: "all_gather",
    _ops.begin_reduce_scatter.default: "reduce_scatter",
}
BEGINS = {_ops.all_gather.default: _ops.begin_all_gather.default, _ops.reduce_scatter.default: _ops.begin_reduce_scatter.default}
"""Of collectives that other work may go on beside, the operator that begins them."""
ARRIVED = _ops.arrived.default


def _sized(x: Tensor, dim: int, size: int) -> Tensor:
    shape = list(x.shape)
    shape[dim] = size
    return x.new_empty(shape)


@torch.library.register_fake("shardwise::all_reduce", lib=LIBRARY)
def _all_reduce(x: Tensor, group: str, op: str, impl: str) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("shardwise::begin_all_gather", lib=LIBRARY)
@torch.library.register_fake("shardwise::all_gather", lib=LIBRARY)
def _all_gather(x: Tensor, group: str, dim: int, sizes: Sequence[int], impl: str) -> Tensor:
    return _sized(x, dim, sum(sizes))


@torch.library.register_fake("shardwise::begin_reduce_scatter", lib=LIBRARY)
@torch.library.register_fake("shardwise::reduce_scatter", lib=LIBRARY)
def _reduce_scatter(x: Tensor, group: str, dim: int, sizes: Sequence[int], rank: int, impl: str) -> Tensor:
    return _sized(x, dim, sizes[rank])


@torch.library.register_fake("shardwise::all_to_all", lib=LIBRARY)
def _all_to_all(
    x: Tensor, group: str, split_dim: int, split_sizes: Sequence[int], cat_dim: int, cat_sizes: Sequence[int], rank: int, impl: str
) -> Tensor:
    return _sized(_sized(x, split_dim, split_sizes[rank]), cat_dim, sum(cat_sizes))


@torch.library.register_fake("shardwise::exchange_rows", lib=LIBRARY)
def _exchange_rows(x: Tensor, group: str, send: Tensor, receive: Tensor, rows: int, impl: str) -> Tensor:
    return _sized(x, 0, rows)


@torch.library.register_fake("shardwise::begin_shift", lib=LIBRARY)
def _begin_shift(x: Tensor, group: str, dim: int, sizes: Sequence[int], step: int, rank: int, impl: str) -> Tensor:
    return torch.empty(1, dtype=torch.int64)


@torch.library.register_fake("shardwise::end_shift", lib=LIBRARY)
def _end_shift(ticket: Tensor, x: Tensor, dim: int, size: int) -> Tensor:
    return _sized(x, dim, size)


def group_name(axis: str, ranks: Sequence[int]) -> str:
    """`tp:0,1`: the process group along an axis."""
    return f"{axis}:{','.join(map(str, ranks))}"


def group_ranks(name: str) -> list[int]:
    """The global ranks of a named group."""
    return [int(rank) for rank in name.split(":")[1].split(",")]


def all_reduce(x: Tensor, group: str, op: str = "sum", impl: str = "native") -> Tensor:
    """The sum (or "max") of all ranks' x, on every rank, bitwise equal."""
    return _ops.all_reduce(x, group, op, impl)


def all_gather(x: Tensor, group: str, dim: int, sizes: Sequence[int], impl: str = "native") -> Tensor:
    """All ranks' parts joined along `dim`; `sizes`: their lengths there."""
    return _ops.all_gather(x, group, dim, list(sizes), impl)


def reduce_scatter(x: Tensor, group: str, dim: int, sizes: Sequence[int], rank: int, impl: str = "native") -> Tensor:
    """This rank's part (of `sizes[rank]` along `dim`) of the sum of all ranks' x."""
    return _ops.reduce_scatter(x, group, dim, list(sizes), rank, impl)


def all_to_all(
    x: Tensor,
    group: str,
    split_dim: int,
    split_sizes: Sequence[int],
    cat_dim: int,
    cat_sizes: Sequence[int],
    rank: int,
    impl: str = "native",
) -> Tensor:
    """Sends to each rank its piece along `split_dim` and joins what comes from each along `cat_dim`."""
    return _ops.all_to_all(x, group, split_dim, list(split_sizes), cat_dim, list(cat_sizes), rank, impl)


def exchange_rows(x: Tensor, group: str, send: Tensor, receive: Tensor, rows: int, impl: str = "native") -> Tensor:
    """Sends to each rank so many of the rows (dim 0), in the ranks' order, and joins those that come.

    send, receive: int64 [ranks], how many to and from each; rows: how many come where all ranks get equally many, for programs' shapes.
    """
    return _ops.exchange_rows(x, group, send, receive, rows, impl)


def begin_shift(x: Tensor, group: str, dim: int, sizes: Sequence[int], step: int, rank: int, impl: str = "native") -> Tensor:
    """Begins to send x to the next rank of the group, the last one's to the first, and to receive the one before's; a ticket for that.

    sizes: how long each rank's own part is along `dim`; step: how often the parts have been sent on, so x is that of rank − step.
    """
    return _ops.begin_shift(x, group, dim, list(sizes), step, rank, impl)


def end_shift(ticket: Tensor, x: Tensor, dim: int, sizes: Sequence[int], step: int, rank: int) -> Tensor:
    """What has arrived, as `begin_shift` of the same x and arguments promised; until then x must be as it was."""
    return _ops.end_shift(ticket, x, dim, sizes[(rank - step - 1) % len(sizes)])


def is_shift(target: Any) -> bool:
    """Whether an operator of a graph is `begin_shift`."""
    return target is _ops.begin_shift.default


def is_end_of_shift(target: Any) -> bool:
    """Whether an operator of a graph is `end_shift`, whose result's memory is there from the beginning of the shift."""
    return target is _ops.end_shift.default


class _AllReduceSum(torch.autograd.Function):
    """P → R: the sum, whose gradient is the sum of the ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str) -> Tensor:
        ctx.group = group
        return all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return all_reduce(gradient, ctx.group), None


def all_reduce_sum(x: Tensor, group: str) -> Tensor:
    """The sum over the group of summands, each rank's gradient being a summand, too."""
    return _AllReduceSum.apply(x, group)
