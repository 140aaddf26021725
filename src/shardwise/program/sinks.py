"""Which gradients are computed straight into their buffers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx

__all__ = ["product_of"]

aten = torch.ops.aten


def product_of(gradient: fx.Node, read: Mapping[fx.Node, int]) -> tuple[fx.Node, bool] | None:
    """The matrix product that a parameter's gradient is, or of which it is the transpose (True), if nothing else reads it.

    read: how often the backward graph returns each node, as gradients of parameters and of what was received.
    """
    product, turned = gradient, False
    while product.target is aten.t.default and _readers(product) <= 1:
        product, turned = product.args[0], not turned  # type: ignore[assignment]
    alone = read[gradient] == 1 and (product is gradient or product not in read)
    return (product, turned) if product.target is aten.mm.default and _readers(product) <= 1 and alone else None


def _readers(node: fx.Node) -> int:
    return sum(user.op != "output" for user in node.users)
