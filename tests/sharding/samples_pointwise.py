"""Sample calls of operators that treat each element alone: made from each operator's own list of arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from tests.sharding.brute_force import Sample, sample
from tests.sharding.make import bools, complex_numbers, ints, positive, unit, x
from torch import Tensor

from shardwise.capture.graph import operator_name
from shardwise.sharding.rules import RULES, pointwise

__all__ = ["pointwise_samples"]

aten = torch.ops.aten

_GENERAL = {pointwise.nonlinear, pointwise.scaling, pointwise.total, pointwise.product, pointwise.add_product, pointwise.add_quotient}

# What each operator is defined on, where that is not every number.
_POSITIVE = (
    *("acosh", "digamma", "float_power", "igamma", "igammac", "lgamma", "log", "log10", "log1p", "log2", "mvlgamma", "polygamma", "pow"),
    *("rsqrt", "special_bessel_y0", "special_bessel_y1", "special_digamma", "special_entr", "special_gammainc", "special_gammaincc"),
    *("special_gammaln", "special_log1p", "special_multigammaln", "special_polygamma", "special_psi", "special_xlog1py"),
    *("special_xlogy", "special_zeta", "sqrt", "xlogy", "div", "divide", "true_divide", "addcdiv", "floor_divide", "fmod", "remainder"),
)
_UNIT = ("acos", "arccos", "arcsin", "arctanh", "asin", "atanh", "erfinv", "logit", "special_erfinv", "special_logit", "special_ndtri")
_WHOLE = (*pointwise._BITS, "eq", "ne", "not_equal", "isclose")
_BOOLEAN = ("logical_and", "logical_not", "logical_or", "logical_xor")
_COMPLEX = ("_conj", "_conj_physical", "conj", "conj_physical", "imag", "resolve_conj", "sgn")
# The general form says nothing of these.
_OWN_SAMPLE = {aten.where.Scalar, aten._prelu_kernel.default, aten.nan_to_num.default, aten.clamp.Tensor, aten.clip.Tensor}
# Operators that have no derivative in torch.
_CONSTANT = (
    *pointwise._BESSEL,
    *(f"{name}{form}" for name in pointwise._POLYNOMIALS for form in ("", ".x_scalar", ".n_scalar")),
    *("igamma", "igammac", "nextafter", "special_airy_ai", "special_bessel_j0", "special_bessel_j1", "special_bessel_y0"),
    *("special_bessel_y1", "special_gammainc", "special_gammaincc", "special_zeta", "heaviside", "ldexp"),
    *("floor_divide", "remainder.Scalar_Tensor", "isclose"),
)
_NUMBERS: dict[str, Any] = {
    "min": -0.5,
    "max": 0.5,
    "n": 2,
    "p": 2,
    "decimals": 1,
    "threshold": 0.1,
    "weight": 0.3,
    "value": 2.0,
    "self": 2,
    "other": 2,
    "x": 0.5,
    "exponent": 3,
    "rounding_mode": "floor",
}
_SHAPES = ((4, 5), (3, 1, 5), (4, 1))


def pointwise_samples() -> Iterator[Sample]:
    for target, rule in RULES.items():
        if rule in _GENERAL and target not in _OWN_SAMPLE:
            yield _call(target)
    yield from _special_forms()
    yield from _casts()
    yield from _filled()
    yield from _complex()


def _call(target: Any) -> Sample:
    """Required arguments and limits; tensors that are broadcast against each other."""
    _, name, form = operator_name(target).split(".")
    shapes, make = iter(_SHAPES), _maker(name)
    wanted = [each for each in target._schema.arguments if not each.has_default_value() or each.name in ("min", "max")]
    values = {each.name: make(*next(shapes)) if "Tensor" in str(each.type) else _NUMBERS[each.name] for each in wanted}
    placed = [values[each.name] for each in wanted if not each.kwarg_only]
    named = {each.name: values[each.name] for each in wanted if each.kwarg_only}
    return sample(target, *placed, frozen=range(3) if {name, f"{name}.{form}"} & {*_CONSTANT} else (), **named)


def _maker(name: str) -> Callable[..., Tensor]:
    if name in _BOOLEAN:
        return bools
    if name in _WHOLE:
        return lambda *shape: ints(6, *shape) + 1
    if name in _COMPLEX:
        return complex_numbers
    if name in _UNIT:
        return unit
    return (lambda *shape: positive(*shape) + 1) if name in _POSITIVE else x


def _special_forms() -> Iterator[Sample]:
    """What the general form does not show: truth values, whole numbers, two scalars, numbers of no dims."""
    for name in ("__and__", "__or__", "__xor__", "bitwise_and", "bitwise_or", "bitwise_xor"):
        yield sample(getattr(aten, name).Tensor, bools(4, 1, 5), bools(3, 5))
    for name in ("eq", "ne", "ge", "gt", "le", "lt"):
        yield sample(getattr(aten, name).Scalar, ints(3, 4, 5), 1)
        yield sample(getattr(aten, name).Tensor, ints(3, 4, 5), ints(3, 5))
    yield sample(aten.clamp.default, x(4, 5), max=0.5)
    for target in (aten.clamp.Tensor, aten.clip.Tensor):
        yield sample(target, x(4, 5), x(4, 1) - 1, x(5) + 1)
        yield sample(target, x(4, 5), None, x(5))
    for name in ("add", "sub"):
        yield sample(getattr(aten, name).Tensor, x(4, 5), x(4, 5), alpha=2)
        yield sample(getattr(aten, name).Tensor, x(4, 5), 3)
    yield sample(aten.add.Tensor, x(6), x())
    yield sample(aten.add.Tensor, x(), x())
    yield sample(aten.add.Tensor, complex_numbers(4, 5), x(5))
    for name in ("mul", "div"):
        yield sample(getattr(aten, name).Tensor, x(4, 5), positive(4, 5))
        yield sample(getattr(aten, name).Tensor, x(4, 5), 3)
        yield sample(getattr(aten, name).Tensor, x(4, 5), complex_numbers(4, 1))
        yield sample(getattr(aten, name).Tensor, ints(9, 4, 1), ints(9, 5) + 1)
    yield sample(aten.div.Tensor_mode, x(4, 5), positive(5), rounding_mode=None)
    yield sample(aten.pow.Tensor_Scalar, complex_numbers(4, 5), 2)
    yield sample(aten.abs.default, complex_numbers(4, 5))
    yield sample(aten.nan_to_num.default, torch.where(bools(4, 5), x(4, 5), float("nan")), 1.0)
    for shape in ((4, 6), (5, 4, 3), (6,)):
        signs = 1 - 2 * (torch.arange(torch.Size(shape).numel()) % 2)
        yield sample(aten.prelu.default, positive(*shape) * signs.reshape(shape), x(1))
    yield sample(aten.prelu.default, x(4, 6), x(6))
    yield sample(aten.prelu.default, x(4, 5, 3), x(5))
    yield sample(aten._prelu_kernel.default, x(4, 5, 3), x(5, 1))
    yield sample(aten.glu.default, x(4, 6))
    yield sample(aten.glu.default, x(3, 8, 5), 1)
    yield sample(aten.linalg_cross.default, x(4, 3, 5), x(1, 3, 1), dim=-2)
    yield sample(aten.linalg_cross.default, x(4, 3), x(4, 3))
    yield sample(aten.polar.default, positive(4, 5), x(5))
    yield sample(aten.cross.default, x(5, 3, 4), x(5, 3, 4))
    yield sample(aten.cross.default, x(4, 3), x(4, 3), -1)


def _casts() -> Iterator[Sample]:
    for dtype in (torch.float32, torch.int64, torch.complex128):
        yield sample(aten.to.dtype, x(4, 5), dtype)
    yield sample(aten.to.dtype, ints(9, 4, 5), torch.float64)
    yield sample(aten.to.dtype, bools(4, 5), torch.float64)
    yield sample(aten.to.dtype_layout, x(4, 5), dtype=torch.float32)
    yield sample(aten.to.device, x(4, 5), torch.device("cpu"), torch.float32)
    yield sample(aten._to_copy.default, x(4, 5), dtype=torch.float32)
    yield sample(aten.type_as.default, x(4, 5).float(), x(7))
    yield sample(aten.to.other, x(4, 5), ints(7, 7))
    yield sample(aten.copy.default, x(4, 5), x(5), frozen=(0, 1))
    yield sample(aten.copy.default, ints(7, 4, 5), x(4, 5), frozen=(1,))


def _filled() -> Iterator[Sample]:
    for name in ("Scalar", "ScalarOther", "ScalarSelf"):
        branches = [1.0 if name != "ScalarOther" else x(4, 5), 0.0 if name != "ScalarSelf" else x(4, 5)]
        yield sample(getattr(aten.where, name), bools(4, 5), *branches)
    yield sample(aten.where.ScalarSelf, bools(4, 5), 0.0, x(4, 5))
    yield sample(aten.where.self, bools(4, 1), x(4, 5), x(5))
    yield sample(aten.where.self, bools(4, 5), x(4, 5), x())
    yield sample(aten.masked_fill.Scalar, x(4, 3, 5), bools(3, 1), 0.0)
    yield sample(aten.masked_fill.Scalar, x(4, 3, 5), bools(4, 3, 5), -7.0)
    yield sample(aten.masked_fill.Tensor, x(4, 5), bools(4, 1), x())
    for name in ("zeros_like", "ones_like", "zero"):
        yield sample(getattr(aten, name).default, x(4, 5))
    yield sample(aten.full_like.default, x(4, 5), 2.0)
    yield sample(aten.empty_like.default, x(0, 5), frozen=(0,))  # of no elements: what else it holds is not defined
    yield sample(aten.fill.Scalar, x(4, 5), 2.0)
    yield sample(aten.fill.Tensor, x(4, 5), x())


def _complex() -> Iterator[Sample]:
    """Complex numbers taken apart; put together they are among the general forms."""
    for name in ("real", "imag", "angle", "resolve_neg", "neg", "sgn", "exp"):
        yield sample(getattr(aten, name).default, complex_numbers(4, 5))
    for name in ("real", "conj", "resolve_conj"):
        yield sample(getattr(aten, name).default, x(4, 5))
    yield sample(aten.mul.Tensor, complex_numbers(4, 5), complex_numbers(5))
