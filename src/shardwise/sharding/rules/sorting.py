"""Operators that bring the elements along a dim into order: that dim stays whole."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from shardwise.capture.graph import Op
from shardwise.sharding.rules.build import given, over, overloads, simple_dims, wrap
from shardwise.sharding.rules.registry import rule
from shardwise.sharding.signature import Dim, Signature

aten = torch.ops.aten

_WHOLE = "its elements are compared as a whole"


@rule(*overloads("argsort", "kthvalue", "msort", "sort", "topk"))
def ordered(op: Op) -> Signature:
    """The dim keeps its size, shrinks to the k largest, or goes."""
    names = simple_dims(op.inputs[0].shape)
    dim = 0 if op.target is aten.msort.default else wrap(given(op, "dim"), len(names))
    left: Sequence[Dim] = names
    if op.target is aten.kthvalue.default:
        left = [*names[:dim], *([()] if given(op, "keepdim") and names else []), *names[dim + 1 :]]
    elif op.target is aten.topk.default and names:
        left = [*names[:dim], ("k",), *names[dim + 1 :]]
    return over(op, [names], [left for _ in op.outputs], whole={f"d{dim}": _WHOLE})
