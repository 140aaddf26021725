"""Operators that treat each element alone, with broadcasting: split any dim."""

from __future__ import annotations

from dataclasses import replace

import torch

from shardwise.capture.graph import Op
from shardwise.sharding.rules.registry import rule
from shardwise.sharding.signature import Dims, Signature, Split

aten = torch.ops.aten

# In which tensor inputs an operator is linear (sets: jointly). An operator that is not named in one of these lists is not linear.
_FIRST = [  # linear in the first input alone
    aten.neg.default,
    aten.mul.Scalar,
    aten.div.Scalar,
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.device,
    aten._to_copy.default,
    aten.masked_fill.Scalar,
]
_SUM = [aten.add.Tensor, aten.sub.Tensor]
_PRODUCT = [aten.mul.Tensor]
_QUOTIENT = [aten.div.Tensor]
_OTHER = [
    aten.abs.default,
    aten.add.Scalar,
    aten.sub.Scalar,
    aten.rsub.Scalar,
    aten.bitwise_not.default,
    aten.__and__.Tensor,
    aten.__or__.Tensor,
    aten.bitwise_and.Tensor,
    aten.bitwise_or.Tensor,
    aten.logical_and.default,
    aten.logical_or.default,
    aten.logical_not.default,
    aten.ceil.default,
    aten.floor.default,
    aten.clamp.default,
    aten.clamp_min.default,
    aten.clamp_max.default,
    aten.cos.default,
    aten.sin.default,
    aten.elu.default,
    aten.erf.default,
    aten.exp.default,
    aten.floor_divide.default,
    aten.gelu.default,
    aten.eq.Scalar,
    aten.eq.Tensor,
    aten.ne.Scalar,
    aten.ne.Tensor,
    aten.ge.Scalar,
    aten.ge.Tensor,
    aten.gt.Scalar,
    aten.gt.Tensor,
    aten.le.Scalar,
    aten.le.Tensor,
    aten.lt.Scalar,
    aten.lt.Tensor,
    aten.leaky_relu.default,
    aten.log.default,
    aten.log_sigmoid.default,
    aten.maximum.default,
    aten.minimum.default,
    aten.pow.Scalar,
    aten.pow.Tensor_Scalar,
    aten.pow.Tensor_Tensor,
    aten.reciprocal.default,
    aten.relu.default,
    aten.rsqrt.default,
    aten.sigmoid.default,
    aten.sign.default,
    aten.silu.default,
    aten.softplus.default,
    aten.sqrt.default,
    aten.square.default,
    aten.tanh.default,
    aten.where.Scalar,
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.full_like.default,
]


def broadcast_dims(shape: tuple[int, ...], out: tuple[int, ...]) -> Dims:
    """Factors d0, d1, … of the result that this input holds; () where it is broadcast."""
    shift = len(out) - len(shape)
    return tuple(() if size == 1 else (f"d{index + shift}",) for index, size in enumerate(shape))


def elementwise(op: Op, linear: tuple[frozenset[int], ...] = ()) -> Signature:
    """A factor for each dim of the result."""
    out = op.outputs[0].shape
    sizes = {f"d{index}": size for index, size in enumerate(out) if size != 1}
    return Signature(
        inputs=tuple(broadcast_dims(value.shape, out) for value in op.inputs),
        outputs=(broadcast_dims(out, out),),
        sizes=sizes,
        splits={name: Split() for name in sizes},
        linear=linear,
    )


@rule(*_OTHER)
def nonlinear(op: Op) -> Signature:
    return elementwise(op)


@rule(*_FIRST)
def scaling(op: Op) -> Signature:
    """Linear where the value filled in or the dtype cast to keeps a sum a sum."""
    filled = op.args[2] if op.target is aten.masked_fill.Scalar else 0
    exact = op.outputs[0].dtype.is_floating_point and op.inputs[0].dtype.is_floating_point and filled == 0
    return elementwise(op, (frozenset({0}),) if exact else ())


@rule(*_SUM)
def total(op: Op) -> Signature:
    return elementwise(op, (frozenset({0, 1}),) if len(op.inputs) == 2 else ())


@rule(*_PRODUCT)
def product(op: Op) -> Signature:
    return elementwise(op, tuple(frozenset({index}) for index in range(len(op.inputs))))


@rule(*_QUOTIENT)
def quotient(op: Op) -> Signature:
    return elementwise(op, (frozenset({0}),))


@rule(aten.where.self)
def where(op: Op) -> Signature:
    return elementwise(op, (frozenset({1, 2}),))


@rule(aten.where.ScalarOther, aten.where.ScalarSelf)
def where_filled(op: Op) -> Signature:
    """Linear where the number filled in is zero."""
    filled = op.args[2] if op.target is aten.where.ScalarOther else op.args[1]
    return elementwise(op, (frozenset({1}),) if filled == 0 else ())


@rule(aten.type_as.default)
def type_as(op: Op) -> Signature:
    """Of the second tensor only the dtype is read: it is left whole."""
    cast = elementwise(Op(**{**op.__dict__, "inputs": op.inputs[:1]}))
    other = op.inputs[1].shape
    names = tuple(f"other{dim}" for dim in range(len(other)))
    floating = all(value.dtype.is_floating_point for value in (op.inputs[0], op.outputs[0]))
    return replace(
        cast,
        inputs=(*cast.inputs, tuple((name,) for name in names)),
        sizes={**cast.sizes, **dict(zip(names, other, strict=True))},
        linear=(frozenset({0}),) if floating else (),
        reasons=dict.fromkeys(names, "only its dtype is read"),
    )
