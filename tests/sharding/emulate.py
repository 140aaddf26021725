"""All ranks of a small mesh in one process: threads, and collectives that meet at a barrier.

Tensors as each rank holds them: `shardwise.sharding.dealing`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar
from unittest import mock

import torch
from torch import Tensor

from shardwise.sharding import collectives
from shardwise.sharding.collectives import group_ranks

Result = TypeVar("Result")

# Emulated ranks wait at most this long for each other: a rank that does not come is a bug, not a slow machine.
_PATIENCE_S = 20.0


class _Meeting:
    """Where the ranks of one group exchange tensors."""

    def __init__(self, ranks: Sequence[int]) -> None:
        self.ranks = list(ranks)
        self.slots: list[Any] = [None] * len(ranks)
        self.barrier = threading.Barrier(len(ranks))

    def exchange(self, rank: int, tensor: Tensor) -> list[Tensor]:
        self.slots[self.ranks.index(rank)] = tensor.detach().clone()
        self.barrier.wait(_PATIENCE_S)
        found = list(self.slots)
        self.barrier.wait(_PATIENCE_S)
        return found


class EmulatedCollectives:
    """Stands for `torch.ops.shardwise` as `shardwise.sharding.collectives` looks it up; every thread is a rank."""

    def __init__(self) -> None:
        self.here = threading.local()
        self.meetings: dict[str, _Meeting] = {}
        self.lock = threading.Lock()

    def _exchange(self, x: Tensor, group: str) -> tuple[list[Tensor], int]:
        with self.lock:
            meeting = self.meetings.setdefault(group, _Meeting(group_ranks(group)))
        return meeting.exchange(self.here.rank, x), meeting.ranks.index(self.here.rank)

    def all_reduce(self, x: Tensor, group: str, op: str, impl: str) -> Tensor:
        all_, _ = self._exchange(x, group)
        return torch.stack(all_).amax(0) if op == "max" else _sum(all_)

    def all_gather(self, x: Tensor, group: str, dim: int, sizes: Sequence[int], impl: str) -> Tensor:
        all_, _ = self._exchange(x, group)
        assert [each.shape[dim] for each in all_] == list(sizes)
        return torch.cat(all_, dim)

    def reduce_scatter(self, x: Tensor, group: str, dim: int, sizes: Sequence[int], rank: int, impl: str) -> Tensor:
        all_, here = self._exchange(x, group)
        assert here == rank and x.shape[dim] == sum(sizes)
        return _sum(all_).split(list(sizes), dim)[rank].clone()

    def all_to_all(
        self, x: Tensor, group: str, split_dim: int, gives: Sequence[int], cat_dim: int, gets: Sequence[int], *here: Any
    ) -> Tensor:
        all_, rank = self._exchange(x, group)
        assert here[0] == rank and x.shape[cat_dim] == gets[rank]
        return torch.cat([each.split(list(gives), split_dim)[rank] for each in all_], cat_dim)


def _sum(tensors: Sequence[Tensor]) -> Tensor:
    total = tensors[0].clone()
    for each in tensors[1:]:
        total += each
    return total


@contextmanager
def emulated_collectives() -> Iterator[EmulatedCollectives]:
    """Collectives of shardwise.sharding.collectives meet the other threads of `run_ranks`."""
    emulated = EmulatedCollectives()
    with mock.patch.object(collectives, "_ops", emulated):
        yield emulated


def run_ranks(count: int, function: Callable[[int], Result]) -> list[Result]:
    """`function(rank)` on `count` threads that may communicate; the first error of any is raised."""
    results: list[Any] = [None] * count
    errors: list[BaseException] = []
    with emulated_collectives() as emulated:

        def work(rank: int) -> None:
            emulated.here.rank = rank
            try:
                results[rank] = function(rank)
            except BaseException as error:
                errors.append(error)
                for meeting in emulated.meetings.values():
                    meeting.barrier.abort()

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if errors:
        raise next((error for error in errors if not isinstance(error, threading.BrokenBarrierError)), errors[0])
    return results
