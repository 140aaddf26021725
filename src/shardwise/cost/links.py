"""Seconds of a collective over the links that a group of ranks crosses.

    ring     every byte passes every rank: steps × latency + part ÷ the narrowest place of the ring
    tree     all-reduce of small messages: 2 × depth of the tree × latency, and twice the message through each rank
    switch   NVLink SHARP: switches add up, the message passes each rank's links once

A ring through several nodes crosses each node's border once, over as many ports as the group has ranks in the node (Jeaugey,
"Massively scale your deep learning training with NCCL 2.4", 2019: channels); all groups of an axis use their own ranks' ports at once. What
ranks send each other pairwise (all-to-all) goes over the level that joins the two.
"""

from __future__ import annotations

from math import ceil, log2

from shardwise.cluster.topology import Crossing, Level

__all__ = ["level_rate", "link_seconds"]

_REACH = {"nvswitch": 0.78, "nvlink": 0.78, "infiniband": 0.88, "ethernet": 0.75, "pcie": 0.75, "xgmi": 0.7, "ici": 0.8}
"""Share of a link's rate that long messages reach: NCCL's bus bandwidths on DGX machines (NVIDIA/nccl-tests) ÷ the data sheets'."""

_PROTOCOLS = ((1.0, 0.25), (2.0, 0.92), (5.5, 1.0))
"""(latency ÷ that of the smallest messages, share of the rate) of NCCL's LL, LL128 and Simple, of which it takes the fastest (NVIDIA/nccl,
src/graph/tuning.cc: hwLat, and the efficiency of the words that carry flags)."""

_SOFTWARE_S = 6e-6  # beginning a collective: kernel start and synchronisation of the channels
_OTHER_REACH = 0.75


def link_seconds(kind: str, message_bytes: float, crossing: Crossing) -> float:
    """Time, s, of one collective of `shardwise.cost.collectives`' kinds and message sizes in a group with that crossing."""
    ranks = crossing.size
    if ranks <= 1 or not crossing.hops:
        return 0.0
    if kind == "send_recv":
        level = crossing.hops[-1].level
        return level.latency_s + message_bytes / level_rate(level)
    if kind == "all_to_all":
        return _pairwise(message_bytes, crossing)
    ring = _ring(kind, message_bytes, crossing)
    return min(ring, _tree(message_bytes, crossing), _switch(message_bytes, crossing)) if kind == "all_reduce" else ring


def level_rate(level: Level) -> float:
    """Bytes/s that long messages of each device reach over a level, in each direction, all devices sending at once."""
    return level.bytes_per_s * _REACH.get(level.link.kind, _OTHER_REACH)


def _narrowest(crossing: Crossing) -> float:
    """Bytes/s of a ring through all ranks of the group: at each level as many ports as the group has ranks in a part."""
    inside, found = 1, float("inf")
    for hop in crossing.hops:
        found = min(found, level_rate(hop.level) * inside)
        inside *= hop.parts
    return found


def _latency(crossing: Crossing) -> float:
    """Of one way round the ring."""
    inside, total = 1, 0.0
    for hop in reversed(crossing.hops):
        total += inside * (hop.parts - 1) * hop.level.latency_s
        inside *= hop.parts
    return total


def _ring(kind: str, message_bytes: float, crossing: Crossing) -> float:
    rounds = 2 if kind == "all_reduce" else 1
    part = 1.0 if kind == "broadcast" else (crossing.size - 1) / crossing.size
    return _SOFTWARE_S + rounds * _fastest(_latency(crossing), part * message_bytes / _narrowest(crossing))


def _fastest(latency_s: float, transfer_s: float) -> float:
    """By the best protocol."""
    return min(slower * latency_s + transfer_s / share for slower, share in _PROTOCOLS)


def _tree(message_bytes: float, crossing: Crossing) -> float:
    depth = sum(ceil(log2(hop.parts)) * hop.level.latency_s for hop in crossing.hops if hop.parts > 1)
    return _SOFTWARE_S + 2 * _fastest(depth, message_bytes / _narrowest(crossing))


def _switch(message_bytes: float, crossing: Crossing) -> float:
    hop = crossing.hops[-1]
    if not hop.level.sharp or len(crossing.hops) > 1:
        return float("inf")
    return _SOFTWARE_S + 2 * hop.level.latency_s + message_bytes / level_rate(hop.level)


def _pairwise(message_bytes: float, crossing: Crossing) -> float:
    each = message_bytes / crossing.size
    inside, slowest = 1, 0.0
    latency = 0.0
    for hop in crossing.hops:
        peers = inside * (hop.parts - 1)
        slowest = max(slowest, peers * each / level_rate(hop.level))
        latency = max(latency, hop.level.latency_s * ceil(log2(max(2, peers))))
        inside *= hop.parts
    return _SOFTWARE_S + latency + slowest
