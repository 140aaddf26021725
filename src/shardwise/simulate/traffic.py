"""What ranks send each other, apart from how long it takes: so that it can be costed again on other links."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from math import prod

from pydantic import BaseModel, ConfigDict
from torch import fx

from shardwise.cluster.model import Cluster
from shardwise.cost.collectives import collective_cost, collective_seconds
from shardwise.cost.compute import streaming_seconds
from shardwise.cost.memory import tensor_bytes
from shardwise.program.program import Program
from shardwise.program.reductions import reductions
from shardwise.sharding.collectives import COLLECTIVES, group_ranks

__all__ = ["Traffic", "counted", "graph_traffic", "reduction_traffic", "traffic_of", "traffic_seconds"]


class Traffic(BaseModel):
    """A collective of a group of ranks, each `stride` after the one before, and how many times it is done.

    kind, nbytes: as in `shardwise.cost.collectives`; impl: None where the fastest is taken. inner: whether the parts lie inside the tensor,
    not one after the other, so that it is copied as well where the software does that.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: str
    nbytes: int
    ranks: int
    stride: int
    impl: str | None = None
    times: int = 1
    inner: bool = False


def traffic_of(node: fx.Node) -> Traffic:
    """Of one collective in a graph."""
    kind = COLLECTIVES[node.target]  # type: ignore[index]
    source = node.args[0]
    assert isinstance(source, fx.Node)
    nbytes = tensor_bytes(node.meta["val"] if kind == "all_gather" else source.meta["val"])
    ranks, stride = _group(str(node.args[1]))
    inner = kind in ("all_gather", "reduce_scatter") and prod(source.meta["val"].shape[: int(str(node.args[2]))]) > 1
    return Traffic(kind=kind, nbytes=nbytes, ranks=ranks, stride=stride, impl=str(node.args[-1]), inner=inner)


def graph_traffic(graph: fx.Graph) -> list[Traffic]:
    """Of one run of a graph on a rank."""
    return counted(traffic_of(node) for node in graph.nodes if node.op == "call_function" and node.target in COLLECTIVES)


def reduction_traffic(program: Program) -> list[Traffic]:
    """Of the pending gradients, summed at the end of a step."""
    found = [(reduction.nbytes, *_group(group)) for reduction in reductions(program) for group in reduction.groups]
    return counted(Traffic(kind="all_reduce", nbytes=nbytes, ranks=ranks, stride=stride) for nbytes, ranks, stride in found)


def counted(each: Iterable[Traffic]) -> list[Traffic]:
    """Equal ones as one."""
    return [one.model_copy(update={"times": one.times * times}) for one, times in Counter(each).items()]


def traffic_seconds(traffic: Iterable[Traffic], cluster: Cluster) -> float:
    """One after the other."""
    return sum(each.times * _seconds(each, cluster) for each in traffic)


def _seconds(each: Traffic, cluster: Cluster) -> float:
    copied_s = streaming_seconds(each.nbytes, each.nbytes, cluster) if each.inner and cluster.rates.copies_inner else 0.0
    if each.impl is None:
        return collective_cost(each.kind, each.nbytes, each.ranks, cluster, each.stride).seconds + copied_s
    return collective_seconds(each.kind, each.impl, each.nbytes, each.ranks, cluster, each.stride) + copied_s


def _group(name: str) -> tuple[int, int]:
    """(ranks, stride)."""
    ranks = group_ranks(name)
    return len(ranks), ranks[1] - ranks[0] if len(ranks) > 1 else 1
