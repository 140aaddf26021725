"""Ranks as threads of one process: for proofs, where starting processes would take longer than the work.

Every rank runs its own program with the same executor as over torch.distributed; only its messages travel through memory. Sums are taken
in the order of the ranks, so all ranks hold bitwise equal ones.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from shardwise.errors import TransferError
from shardwise.runtime.collectives import Finish
from shardwise.runtime.transport import Transport, using
from shardwise.sharding.collectives import group_ranks

__all__ = ["InProcess", "Meetings", "run_ranks"]

Result = TypeVar("Result")
_PATIENCE_S = 120.0


class _Meeting:
    """Where the ranks of a group exchange one tensor each."""

    def __init__(self, ranks: Sequence[int]) -> None:
        self.ranks = list(ranks)
        self.slots: list[Any] = [None] * len(self.ranks)
        self.barrier = threading.Barrier(len(self.ranks))

    def exchange(self, rank: int, tensor: Tensor) -> list[Tensor]:
        """All ranks' tensors, in their order."""
        self.slots[self.ranks.index(rank)] = tensor.clone(memory_format=torch.contiguous_format)
        self.barrier.wait(_PATIENCE_S)
        found = list(self.slots)
        self.barrier.wait(_PATIENCE_S)
        return found


@dataclass(kw_only=True)
class _Box:
    """Messages from one rank to another. The number of a receive, in the order in which they were begun, is that of its message."""

    sent: list[Tensor | None] = field(default_factory=list)
    begun: int = 0
    changed: threading.Condition = field(default_factory=threading.Condition)

    def put(self, tensor: Tensor) -> None:
        """One more message."""
        with self.changed:
            self.sent.append(tensor)
            self.changed.notify_all()

    def ticket(self) -> int:
        """The number of a receive that begins now."""
        with self.changed:
            self.begun += 1
            return self.begun - 1

    def get(self, number: int, timeout_s: float) -> Tensor | None:
        """A message; None where it has not come in time."""
        with self.changed:
            if not self.changed.wait_for(lambda: len(self.sent) > number, timeout_s):
                return None
            found, self.sent[number] = self.sent[number], None
            return found


@dataclass(kw_only=True)
class Meetings:
    """What the ranks of one job share."""

    groups: dict[str, _Meeting] = field(default_factory=dict)
    mail: dict[tuple[int, int, str], _Box] = field(default_factory=lambda: defaultdict(_Box))
    lock: threading.Lock = field(default_factory=threading.Lock)
    ended: threading.Event = field(default_factory=threading.Event)

    def of(self, group: str) -> _Meeting:
        """The meeting of a group."""
        with self.lock:
            meeting = self.groups.setdefault(group, _Meeting(group_ranks(group)))
        if self.ended.is_set():
            meeting.barrier.abort()
        return meeting

    def box(self, source: int, target: int, group: str = "") -> _Box:
        """Messages from one rank to another, in their order; those within a group by themselves."""
        with self.lock:
            return self.mail[source, target, group]

    def end(self) -> None:
        """Wakes all who wait: a rank has failed."""
        self.ended.set()
        with self.lock:
            for meeting in self.groups.values():
                meeting.barrier.abort()


@dataclass(frozen=True, kw_only=True)
class _Sent:
    def wait(self) -> None:
        """A copy was sent: the tensor is free at once."""

    def is_completed(self) -> bool:
        """As it is."""
        return True


@dataclass(frozen=True, kw_only=True)
class _Awaited:
    transport: InProcess
    x: Tensor
    peer: int
    box: _Box
    number: int

    def wait(self) -> None:
        """Fills the tensor."""
        for _ in range(int(_PATIENCE_S * 10)):
            if (found := self.box.get(self.number, 0.1)) is not None:
                assert (found.shape, found.dtype) == (self.x.shape, self.x.dtype), (
                    f"rank {self.transport.rank} was sent another tensor than it awaits"
                )
                self.x.copy_(found)
                return
            if self.transport.meetings.ended.is_set():
                raise TransferError(f"rank {self.transport.rank} waits for rank {self.peer}, but a rank has failed")
        raise TransferError(f"rank {self.transport.rank} waited {_PATIENCE_S:.0f} s in vain for rank {self.peer}")


@dataclass(frozen=True, kw_only=True)
class InProcess:
    """One rank's transport."""

    rank: int
    meetings: Meetings
    under_way: dict[int, Finish] = field(default_factory=dict)

    def _exchange(self, x: Tensor, group: str) -> tuple[list[Tensor], int]:
        meeting = self.meetings.of(group)
        return meeting.exchange(self.rank, x), meeting.ranks.index(self.rank)

    def all_reduce(self, x: Tensor, group: str, op: str, impl: str) -> Tensor:
        every, _ = self._exchange(x, group)
        return torch.stack(every).amax(0) if op == "max" else _sum(every)

    def all_gather(self, x: Tensor, group: str, dim: int, sizes: Sequence[int], impl: str) -> Tensor:
        every, _ = self._exchange(x, group)
        assert [each.shape[dim] for each in every] == list(sizes), f"{group}: parts of other sizes than {sizes}"
        return torch.cat(every, dim)

    def reduce_scatter(self, x: Tensor, group: str, dim: int, sizes: Sequence[int], impl: str) -> Tensor:
        every, here = self._exchange(x, group)
        return _sum(every).split(list(sizes), dim)[here].clone(memory_format=torch.contiguous_format)

    def all_to_all(
        self, x: Tensor, group: str, split_dim: int, split_sizes: Sequence[int], cat_dim: int, cat_sizes: Sequence[int], impl: str
    ) -> Tensor:
        every, here = self._exchange(x, group)
        assert x.shape[cat_dim] == cat_sizes[here], f"{group}: a part of another size than {cat_sizes[here]}"
        return torch.cat([each.split(list(split_sizes), split_dim)[here] for each in every], cat_dim)

    def exchange_rows(self, x: Tensor, group: str, send: Sequence[int], receive: Sequence[int], impl: str) -> Tensor:
        counts, here = self._exchange(torch.tensor(send), group)
        every, _ = self._exchange(x, group)
        found = [each.split(sent.tolist())[here] for each, sent in zip(every, counts, strict=True)]
        assert [len(each) for each in found] == list(receive), f"{group}: other numbers of rows than {receive}"
        return torch.cat(found)

    def begin_shift(self, x: Tensor, received: Tensor, group: str) -> Finish:
        ranks = group_ranks(group)
        here = ranks.index(self.rank)
        before, after = ranks[here - 1], ranks[(here + 1) % len(ranks)]
        self.meetings.box(self.rank, after, group).put(x.clone())
        box = self.meetings.box(before, self.rank, group)
        return _Awaited(transport=self, x=received, peer=before, box=box, number=box.ticket()).wait

    def sum_in_place(self, x: Tensor, group: str, impl: str) -> None:
        x.copy_(self.all_reduce(x, group, "sum", impl))

    def begin_all_gather(self, x: Tensor, group: str, dim: int, sizes: Sequence[int], impl: str) -> tuple[Tensor, Finish]:
        return _later(self.all_gather(x, group, dim, sizes, impl), x)

    def begin_reduce_scatter(self, x: Tensor, group: str, dim: int, sizes: Sequence[int], impl: str) -> tuple[Tensor, Finish]:
        return _later(self.reduce_scatter(x, group, dim, sizes, impl), x)

    def begin_sum(self, x: Tensor, group: str, impl: str) -> Finish:
        self.sum_in_place(x, group, impl)
        return lambda: None

    def swap(self, sends: Sequence[tuple[Tensor, int]], receives: Sequence[tuple[Tensor, int]]) -> None:
        for x, peer in sends:
            self.send(x, peer)
        for x, peer in receives:
            self.receive(x, peer).wait()

    def send(self, x: Tensor, peer: int) -> _Sent:
        self.meetings.box(self.rank, peer).put(x.clone())
        return _Sent()

    def receive(self, x: Tensor, peer: int) -> _Awaited:
        box = self.meetings.box(peer, self.rank)
        return _Awaited(transport=self, x=x, peer=peer, box=box, number=box.ticket())


def _later(result: Tensor, source: Tensor) -> tuple[Tensor, Finish]:
    """Ranks meet where a message is begun, the strictest reading; but its result is there at the end only, and its source as it was."""
    given, shown = source.clone(), torch.full_like(result, torch.nan) if result.is_floating_point() else torch.zeros_like(result)

    def finish() -> None:
        assert torch.equal(source.nan_to_num(), given.nan_to_num()), "what is sent was written over before it arrived"
        shown.copy_(result)

    return shown, finish


def _sum(tensors: Sequence[Tensor]) -> Tensor:
    total = tensors[0].clone()
    for each in tensors[1:]:
        total += each
    return total


def run_ranks(count: int, function: Callable[[int, Transport], Result]) -> list[Result]:
    """`function(rank, its transport)` on so many threads at once; raises the first error of any."""
    meetings = Meetings()
    results: list[Any] = [None] * count
    errors: list[BaseException] = []

    def work(rank: int) -> None:
        transport = InProcess(rank=rank, meetings=meetings)
        try:
            with using(transport):
                results[rank] = function(rank, transport)
        except BaseException as error:
            errors.append(error)
            meetings.end()

    threads = [threading.Thread(target=work, args=(rank,), name=f"rank {rank}") for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise next((error for error in errors if not isinstance(error, (threading.BrokenBarrierError, TransferError))), errors[0])
    return results
