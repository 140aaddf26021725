"""How a rank's messages travel: over torch.distributed, or (`in_process`) between threads that stand for ranks.

The collectives of a program (`torch.ops.shardwise.*`) find their transport through `using`, which an executor enters for a step. What is
begun and not awaited yet is known by its result's memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import count
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from shardwise._torch import find_group
from shardwise.runtime import collectives
from shardwise.runtime.collectives import Finish
from shardwise.sharding.collectives import LIBRARY, group_ranks

__all__ = ["Distributed", "Transport", "using"]


class Work(Protocol):
    """A message under way."""

    def wait(self) -> object:
        """Returns when it has arrived (a receive) or its tensor is free again (a send)."""


class Sending(Work, Protocol):
    """A message that this rank sends."""

    def is_completed(self) -> bool:
        """Whether its tensor is free again, as far as the backend knows."""


class Transport(Protocol):
    """What one rank can say to others. `group` is a name of `shardwise.sharding.collectives.group_name`; ranks are global."""

    @property
    def under_way(self) -> dict[int, Finish]:
        """Address of a result → what ends its message."""

    def all_reduce(self, x: Tensor, group: str, op: str, impl: str) -> Tensor:
        """As `shardwise.runtime.collectives`, as are the next three."""

    def all_gather(self, x: Tensor, group: str, dim: int, sizes: Sequence[int], impl: str) -> Tensor: ...

    def reduce_scatter(self, x: Tensor, group: str, dim: int, sizes: Sequence[int], impl: str) -> Tensor: ...

    def all_to_all(
        self, x: Tensor, group: str, split_dim: int, split_sizes: Sequence[int], cat_dim: int, cat_sizes: Sequence[int], impl: str
    ) -> Tensor: ...

    def exchange_rows(self, x: Tensor, group: str, send: Sequence[int], receive: Sequence[int], impl: str) -> Tensor:
        """So many rows to and from each rank."""

    def begin_shift(self, x: Tensor, received: Tensor, group: str) -> Finish:
        """Begins to send a contiguous x to the next rank of the group and to receive from the one before; the returned function waits."""

    def begin_all_gather(self, x: Tensor, group: str, dim: int, sizes: Sequence[int], impl: str) -> tuple[Tensor, Finish]:
        """As `all_gather`, begun: its result, and the function that waits for it. Until then x must stay as it is. All ranks of a group
        begin messages in one order."""

    def begin_reduce_scatter(self, x: Tensor, group: str, dim: int, sizes: Sequence[int], impl: str) -> tuple[Tensor, Finish]: ...

    def sum_in_place(self, x: Tensor, group: str, impl: str) -> None:
        """x becomes the sum over the group."""

    def begin_sum(self, x: Tensor, group: str, impl: str) -> Finish:
        """Begins to make x the sum over the group; the returned function waits for it."""

    def swap(self, sends: Sequence[tuple[Tensor, int]], receives: Sequence[tuple[Tensor, int]]) -> None:
        """Sends and receives (contiguous tensor, peer), all at once; between two ranks both sides name them in one order."""

    def send(self, x: Tensor, peer: int) -> Sending:
        """Begins to send x, which must not change before the end."""

    def receive(self, x: Tensor, peer: int) -> Work:
        """Begins to receive into x."""


class Distributed:
    """torch.distributed's process groups."""

    def __init__(self) -> None:
        self.under_way: dict[int, Finish] = {}
        self.begun: Counter[str] = Counter()  # messages of each group

    def _number(self, group: str) -> int:
        """Of one more message that is begun, from 1 on; the same on all ranks of the group. Far fewer are ever under way at once."""
        self.begun[group] += 1
        return 1 + self.begun[group] % 1024

    def all_reduce(self, x: Tensor, group: str, op: str, impl: str) -> Tensor:
        return collectives.all_reduce(x, find_group(group), impl, reduction=op)  # type: ignore[arg-type]

    def all_gather(self, x: Tensor, group: str, dim: int, sizes: Sequence[int], impl: str) -> Tensor:
        return collectives.all_gather(x, dim, sizes, find_group(group), impl)

    def reduce_scatter(self, x: Tensor, group: str, dim: int, sizes: Sequence[int], impl: str) -> Tensor:
        return collectives.reduce_scatter(x, dim, sizes, find_group(group), impl)

    def all_to_all(
        self, x: Tensor, group: str, split_dim: int, split_sizes: Sequence[int], cat_dim: int, cat_sizes: Sequence[int], impl: str
    ) -> Tensor:
        return collectives.all_to_all(x, split_dim, split_sizes, cat_dim, cat_sizes, find_group(group), impl)

    def exchange_rows(self, x: Tensor, group: str, send: Sequence[int], receive: Sequence[int], impl: str) -> Tensor:
        return collectives.all_to_all(x, 0, send, 0, receive, find_group(group), impl)

    def begin_shift(self, x: Tensor, received: Tensor, group: str) -> Finish:
        return collectives.begin_shift(x, received, find_group(group))

    def sum_in_place(self, x: Tensor, group: str, impl: str) -> None:
        collectives.all_reduce(x, find_group(group), impl, inplace=True)

    def begin_all_gather(self, x: Tensor, group: str, dim: int, sizes: Sequence[int], impl: str) -> tuple[Tensor, Finish]:
        return collectives.begin_all_gather(x, dim, sizes, find_group(group), impl, self._number(group))

    def begin_reduce_scatter(self, x: Tensor, group: str, dim: int, sizes: Sequence[int], impl: str) -> tuple[Tensor, Finish]:
        return collectives.begin_reduce_scatter(x, dim, sizes, find_group(group), impl, self._number(group))

    def begin_sum(self, x: Tensor, group: str, impl: str) -> Finish:
        return collectives.begin_all_reduce(x, find_group(group), impl, self._number(group))

    def swap(self, sends: Sequence[tuple[Tensor, int]], receives: Sequence[tuple[Tensor, int]]) -> None:
        operations = [dist.P2POp(dist.irecv, x, peer) for x, peer in receives] + [dist.P2POp(dist.isend, x, peer) for x, peer in sends]
        for work in dist.batch_isend_irecv(operations) if operations else []:
            work.wait()

    def send(self, x: Tensor, peer: int) -> Any:
        return dist.isend(x, peer)

    def receive(self, x: Tensor, peer: int) -> Any:
        return dist.irecv(x, peer)


_current: ContextVar[Transport] = ContextVar("transport", default=Distributed())  # noqa: B039 - a process has one


@contextmanager
def using(transport: Transport) -> Iterator[None]:
    """Inside, this thread's collective operators go over the transport."""
    token = _current.set(transport)
    try:
        yield
    finally:
        _current.reset(token)


def group_size(group: str) -> int:
    """How many ranks a named group has."""
    return len(group_ranks(group))


def _all_reduce(x: Tensor, group: str, op: str, impl: str) -> Tensor:
    return _current.get().all_reduce(x, group, op, impl)


def _all_gather(x: Tensor, group: str, dim: int, sizes: Sequence[int], impl: str) -> Tensor:
    return _current.get().all_gather(x, group, dim, sizes, impl)


def _reduce_scatter(x: Tensor, group: str, dim: int, sizes: Sequence[int], rank: int, impl: str) -> Tensor:
    part = _current.get().reduce_scatter(x, group, dim, sizes, impl)
    assert part.shape[dim] == sizes[rank], f"{group}: a part of {part.shape[dim]}, declared as that of rank {rank} of {sizes}"
    return part


def _all_to_all(
    x: Tensor, group: str, split_dim: int, split_sizes: Sequence[int], cat_dim: int, cat_sizes: Sequence[int], rank: int, impl: str
) -> Tensor:
    part = _current.get().all_to_all(x, group, split_dim, split_sizes, cat_dim, cat_sizes, impl)
    assert part.shape[split_dim] == split_sizes[rank], f"{group}: {part.shape[split_dim]}, declared as rank {rank}'s of {split_sizes}"
    return part


def _exchange_rows(x: Tensor, group: str, send: Tensor, receive: Tensor, rows: int, impl: str) -> Tensor:
    return _current.get().exchange_rows(x, group, send.tolist(), receive.tolist(), impl)


_tickets = count()
_under_way: dict[int, tuple[Callable[[], object], Tensor, Tensor]] = {}  # ticket → how to wait, what is sent, where the other arrives


def _begin_shift(x: Tensor, group: str, dim: int, sizes: Sequence[int], step: int, rank: int, impl: str) -> Tensor:
    shape = list(x.shape)
    assert shape[dim] == sizes[(rank - step) % len(sizes)], f"{group}: {shape[dim]} of rank {rank} in step {step} of {sizes}"
    shape[dim] = sizes[(rank - step - 1) % len(sizes)]
    sent, received = x.contiguous(), x.new_empty(shape)
    ticket = next(_tickets)
    _under_way[ticket] = _current.get().begin_shift(sent, received, group), sent, received
    return torch.tensor([ticket])


def _end_shift(ticket: Tensor, x: Tensor, dim: int, size: int) -> Tensor:
    wait, _, received = _under_way.pop(int(ticket))
    wait()
    assert received.shape[dim] == size, f"{received.shape[dim]} elements have arrived, declared as {size}"
    return received


def _begin_all_gather(x: Tensor, group: str, dim: int, sizes: Sequence[int], impl: str) -> Tensor:
    return _begun(*_current.get().begin_all_gather(x, group, dim, sizes, impl))


def _begin_reduce_scatter(x: Tensor, group: str, dim: int, sizes: Sequence[int], rank: int, impl: str) -> Tensor:
    return _begun(*_current.get().begin_reduce_scatter(x, group, dim, sizes, impl))


def _begun(result: Tensor, finish: Finish) -> Tensor:
    if result.numel():
        _current.get().under_way[result.data_ptr()] = finish
    else:
        finish()
    return result


def _arrived(begun: Tensor, source: Tensor) -> Tensor:
    if begun.numel():
        _current.get().under_way.pop(begun.data_ptr())()
    return begun


for _name, _function in (
    ("all_reduce", _all_reduce),
    ("all_gather", _all_gather),
    ("reduce_scatter", _reduce_scatter),
    ("all_to_all", _all_to_all),
    ("exchange_rows", _exchange_rows),
    ("begin_shift", _begin_shift),
    ("end_shift", _end_shift),
    ("begin_all_gather", _begin_all_gather),
    ("begin_reduce_scatter", _begin_reduce_scatter),
    ("arrived", _arrived),
):
    LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")
