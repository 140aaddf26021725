"""Which gradients are computed straight into their buffers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx

import shardwise.capture.experts  # noqa: F401  defines the products with experts

__all__ = ["into_buffer", "product_of"]

aten = torch.ops.aten
_OUTER = torch.ops.shardwise.expert_outer.default
_PRODUCTS = (aten.mm.default, _OUTER)


def product_of(gradient: fx.Node, read: Mapping[fx.Node, int]) -> tuple[fx.Node, bool] | None:
    """The product of matrices, or of rows at their experts, that a parameter's gradient is, or of which it is the transpose (True), if
    nothing else reads it.

    read: how often the backward graph returns each node, as gradients of parameters and of what was received.
    """
    product, turned = gradient, False
    while _turns(product) and _readers(product) <= 1:
        product, turned = product.args[0], not turned  # type: ignore[assignment]
    alone = read[gradient] == 1 and (product is gradient or product not in read)
    return (product, turned) if product.target in _PRODUCTS and _readers(product) <= 1 and alone else None


def into_buffer(graph: fx.Graph, buffer: fx.Node, product: fx.Node, *, turned: bool, first: bool) -> fx.Node:
    """A call, where the graph inserts, that computes the product straight into a buffer, or adds it there if it is not the first."""
    place = graph.call_function(aten.transpose.int, (buffer, -2, -1)) if turned else buffer
    if product.target is _OUTER:
        return graph.call_function(torch.ops.shardwise.expert_outer_into.default, (place, *product.args[:3], not first, *product.args[4:]))
    if first:
        return graph.call_function(aten.mm.out, product.args, {"out": place})
    return graph.call_function(aten.addmm_.default, (place, *product.args))


def _turns(node: fx.Node) -> bool:
    """Whether it is the transpose of matrices."""
    if node.target is aten.transpose.int:
        dims = node.meta["val"].ndim
        return {dim % dims for dim in node.args[1:]} == {dims - 2, dims - 1}
    return node.target is aten.t.default


def _readers(node: fx.Node) -> int:
    return sum(user.op != "output" for user in node.users)
