"""What a model's operators take, each by itself, on the devices of a cluster."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from shardwise.capture.graph import Op, call
from shardwise.cluster.model import Cluster
from shardwise.cost.compute import op_flops, op_seconds
from shardwise.program.trace import Tracer

__all__ = ["OpCosts"]


@dataclass(kw_only=True)
class OpCosts:
    """Seconds of each operator of the graph on the whole batch, forward and backward, from its own traces; equal calls are traced once."""

    cluster: Cluster
    tracer: Tracer
    known: dict[Op, tuple[float, bool]] = field(default_factory=dict)
    total_s: float | None = None  # of all operators, once somebody has asked

    def of(self, op: Op) -> tuple[float, bool]:
        """(seconds, whether it multiplies matrices)."""
        if op not in self.known:
            tensors = [self.tracer.tensor(value.shape, value.dtype) for value in op.inputs]
            grads = [op.requires_grad and value.requires_grad for value in op.inputs]
            key = (op.name, repr((op.args, op.kwargs)))
            if any(grads):
                cotangents = [self.tracer.tensor(v.shape, v.dtype) if v.requires_grad else None for v in op.outputs]
                traced = self.tracer.joint(lambda t: call(op, list(t)), key, tensors, grads, cotangents)
            else:
                traced = self.tracer.forward(lambda t: call(op, list(t)), key, tensors, grads)
            self.known[op] = self._sum(traced.graph)
        return self.known[op]

    def _sum(self, graph: torch.fx.Graph) -> tuple[float, bool]:
        seconds, flops = 0.0, 0.0
        for node in graph.nodes:
            if node.op == "call_function":
                args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta.get("val"))
                seconds += op_seconds(node.target, args, kwargs, node.meta.get("val"), self.cluster)
                flops += op_flops(node.target, args, kwargs, node.meta.get("val"))
        return seconds, flops > 0
