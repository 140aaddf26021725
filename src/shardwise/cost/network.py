"""Seconds that a collective takes on the links between nodes, where the nodes' own speed was measured or described without them.

    node 0: ranks 0 1 ┐ link ┌ node 1: ranks 2 3        a link carries what all ranks of its node send to others, in each direction

Bytes that leave the busiest node, for a message of M bytes in a group of n ranks of which k are in each node (n - k elsewhere):

    all_reduce       native     a ring: 2 (n - 1) / n · M          exchange   every pair swaps 1/n, twice: 2 k (n - k) / n · M
                                                                               (two ranks swap all of it, once: M)
    all_gather, reduce_scatter  half of that; `all_reduce` does what an all-reduce does
    all_to_all                  k (n - k) / n · M                  broadcast, send_recv   M

(Thakur, Rabenseifner, Gropp, 2005.) Groups that are not inside a node share its link: as many as its ranks are in.
"""

from __future__ import annotations

from math import ceil, log2

from shardwise.cluster.network import Network

__all__ = ["network_seconds", "sent_seconds"]


def network_seconds(kind: str, impl: str, message_bytes: float, ranks: int, stride: int, network: Network) -> float:
    """Of one collective of `shardwise.cost.collectives`' kinds, all groups of `ranks`, each `stride` after the one before, at it together;
    0 where they are inside nodes."""
    inside = network.inside(ranks, stride)
    if inside == ranks or ranks <= 1:
        return 0.0
    sharing = max(1, network.node_ranks // inside)
    steps, part = _sent(kind, impl, ranks, inside)
    return steps * network.latency_s + sharing * part * message_bytes / network.bytes_per_s


def sent_seconds(message_bytes: float, senders: int, network: Network) -> float:
    """Of messages that so many ranks of a node send to another node at once."""
    return network.latency_s + min(senders, network.node_ranks) * message_bytes / network.bytes_per_s


def _sent(kind: str, impl: str, ranks: int, inside: int) -> tuple[float, float]:
    """(messages in turn, part of the message that leaves a node)."""
    if kind == "send_recv":
        return 1, 1.0
    if kind == "broadcast":
        return ceil(log2(ranks)), 1.0
    pairs = inside * (ranks - inside) / ranks
    if kind == "all_to_all":
        return 1, pairs
    whole = kind == "all_reduce" or impl == "all_reduce"
    rounds = 2 if whole else 1
    if impl == "exchange":
        return (1, 1.0) if whole and ranks == 2 else (rounds, rounds * pairs)
    return rounds * (ranks - 1), rounds * (ranks - 1) / ranks
