"""Records what is called on descriptions of tensors as a graph of ATen operators and collectives.

A recorder is a mode of torch's dispatcher below autograd: it sees forward operators and those that autograd calls for gradients, after
composite ones were written out. It does what `make_fx` does for the calls of operators' rules, without its support of symbolic sizes,
higher-order operators and modules, in a third of the time.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode

from shardwise._torch import is_written_out, without_gradient

__all__ = ["Recorder"]


class Recorder(TorchDispatchMode):
    """graph: what was called while the mode was on, on inputs and on results of earlier calls.

    Tensors are known by identity and kept as long as the recorder is.
    """

    def __init__(self) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self._nodes: dict[int, tuple[fx.Node, Tensor]] = {}
        self._last_input: fx.Node | None = None

    def input(self, name: str, tensor: Tensor) -> None:
        """Another placeholder of the graph, behind those that it has."""
        first = next(iter(self.graph.nodes), None)
        with self.graph.inserting_after(self._last_input) if self._last_input else self.graph.inserting_before(first):
            self._last_input = self.graph.placeholder(name)
        self._keep(tensor, self._last_input)

    def node_of(self, tensor: Tensor) -> fx.Node:
        """What made a tensor."""
        assert id(tensor) in self._nodes, f"a traced call holds a tensor constant: {tensor}"
        return self._nodes[id(tensor)][0]

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Calls the operator and appends it to the graph."""
        named = dict(kwargs or {})
        if func is torch.ops.prim.device.default:
            return func(*args, **named)
        if is_written_out(func, next(_tensors((args, named)), None)):
            with self:
                result = func.decompose(*args, **named)
            if result is not NotImplemented:
                return result
        node_args, node_kwargs = self._as_nodes(args), self._as_nodes(named)
        result = func(*args, **named)
        name = func.overloadpacket.__name__
        node = self.graph.create_node("call_function", func, node_args, node_kwargs, name=self.graph._target_to_str(name))
        self._keep(result, node)
        return result

    def _as_nodes(self, tree: Any) -> Any:
        if isinstance(tree, Tensor):
            return self.node_of(tree)
        if isinstance(tree, (list, tuple)):
            return type(tree)(map(self._as_nodes, tree))
        if isinstance(tree, dict):
            return {name: self._as_nodes(item) for name, item in tree.items()}
        return tree

    def _keep(self, result: Any, node: fx.Node) -> Any:
        """Remembers that the node made the result, and each item of it; returns what describes it."""
        if isinstance(result, Tensor):
            self._nodes[id(result)] = node, result
            node.meta["val"] = without_gradient(result)
        elif isinstance(result, (list, tuple)):
            items = [self.graph.call_function(operator.getitem, (node, index)) for index in range(len(result))]
            node.meta["val"] = type(result)(map(self._keep, result, items))
        return node.meta.get("val")


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (list, tuple)):
        for item in tree:
            yield from _tensors(item)
    elif isinstance(tree, dict):
        yield from _tensors(list(tree.values()))
