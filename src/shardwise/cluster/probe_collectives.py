"""Measures what communication takes. Runs inside all ranks at once; groups of a size are all busy together."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from shardwise.cluster.machine import available_cores
from shardwise.cluster.rates import IMPLEMENTATIONS, CollectiveRate
from shardwise.runtime import collectives
from shardwise.runtime.collectives import Finish

__all__ = ["collective_rates"]

_LEAST, _MOST = 4, 60
_WIDTH = 4  # bytes of a float32
_OTHER_WORK_BYTES = 8 << 20  # between two calls: more than a core's own caches hold
_PRODUCTS, _PRODUCT_SIZE = 16, 256  # some 6 ms between two calls, as a layer between its messages
_Call = Callable[[Tensor, Sequence[int], dist.ProcessGroup, str], object]
_Begin = Callable[[], Finish]


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
    """What a message adds to the time of a step, and to that of a core that a rank takes: medians over the repetitions, of the second the
    mean over the ranks.

    All ranks compute before each message, as in a step. They are not ready at the same time, the more so where they share cores, and a
    message takes more of a core when its caches are full of other things: alone, the same messages take half as long. A shift is under way
    while products run, which it slows: what all takes longer counts as the shift's.
    """
    taking_part = dist.get_rank(group) >= 0
    call = _prepared(kind, impl, message_bytes, group) if taking_part else _nothing
    other, factor = torch.ones(_OTHER_WORK_BYTES // _WIDTH), torch.ones(_PRODUCT_SIZE, _PRODUCT_SIZE)
    start = time.perf_counter()
    _timed(call, other, factor)
    count = _repetitions(time.perf_counter() - start, budget_s)
    wall, computing, busy = torch.tensor([_timed(call, other, factor) for _ in range(count)]).unbind(1)
    dist.all_reduce(wall := wall.clone(), op=dist.ReduceOp.MAX)
    dist.all_reduce(computing := computing.clone())
    taken = _busy_beside(call, other, factor, count) if kind == "shift" else float(busy.median())
    dist.all_reduce(summed := torch.tensor([max(taken, 0.0), 1.0]) * taking_part)
    ranks = dist.get_world_size()
    added = wall - computing / ranks * _crowd()
    return max(float(added.median()), 1e-7), float(summed[0] / summed[1])


def _timed(call: _Begin, other: Tensor, factor: Tensor) -> tuple[float, float, float]:
    """Seconds by the clock of computing and the message after it; of a core that the computing took; of cores, of all threads of this
    process, that the message took."""
    dist.barrier()
    start, begun = time.perf_counter(), time.process_time()
    _compute(other, factor)
    computed = time.process_time()
    call()()
    return time.perf_counter() - start, computed - begun, time.process_time() - computed


def _busy_beside(call: _Begin, other: Tensor, factor: Tensor, count: int) -> float:
    """Seconds of a core that ranks need longer to compute with the message under way: by the clock, of the slowest."""
    walls = torch.tensor([[_computed_beside(begin, other, factor) for begin in (call, _nothing)] for _ in range(count)])
    dist.all_reduce(walls, op=dist.ReduceOp.MAX)
    beside, alone = walls.median(0).values.tolist()
    return float(beside - alone) / _crowd()


def _computed_beside(begin: _Begin, other: Tensor, factor: Tensor) -> float:
    dist.barrier()
    start = time.perf_counter()
    end = begin()
    _compute(other, factor)
    end()
    return time.perf_counter() - start


def _crowd() -> float:
    """How many threads want each core."""
    return max(1.0, dist.get_world_size() * torch.get_num_threads() / available_cores())


def _compute(other: Tensor, factor: Tensor) -> None:
    other.mul_(1.0)
    for _ in range(_PRODUCTS):
        factor @ factor


def _repetitions(first_s: float, budget_s: float) -> int:
    """As many as the budget allows, the same on all ranks."""
    count = torch.tensor(min(_MOST, max(_LEAST, int(budget_s / max(first_s, 1e-6)))))
    dist.broadcast(count, 0)
    return int(count)


def _nothing() -> Finish:
    """What a rank without a group does."""
    return lambda: None


def _prepared(kind: str, impl: str, message_bytes: int, group: dist.ProcessGroup) -> _Begin:
    """Begins the message and returns what ends it; one that is not begun before it is awaited is all in that."""
    ranks = dist.get_world_size(group)
    whole = torch.ones(max(ranks, message_bytes // _WIDTH))
    if kind == "shift":
        return partial(collectives.begin_shift, whole, torch.empty_like(whole), group)
    sizes = [part.numel() for part in whole.tensor_split(ranks)]
    call = partial(_CALLS[kind], whole, sizes, group, impl)
    return lambda: call


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
