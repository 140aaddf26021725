"""Seconds of sending tokens to the ranks of their experts, and of what experts make of them back.

    rows     every (token, expert) pair is a row of its own, sent straight to the expert's rank: an all-to-all of k rows a token
    tokens   a token goes once to each node that has an expert of it, to the rank there with its sender's place, and from there once to each
             rank that has one: DeepEP and Hybrid-EP (github.com/deepseek-ai/DeepEP), network and fast links at once

Experts are chosen evenly: any `chosen` of all, or any of those in `limit` of `groups` groups (DeepSeek-V3 technical report,
arXiv:2412.19437, section 2.1.2). The way back carries as many bytes: what a node's experts make of a token is added up there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil, comb, log2
from typing import Literal

from shardwise.cluster.model import Cluster
from shardwise.cluster.topology import Crossing, Hop
from shardwise.cost.collectives import collective_cost, crossing_of
from shardwise.cost.links import level_rate

__all__ = ["Dispatch", "Routing", "expected_parts", "routing_seconds", "token_seconds"]

Dispatch = Literal["rows", "tokens"]

# Of the rates that DeepEP and Hybrid-EP measured with rows of 14 KB (Hybrid-EP_Implementation.md there; bytes to the own rank taken off):
# 315 of 450 GB/s on H100, 643 of 900 on B200, 43 of 50 between nodes. Rows of 4 KB reach 0.84 to 0.90 of that.
_FAST_REACH = 0.9  # of what long messages of a collective reach on fast links
_ROW_BYTES = 800.0  # that a row's own cost is worth: index, flags, a copy's start
_SCALE_BYTES = 4 / 128  # a number's share of a float32 scale (DeepSeek-V3 technical report, section 3.3.2)
_BEGIN_S = 35e-6  # counting who gets how many, and waiting for all (DeepEP: 39 µs layout, 35 µs notification, the way there alone)


@dataclass(frozen=True, kw_only=True)
class Routing:
    """experts: of a layer, on all ranks; chosen: of each token. groups, limit: a token's experts are in so many of that many groups.

    dispatch: how rows travel; there_bits: a number's on the way to the experts, 8 with a scale for each 128, or those of the tensor.
    overlapped: whether another microbatch's computing hides them. launch_s: what the host takes to launch the forward pass of a layer with
    experts, and half of what the backward pass takes it; a device that is done sooner waits.
    """

    experts: int
    chosen: int
    groups: int = 1
    limit: int = 1
    dispatch: Dispatch = "tokens"
    there_bits: Literal[8] | None = None
    overlapped: bool = False
    launch_s: float = 0.0


def expected_parts(parts: int, routing: Routing) -> float:
    """The expected number of parts that hold one of a token's experts, the experts being divided evenly and in order into `parts`.

    With h of the chosen groups in a part, none of its experts is drawn in C(all − own, k) ÷ C(all, k) of the cases, `all` being the experts
    in the chosen groups. More parts than experts hold copies: one of each is used.
    """
    parts = min(parts, routing.experts)
    held = routing.groups / parts  # groups of a part: several, or a share of one
    size = routing.experts / routing.groups
    own = routing.experts / parts
    everything = routing.limit * size
    if held <= 1:
        return parts * routing.limit / routing.groups * (1 - _missed(everything, own, routing.chosen))
    whole, ways = round(held), comb(routing.groups, routing.limit)
    hit = 0.0
    for inside in range(1, min(whole, routing.limit) + 1):
        share = comb(whole, inside) * comb(routing.groups - whole, routing.limit - inside) / ways
        hit += share * (1 - _missed(everything, inside * size, routing.chosen))
    return parts * hit


def _missed(everything: float, own: float, drawn: int) -> float:
    """The probability that none of `own` is among `drawn` different ones of `everything`."""
    missed = 1.0
    for before in range(drawn):
        missed *= max(0.0, everything - own - before) / max(1.0, everything - before)
    return missed


def routing_seconds(routing: Routing, tokens: float, row: int, item: int, ranks: int, cluster: Cluster) -> float:
    """Time, s, of the way there and back of so many tokens of each rank, among so many consecutive ranks. row: numbers of a token, of so
    many bytes each."""
    there = row * (1 + _SCALE_BYTES) if routing.there_bits == 8 else row * item
    return sum(_one_way(routing, tokens, row_bytes, ranks, cluster) for row_bytes in (there, row * item))


def _one_way(routing: Routing, tokens: float, row_bytes: float, ranks: int, cluster: Cluster) -> float:
    if ranks <= 1:
        return 0.0
    if routing.dispatch == "rows" or cluster.machines is None:
        return _BEGIN_S + collective_cost("all_to_all", tokens * routing.chosen * row_bytes, ranks, cluster).seconds
    return _BEGIN_S + token_seconds(routing, tokens, row_bytes, crossing_of(cluster.machines, ranks, 1))


def token_seconds(routing: Routing, tokens: float, row_bytes: float, crossing: Crossing) -> float:
    """Time, s, of what travels where a token goes to each node and rank once: the slowest level's, since all are busy at once."""
    share = row_bytes / (row_bytes + _ROW_BYTES)
    slowest = latency = 0.0
    for hop, copies, inside in _copies(routing, crossing):
        rate = level_rate(hop.level) * share * (_FAST_REACH if inside else 1.0)
        slowest = max(slowest, copies * tokens * row_bytes / rate)
        latency += hop.level.latency_s * ceil(log2(max(2, hop.parts)))
    return latency + slowest


def _copies(routing: Routing, crossing: Crossing) -> Iterator[tuple[Hop, float, bool]]:
    """For each level how many copies of a token a rank sends over it, and whether it lies inside a node.

    Inside a node each rank that has an expert gets a copy from the rank where the token arrived, itself among them once in their number.
    """
    nodes = max(1, round(crossing.size / crossing.ranks_in_node))
    ranks, reached = expected_parts(crossing.size, routing), expected_parts(nodes, routing)
    joined = 1
    for hop in crossing.hops:
        peers = joined * (hop.parts - 1)
        joined *= hop.parts
        inside = joined <= crossing.ranks_in_node
        yield hop, (ranks * peers / crossing.ranks_in_node if inside else reached * peers / crossing.ranks_in_node / nodes), inside
