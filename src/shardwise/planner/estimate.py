"""Seconds of the reshards that an assignment implies, and of what goes round in attention, in one microbatch, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

from shardwise.capture.graph import Op, Value
from shardwise.cluster.model import Cluster
from shardwise.cost.collectives import collective_cost
from shardwise.sharding.assignment import Assignment
from shardwise.sharding.context import goes_round
from shardwise.sharding.reshard import collective_of, dual
from shardwise.sharding.rules.attention import is_causal
from shardwise.sharding.types import Placement, Shard

__all__ = ["context_work", "reshard_seconds", "reshards", "ring_seconds", "share_left", "waiting_share"]

_FORWARD = 2 / 7  # of attention's products: two forward, five backward


def reshards(assignment: Assignment, axis: str) -> list[tuple[Value, Placement, Placement, list[Op]]]:
    """(value, made as, wanted as, by whom) for each change of type on the axis, each once."""
    found: dict[tuple[Value, Placement], list[Op]] = {}
    for op in assignment.graph.ops:
        for index, value in enumerate(op.inputs):
            wanted = assignment.wanted(op, index)[axis]
            if assignment.produced(value)[axis] != wanted:
                found.setdefault((value, wanted), []).append(op)
    return [(value, assignment.produced(value)[axis], wanted, readers) for (value, wanted), readers in found.items()]


def share_left(assignment: Assignment, value: Value, axis: str) -> float:
    """What the context and the tensor axis, but for `axis`, leave a rank of a value as it is made."""
    made = assignment.produced(value)
    return 1 / prod(assignment.mesh[other] for other in ("cp", "tp") if other != axis and isinstance(made[other], Shard))


def reshard_seconds(assignment: Assignment, axis: str, share: float, cluster: Cluster) -> float:
    """share: of a batch-sized value that one microbatch on one data rank has, or on those that divide the experts where it is of these."""
    ranks = assignment.mesh[axis]
    if ranks == 1:
        return 0.0
    total, stride = 0.0, assignment.mesh["tp"] if axis == "cp" else 1
    for value, made, wanted, _ in reshards(assignment, axis):
        whole = value.nbytes * (share if value.kind == "result" else 1.0) * share_left(assignment, value, axis)
        kinds = [collective_of(made, wanted)] + ([collective_of(dual(wanted), dual(made))] if value.requires_grad else [])
        sent = [(kind, whole / ranks if kind == "all_to_all" else whole) for kind in kinds if kind]
        total += sum(collective_cost(kind, nbytes, ranks, cluster, stride).seconds for kind, nbytes in sent)
    return total


def ring_seconds(assignment: Assignment, share: float, seconds: Callable[[Op], float], cluster: Cluster) -> float:
    """What the shifts of keys, values and their gradients take longer than the products beside them. share: as of `reshard_seconds`;
    seconds: of a rank's part of attention, both passes."""
    ranks = assignment.mesh["cp"]
    total = 0.0
    for op in assignment.graph.ops:
        if not goes_round(assignment.signatures[op]) or assignment.variants[op]["cp"].choice.mode != "split":
            continue
        kept = [
            value.nbytes / (assignment.mesh["tp"] if isinstance(assignment.wanted(op, index)["tp"], Shard) else 1)
            for index, value in enumerate(op.inputs[1:3], start=1)
        ]
        shift = collective_cost("shift", sum(kept) * share / ranks, ranks, cluster, assignment.mesh["tp"]).seconds
        forward, backward = (part * seconds(op) / ranks for part in (_FORWARD, 1 - _FORWARD))
        total += (ranks - 1) * (max(0.0, shift - forward) + max(0.0, 2 * shift - backward)) + shift
    return total


def context_work(assignment: Assignment, op: Op) -> float:
    """What the rank of the context axis that does most of an operator does, as a multiple of the mean: under a causal mask the last
    queries see all keys."""
    ranks = assignment.mesh["cp"]
    choice = assignment.variants[op]["cp"].choice
    uneven = is_causal(op) and choice.factor == "q" and not choice.mirrored
    return 2 - 1 / ranks if uneven else 1.0


def waiting_share(schedule: str, chunks: int) -> float:
    """Of the p - 1 microbatches' time that the ranks of a pipeline wait with 1F1B, what they are expected to wait with a schedule: an
    interleaved one waits for parts of a microbatch (Narayanan et al. 2021, section 2.2), weights' parts fill what is left (Qi et al. 2023,
    table 2; 2024, table 1) as far as they take as long as the others."""
    known = {"zb-h1": 0.5, "zb-2p": 0.3, "zb-v": 0.2}
    return known.get(schedule, 1 / chunks)
