"""How much of a model one rank holds and computes: whether tensor parallelism really splits the work."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod

import torch
from torch import fx

from shardwise.capture.graph import Graph
from shardwise.cost.compute import op_flops
from shardwise.planner.apply import analyse, assign
from shardwise.planner.intra import whole_on_one_rank
from shardwise.program.actions import Kind
from shardwise.program.build import build_programs
from shardwise.program.lower import Cut
from shardwise.program.program import Program
from shardwise.program.trace import Tracer

__all__ = ["Shares", "block_flops", "block_shares"]


def block_modules(graph: Graph) -> set[str]:
    """Paths of the modules that make up the repeated blocks (all, where there are none)."""
    found = {op.module for run in graph.blocks for block in run for op in block}
    return found or {op.module for op in graph.ops}


def block_parameters(graph: Graph) -> set[str]:
    """Names of the parameters that operators of the repeated blocks read."""
    modules = block_modules(graph)
    return {value.name for op in graph.ops if op.module in modules for value in op.inputs if value.kind == "parameter"}


def block_flops(graph: Graph, tracer: Tracer) -> float:
    """Flops of the blocks' matrix products, forward and backward, of one microbatch of the whole batch on one device."""
    analysis = analyse(graph)
    assignment = assign(analysis, 1, 1, 1)
    whole_on_one_rank(assignment)
    cut = Cut(stage_of={op: 0 for op in graph.ops if op not in analysis.prelude}, prelude=frozenset(analysis.prelude))
    programs = build_programs(assignment, cut, "1f1b", lambda kind, size, ranks: "native", device=torch.device("cpu"), tracer=tracer)
    return _flops(programs[0], block_modules(graph))


Shares = tuple[float, float]


def block_shares(graph: Graph, programs: Mapping[int, Program], whole_flops: float) -> Shares:
    """The largest share that any rank holds of the blocks' parameters, and does of their flops (matrix products of a whole step).

    Meant for layouts with a tensor axis alone: stages and data ranks share by other means.
    """
    names, modules = block_parameters(graph), block_modules(graph)
    whole = sum(graph.parameters[name].numel for name in names)
    held = max(sum(prod(part.local) for part in program.parameters if part.name in names) for program in programs.values())
    done = max(_flops(program, modules) * program.microbatches for program in programs.values())
    return held / max(whole, 1), done / whole_flops if whole_flops else 0.0


def _flops(program: Program, modules: Iterable[str]) -> float:
    """Of one microbatch, forward and backward."""
    wanted = set(modules)
    graphs = [graph for stage in program.stages.values() for kind, graph in stage.graphs.items() if kind is not Kind.PRELUDE]
    return sum(
        _node_flops(node) for graph in graphs for node in graph.nodes if node.op == "call_function" and node.meta.get("module") in wanted
    )


def _node_flops(node: fx.Node) -> float:
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta.get("val"))
    return op_flops(node.target, args, kwargs, node.meta.get("val"))
