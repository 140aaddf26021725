"""What each action of a program takes: seconds of computing, seconds of communicating, and bytes."""

from __future__ import annotations

from dataclasses import dataclass, fields
from math import prod

import torch
from torch import fx

from shardwise.cluster.model import Cluster
from shardwise.cost.collectives import collective_cost
from shardwise.cost.compute import op_seconds, streaming_seconds
from shardwise.cost.fusion import fused_traffic
from shardwise.cost.memory import bases, liveness, tensor_bytes
from shardwise.cost.optimizer import optimizer_seconds
from shardwise.program.actions import Kind
from shardwise.program.program import ParameterPart, Program
from shardwise.program.schedules import in_flight
from shardwise.sharding.collectives import COLLECTIVES
from shardwise.simulate.traffic import reduction_traffic, traffic_of, traffic_seconds

__all__ = ["OPTIMIZER_STATES", "MemoryUse", "StageTimes", "graph_seconds", "memory_use", "node_seconds", "sink_seconds", "stage_times"]

OPTIMIZER_STATES = {"adamw": 2, "adam": 2, "sgd": 0, "sgd_momentum": 1}


# Memory that freed tensors leave with the allocator, the transport's buffers and the program's own objects: measured peaks less the
# tensors' own, on a CPU with glibc and gloo (GPT-2, Llama and ViT steps of 130 to 1,550 MiB were 35 to 60 MiB above).
_RUNTIME_BYTES = 40 * 2**20


@dataclass(frozen=True, kw_only=True)
class Seconds:
    """compute_s takes a core; communicate_s waits for the network or for other ranks' cores."""

    compute_s: float
    communicate_s: float


@dataclass(frozen=True, kw_only=True)
class StageTimes:
    """Of each kind of action of one rank."""

    of: dict[Kind, Seconds]
    transfer_s: dict[str, float]  # edge → one message


@dataclass(frozen=True, kw_only=True)
class MemoryUse:
    """Bytes of a rank at its peak."""

    parameters: int
    gradients: int
    optimizer: int
    buffers: int
    saved: int
    transient: int
    runtime: int

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.buffers + self.saved + self.transient + self.runtime

    def by_kind(self) -> dict[str, int]:
        return {each.name: getattr(self, each.name) for each in fields(self)}


def graph_seconds(graph: fx.Graph, cluster: Cluster) -> Seconds:
    """One run of a graph on a rank."""
    each = node_seconds(graph, cluster)
    communicate = sum(seconds for node, seconds in each.items() if node.target in COLLECTIVES)
    return Seconds(compute_s=sum(each.values()) - communicate, communicate_s=communicate)


def node_seconds(graph: fx.Graph, cluster: Cluster) -> dict[fx.Node, float]:
    """Of every call of a graph on a rank."""
    fused = fused_traffic(graph) if cluster.rates.fuses else {}
    found: dict[fx.Node, float] = {}
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if node.target in COLLECTIVES:
            found[node] = traffic_seconds([traffic_of(node)], cluster)
        elif node in fused:
            found[node] = streaming_seconds(*fused[node], cluster)
        else:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta.get("val"))
            found[node] = op_seconds(node.target, args, kwargs, node.meta.get("val"), cluster)
    return found


def stage_times(program: Program, cluster: Cluster, optimizer: str) -> StageTimes:
    """What the actions of a rank take."""
    stage = program.stage
    update_s = sum(optimizer_seconds(prod(p.local), p.dtype, optimizer, cluster) for p in stage.parameters if p.requires_grad)
    apart = prod(program.mesh[axis] for axis in ("dp", "cp", "tp"))
    transfers = {edge.name: collective_cost("send_recv", edge.nbytes, 2, cluster, apart).seconds for edge in program.edges}
    backward = graph_seconds(stage.backward, cluster)
    sinks = sink_seconds(stage.parameters, cluster)
    return StageTimes(
        of={
            Kind.PRELUDE: graph_seconds(stage.prelude, cluster),
            Kind.FORWARD: graph_seconds(stage.forward, cluster),
            Kind.BACKWARD: Seconds(compute_s=backward.compute_s + sinks, communicate_s=backward.communicate_s),
            Kind.REDUCE: Seconds(compute_s=0.0, communicate_s=traffic_seconds(reduction_traffic(program), cluster)),
            Kind.UPDATE: Seconds(compute_s=update_s, communicate_s=0.0),
        },
        transfer_s=transfers,
    )


def sink_seconds(parameters: list[ParameterPart], cluster: Cluster) -> float:
    """Putting each gradient into its buffer: it is read and written once."""
    copy = torch.ops.aten.copy_.default
    seconds = 0.0
    for parameter in parameters:
        if parameter.requires_grad:
            meta = torch.empty(parameter.local, dtype=parameter.dtype, device="meta")
            seconds += op_seconds(copy, (meta, meta), {}, meta, cluster)
    return seconds


def memory_use(program: Program, optimizer: str) -> MemoryUse:
    """The peak of a rank, by liveness on its graphs and by how many microbatches are in flight."""
    stage = program.stage
    trained = [p for p in stage.parameters if p.requires_grad]
    held = sum(_bytes(p) for p in stage.parameters)
    gradients = sum(_bytes(p) for p in trained)
    saved, aliases, sizes = _saved(program)
    flying = in_flight([(action.kind, action.microbatch) for action in program.actions if action.kind in (Kind.FORWARD, Kind.BACKWARD)])
    forward_peak = liveness(stage.forward).peak_bytes
    backward_peak = liveness(stage.backward, lambda node: sizes.get(node, 0), aliases).peak_bytes
    largest = max((_bytes(p) for p in trained), default=0)
    transient = max(forward_peak - saved, backward_peak, 2 * largest - flying * saved)
    return MemoryUse(
        parameters=held,
        gradients=gradients,
        optimizer=OPTIMIZER_STATES.get(optimizer, 2) * gradients,
        buffers=sum(_bytes(p) for p in stage.buffers) + _crossing_bytes(program),
        saved=flying * saved,
        transient=max(0, transient),
        runtime=_RUNTIME_BYTES,
    )


def _saved(program: Program) -> tuple[int, dict[fx.Node, fx.Node], dict[fx.Node, int]]:
    """Bytes saved by a forward pass; in the backward graph, which saved values share memory, and the bytes of each that has its own."""
    stage = program.stage
    forward_base = bases(stage.forward, {})
    kept = list(stage.forward.output_node().args[0])[len(stage.forward_outputs) :]  # type: ignore[arg-type]
    placeholders = [node for node in stage.backward.nodes if node.op == "placeholder"][: stage.saved]
    inputs = [node for node in stage.forward.nodes if node.op == "placeholder"]
    lasting = {node for node, binding in zip(inputs, stage.forward_inputs, strict=True) if binding.kind != "edge"}
    first: dict[fx.Node, fx.Node] = {}
    aliases: dict[fx.Node, fx.Node] = {}
    sizes: dict[fx.Node, int] = {}
    for node, placeholder in zip(kept, placeholders, strict=True):
        owner = forward_base[node]
        if owner in first:
            aliases[placeholder] = first[owner]
        else:
            first[owner] = placeholder
            sizes[placeholder] = 0 if owner in lasting else tensor_bytes(owner.meta.get("val"))
    return sum(sizes.values()), aliases, sizes


def _crossing_bytes(program: Program) -> int:
    return sum(tensor_bytes(node.meta.get("val")) for node in program.stage.prelude.output_node().all_input_nodes)


def _bytes(part: ParameterPart) -> int:
    return prod(part.local) * part.dtype.itemsize
