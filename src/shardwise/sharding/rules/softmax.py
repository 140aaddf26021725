"""Softmax. Over a split dim the ranks exchange the highest element and the sum of exponentials of each row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shardwise.capture.graph import Op
from shardwise.sharding.collectives import all_reduce
from shardwise.sharding.rules.build import given, over, simple_dims, wrap
from shardwise.sharding.rules.registry import rule
from shardwise.sharding.signature import AxisSplit, Call, Signature, Split

aten = torch.ops.aten

_LOGARITHMS = (aten.log_softmax.int, aten._log_softmax.default, aten.special_log_softmax.default)


@rule(
    aten.softmax.int,
    aten._softmax.default,
    aten.special_softmax.default,
    aten._safe_softmax.default,
    *_LOGARITHMS,
)
def softmax(op: Op) -> Signature:
    """Every dim; over the normalised one the ranks communicate."""
    names = simple_dims(op.inputs[0].shape)
    if not names:
        return over(op, [names], [names])
    if op.target is aten._safe_softmax.default:  # which makes zeros of rows that are −∞ throughout
        return over(op, [names], [names], whole={names[_dim(op)][0]: "it is normalised as a whole"})
    return over(op, [names], [names], splits={names[_dim(op)][0]: Split(microbatches=False)}, local=_softmax)


def _dim(op: Op) -> int:
    return wrap(given(op, "dim"), len(op.inputs[0].shape))


def _softmax(call: Call, tensors: Sequence[Tensor]) -> Any:
    dim = _dim(call.op)
    splits = call.splits.get(f"d{dim}", ())
    if not splits:
        return call.run(tensors)
    x = tensors[0].to(call.op.outputs[0].dtype)
    return _SplitSoftmax.apply(x, dim, splits, call.op.target in _LOGARITHMS)


class _SplitSoftmax(torch.autograd.Function):
    """(log-)softmax of x over a dim that is split over the ranks of some axes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, splits: Sequence[AxisSplit], logarithm: bool) -> Tensor:
        shifted, total = _exponentials(x, dim, splits)
        result = shifted - total.log() if logarithm else shifted.exp() / total
        ctx.dim, ctx.splits, ctx.logarithm = dim, splits, logarithm
        ctx.save_for_backward(result)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (result,) = ctx.saved_tensors
        if ctx.logarithm:
            return gradient - result.exp() * _summed(gradient, ctx.dim, ctx.splits), None, None, None
        weighted = gradient * result
        return weighted - result * _summed(weighted, ctx.dim, ctx.splits), None, None, None


def _exponentials(x: Tensor, dim: int, splits: Sequence[AxisSplit]) -> tuple[Tensor, Tensor]:
    """x less the highest of all ranks, and the sum of the exponentials of that."""
    highest = x.amax(dim, keepdim=True)
    for split in splits:
        highest = all_reduce(highest, split.group, "max")
    shifted = x - highest
    return shifted, _summed(shifted.exp(), dim, splits)


def _summed(x: Tensor, dim: int, splits: Sequence[AxisSplit]) -> Tensor:
    total = x.sum(dim, keepdim=True)
    for split in splits:
        total = all_reduce(total, split.group)
    return total
