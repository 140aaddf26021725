"""What ranks send each other, apart from how long it takes: so that it can be costed again on other links."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from math import prod

from pydantic import BaseModel, ConfigDict
from torch import fx

from shardwise.cluster.model import Cluster
from shardwise.cost.collectives import Shares, collective_cost, collective_shares
from shardwise.cost.compute import streaming_seconds
from shardwise.cost.memory import tensor_bytes
from shardwise.program.program import Program
from shardwise.program.reductions import reductions, regatherings
from shardwise.sharding.collectives import ARRIVED, BEGINS, COLLECTIVES, group_ranks, is_end_of_shift, is_shift

__all__ = [
    "Traffic",
    "computed_beside",
    "counted",
    "gather_traffic",
    "graph_traffic",
    "reduction_traffic",
    "traffic_of",
    "traffic_seconds",
    "traffic_shares",
]


class Traffic(BaseModel):
    """A collective of a group of ranks, each `stride` after the one before, and how many times it is done.

    kind, nbytes: as in `shardwise.cost.collectives`; impl: None where the fastest is taken. inner: whether the parts lie inside the tensor,
    not one after the other, so that it is copied as well where the software does that. beside_s: seconds that the rank computes meanwhile.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: str
    nbytes: int
    ranks: int
    stride: int
    impl: str | None = None
    times: int = 1
    inner: bool = False
    beside_s: float = 0.0


def traffic_of(node: fx.Node, beside_s: float = 0.0) -> Traffic:
    """Of one collective in a graph. beside_s: as of `Traffic`."""
    kind = COLLECTIVES[node.target]  # type: ignore[index]
    source = node.args[0]
    assert isinstance(source, fx.Node)
    nbytes = tensor_bytes(node.meta["val"] if kind == "all_gather" else source.meta["val"])
    ranks, stride = _group(str(node.args[1]))
    kind = "all_to_all" if kind == "exchange_rows" else kind
    inner = kind in ("all_gather", "reduce_scatter") and prod(source.meta["val"].shape[: int(str(node.args[2]))]) > 1
    return Traffic(kind=kind, nbytes=nbytes, ranks=ranks, stride=stride, impl=str(node.args[-1]), inner=inner, beside_s=beside_s)


def graph_traffic(graph: fx.Graph, beside: Mapping[fx.Node, float]) -> list[Traffic]:
    """Of one run of a graph on a rank. beside: of collectives that are under way while the rank computes, the seconds of that."""
    talk = [node for node in graph.nodes if node.op == "call_function" and node.target in COLLECTIVES]
    return counted(traffic_of(node, beside.get(node, 0.0)) for node in talk)


def computed_beside(graph: fx.Graph, seconds: Mapping[fx.Node, float]) -> dict[fx.Node, float]:
    """For each message that is begun and awaited later the seconds of computing between the two. seconds: of what computes.

    What lies between the ends of several is divided among them by the bytes that they send.
    """
    under_way: dict[fx.Node, int] = {}
    found: dict[fx.Node, float] = {}
    for node in graph.nodes:
        if is_shift(node.target) or node.target in BEGINS.values():
            under_way[node] = traffic_of(node).nbytes
            found[node] = 0.0
        elif is_end_of_shift(node.target) or node.target is ARRIVED:
            under_way.pop(node.args[0], None)
        elif under_way and node in seconds:
            total = sum(under_way.values())
            for each, nbytes in under_way.items():
                found[each] += seconds[node] * nbytes / max(1, total)
    return found


def reduction_traffic(program: Program) -> list[Traffic]:
    """Of the pending gradients, summed at the end of a step."""
    found: list[Traffic] = []
    for reduction in reductions(program):
        if reduction.scatter:
            found.append(_sent("reduce_scatter", reduction.nbytes, reduction.scatter))
        found += [_sent("all_reduce", reduction.summed * reduction.dtype.itemsize, group) for group in reduction.groups]
    return counted(found)


def gather_traffic(program: Program) -> list[Traffic]:
    """Of what other ranks have updated, gathered at the end of a step."""
    return counted(_sent("all_gather", message.nbytes, message.group) for message in regatherings(program))


def _sent(kind: str, nbytes: int, group: str) -> Traffic:
    ranks, stride = _group(group)
    return Traffic(kind=kind, nbytes=nbytes, ranks=ranks, stride=stride)


def counted(each: Iterable[Traffic]) -> list[Traffic]:
    """Equal ones as one."""
    return [one.model_copy(update={"times": one.times * times}) for one, times in Counter(each).items()]


def traffic_seconds(traffic: Iterable[Traffic], cluster: Cluster) -> float:
    """One after the other."""
    each = traffic_shares(traffic, cluster)
    return each.compute_s + each.communicate_s


def traffic_shares(traffic: Iterable[Traffic], cluster: Cluster) -> Shares:
    """One after the other; where ranks share cores, collectives take part of their time from them."""
    shares = [(each.times, _shares(each, cluster)) for each in traffic]
    compute_s, communicate_s = (sum(times * getattr(share, name) for times, share in shares) for name in ("compute_s", "communicate_s"))
    return Shares(compute_s=compute_s, communicate_s=communicate_s)


def _shares(each: Traffic, cluster: Cluster) -> Shares:
    if each.impl is None:
        return Shares(compute_s=0.0, communicate_s=collective_cost(each.kind, each.nbytes, each.ranks, cluster, each.stride).seconds)
    share = collective_shares(each.kind, each.impl, each.nbytes, each.ranks, cluster, each.stride)
    copied_s = streaming_seconds(each.nbytes, each.nbytes, cluster) if each.inner and cluster.rates.copies_inner else 0.0
    return Shares(compute_s=share.compute_s, communicate_s=max(0.0, share.communicate_s + copied_s - each.beside_s))


def _group(name: str) -> tuple[int, int]:
    """(ranks, stride)."""
    ranks = group_ranks(name)
    return len(ranks), ranks[1] - ranks[0] if len(ranks) > 1 else 1
