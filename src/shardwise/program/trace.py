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
from shardwise.program.recorder import Recorder

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
    contiguous: dict[Hashable, Traced] = field(default_factory=dict)

    def tensor(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A description of a contiguous tensor."""
        with self.mode:
            return torch.empty(list(shape), dtype=dtype, device=self.device)

    def forward(self, function: Function, key: Hashable, tensors: Sequence[Tensor], grads: Sequence[bool]) -> Traced:
        """The call on `tensors`, of which those marked in `grads` will be differentiated; its gradients for contiguous cotangents."""
        short = (key, *map(describe, tensors), tuple(grads))
        if short not in self.contiguous:
            traced, given = self._trace(function, tensors, grads, None)
            self.contiguous[short] = self.known.setdefault(_full(key, tensors, grads, given), traced)
        return self.contiguous[short]

    def joint(
        self, function: Function, key: Hashable, tensors: Sequence[Tensor], grads: Sequence[bool], cotangents: Sequence[Tensor | None]
    ) -> Traced:
        """The call and its gradients, given the incoming `cotangents` (None where a result has none). Its forward part is always the
        same."""
        full = _full(key, tensors, grads, cotangents)
        if full not in self.known:
            self.known[full], _ = self._trace(function, tensors, grads, cotangents)
        return self.known[full]

    def _trace(
        self, function: Function, tensors: Sequence[Tensor], grads: Sequence[bool], cotangents: Sequence[Tensor | None] | None
    ) -> tuple[Traced, Sequence[Tensor | None]]:
        """The call's trace, and the cotangents that it was given: contiguous ones, where there are none."""
        recorder = Recorder()
        with self.mode, warnings.catch_warnings(), torch.enable_grad() if any(grads) else torch.no_grad():
            warnings.simplefilter("ignore")
            leaves = [_like(tensor, self.device).requires_grad_(grad) for tensor, grad in zip(tensors, grads, strict=True)]
            for number, leaf in enumerate(leaves, start=1):
                recorder.input(f"primals_{number}", leaf)
            with recorder:
                found = function(leaves)
            results = list(found) if isinstance(found, (tuple, list)) else [found]
            forward = {node.name for node in recorder.graph.nodes}
            given = cotangents if cotangents is not None else [self._contiguous(each) for each in results] if any(grads) else []
            tangents = [None if each is None else _like(each, self.device) for each in given]
            for number, tangent in enumerate((each for each in tangents if each is not None), start=1):
                recorder.input(f"tangents_{number}", tangent)
            with recorder:
                gradients = _gradients(results, leaves, grads, tangents) if tangents else []
            made: list[Tensor | None] = [*results, *gradients]
            recorder.graph.output([None if each is None else recorder.node_of(each) for each in made])
            graph = recorder.graph
            if _changes_in_place(graph):
                with torch.no_grad():
                    inputs = [_like(each, self.device) for each in (*leaves, *tangents) if each is not None]
                    graph, forward = _without_changes(fx.GraphModule({}, graph), forward, inputs)
        graph = _clean(graph)
        graph.owning_module = None  # torch makes a class for each module, and each further trace looks at all classes that live
        outputs: list[Any] = list(graph.output_node().args[0])  # type: ignore[arg-type]
        count = len(results)
        return Traced(graph=graph, results=outputs[:count], gradients=outputs[count:], forward=frozenset(forward)), given

    def _contiguous(self, result: Tensor) -> Tensor | None:
        return torch.empty(result.shape, dtype=result.dtype, device=self.device) if differentiable(result) else None


def _full(key: Hashable, tensors: Sequence[Tensor], grads: Sequence[bool], cotangents: Sequence[Tensor | None]) -> Hashable:
    return (key, *map(describe, tensors), tuple(grads), tuple(c if c is None else describe(c) for c in cotangents))


def _changes_in_place(graph: fx.Graph) -> bool:
    """Whether a traced operator writes over its input; graphs are cut and merged as if none did."""
    return any(isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable for node in graph.nodes)


def _without_changes(module: fx.GraphModule, forward: set[str], inputs: Sequence[Tensor]) -> tuple[fx.Graph, set[str]]:
    """The trace once more, without operators that write over their inputs; and the names of its forward part."""
    replay = _Replay(module, [node for node in module.graph.nodes if node.name in forward][-1])
    without = make_fx(torch.func.functionalize(replay.run, remove="mutations"))(*inputs)
    return without.graph, replay.forward


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
