"""What each action of a program takes: seconds of computing and of communicating."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

import torch
from torch import fx

from shardwise.cluster.model import Cluster
from shardwise.cost.collectives import Shares, collective_cost, collective_shares
from shardwise.cost.compute import op_seconds, streaming_seconds
from shardwise.cost.fusion import fused_traffic
from shardwise.cost.network import sent_seconds
from shardwise.cost.optimizer import optimizer_seconds
from shardwise.program.actions import Kind
from shardwise.program.program import ParameterPart, Program
from shardwise.sharding.collectives import COLLECTIVES
from shardwise.simulate.memory import own_parameters
from shardwise.simulate.traffic import (
    Traffic,
    computed_beside,
    gather_traffic,
    graph_traffic,
    reduction_traffic,
    traffic_of,
    traffic_seconds,
    traffic_shares,
)

__all__ = [
    "Seconds",
    "graph_seconds",
    "node_seconds",
    "passing_traffic",
    "sink_seconds",
    "stage_times",
    "transfer_shares",
]


@dataclass(frozen=True, kw_only=True)
class Seconds:
    """compute_s takes a core; communicate_s waits for the network or for other ranks' cores."""

    compute_s: float
    communicate_s: float


def graph_seconds(graph: fx.Graph, cluster: Cluster) -> Seconds:
    """One run of a graph on a rank. Where ranks share cores, collectives take part of their time from them. What is computed while a
    message is under way hides it."""
    each = _computing_seconds(graph, cluster)
    talk = traffic_shares(graph_traffic(graph, computed_beside(graph, each)), cluster)
    alone = sum(each.values())
    return Seconds(compute_s=alone + talk.compute_s, communicate_s=talk.communicate_s)


def passing_traffic(graph: fx.Graph, cluster: Cluster) -> list[Traffic]:
    """What one run of a graph on a rank sends, and how long it computes beside that."""
    return graph_traffic(graph, computed_beside(graph, _computing_seconds(graph, cluster)))


def node_seconds(graph: fx.Graph, cluster: Cluster) -> dict[fx.Node, float]:
    """Of every call of a graph on a rank; of a shift what the computing beside it does not hide."""
    each = _computing_seconds(graph, cluster)
    beside = computed_beside(graph, each)
    talk = [node for node in graph.nodes if node.op == "call_function" and node.target in COLLECTIVES]
    return each | {node: traffic_seconds([traffic_of(node, beside.get(node, 0.0))], cluster) for node in talk}


def _computing_seconds(graph: fx.Graph, cluster: Cluster) -> dict[fx.Node, float]:
    """Of every call of a graph that is no collective."""
    fused = fused_traffic(graph) if cluster.rates.fuses else {}
    found: dict[fx.Node, float] = {}
    for node in graph.nodes:
        if node.op != "call_function" or node.target in COLLECTIVES:
            continue
        if node in fused:
            found[node] = streaming_seconds(*fused[node], cluster)
        else:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta.get("val"))
            found[node] = op_seconds(node.target, args, kwargs, node.meta.get("val"), cluster)
    return found


def stage_times(program: Program, cluster: Cluster, optimizer: str) -> dict[int, dict[Kind, Seconds]]:
    """What the actions of a rank take, by stage; what it does once for all its stages counts with the first, the update with each."""
    found: dict[int, dict[Kind, Seconds]] = {}
    reduce_s = traffic_seconds(reduction_traffic(program), cluster)
    gather_s = traffic_seconds(gather_traffic(program), cluster)
    for number, parameters in own_parameters(program).items():
        stage = program.stages[number]
        update_s = sum(optimizer_seconds(prod(p.updated), p.wide, optimizer, cluster) for p in parameters if p.requires_grad)
        found[number] = {kind: graph_seconds(graph, cluster) for kind, graph in stage.graphs.items()}
        for kind in (Kind.BACKWARD, Kind.WEIGHT):
            if kind in found[number]:
                sinks = sink_seconds([p for p in stage.parameters if p.name in stage.gradients(kind)], cluster)
                found[number][kind] = replace(found[number][kind], compute_s=found[number][kind].compute_s + sinks)
        first = len(found) == 1
        found[number][Kind.REDUCE] = Seconds(compute_s=0.0, communicate_s=reduce_s if first else 0.0)
        found[number][Kind.UPDATE] = Seconds(compute_s=update_s, communicate_s=gather_s if first else 0.0)
    return found


def transfer_shares(program: Program, cluster: Cluster) -> dict[str, Shares]:
    """Of one message on each edge of a rank; none between stages of one rank. compute_s: of its sender, and of its receiver."""
    local = program.local_edges
    stage_ranks = program.stage_ranks
    found: dict[str, Shares] = {}
    for edge in program.edges:
        source, target = (program.placement[stage] * stage_ranks + program.rank % stage_ranks for stage in (edge.source, edge.target))
        inside = replace(cluster, network=None)
        impl = collective_cost("send_recv", edge.nbytes, 2, inside, stage_ranks).impl
        shares = collective_shares("send_recv", impl, edge.nbytes, 2, inside, stage_ranks)
        if cluster.network is not None and cluster.network.node(source) != cluster.network.node(target):
            shares = replace(shares, communicate_s=max(shares.communicate_s, sent_seconds(edge.nbytes, stage_ranks, cluster.network)))
        found[edge.name] = shares
    return {name: Shares(compute_s=0.0, communicate_s=0.0) if name in local else each for name, each in found.items()}


def sink_seconds(parameters: list[ParameterPart], cluster: Cluster) -> float:
    """Putting each gradient into its buffer: it is read and written once."""
    copy = torch.ops.aten.copy_.default
    seconds = 0.0
    for parameter in parameters:
        if parameter.requires_grad:
            made, kept = (torch.empty(parameter.gradient, dtype=each, device="meta") for each in (parameter.dtype, parameter.wide))
            seconds += op_seconds(copy, (kept, made), {}, kept, cluster)
    return seconds
