"""Seconds of communication, and the fastest implementation of it.

**The message** is the largest tensor that one rank holds before or after, in bytes:

    all_reduce       the tensor (every rank holds all of it)
    all_gather       the gathered result
    reduce_scatter   the input, before it is reduced
    all_to_all       a rank's input (its result is about as large); the global tensor is ``ranks`` times that
    broadcast        the tensor
    send_recv        the tensor sent
    shift            the tensor that each rank sends to the next

**Other group sizes.** The time of a group of n that was not measured is that of the nearest measured group size m (the larger of
two equally near), with its latency scaled by (n − 1)/(m − 1), the messages of a pairwise exchange or the steps of a ring, and the
rest by the bytes that a rank sends: all_reduce, all_gather, reduce_scatter and all_to_all (n − 1)/n ÷ (m − 1)/m, broadcast,
send_recv and shift 1 (Thakur, Rabenseifner, Gropp, 2005). `exchange` and `native` are scaled alike.

Between devices of the catalog, and over a described network, a shift takes what one of the ranks − 1 rounds does in which an all_gather of
all their tensors sends them round a ring.

**Several nodes.** Where a group crosses the network between nodes of a described cluster, it takes what it would take in one node or what
its bytes take on the network (`shardwise.cost.network`), whichever is longer.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, log2

from shardwise.cluster.model import Cluster
from shardwise.cluster.rates import IMPLEMENTATIONS, CollectiveRate
from shardwise.cluster.topology import Crossing, Machines
from shardwise.cost.links import link_seconds
from shardwise.cost.network import network_seconds

__all__ = ["CollectiveCost", "Shares", "collective_cost", "collective_seconds", "collective_shares", "crossing_of", "fastest", "step_of"]

_SMALLEST, _LARGEST = 8, 32  # powers of two: steps of message sizes for which an implementation is chosen


@dataclass(frozen=True, kw_only=True)
class CollectiveCost:
    """Time, and the implementation (`shardwise.runtime.collectives`) that takes it."""

    seconds: float
    impl: str


@dataclass(frozen=True, kw_only=True)
class Shares:
    """A collective's time as that of a core, which other ranks may want, and that in which the rank waits."""

    compute_s: float
    communicate_s: float


def collective_shares(kind: str, impl: str, message_bytes: float, ranks: int, cluster: Cluster, stride: int = 1) -> Shares:
    """Of one implementation. Its time was measured with all of the cluster's ranks at it: where they share cores it is at least as long
    as these are busy with all of them."""
    seconds = collective_seconds(kind, impl, message_bytes, ranks, cluster, stride)
    if cluster.cores is None or ranks <= 1:
        return Shares(compute_s=0.0, communicate_s=seconds)
    rate = _nearest(kind, impl, ranks, cluster)
    busy = min(_scaled(rate, rate.busy_for(message_bytes), rate.busy_for(0.0), ranks), seconds) if rate else 0.0
    return Shares(compute_s=busy, communicate_s=max(0.0, seconds - busy * max(1.0, cluster.ranks / cluster.cores)))


def collective_cost(kind: str, message_bytes: float, ranks: int, cluster: Cluster, stride: int = 1) -> CollectiveCost:
    """The fastest implementation of ``kind`` for this message within groups of ``ranks``, each ``stride`` after the one before; nothing
    within a group of one."""
    if ranks <= 1:
        return CollectiveCost(seconds=0.0, impl="native")
    impl = fastest(kind, message_bytes, ranks, cluster)
    return CollectiveCost(seconds=collective_seconds(kind, impl, message_bytes, ranks, cluster, stride), impl=impl)


def step_of(message_bytes: float) -> int:
    """The power of two to which a message is rounded up: those of one step have one implementation, in plans' tables too."""
    return ceil(log2(min(max(message_bytes, 2.0**_SMALLEST), 2.0**_LARGEST)))


def fastest(kind: str, message_bytes: float, ranks: int, cluster: Cluster) -> str:
    """The implementation with the shortest measured time for messages of this step; the backend's own on devices of the catalog."""
    if cluster.machines is not None:
        return "native"
    message = 2.0 ** step_of(message_bytes)
    costs = {impl: collective_seconds(kind, impl, message, ranks, cluster) for impl in IMPLEMENTATIONS[kind]}
    impl = min(costs, key=costs.__getitem__)
    assert costs[impl] < float("inf"), f"no {kind} among the rates of {cluster.name}"
    return impl


def collective_seconds(kind: str, impl: str, message_bytes: float, ranks: int, cluster: Cluster, stride: int = 1) -> float:
    """Time, s, of one implementation; infinite where the cluster has no figures of it."""
    if ranks <= 1:
        return 0.0
    if cluster.machines is not None:
        if kind == "shift":
            return collective_seconds("all_gather", impl, message_bytes * ranks, ranks, cluster, stride) / (ranks - 1)
        return link_seconds(kind, message_bytes, crossing_of(cluster.machines, ranks, stride))
    rate = _nearest(kind, impl, ranks, cluster)
    if rate is None:
        return float("inf")
    within = _scaled(rate, rate.seconds_for(message_bytes), rate.latency_s, ranks)
    if cluster.network is None:
        return within
    if kind == "shift":
        return max(within, network_seconds("all_gather", impl, message_bytes * ranks, ranks, stride, cluster.network) / (ranks - 1))
    return max(within, network_seconds(kind, impl, message_bytes, ranks, stride, cluster.network))


def _nearest(kind: str, impl: str, ranks: int, cluster: Cluster) -> CollectiveRate | None:
    measured = [rate for rate in cluster.rates.collectives if rate.kind == kind and rate.impl == impl]
    return min(measured, key=lambda rate: (abs(rate.ranks - ranks), -rate.ranks), default=None)


def crossing_of(machines: Machines, ranks: int, stride: int) -> Crossing:
    """What the slowest group of `ranks`, each `stride` after the one before, crosses; the first where such groups do not tile all."""
    if machines.ranks % (ranks * stride) == 0:
        return machines.span(stride, ranks)
    return machines.crossing(range(0, min(ranks * stride, machines.ranks), stride))


def _scaled(rate: CollectiveRate, seconds: float, latency_s: float, ranks: int) -> float:
    if rate.ranks == ranks or rate.kind in ("send_recv", "shift"):
        return seconds
    part = 1.0 if rate.kind == "broadcast" else ((ranks - 1) / ranks) / ((rate.ranks - 1) / rate.ranks)
    return latency_s * (ranks - 1) / (rate.ranks - 1) + (seconds - latency_s) * part
