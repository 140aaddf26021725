"""Makes a program's graphs callable: Python code that frees each tensor at its last use."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from shardwise._torch import BoxedCodeGen
from shardwise.program.program import Binding, StageProgram

__all__ = ["Prelude", "accumulating", "callable_of"]

Function = Callable[[list[Any]], list[Any]]


def callable_of(graph: fx.Graph) -> Function:
    """The graph as a function of one list of inputs, which it empties."""
    graph.set_codegen(BoxedCodeGen())
    module = fx.GraphModule(torch.nn.Module(), graph)
    return module.forward  # type: ignore[no-any-return]


class Prelude:
    """The part of a step that depends on batch inputs alone. What depends on nothing is computed once, here."""

    def __init__(self, stage: StageProgram, buffers: Mapping[str, Tensor]) -> None:
        self.inputs = [binding.name for binding in stage.prelude_inputs if binding.kind == "crossing"]
        self.names = [crossing.name for crossing in stage.crossings]
        graph, self.constants = _fold(stage.prelude, stage.prelude_inputs, buffers)
        self.function = callable_of(graph)

    def run(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The crossings of a step, by name."""
        results = self.function([*(batch[name] for name in self.inputs), *self.constants])
        return dict(zip(self.names, results, strict=True))


def _fold(graph: fx.Graph, bindings: Sequence[Binding], buffers: Mapping[str, Tensor]) -> tuple[fx.Graph, list[Tensor]]:
    """The graph with what does not depend on the batch computed: its inputs are the batch's, then the constants returned."""
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    known: dict[fx.Node, Any] = {n: buffers[b.name] for n, b in zip(placeholders, bindings, strict=True) if b.kind == "buffer"}
    folded, copies = fx.Graph(), {}
    for node, binding in zip(placeholders, bindings, strict=True):
        if binding.kind == "crossing":
            copies[node] = folded.placeholder(node.name)
    constants: list[Tensor] = []

    def copy_of(node: fx.Node) -> fx.Node:
        if node not in copies:
            last = [n for n in folded.nodes if n.op == "placeholder"]
            with folded.inserting_after(last[-1]) if last else folded.inserting_before(next(iter(folded.nodes), None)):
                copies[node] = folded.placeholder(f"constant_{len(constants)}")
            constants.append(known[node])
        return copies[node]

    for node in graph.nodes:
        if node.op == "call_function" and all(parent in known for parent in node.all_input_nodes):
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), known.__getitem__)
            known[node] = node.target(*args, **kwargs)
        elif node.op == "call_function":
            copies[node] = folded.node_copy(node, copy_of)
    folded.output([copy_of(node) for node in graph.output_node().args[0]])  # type: ignore[union-attr]
    return folded, constants


def accumulating(stage: StageProgram, *, first: bool) -> Function:
    """The backward graph with each parameter's gradient put into a buffer as soon as it is known.

    Inputs: saved values, gradients of what was sent, and a buffer for each parameter with a gradient; outputs: gradients to send.
    first: whether the buffers are overwritten (the step's first microbatch) or added to.
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    returned = graph.graph_copy(stage.backward, copies)
    gradients: Sequence[Any] = returned  # type: ignore[assignment]
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    sent = []
    last = placeholders[-1]
    for binding, gradient in zip(stage.backward_outputs, gradients, strict=True):
        if binding.kind != "parameter":
            sent.append(gradient)
        elif gradient is not None:
            with graph.inserting_after(last):
                last = graph.placeholder(f"buffer_{''.join(c if c.isalnum() else '_' for c in binding.name)}")
            with graph.inserting_after(last if gradient.op == "placeholder" else gradient):
                graph.call_function(torch.ops.aten.copy_.default if first else torch.ops.aten.add_.Tensor, (last, gradient))
    graph.output(sent)
    return callable_of(graph)


def with_gradient(stage: StageProgram) -> list[str]:
    """The parameters that the backward graph makes a gradient for, in the order of `accumulating`'s buffers."""
    returned: Sequence[Any] = stage.backward.output_node().args[0]  # type: ignore[assignment]
    return [b.name for b, g in zip(stage.backward_outputs, returned, strict=True) if b.kind == "parameter" and g is not None]
