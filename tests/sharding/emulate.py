"""All ranks of a small mesh in one process: threads, collectives that meet at a barrier, and tensors as each rank holds them.

    whole tensor ──distribute──▶ [rank 0's, rank 1's, …] ──combine──▶ whole tensor

Everything here follows the definitions of the types (shardwise.sharding.types) and none of the code that it tests, but for `part`,
which has tests of its own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import product
from typing import Any, TypeVar
from unittest import mock

import torch
from torch import Tensor

from shardwise.sharding import collectives
from shardwise.sharding.collectives import group_name, group_ranks
from shardwise.sharding.types import P, Placement, Shard, Type, part

Result = TypeVar("Result")
Coordinates = Mapping[str, int]

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


def coordinates(mesh: Mapping[str, int]) -> list[dict[str, int]]:
    """Every rank's place on each axis; the last axis runs fastest."""
    return [dict(zip(mesh, place, strict=True)) for place in product(*(range(ranks) for ranks in mesh.values()))]


def group_along(mesh: Mapping[str, int], axis: str, place: Coordinates) -> str:
    """The name of the group of ranks that differ from this one on `axis` alone."""
    return group_name(axis, [rank for rank, other in enumerate(coordinates(mesh)) if {**other, axis: place[axis]} == dict(place)])


def distribute(whole: Tensor, type_: Type, mesh: Mapping[str, int]) -> list[Tensor]:
    """What each rank holds of a tensor of this type; summands are random."""
    tensors = [whole]
    for axis, ranks in mesh.items():
        tensors = [each for tensor in tensors for each in _parts(tensor, type_[axis], ranks)]
    return tensors


def _parts(tensor: Tensor, placement: Placement, ranks: int) -> list[Tensor]:
    if isinstance(placement, Shard):
        pieces = (part(tensor.shape[placement.dim], placement, ranks, rank).indices() for rank in range(ranks))
        return [tensor.index_select(placement.dim, indices) for indices in pieces]
    if placement != P:
        return [tensor.clone() for _ in range(ranks)]
    summands = [_random_like(tensor) for _ in range(ranks - 1)]
    return [tensor - sum(summands, torch.zeros_like(tensor)), *summands]


def _random_like(tensor: Tensor) -> Tensor:
    return torch.randn_like(tensor) if tensor.is_floating_point() else torch.randint_like(tensor, -9, 10)


def combine(held: Sequence[Tensor], type_: Type, mesh: Mapping[str, int], sizes: Sequence[int], tolerance: float = 1e-10) -> Tensor:
    """The whole tensor of `sizes` from what each rank holds. Raises AssertionError when ranks that must agree do not."""
    if not mesh:
        return held[0]
    (axis, ranks), *rest = mesh.items()
    placement = type_[axis]
    each = len(held) // ranks
    inner = [_local_sizes(sizes, placement, ranks, rank) for rank in range(ranks)]
    parts = [combine(held[rank * each : (rank + 1) * each], type_, dict(rest), inner[rank], tolerance) for rank in range(ranks)]
    if isinstance(placement, Shard):
        return _joined(parts, placement, sizes)
    if placement == P:
        return sum(parts[1:], parts[0])
    for rank, other in enumerate(parts[1:], 1):
        assert_same(other, parts[0], f"ranks 0 and {rank} of {axis} hold different values where the type is {placement}", tolerance)
    return parts[0]


def _local_sizes(sizes: Sequence[int], placement: Placement, ranks: int, rank: int) -> list[int]:
    local = list(sizes)
    if isinstance(placement, Shard):
        local[placement.dim] = part(local[placement.dim], placement, ranks, rank).length
    return local


def _joined(parts: Sequence[Tensor], shard: Shard, sizes: Sequence[int]) -> Tensor:
    shape = list(parts[0].shape)
    shape[shard.dim] = sizes[shard.dim]
    whole = parts[0].new_zeros(shape)
    for rank, held in enumerate(parts):
        indices = part(sizes[shard.dim], shard, len(parts), rank).indices()
        assert held.shape[shard.dim] == len(indices), f"rank {rank} holds {list(held.shape)}, not {len(indices)} elements of {shard}"
        whole.index_copy_(shard.dim, indices, held)
    return whole


def assert_same(found: Tensor, wanted: Tensor, what: str, tolerance: float = 1e-10) -> None:
    """Same dtype and shape, and equal to `tolerance` (relative or absolute; whole numbers exactly)."""
    assert found.dtype == wanted.dtype and found.shape == wanted.shape, (
        f"{what}: {found.dtype} {list(found.shape)}, not {wanted.dtype} {list(wanted.shape)}"
    )
    close = torch.isclose(found, wanted, rtol=tolerance, atol=tolerance, equal_nan=True) if found.is_floating_point() else found == wanted
    assert close.all(), f"{what}: differs by up to {(found.double() - wanted.double()).abs().max().item():.3g}"
