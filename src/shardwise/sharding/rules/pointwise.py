"""Operators that treat each element alone, with broadcasting: split any dim."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from shardwise.capture.graph import Op, Slot
from shardwise.sharding.rules.build import ALONE, broadcast, given, over, overloads, run_named, simple_dims, wrap
from shardwise.sharding.rules.registry import rule
from shardwise.sharding.signature import Call, Dims, Signature, Split

aten = torch.ops.aten

# Every functional form of each name (see `overloads`), sorted by the tensors in which the operator is linear.
_ROUNDING = ("abs", "absolute", "ceil", "fix", "floor", "frac", "nan_to_num", "round", "sgn", "sign", "signbit", "special_round", "trunc")
_LIMITS = ("clamp", "clamp_max", "clamp_min", "clip", "fmax", "fmin", "max.other", "maximum", "min.other", "minimum")
_POWERS = (
    *("exp", "exp2", "expm1", "float_power", "hypot", "log", "log10", "log1p", "log2", "logaddexp", "logaddexp2", "logit", "pow"),
    *("reciprocal", "rsqrt", "special_entr", "special_exp2", "special_expit", "special_expm1", "special_log1p", "special_logit"),
    *("sigmoid", "sqrt", "square"),
)
_ANGLES = (  # the derivative of polar assumes a positive radius, which a summand need not be
    *("acos", "acosh", "angle", "arccos", "arccosh", "arcsin", "arcsinh", "arctan", "arctan2", "arctanh", "asin", "asinh", "atan"),
    *("atan2", "atanh", "cos", "cosh", "polar", "sin", "sinc", "sinh", "special_sinc", "tan", "tanh"),
)
_SPECIAL = (
    *("digamma", "erf", "erfc", "erfinv", "i0", "igamma", "igammac", "lgamma", "mvlgamma", "polygamma", "special_airy_ai"),
    *("special_digamma", "special_erf", "special_erfc", "special_erfcx", "special_erfinv", "special_gammainc", "special_gammaincc"),
    *("special_gammaln", "special_i0", "special_i0e", "special_i1", "special_i1e", "special_log_ndtr", "special_multigammaln"),
    *("special_ndtr", "special_ndtri", "special_polygamma", "special_psi", "special_zeta"),
)
_BESSEL = (
    *("special_bessel_j0", "special_bessel_j1", "special_bessel_y0", "special_bessel_y1", "special_modified_bessel_i0"),
    *("special_modified_bessel_i1", "special_modified_bessel_k0", "special_modified_bessel_k1", "special_scaled_modified_bessel_k0"),
    *("special_scaled_modified_bessel_k1", "special_spherical_bessel_j0"),
)
_POLYNOMIALS = (
    *(f"special_{kind}_polynomial_{letter}" for kind in ("chebyshev", "shifted_chebyshev") for letter in "tuvw"),
    *("special_hermite_polynomial_h", "special_hermite_polynomial_he", "special_laguerre_polynomial_l"),
    "special_legendre_polynomial_p",
)
_ACTIVATIONS = (
    *("_prelu_kernel", "celu", "elu", "gelu", "hardshrink", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "log_sigmoid"),
    *("mish", "relu", "relu6", "selu", "silu", "softplus", "softshrink", "threshold"),
)
_LOGIC = (
    *("eq", "ge", "greater", "greater_equal", "gt", "isclose", "isfinite", "isinf", "isnan", "isneginf", "isposinf", "isreal", "le"),
    *("less", "less_equal", "logical_and", "logical_not", "logical_or", "logical_xor", "lt", "ne", "not_equal", "where.Scalar"),
)
_BITS = (
    *("__and__", "__lshift__", "__or__", "__rshift__", "__xor__", "bitwise_and", "bitwise_left_shift", "bitwise_not", "bitwise_or"),
    *("bitwise_right_shift", "bitwise_xor", "gcd", "lcm"),
)
_WITH_NUMBER = ("add.Scalar", "rsub.Scalar", "sub.Scalar", "subtract.Scalar")
_REMAINDERS = ("copysign", "floor_divide", "fmod", "frexp", "heaviside", "nextafter", "remainder")
_CONSTANTS = ("empty_like", "fill.Scalar", "full_like", "ones_like", "zero", "zeros_like")

_FIRST = (  # linear in the first tensor alone, if that is the first argument
    *("deg2rad", "div", "divide", "ldexp", "neg", "negative", "positive", "rad2deg", "true_divide"),
    *("special_xlog1py", "special_xlogy", "xlogy"),
    *("_conj", "_conj_physical", "conj", "conj_physical", "imag", "real", "resolve_conj", "resolve_neg"),
)
_CASTS = ("_to_copy", "to.device", "to.dtype", "to.dtype_layout")
_SUMS = ("add.Tensor", "complex", "lerp", "rsub.Tensor", "sub.Tensor", "subtract.Tensor")  # in the first two together
_PRODUCTS = ("mul", "multiply")  # in each alone


def elementwise(op: Op, linear: tuple[frozenset[int], ...] = ()) -> Signature:
    """A factor for each dim of the result."""
    out = op.outputs[0].shape
    names = [name if size != 1 else () for name, size in zip(simple_dims(out), out, strict=True)]
    sizes = {f"d{index}": size for index, size in enumerate(out) if size != 1}
    return Signature(
        inputs=tuple(broadcast(value.shape, names, out) for value in op.inputs),
        outputs=tuple(tuple(names) for _ in op.outputs),
        sizes=sizes,
        splits={name: Split() for name in sizes},
        linear=linear,
    )


@rule(*overloads(*_ROUNDING, *_LIMITS, *_POWERS, *_ANGLES, *_SPECIAL, *_BESSEL, *_POLYNOMIALS))
@rule(*overloads(*_ACTIVATIONS, *_LOGIC, *_BITS, *_WITH_NUMBER, *_REMAINDERS))
def nonlinear(op: Op) -> Signature:
    return elementwise(op)


@rule(*overloads(*_CONSTANTS))
def constant_like(op: Op) -> Signature:
    """Of the tensor only the shape is read."""
    return elementwise(op)


@rule(*overloads(*_FIRST))
def scaling(op: Op) -> Signature:
    """Linear unless the first argument is a number or the quotient is rounded."""
    exact = isinstance(op.args[0], Slot) and given(op, "rounding_mode") is None
    return elementwise(op, ALONE if exact else ())


@rule(*overloads(*_CASTS))
def cast(op: Op) -> Signature:
    """Linear where the new dtype keeps a sum a sum: rounding to whole numbers or to truth does not."""
    return elementwise(op, ALONE if _keeps_sums(op, 0) else ())


def _keeps_sums(op: Op, index: int) -> bool:
    dtype = op.outputs[0].dtype
    return dtype == op.inputs[index].dtype or dtype.is_floating_point or dtype.is_complex


@rule(*overloads(*_SUMS))
def total(op: Op) -> Signature:
    return elementwise(op, (frozenset({0, 1}),) if len(op.inputs) > 1 else ())


@rule(*overloads(*_PRODUCTS))
def product(op: Op) -> Signature:
    return elementwise(op, tuple(frozenset({index}) for index in range(len(op.inputs))))


@rule(aten.addcmul.default)
def add_product(op: Op) -> Signature:
    return elementwise(op, (frozenset({0, 1}), frozenset({0, 2})))


@rule(aten.addcdiv.default)
def add_quotient(op: Op) -> Signature:
    return elementwise(op, (frozenset({0, 1}),))


@rule(aten.where.self)
def where(op: Op) -> Signature:
    return elementwise(op, (frozenset({1, 2}),))


@rule(aten.where.ScalarOther, aten.where.ScalarSelf)
def where_filled(op: Op) -> Signature:
    """Linear where the number filled in is zero."""
    filled = given(op, "other" if op.target is aten.where.ScalarOther else "self")
    return elementwise(op, (frozenset({1}),) if filled == 0 else ())


@rule(aten.masked_fill.Scalar)
def masked_fill(op: Op) -> Signature:
    """Linear where the number filled in is zero."""
    return elementwise(op, ALONE if given(op, "value") == 0 else ())


@rule(aten.masked_fill.Tensor)
def masked_fill_tensor(op: Op) -> Signature:
    return elementwise(op, (frozenset({0, 2}),))


@rule(aten.fill.Tensor, aten.copy.default)
def overwrite(op: Op) -> Signature:
    """The second tensor in the shape and dtype of the first, whose values are not read."""
    linear = (frozenset({1}), frozenset({0, 1})) if _keeps_sums(op, 1) else ()
    return replace(elementwise(op, linear), local=_overwrite)


def _overwrite(call: Call, tensors: Sequence[Tensor]) -> Any:
    """Written out, for torch has no derivative of `copy`."""
    return tensors[1].to(tensors[0].dtype).expand(call.shapes[0])


@rule(aten.type_as.default, aten.to.other)
def type_as(op: Op) -> Signature:
    """Of the second tensor only the dtype is read: it is left whole."""
    alone = cast(Op(**{**op.__dict__, "inputs": op.inputs[:1]}))
    other = op.inputs[1].shape
    names = tuple(f"other{dim}" for dim in range(len(other)))
    return replace(
        alone,
        inputs=(*alone.inputs, tuple((name,) for name in names)),
        sizes={**alone.sizes, **dict(zip(names, other, strict=True))},
        reasons=dict.fromkeys(names, "only its dtype is read"),
    )


@rule(aten.prelu.default)
def prelu(op: Op) -> Signature:
    """A weight for each channel (dim 1), or one for all."""
    names = simple_dims(op.inputs[0].shape)
    one = op.inputs[1].numel == 1
    weight: Dims = tuple(() if one else ("d1",) for _ in op.inputs[1].shape)
    return over(op, [names, weight], [names])


@rule(aten.glu.default)
def glu(op: Op) -> Signature:
    """One half of a dim gates the other: split alike inside both."""
    names = simple_dims(op.inputs[0].shape)
    dim = wrap(given(op, "dim"), len(names))
    halves = [*names[:dim], ("halves", f"d{dim}"), *names[dim + 1 :]]
    return over(op, [halves], [names], sizes={"halves": 2}, whole={"halves": "one half gates the other"})


@rule(aten.linalg_cross.default, aten.cross.default)
def cross(op: Op) -> Signature:
    """Vectors of three along one dim, which stays whole; linear in each."""
    out = op.outputs[0].shape
    chosen = given(op, "dim")
    dim = out.index(3) if chosen is None else wrap(chosen, len(out))
    names = simple_dims(out)
    inputs = [broadcast(value.shape, names, out) for value in op.inputs]
    reason = {f"d{dim}": "a vector's elements are mixed"}
    return over(op, inputs, [names], whole=reason, linear=(frozenset({0}), frozenset({1})), local=_cross)


def _cross(call: Call, tensors: Sequence[Tensor]) -> Any:
    dim = given(call.op, "dim")
    return run_named(call, tensors, dim=call.op.outputs[0].shape.index(3) if dim is None else dim)
