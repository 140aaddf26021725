"""Cuts a backward graph in two: what gradients on edges need, and what only gradients of parameters need.

    backward   saved, gradients ──▶ gradients on edges, those of parameters that are finished on the way, kept values
    weight     kept values      ──▶ the other parameters' gradients

Zero-bubble schedules (Qi et al. 2023, "Zero bubble pipeline parallelism", section 2) put the second part off until a rank would wait.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

__all__ = ["Parts", "edges_need", "split_backward"]


@dataclass(frozen=True, kw_only=True)
class Parts:
    """backward: returns what it is asked for, in its places (None where weight makes it), then the kept values.

    weight: takes the kept values; returns the gradients of `later`, numbers of the whole graph's outputs.
    """

    backward: fx.Graph
    weight: fx.Graph
    later: list[int]
    kept: int


def edges_need(graph: fx.Graph, for_parameters: Sequence[bool]) -> set[fx.Node]:
    """The nodes of which outputs are made that are not for parameters."""
    pending = [node for node, parameter in zip(_returned(graph), for_parameters, strict=True) if node is not None and not parameter]
    found: set[fx.Node] = set()
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            pending.extend(node.all_input_nodes)
    return found


def split_backward(graph: fx.Graph, for_parameters: Sequence[bool]) -> Parts:
    """for_parameters: of each output of the graph, whether it is a parameter's gradient. The graph's inputs are the first part's."""
    outputs = _returned(graph)
    early = {node for node in graph.nodes if node.op == "placeholder"} | edges_need(graph, for_parameters)
    early |= {node for node in graph.nodes if _is_item(node) and node.args[0] in early}  # one of several results, there all the same
    later = [number for number, node in enumerate(outputs) if node is not None and node not in early]
    last = {node for node in graph.nodes if node.op == "call_function" and node not in early}
    kept = [node for node in graph.nodes if node in early and any(user in last for user in node.users)]
    first = _taken(graph, early, [], [*(None if number in later else node for number, node in enumerate(outputs)), *kept])
    second = _taken(graph, last, kept, [outputs[number] for number in later])
    return Parts(backward=first, weight=second, later=later, kept=len(kept))


def _returned(graph: fx.Graph) -> list[fx.Node | None]:
    return list(graph.output_node().args[0])  # type: ignore[arg-type]


def _is_item(node: fx.Node) -> bool:
    return node.op == "call_function" and getattr(node.target, "__name__", "") == "getitem"


def _taken(graph: fx.Graph, nodes: set[fx.Node], inputs: Sequence[fx.Node], outputs: Sequence[fx.Node | None]) -> fx.Graph:
    """Some of the nodes as a graph of their own, with `inputs` as further placeholders."""
    taken = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in inputs:
        copies[node] = taken.placeholder(node.name)
        copies[node].meta = dict(node.meta)
    for node in graph.nodes:
        if node in nodes and node.op != "output":
            copies[node] = taken.node_copy(node, copies.__getitem__)
    taken.output([None if node is None else copies[node] for node in outputs])
    return taken
