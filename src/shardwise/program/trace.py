"""Traces one call, forward and backward, into ATen operators and collectives.

A call is a function of tensors: a rule's local code, or a reshard. Its forward part is recorded when a stage is built; its backward part
later, when the strides of the incoming gradients are known. Equal calls on equal shapes (repeated blocks) are traced once.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from shardwise._torch import FaithfulFakeMode, FakeTensorMode, make_fx, traced_names

__all__ = ["Traced", "Tracer", "describe", "differentiable"]

Function = Callable[[Sequence[Tensor]], Any]
Description = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]


def differentiable(tensor: Tensor) -> bool:
    """Whether a gradient may flow through tensors of its dtype."""
    return tensor.is_floating_point() or tensor.is_complex()


def describe(tensor: Tensor) -> Description:
    """Shape, strides and dtype."""
    return tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype


@dataclass(frozen=True, kw_only=True)
class Traced:
    """A call as operators.

    graph: placeholders are the call's tensors, then the incoming gradients.
    results: its results; gradients: those of the call's tensors (None where there is none), empty when none was asked for.
    forward: names of the nodes recorded before the gradients were taken.
    """

    graph: fx.Graph
    results: list[fx.Node]
    gradients: list[fx.Node | None]
    forward: frozenset[str]


@dataclass(kw_only=True)
class Tracer:
    """Traces calls on descriptions of tensors on `device`, remembering what it has traced."""

    device: torch.device
    mode: FakeTensorMode = field(default_factory=lambda: FaithfulFakeMode(allow_non_fake_inputs=True))
    known: dict[Hashable, Traced] = field(default_factory=dict)
    shapes: dict[Hashable, list[Tensor | None]] = field(default_factory=dict)

    def tensor(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A description of a contiguous tensor."""
        with self.mode:
            return torch.empty(list(shape), dtype=dtype, device=self.device)

    def forward(self, function: Function, key: Hashable, tensors: Sequence[Tensor], grads: Sequence[bool]) -> Traced:
        """The call on `tensors`, of which those marked in `grads` will be differentiated; its gradients for contiguous cotangents."""
        short = (key, *map(describe, tensors), tuple(grads))
        if short not in self.shapes:
            self.shapes[short] = self._cotangents(function, tensors, grads)
        return self.joint(function, key, tensors, grads, self.shapes[short])

    def joint(
        self, function: Function, key: Hashable, tensors: Sequence[Tensor], grads: Sequence[bool], cotangents: Sequence[Tensor | None]
    ) -> Traced:
        """The call and its gradients, given the incoming `cotangents` (None where a result has none). Its forward part is always the
        same."""
        full = (key, *map(describe, tensors), tuple(grads), tuple(c if c is None else describe(c) for c in cotangents))
        if full not in self.known:
            self.known[full] = self._trace(function, tensors, grads, cotangents)
        return self.known[full]

    def _cotangents(self, function: Function, tensors: Sequence[Tensor], grads: Sequence[bool]) -> list[Tensor | None]:
        """A contiguous one for each result that may have a gradient."""
        if not any(grads):
            return []
        with self.mode, torch.no_grad():
            found = function([_like(t, self.device) for t in tensors])
            results = found if isinstance(found, (tuple, list)) else [found]
            return [torch.empty(r.shape, dtype=r.dtype, device=self.device) if differentiable(r) else None for r in results]

    def _trace(self, function: Function, tensors: Sequence[Tensor], grads: Sequence[bool], cotangents: Sequence[Tensor | None]) -> Traced:
        forward: set[str] = set()
        count = 0

        def joint(primals: list[Tensor], tangents: list[Tensor]) -> list[Tensor | None]:
            nonlocal count
            leaves = [t.detach().requires_grad_(g) if g else t for t, g in zip(primals, grads, strict=True)]
            found = function(leaves)
            results = list(found) if isinstance(found, (tuple, list)) else [found]
            forward.update(traced_names())
            count = len(results)
            if not cotangents:
                return [*results]
            given = iter(tangents)
            return [*results, *_gradients(results, leaves, grads, [None if c is None else next(given) for c in cotangents])]

        with self.mode, warnings.catch_warnings(), torch.enable_grad() if any(grads) else torch.no_grad():
            warnings.simplefilter("ignore")
            fresh = [_like(t, self.device) for t in tensors]
            tangents = [_like(c, self.device) for c in cotangents if c is not None]
            module = make_fx(joint)(fresh, tangents)
            if _changes_in_place(module.graph):
                with torch.no_grad():
                    module, forward = _without_changes(module, forward, fresh, tangents)
        graph = _clean(module.graph)
        graph.owning_module = None  # torch makes a class for each module, and each further trace looks at all classes that live
        outputs: list[Any] = list(graph.output_node().args[0])  # type: ignore[arg-type]
        return Traced(graph=graph, results=outputs[:count], gradients=outputs[count:], forward=frozenset(forward))


def _changes_in_place(graph: fx.Graph) -> bool:
    """Whether a traced operator writes over its input; graphs are cut and merged as if none did."""
    return any(isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable for node in graph.nodes)


def _without_changes(
    module: fx.GraphModule, forward: set[str], tensors: Sequence[Tensor], tangents: Sequence[Tensor]
) -> tuple[fx.GraphModule, set[str]]:
    """The trace once more, without operators that write over their inputs; and the names of its forward part."""
    replay = _Replay(module, [node for node in module.graph.nodes if node.name in forward][-1])
    without = make_fx(torch.func.functionalize(replay.run, remove="mutations"))(*tensors, *tangents)
    return without, replay.forward


class _Replay(fx.Interpreter):
    """Runs a trace inside another; forward: what that has recorded when `last` is done."""

    def __init__(self, module: fx.GraphModule, last: fx.Node) -> None:
        super().__init__(module)
        self.last = last
        self.forward: set[str] = set()

    def run_node(self, n: fx.Node) -> Any:
        """As the interpreter does."""
        result = super().run_node(n)
        if n is self.last:
            self.forward = traced_names()
        return result


def _like(tensor: Tensor, device: torch.device) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)


def _gradients(results: list[Tensor], leaves: list[Tensor], grads: Sequence[bool], tangents: list[Tensor | None]) -> list[Tensor | None]:
    wanted = [leaf for leaf, grad in zip(leaves, grads, strict=True) if grad]
    pairs = [(r, g) for r, g in zip(results, tangents, strict=True) if r.requires_grad and g is not None]
    if not wanted or not pairs:
        return [None] * len(leaves)
    found = iter(torch.autograd.grad([r for r, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True))
    return [next(found) if grad else None for grad in grads]


def _clean(graph: fx.Graph) -> fx.Graph:
    """Without `detach`, which only autograd needs."""
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target is torch.ops.aten.detach.default:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        assert node.op != "get_attr", f"a traced call holds a tensor constant: {node.target}"
    assert not _changes_in_place(graph), f"a traced call writes over its inputs:\n{graph}"
    return graph
