"""Lets elementwise operators and softmax write over an input that nobody reads afterwards.

Adding up gradients and chains of elementwise operators otherwise take fresh memory for every result, which costs page faults and cache; of
logits a language model's loss would hold three times their size. An
input may be overwritten when the graph itself made its memory, this is the last use of all of that memory, and the result has just its
shape, strides and dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from shardwise.cost.memory import bases

__all__ = ["as_torch_would", "into_fresh_memory", "reuse_memory", "without_reuse"]

aten = torch.ops.aten

_IN_PLACE: dict[Any, Any] = {
    aten.add.Tensor: aten.add_.Tensor,
    aten.sub.Tensor: aten.sub_.Tensor,
    aten.mul.Tensor: aten.mul_.Tensor,
    aten.div.Tensor: aten.div_.Tensor,
    aten.neg.default: aten.neg_.default,
    aten.tanh.default: aten.tanh_.default,
    aten.relu.default: aten.relu_.default,
    aten.add.Scalar: aten.add_.Scalar,
    aten.mul.Scalar: aten.mul_.Scalar,
}
_LIBRARY = torch.library.Library("shardwise", "FRAGMENT")
_WITHOUT_A_FORM_IN_PLACE = (  # whose kernels may write over their first argument: they read an element, or a row's, before they write it
    aten._log_softmax.default,
    aten._log_softmax_backward_data.default,
    aten._softmax.default,
    aten._softmax_backward_data.default,
    aten.gelu_backward.default,
    aten.sigmoid_backward.default,
    aten.silu_backward.default,
    aten.tanh_backward.default,
    aten.threshold_backward.default,
)


def _in_place(fresh: torch._ops.OpOverload) -> torch._ops.OpOverload:
    """`shardwise::name_`, which writes over its first argument what the ATen operator `name` returns.

    Softmax returns contiguous memory whatever it is given, which others rely on, and strides may differ from those of the trace (a
    convolution's): an argument that is not contiguous is left as it is.
    """
    name = f"{fresh.overloadpacket.__name__}_"
    overloads = (getattr(fresh.overloadpacket, each) for each in fresh.overloadpacket.overloads())
    into, result = next((each, out.name) for each in overloads for out in each._schema.arguments if out.is_out)
    arguments = str(fresh._schema).partition("(")[2].rpartition(") -> Tensor")[0].replace("Tensor ", "Tensor(a!) ", 1)

    def over_the_first(*args: Any, **kwargs: Any) -> Any:
        return into(*args, **kwargs, **{result: args[0]}) if args[0].is_contiguous() else fresh(*args, **kwargs)

    _LIBRARY.define(f"{name}({arguments}) -> Tensor(a!)")
    _LIBRARY.impl(name, over_the_first, "CompositeExplicitAutograd")
    torch.library.register_fake(f"shardwise::{name}", lambda *args, **kwargs: args[0], lib=_LIBRARY)
    changed: torch._ops.OpOverload = getattr(torch.ops.shardwise, name).default
    return changed


_IN_PLACE |= {fresh: _in_place(fresh) for fresh in _WITHOUT_A_FORM_IN_PLACE}
_FRESH = {changed: target for target, changed in _IN_PLACE.items()}
_COMMUTES = (aten.add.Tensor, aten.mul.Tensor)


def reuse_memory(graph: fx.Graph) -> None:
    """Exchanges operators for their in-place forms where that changes no value that is read."""
    base = bases(graph, {})
    position = {node: index for index, node in enumerate(graph.nodes)}
    last: dict[fx.Node, int] = {}
    for node in graph.nodes:
        for parent in node.all_input_nodes:
            last[base[parent]] = position[node]
    for node in graph.nodes:
        if node.op == "call_function" and node.target in _IN_PLACE:
            _reuse(node, base, last, position)


def into_fresh_memory(target: Callable[..., Any]) -> Callable[..., Any]:
    """The operator that leaves its inputs as they are, of one that `reuse_memory` put in; others as they are."""
    return _FRESH.get(target, target)


def without_reuse(graph: fx.Graph) -> fx.Graph:
    """A copy in which every operator has memory of its own for its result; the values are the same."""
    copied = fx.Graph()
    copied.output(copied.graph_copy(graph, {}))
    for node in copied.nodes:
        if node.op == "call_function":
            node.target = into_fresh_memory(node.target)
    return copied


def as_torch_would(graph: fx.Graph) -> None:
    """Gives memory of its own again to what torch has no operator in place for: what other frameworks hold and move."""
    for node in graph.nodes:
        if into_fresh_memory(node.target) in _WITHOUT_A_FORM_IN_PLACE:
            node.target = into_fresh_memory(node.target)


def _reuse(node: fx.Node, base: dict[fx.Node, fx.Node], last: dict[fx.Node, int], position: dict[fx.Node, int]) -> None:
    choices = (0, 1) if node.target in _COMMUTES and not node.kwargs else (0,)
    for index in choices:
        source = node.args[index]
        if not isinstance(source, fx.Node) or not _overwritable(node, source, base, last, position):
            continue
        if index == 1:
            node.args = (node.args[1], node.args[0])
        node.target = _IN_PLACE[node.target]
        mine, owner = base[node], base[source]
        last[owner] = max(last[owner], last.get(mine, -1))
        for other, known in base.items():
            if known is mine:
                base[other] = owner
        return


def _overwritable(
    node: fx.Node, source: fx.Node, base: dict[fx.Node, fx.Node], last: dict[fx.Node, int], position: dict[fx.Node, int]
) -> bool:
    owner, meta, result = base[source], source.meta.get("val"), node.meta["val"]
    if owner.op != "call_function" or last[owner] != position[node] or not isinstance(meta, torch.Tensor):
        return False
    others = [other for other in node.all_input_nodes if other is not source and base[other] is owner]
    whole = owner.meta.get("val")
    alike = meta.shape == result.shape and meta.stride() == result.stride() and meta.dtype == result.dtype
    return alike and not others and isinstance(whole, torch.Tensor) and whole.numel() == meta.numel() and node.args.count(source) == 1
