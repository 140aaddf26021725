"""Measures what communication takes. Runs inside all ranks at once; groups of a size are all busy together."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from shardwise.cluster.rates import IMPLEMENTATIONS, CollectiveRate
from shardwise.runtime import collectives

__all__ = ["collective_rates"]

_LEAST, _MOST = 4, 60
_WIDTH = 4  # bytes of a float32
_OTHER_WORK_BYTES = 8 << 20  # between two calls: more than a core's own caches hold
_Call = Callable[[Tensor, Sequence[int], dist.ProcessGroup, str], object]


def collective_rates(message_bytes: Sequence[int], budget_s: float) -> tuple[CollectiveRate, ...]:
    """Every kind and implementation, within groups of every size that divides the number of ranks.

    message_bytes: increasing sizes of the largest tensor a rank holds; budget_s: of each point.
    """
    found = []
    for size, group in _groups():
        for kind in IMPLEMENTATIONS if size == 2 else (kind for kind in IMPLEMENTATIONS if kind != "send_recv"):
            for impl in IMPLEMENTATIONS[kind]:
                measured = [_seconds(kind, impl, count, group, budget_s) for count in message_bytes]
                seconds, busy = (_rising(each) for each in zip(*measured, strict=True))
                found.append(
                    CollectiveRate(kind=kind, impl=impl, ranks=size, message_bytes=tuple(message_bytes), seconds=seconds, busy_s=busy)
                )
    return tuple(found)


def _rising(seconds: Sequence[float]) -> tuple[float, ...]:
    """Noise adds time: no message takes longer than a larger one."""
    return tuple(min(seconds[place:]) for place in range(len(seconds)))


def _groups() -> list[tuple[int, dist.ProcessGroup]]:
    """For each size, this rank's group; and pairs even where the ranks are odd (the last rank then stands by)."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    sizes = sorted({size for size in range(2, ranks + 1) if ranks % size == 0} | ({2} if ranks > 1 else set()))
    found = []
    for size in sizes:
        parts = [dist.new_group(list(range(start, start + size))) for start in range(0, ranks - size + 1, size)]
        found.append((size, parts[min(rank // size, len(parts) - 1)]))
    return found


def _seconds(kind: str, impl: str, message_bytes: int, group: dist.ProcessGroup, budget_s: float) -> tuple[float, float]:
    """Of the slowest rank's time the lower quartile over the repetitions; of the core's time that a rank takes the median, then the mean.

    Of the first not the median: other processes delay a message by whole time slices, which a quartile leaves out where most are not
    delayed.
    """
    taking_part = dist.get_rank(group) >= 0
    call = _prepared(kind, impl, message_bytes, group) if taking_part else _nothing
    other = torch.ones(_OTHER_WORK_BYTES // _WIDTH)
    start = time.perf_counter()
    _timed(call, other)
    times = [_timed(call, other) for _ in range(_repetitions(time.perf_counter() - start, budget_s))]
    slowest, busy = torch.tensor(times).unbind(1)
    dist.all_reduce(slowest := slowest.clone(), op=dist.ReduceOp.MAX)
    dist.all_reduce(taken := torch.tensor([float(busy.median()), 1.0]) * taking_part)
    return max(float(slowest.quantile(0.25)), 1e-7), float(taken[0] / taken[1])


def _timed(call: Callable[[], object], other: Tensor) -> tuple[float, float]:
    """Seconds by the clock, and of cores: of all threads of this process. The call comes after other work, as in a step: its code and
    data are in no cache of the core's own, as where another rank computed on it while this one waited."""
    dist.barrier()
    other.mul_(1.0)
    start, busy = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - start, time.process_time() - busy


def _repetitions(first_s: float, budget_s: float) -> int:
    """As many as the budget allows, the same on all ranks."""
    count = torch.tensor(min(_MOST, max(_LEAST, int(budget_s / max(first_s, 1e-6)))))
    dist.broadcast(count, 0)
    return int(count)


def _nothing() -> None:
    """What a rank without a group does."""


def _prepared(kind: str, impl: str, message_bytes: int, group: dist.ProcessGroup) -> Callable[[], object]:
    ranks = dist.get_world_size(group)
    whole = torch.ones(max(ranks, message_bytes // _WIDTH))
    sizes = [part.numel() for part in whole.tensor_split(ranks)]
    return partial(_CALLS[kind], whole, sizes, group, impl)


def _all_reduce(whole: Tensor, _sizes: Sequence[int], group: dist.ProcessGroup, impl: str) -> object:
    return collectives.all_reduce(whole, group, impl)


def _all_gather(whole: Tensor, sizes: Sequence[int], group: dist.ProcessGroup, impl: str) -> object:
    return collectives.all_gather(whole.split_with_sizes(list(sizes))[dist.get_rank(group)], 0, sizes, group, impl)


def _reduce_scatter(whole: Tensor, sizes: Sequence[int], group: dist.ProcessGroup, impl: str) -> object:
    return collectives.reduce_scatter(whole, 0, sizes, group, impl)


def _all_to_all(whole: Tensor, sizes: Sequence[int], group: dist.ProcessGroup, impl: str) -> object:
    rank = dist.get_rank(group)
    return collectives.all_to_all(whole, 0, sizes, 0, [sizes[rank]] * len(sizes), group, impl)


def _broadcast(whole: Tensor, _sizes: Sequence[int], group: dist.ProcessGroup, _impl: str) -> object:
    return dist.broadcast(whole, group=group, group_src=0)


def _send_recv(whole: Tensor, _sizes: Sequence[int], group: dist.ProcessGroup, _impl: str) -> None:
    if dist.get_rank(group) == 0:
        dist.send(whole, group=group, group_dst=1)
    else:
        dist.recv(whole, group=group, group_src=0)


_CALLS: Mapping[str, _Call] = {
    "all_reduce": _all_reduce,
    "all_gather": _all_gather,
    "reduce_scatter": _reduce_scatter,
    "all_to_all": _all_to_all,
    "broadcast": _broadcast,
    "send_recv": _send_recv,
}
