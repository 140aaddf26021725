"""Operators that make one number, or fewer, of the elements along some dims.

sums                    any dim; what is summed away leaves summands
extremes, norms, …      any dim; ranks exchange their results and reduce once more
medians, quantiles, …   the reduced dims stay whole
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import isfinite, prod
from typing import Any

import torch
from torch import Tensor

from shardwise.capture.graph import Op
from shardwise.sharding.collectives import all_reduce
from shardwise.sharding.reshard import Axis, Reshard, reshard
from shardwise.sharding.rules.build import ALONE, broadcast, every, from_ranks, given, over, overloads, simple_dims, wrap
from shardwise.sharding.rules.registry import rule
from shardwise.sharding.signature import AxisSplit, Call, Dim, Dims, Signature, Split
from shardwise.sharding.types import I, P, Placement, R

aten = torch.ops.aten

_WHOLE = ("aminmax", "median", "mode", "nanmean", "nanmedian", "nuclear_norm")
_COMPARED = "its elements are compared as a whole"


def reduced_dims(op: Op) -> list[int]:
    """The dims that are reduced, counted from the front."""
    shape = op.inputs[0].shape
    dims = given(op, "dim")
    if isinstance(dims, (list, tuple)) and not dims and op.outputs[0].shape == shape:
        return []  # an empty list means all dims, but for operators where it means none
    return every(dims, len(shape))


def reduced(op: Op, dims: Sequence[int], **more: Any) -> Signature:
    """The factors d0, d1, … of the input, and what a reduction of `dims` leaves of them."""
    names = simple_dims(op.inputs[0].shape)
    keepdim = bool(given(op, "keepdim"))
    left: list[Dim] = [() if dim in dims else name for dim, name in enumerate(names) if keepdim or dim not in dims]
    others = [((),) * len(value.shape) for value in op.inputs[1:]]
    return over(op, [names, *others], [left for _ in op.outputs], **more)


def _all(dims: Sequence[int], split: Split) -> dict[str, Split]:
    return {f"d{dim}": split for dim in dims}


def _exchanging(dims: Sequence[int], *, blocked: bool = True) -> dict[str, Split]:
    """Local code exchanges the ranks' results, so that all have the whole one."""
    return _all(dims, Split(others="I", microbatches=False, blocked=blocked))


def _because(dims: Sequence[int], reason: str) -> dict[str, str]:
    return {f"d{dim}": reason for dim in dims}


# -- sums --------------------------------------------------------------------------------------------------------------------------------


@rule(aten.sum.dim_IntList, aten.sum.default)
def sum_(op: Op) -> Signature:
    return reduced(op, reduced_dims(op), splits=_all(reduced_dims(op), Split()), linear=ALONE)


@rule(*overloads("nansum", "count_nonzero"))
def count(op: Op) -> Signature:
    """Sums of something that is not linear."""
    return reduced(op, reduced_dims(op), splits=_all(reduced_dims(op), Split()))


@rule(aten.mean.dim, aten.mean.default)
def mean(op: Op) -> Signature:
    """A sum divided by the whole tensor's count."""
    return reduced(op, reduced_dims(op), splits=_all(reduced_dims(op), Split()), linear=ALONE, local=_mean)


def _mean(call: Call, tensors: Sequence[Tensor]) -> Tensor:
    dims = reduced_dims(call.op)
    whole = prod(call.op.inputs[0].shape[dim] for dim in dims)
    local = prod(tensors[0].shape[dim] for dim in dims) if tensors[0].shape else 1
    result: Tensor = call.run(tensors)
    return result if local == whole else result * (local / whole)


@rule(aten.sum_to_size.default)
def sum_to_size(op: Op) -> Signature:
    """The dims in front and those that become 1 are summed away."""
    source, out = op.inputs[0].shape, op.outputs[0].shape
    names = simple_dims(source)
    kept = broadcast(out, names, source)
    return over(op, [names], [kept], splits=_all(range(len(source)), Split()), linear=ALONE, local=_sum_to_size)


def _sum_to_size(call: Call, tensors: Sequence[Tensor]) -> Any:
    return tensors[0].sum_to_size(call.shapes[0])


@rule(aten.histc.default)
def histc(op: Op) -> Signature:
    """Counts of the elements between two limits; without limits these are the smallest and the largest element."""
    names = simple_dims(op.inputs[0].shape)
    limited = given(op, "min") != given(op, "max")
    dims = range(len(names))
    why = {} if limited else _because(dims, "the limits are its smallest and largest element")
    return over(op, [names], [[("bins",)]], splits=_all(dims, Split()), whole=why | {"bins": "each rank counts them all"})


@rule(aten.bincount.default)
def bincount(op: Op) -> Signature:
    """Counts of each number, or sums of the weights that stand beside it."""
    out: list[Dim] = [("bins",)]
    linear = (frozenset({1}),) if len(op.inputs) == 2 else ()
    inputs = [[("d0",)] for _ in op.inputs]
    reason = {"bins": "each rank counts them all"}
    return over(op, inputs, [out], splits={"d0": Split()}, whole=reason, linear=linear, local=_bincount)


def _bincount(call: Call, tensors: Sequence[Tensor]) -> Any:
    weights = tensors[1] if len(tensors) == 2 else None
    return torch.bincount(tensors[0], weights, minlength=call.shapes[0][0])


# -- reduced again from the ranks' results -----------------------------------------------------------------------------------------------


def _axes(call: Call) -> list[AxisSplit]:
    """The splits of dims that are reduced, innermost first."""
    dims = reduced_dims(call.op)
    found = [split for name, splits in call.splits.items() if int(name[1:]) in dims for split in splits if split.ranks > 1]
    return found[::-1]


def _again(call: Call, tensors: Sequence[Tensor], combine: Callable[[Tensor], Tensor]) -> Any:
    """The reduction of this rank's part, then `combine` over the ranks' results, stacked along dim 0."""
    result = call.run(tensors)
    for split in _axes(call):
        result = combine(from_ranks(result, split))
    return result


_AGAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "any": lambda found: found.any(0),
    "all": lambda found: found.all(0),
    "_is_any_true": lambda found: found.any(0),
    "_is_all_true": lambda found: found.all(0),
    "prod": lambda found: found.prod(0),
    "logsumexp": lambda found: found.logsumexp(0),
    "special_logsumexp": lambda found: found.logsumexp(0),
}


@rule(*overloads(*_AGAIN))
def combined(op: Op) -> Signature:
    """The reduction of the ranks' reductions is the whole one's."""
    combine = _AGAIN[op.name.split(".")[1]]
    return reduced(op, reduced_dims(op), splits=_exchanging(reduced_dims(op)), local=partial(_again, combine=combine))


@rule(*overloads("frobenius_norm", "linalg_matrix_norm", "linalg_norm", "linalg_vector_norm", "norm"))
def norm(op: Op) -> Signature:
    """(Σ |x|^p)^(1/p): the norm of the ranks' norms. Norms of matrices but Frobenius' need them whole."""
    dims = reduced_dims(op)
    power = _power(op)
    if power is None or not isfinite(power) or power == 0:
        return reduced(op, dims, whole=_because(dims, "this norm is not made of its parts' norms"))
    return reduced(
        op, dims, splits=_exchanging(dims), local=partial(_again, combine=lambda found: torch.linalg.vector_norm(found, power, 0))
    )


def _power(op: Op) -> float | None:
    """p, where the norm is that of the reduced elements laid flat."""
    order = given(op, "ord") if "linalg" in op.name else given(op, "p")
    if order in (None, "fro"):
        return 2.0
    matrix = op.target is not aten.linalg_vector_norm.default and "linalg" in op.name and len(reduced_dims(op)) == 2
    return None if matrix or isinstance(order, str) else float(order)


@rule(*overloads("amax", "amin", "max.default", "min.default"))
def extreme(op: Op) -> Signature:
    return reduced(op, reduced_dims(op), splits=_exchanging(reduced_dims(op)), local=_extreme)


def _extreme(call: Call, tensors: Sequence[Tensor]) -> Any:
    axes = _axes(call)
    return _Extreme.apply(tensors[0], call, axes) if axes else call.run(tensors)


class _Extreme(torch.autograd.Function):
    """The largest or smallest element; the gradient is shared by all elements on all ranks that equal it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, call: Call, axes: list[AxisSplit]) -> Tensor:
        largest = call.op.target in (aten.amax.default, aten.max.default)
        found = call.run([x])
        for split in axes:
            ranks = from_ranks(found, split)
            found = ranks.amax(0) if largest else ranks.amin(0)
        dims = reduced_dims(call.op)
        ctx.shape = [1 if dim in dims else size for dim, size in enumerate(x.shape)]
        equal = x == found.reshape(ctx.shape)
        number = equal.sum(dims, keepdim=True)
        for split in axes:
            number = all_reduce(number, split.group)
        ctx.save_for_backward(equal, number)
        return found

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        equal, number = ctx.saved_tensors
        return equal * (gradient.reshape(ctx.shape) / number), None, None


@rule(*overloads("argmax", "argmin", "max.dim", "min.dim"))
def extreme_along(op: Op) -> Signature:
    """The first index of the extreme along a dim; of a tensor laid flat it is counted over all dims."""
    dims = reduced_dims(op)
    if given(op, "dim") is None:
        return reduced(op, dims, whole=_because(dims, "the index counts over all dims"))
    return reduced(op, dims, splits=_exchanging(dims, blocked=False), local=_extreme_along)


def _extreme_along(call: Call, tensors: Sequence[Tensor]) -> Any:
    axes = _axes(call)
    if not axes:
        return call.run(tensors)
    largest = "max" in call.op.name
    dim, keepdim = reduced_dims(call.op)[0], bool(given(call.op, "keepdim"))
    pick = torch.max if largest else torch.min
    value, index = pick(tensors[0], dim, keepdim=keepdim)
    index = index + sum(split.part.start for split in axes)
    for split in axes:
        values, indices = from_ranks(value, split), from_ranks(index, split)
        value, which = pick(values, 0)
        index = indices.gather(0, which.unsqueeze(0)).squeeze(0)
    return (value, index) if len(call.shapes) == 2 else index


# -- variances ---------------------------------------------------------------------------------------------------------------------------


@rule(*overloads("std", "std_mean", "var", "var_mean"))
def variance(op: Op) -> Signature:
    """Around the mean of the whole, which the ranks exchange first."""
    dims = reduced_dims(op)
    if op.inputs[0].dtype.is_complex:
        return reduced(op, dims, whole=_because(dims, "complex numbers are compared with their mean as a whole"))
    return reduced(op, dims, splits=_exchanging(dims), local=_variance)


def _variance(call: Call, tensors: Sequence[Tensor]) -> Any:
    axes = _axes(call)
    if not axes:
        return call.run(tensors)
    op, x, dims = call.op, tensors[0], reduced_dims(call.op)
    count = prod(op.inputs[0].shape[dim] for dim in dims)
    mean = _moved(x.sum(dims, keepdim=True) / count, axes, P, I)
    deviation = x - _moved(mean, axes, I, R)
    found = _moved((deviation * deviation).sum(dims, keepdim=True), axes, P, I) / max(count - _correction(op), 0)
    name = op.name.split(".")[1]
    if name.startswith("std"):
        positive = found > 0
        found = torch.where(positive, torch.where(positive, found, 1.0).sqrt(), 0.0)
    results = [each.reshape(shape) for each, shape in zip((found, mean), call.shapes, strict=False)]
    return tuple(results) if name.endswith("_mean") else results[0]


def _correction(op: Op) -> float:
    if "correction" in op.name:
        given_one = given(op, "correction")
        return 1.0 if given_one is None else float(given_one)
    return float(bool(given(op, "unbiased")))


def _moved(x: Tensor, axes: Sequence[AxisSplit], source: Placement, target: Placement) -> Tensor:
    for split in axes:
        assert split.rank is not None, "microbatches cannot exchange values"
        axis = Axis(name=split.axis, group=split.group, ranks=split.ranks, rank=split.rank)
        x = reshard(x, Reshard(source=source, target=target, axis=axis))
    return x


# -- whole dims --------------------------------------------------------------------------------------------------------------------------


@rule(*overloads(*_WHOLE))
def whole_dim(op: Op) -> Signature:
    """The reduced dims stay whole."""
    dims = [-2, -1] if op.target is aten.nuclear_norm.default else given(op, "dim")
    dims = every(dims, len(op.inputs[0].shape))
    return reduced(op, dims, whole=_because(dims, _COMPARED))


@rule(*overloads("nanquantile", "quantile"))
def quantile(op: Op) -> Signature:
    """The reduced dims stay whole; quantiles asked for in a vector are the first dim of the result."""
    names = simple_dims(op.inputs[0].shape)
    dims = every(given(op, "dim"), len(names))
    asked = [simple_dims(value.shape, "q") for value in op.inputs[1:]]
    left: list[Dim] = [() if dim in dims else name for dim, name in enumerate(names) if given(op, "keepdim") or dim not in dims]
    first = asked[0] if asked else []
    return over(op, [names, *asked], [[*first, *left]], whole=_because(dims, _COMPARED))


# -- along a dim -------------------------------------------------------------------------------------------------------------------------


@rule(*overloads("cumprod", "cummax", "cummin", "logcumsumexp"))
def scan(op: Op) -> Signature:
    return _along(op, "each element depends on those before it")


@rule(aten.cumsum.default)
def cumsum(op: Op) -> Signature:
    """Over a split dim a rank adds the totals of those before it."""
    names = simple_dims(op.inputs[0].shape)
    splits = {name: Split(blocked=False, microbatches=False) for dim in reduced_dims(op) if names for name in names[dim]}
    return over(op, [names], [names], splits=splits, linear=ALONE, local=_cumsum)


def _cumsum(call: Call, tensors: Sequence[Tensor]) -> Any:
    result = call.run(tensors)
    axes = _axes(call)
    if not axes:
        return result
    dim = reduced_dims(call.op)[0]
    total = result.narrow(dim, result.shape[dim] - 1, 1)
    for split in axes:  # innermost first: outside it, all its ranks have one total
        totals = from_ranks(total, split, R)
        result = result + totals[: split.rank].sum(0)
        total = totals.sum(0)
    return result


@rule(aten.renorm.default)
def renorm(op: Op) -> Signature:
    """Each slice along `dim` is scaled by its own norm."""
    kept = wrap(given(op, "dim"), len(op.inputs[0].shape))
    names = simple_dims(op.inputs[0].shape)
    others = [dim for dim in range(len(names)) if dim != kept]
    return over(op, [names], [names], whole=_because(others, "it is scaled by its norm as a whole"))


def _along(op: Op, reason: str, **more: Any) -> Signature:
    names = simple_dims(op.inputs[0].shape)
    dim = wrap(given(op, "dim"), len(names))
    return over(op, [names], [names for _ in op.outputs], whole={f"d{dim}": reason}, **more)


@rule(aten.diff.default)
def diff(op: Op) -> Signature:
    """Differences of neighbours along one dim, which stays whole, as do the same dims of what is put before and after."""
    shape = op.inputs[0].shape
    dim = wrap(given(op, "dim"), len(shape))
    names = simple_dims(shape)

    def along(name: str) -> list[Dim]:
        return [*names[:dim], (name,), *names[dim + 1 :]]

    inputs = [along(f"in{number}") for number in range(len(op.inputs))]
    reason = dict.fromkeys((*(f"in{number}" for number in range(len(op.inputs))), "out"), "each element depends on its neighbours")
    return over(op, inputs, [along("out")], whole=reason, linear=(frozenset(range(len(op.inputs))),))


# -- between two tensors -----------------------------------------------------------------------------------------------------------------


@rule(aten.dist.default)
def dist(op: Op) -> Signature:
    """The norm of a difference: of equal shapes any dim, the norm of the ranks' norms."""
    power = float(given(op, "p"))
    same = op.inputs[0].shape == op.inputs[1].shape and isfinite(power) and power != 0
    names = [simple_dims(value.shape, "d" if same else letter) for value, letter in zip(op.inputs, "ab", strict=True)]
    flat = [name for each in names for (name,) in each]
    if not same:
        return over(op, names, [[]], whole=dict.fromkeys(flat, "all elements make one number"))
    combine = partial(_again, combine=lambda found: torch.linalg.vector_norm(found, power, 0))
    return over(op, names, [[]], splits=_exchanging(range(len(flat))), local=combine)


@rule(aten.cdist.default, aten._cdist_forward.default, aten._euclidean_dist.default)
def cdist(op: Op) -> Signature:
    """b… p m, b… r m -> b… p r."""
    out = op.outputs[0].shape
    names = simple_dims(out)
    inputs = []
    for value, row in zip(op.inputs, names[-2:], strict=True):
        batch = broadcast(value.shape[:-2], names[:-2], out[:-2])
        inputs.append([*batch, row, ("m",)])
    return over(op, inputs, [names], whole={"m": "distances are norms over it"})


@rule(aten.cosine_similarity.default, aten.pairwise_distance.default)
def similarity(op: Op) -> Signature:
    """Of vectors along one dim, which stays whole."""
    shape = torch.broadcast_shapes(*(value.shape for value in op.inputs))
    along = -1 if op.target is aten.pairwise_distance.default else given(op, "dim")
    dim = wrap(along, len(shape))
    names = simple_dims(shape)
    inputs: list[Dims] = [broadcast(value.shape, names, shape) for value in op.inputs]
    kept: list[Dim] = [()] if given(op, "keepdim") else []
    return over(op, inputs, [[*names[:dim], *kept, *names[dim + 1 :]]], whole={f"d{dim}": "vectors are compared as a whole"})
