"""Seconds of the reshards that an assignment implies, in one microbatch, forward and backward."""

from __future__ import annotations

from math import prod

from shardwise.capture.graph import Op, Value
from shardwise.cluster.model import Cluster
from shardwise.cost.collectives import collective_cost
from shardwise.sharding.assignment import Assignment
from shardwise.sharding.reshard import collective_of, dual
from shardwise.sharding.types import Placement, Shard

__all__ = ["reshard_seconds", "reshards", "share_left"]


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
    total = 0.0
    for value, made, wanted, _ in reshards(assignment, axis):
        whole = value.nbytes * (share if value.kind == "result" else 1.0) * share_left(assignment, value, axis)
        kinds = [collective_of(made, wanted)] + ([collective_of(dual(wanted), dual(made))] if value.requires_grad else [])
        total += sum(
            collective_cost(kind, whole / ranks if kind == "all_to_all" else whole, ranks, cluster).seconds for kind in kinds if kind
        )
    return total
