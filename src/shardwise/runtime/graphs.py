"""Makes a program's graphs callable: Python code that frees each tensor at its last use, and keeps the holes of the heap whole."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from shardwise._torch import BoxedCodeGen
from shardwise.cost.memory import bases, made_bytes
from shardwise.heap import join_freed_memory, small_blocks_are_set_aside
from shardwise.program.program import Binding, StageProgram
from shardwise.program.reuse import into_fresh_memory
from shardwise.program.sinks import into_buffer, product_of

__all__ = ["Prelude", "accumulating", "callable_of"]

aten = torch.ops.aten

Function = Callable[[list[Any]], list[Any]]

_LARGE_BYTES = 1 << 20  # of values that are worth 20 microseconds


def callable_of(graph: fx.Graph, *, in_heap: bool = False) -> Function:
    """The graph as a function of one list of inputs, which it empties.

    in_heap: its values lie in the process' own memory, and are to keep no holes of it apart.
    """
    if in_heap and small_blocks_are_set_aside():
        graph = _joining_freed_memory(graph)
    graph.set_codegen(BoxedCodeGen())
    module = fx.GraphModule(torch.nn.Module(), graph)
    return module.forward


def _joining_freed_memory(graph: fx.Graph) -> fx.Graph:
    """A copy that joins freed memory before each large value is made, so that what goes with the value lies in no hole."""
    joining, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    joining.output(joining.graph_copy(graph, copies))
    for node, owner in bases(graph, {}).items():
        if node is owner and node.op == "call_function" and made_bytes(node) >= _LARGE_BYTES:
            with joining.inserting_before(copies[node]):
                joining.call_function(join_freed_memory, kwargs={"quickly": True})
    return joining


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
    """The graph with what does not depend on the batch computed: its inputs are the batch's, then the constants returned.

    Nothing writes over what is computed here: it is read in every step.
    """
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
            known[node] = into_fresh_memory(node.target)(*args, **kwargs)
        elif node.op == "call_function":
            copies[node] = folded.node_copy(node, copy_of)
            if node.args and node.args[0] in known:
                copies[node].target = into_fresh_memory(node.target)
    outputs: Any = graph.output_node().args[0]
    folded.output([copy_of(node) for node in outputs])
    return folded, constants


def accumulating(
    source: fx.Graph,
    outputs: Sequence[Binding],
    *,
    first: Container[str],
    wide: Container[str] = (),
    begin: Mapping[Callable[[], None], set[str]] | None = None,
    make: Callable[[fx.Graph], Function] = callable_of,
) -> Function:
    """A graph of the backward pass with each parameter's gradient put into a buffer as soon as it is known.

    Inputs: the graph's, and a buffer for each parameter whose gradient it makes; outputs: its others.
    outputs: what the graph returns; behind them stand the values that it keeps.
    first: the parameters whose buffers are overwritten (nothing was put there in this step), others are added to.
    wide: those whose buffers have a larger dtype than the gradients that are put there.
    begin: functions to call as soon as all gradients of the named parameters are in their buffers.
    make: what makes a graph callable.
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    returned: Sequence[Any] = graph.graph_copy(source, copies)  # type: ignore[assignment]
    last = next((node for node in reversed(list(graph.nodes)) if node.op == "placeholder"), None)
    named = [(binding, returned[number]) for number, binding in enumerate(outputs)]
    others = [value for binding, value in named if binding.kind != "parameter"] + list(returned[len(outputs) :])
    sinks: dict[str, tuple[fx.Node, fx.Node]] = {}
    for binding, gradient in named:
        if binding.kind == "parameter" and gradient is not None:
            with graph.inserting_after(last) if last else graph.inserting_before(next(iter(graph.nodes), None)):
                last = graph.placeholder(f"buffer_{''.join(c if c.isalnum() else '_' for c in binding.name)}")
            last.meta["buffer"] = True
            sinks[binding.name] = last, gradient
    read = Counter([*(gradient for _, gradient in sinks.values()), *(value for value in others if value is not None)])
    placed = {
        name: _sink(graph, buffer, gradient, last or buffer, read, first=name in first, wide=name in wide)
        for name, (buffer, gradient) in sinks.items()
    }
    graph.output(others)
    _call_when_placed(graph, placed, begin or {})
    return make(graph)


def _sink(
    graph: fx.Graph, buffer: fx.Node, gradient: fx.Node, last_placeholder: fx.Node, read: Mapping[fx.Node, int], *, first: bool, wide: bool
) -> fx.Node:
    """Puts a gradient into its buffer: a matrix product that nothing else reads is computed there, others are copied or added.

    read: how often the backward graph returns each node, as gradients of parameters and of what was received.
    Returns the node after which it is there.
    """
    found = None if wide else product_of(gradient, read)
    if found is not None:
        product, turned = found
        with graph.inserting_before(product):
            done = into_buffer(graph, buffer, product, turned=turned, first=first)
        while gradient is not product:
            gradient, gone = gradient.args[0], gradient  # type: ignore[assignment]
            graph.erase_node(gone)
        graph.erase_node(product)
        return done
    with graph.inserting_after(last_placeholder if gradient.op == "placeholder" else gradient):
        return graph.call_function(aten.copy_.default if first else aten.add_.Tensor, (buffer, gradient))


def _call_when_placed(graph: fx.Graph, placed: Mapping[str, fx.Node], begin: Mapping[Callable[[], None], set[str]]) -> None:
    position = {node: index for index, node in enumerate(graph.nodes)}
    for number, (function, names) in enumerate(begin.items()):
        nodes = [placed[name] for name in names if name in placed]
        if not nodes:
            continue
        with graph.inserting_after(max(nodes, key=position.__getitem__)):
            graph.call_function(_Named(f"begin_reduction_{number}", function))


class _Named:
    """A function under a name that generated code can use."""

    def __init__(self, name: str, function: Callable[[], None]) -> None:
        self.__name__, self.__module__, self.function = name, "shardwise", function

    def __call__(self) -> None:
        self.function()
