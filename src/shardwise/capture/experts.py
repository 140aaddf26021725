"""Mixtures of experts: one product in which each row names its own matrix, and the rewriting of the forms in which models write it.

    sorted     rows are sorted by expert, `grouped_mm(sorted rows, weights, ends of the groups)`, …, rows are put back in order
    batched    each row's matrix is looked up, `bmm(weights[experts], rows)`

Both become `expert_mm(rows, weights, experts)` on the rows in their own order. Sorting mixes the samples of a batch, and what is done to a
row alone does not care where the row stands: so what lies between the sorting and its undoing is written again without it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from shardwise.capture.builder import Builder, Request
from shardwise.capture.graph import Op, Value, fill

__all__ = ["expert_mm", "group_of_row", "rewrite"]

aten = torch.ops.aten

_LIBRARY = torch.library.Library("shardwise", "FRAGMENT")
_LIBRARY.define("expert_mm(Tensor x, Tensor weight, Tensor expert, bool grouped=False) -> Tensor")
_LIBRARY.define("expert_outer(Tensor x, Tensor gradient, Tensor expert, int experts, bool grouped=False) -> Tensor")
_LIBRARY.define("expert_outer_into(Tensor(a!) into, Tensor x, Tensor gradient, Tensor expert, bool add, bool grouped=False) -> ()")
_LIBRARY.define("expert_order(Tensor expert, int experts) -> Tensor")
_ops = torch.ops.shardwise


# -- the operator ------------------------------------------------------------------------------------------------------------------------


def expert_mm(x: Tensor, weight: Tensor, expert: Tensor) -> Tensor:
    """y[s] = x[s] · weight[expert[s]] for x [s, k], weight [e, k, n], expert int [s]; zero where there is no such expert."""
    result: Tensor = _ExpertMM.apply(x, weight, expert)
    return result


class _ExpertMM(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, expert: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, expert)
        result: Tensor = _ops.expert_mm(x, weight, expert)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, expert = ctx.saved_tensors
        for_x = _ops.expert_mm(gradient, weight.transpose(1, 2), expert) if ctx.needs_input_grad[0] else None
        for_weight = _ops.expert_outer(x, gradient, expert, weight.shape[0]) if ctx.needs_input_grad[1] else None
        return for_x, for_weight, None


def _known(expert: Tensor, experts: int) -> Tensor:
    """Each row's expert, `experts` for none."""
    return torch.where((expert >= 0) & (expert < experts), expert, experts)


def _expert_order(expert: Tensor, experts: int) -> Tensor:
    """The rows of the first expert, of the second, …, and those of none; of each in their own order."""
    return torch.argsort(_known(expert, experts), stable=True)


def _counts(expert: Tensor, experts: int) -> list[int]:
    """Rows of each expert, and of none."""
    found: list[int] = torch.bincount(_known(expert, experts), minlength=experts + 1).tolist()
    return found


def _by_expert(expert: Tensor, experts: int) -> tuple[Tensor, ...]:
    """The rows of each expert, and at the end those of none."""
    return _expert_order(expert, experts).split(_counts(expert, experts))


# grouped: whether rows are in the order of `expert_order`. Where they are not: one expert after the other, not all rows at once; what is
# brought together for one is still in the cache when it is multiplied.


def _expert_mm(x: Tensor, weight: Tensor, expert: Tensor, grouped: bool = False) -> Tensor:
    result = x.new_empty(x.shape[0], weight.shape[2])
    if grouped:
        counts = _counts(expert, weight.shape[0])
        *parts, others = result.split(counts)
        for each, matrix, into in zip(x.split(counts), weight, parts, strict=False):
            torch.mm(each, matrix, out=into)
        others.zero_()
        return result
    *rows_of, rest = _by_expert(expert, weight.shape[0])
    result.index_fill_(0, rest, 0)
    for rows, matrix in zip(rows_of, weight, strict=True):
        result.index_copy_(0, rows, x.index_select(0, rows) @ matrix)
    return result


def _expert_outer(x: Tensor, gradient: Tensor, expert: Tensor, experts: int, grouped: bool = False) -> Tensor:
    """For each expert the sum over its rows of x[s]ᵀ gradient[s], [e, k, n]."""
    result = x.new_empty(experts, x.shape[1], gradient.shape[1])
    _expert_outer_into(result, x, gradient, expert, False, grouped)
    return result


def _expert_outer_into(into: Tensor, x: Tensor, gradient: Tensor, expert: Tensor, add: bool, grouped: bool = False) -> None:
    """The same, written or added to a tensor."""
    pairs: Iterable[tuple[Tensor, Tensor]]
    if grouped:
        counts = _counts(expert, into.shape[0])
        pairs = zip(x.split(counts), gradient.split(counts), strict=True)
    else:
        pairs = ((x.index_select(0, rows), gradient.index_select(0, rows)) for rows in _by_expert(expert, into.shape[0]))
    for each, (left, right) in zip(into, pairs, strict=False):
        each.addmm_(left.T, right, beta=int(add))


_LIBRARY.impl("expert_mm", _expert_mm, "CompositeExplicitAutograd")
_LIBRARY.impl("expert_outer", _expert_outer, "CompositeExplicitAutograd")
_LIBRARY.impl("expert_outer_into", _expert_outer_into, "CompositeExplicitAutograd")
_LIBRARY.impl("expert_order", _expert_order, "CompositeExplicitAutograd")


@torch.library.register_fake("shardwise::expert_mm", lib=_LIBRARY)
def _(x: Tensor, weight: Tensor, expert: Tensor, grouped: bool = False) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[2])


@torch.library.register_fake("shardwise::expert_outer", lib=_LIBRARY)
def _(x: Tensor, gradient: Tensor, expert: Tensor, experts: int, grouped: bool = False) -> Tensor:
    return x.new_empty(experts, x.shape[1], gradient.shape[1])


@torch.library.register_fake("shardwise::expert_order", lib=_LIBRARY)
def _(expert: Tensor, experts: int) -> Tensor:
    return expert.new_empty(expert.shape, dtype=torch.int64)


@register_flop_formula([_ops.expert_mm])
def _(x: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * x[0] * weight[1] * weight[2]


@register_flop_formula([_ops.expert_outer])
def _(x: Sequence[int], gradient: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * x[0] * x[1] * gradient[1]


def group_of_row(ends: Tensor, rows: int) -> Tensor:
    """Which group each row is in, of groups that end before the rows `ends` [groups]; the number of groups for rows after the last."""
    return torch.searchsorted(ends, torch.arange(rows, dtype=ends.dtype, device=ends.device), right=True)


# -- rewriting ---------------------------------------------------------------------------------------------------------------------------


_GROUPED = ("transformers.grouped_mm_fallback.default", "aten._grouped_mm.default")


def rewrite(call: Request) -> Value | None:
    """What replaces the call, if it is a product by experts or puts sorted rows back in order."""
    target, args, kwargs, builder = call.target, call.args, call.kwargs, call.builder
    if str(target) in _GROUPED:
        return _grouped(args, kwargs, call.meta, builder)
    if target is aten.squeeze.dim:
        return _batched(args, call.meta, builder)
    if target is aten.index.Tensor and len(args[1]) == 1 and (order := _inverted(args[1][0])) is not None:
        return _Unsorted(order, builder, call.meta).value(args[0])
    return None


def _grouped(args: tuple[Any, ...], kwargs: dict[str, Any], meta: Tensor, builder: Builder) -> Value | None:
    x, weight = args[:2]
    ends = args[2] if len(args) > 2 else kwargs.get("offs")
    if ends is None or len(x.shape) != 2 or len(weight.shape) != 3 or any(extra is not None for extra in args[3:]):
        return None
    sorted_experts = _counted(ends, weight.shape[0])
    if sorted_experts is None:
        (expert,) = builder.add(group_of_row, (ends, x.shape[0]), {}, [meta.new_empty(x.shape[0], dtype=torch.int64)])
    else:
        expert = sorted_experts
    return builder.add(expert_mm, (x, weight, expert), {}, [meta])[0]


def _counted(ends: Value, groups: int) -> Value | None:
    """The sorted group numbers of which `ends` = cumsum(histc(numbers)) says where each group ends."""
    histogram = _made(ends, "aten.cumsum.default")
    counts = _made(histogram.inputs[0], "aten.histc.default") if histogram else None
    if counts is None or list(counts.args[1:]) != [groups, 0, groups - 1]:
        return None
    numbers = counts.inputs[0]
    while (cast := _made(numbers, "aten._to_copy.default", "aten.to.dtype", "aten.to.dtype_layout")) is not None:
        numbers = cast.inputs[0]
    made = _made(numbers, "aten.sort.default", "aten.sort.stable")
    return numbers if made and numbers is made.outputs[0] else None


def _made(value: Value, *names: str) -> Op | None:
    """The operator that made the value, if it is one of these."""
    made = value.producer
    return made if made is not None and made.name in names else None


def _batched(args: tuple[Any, ...], meta: Tensor, builder: Builder) -> Value | None:
    """squeeze(bmm(weight[expert], x as columns)) or squeeze(bmm(x as rows, weight[expert]))."""
    product = _made(args[0], "aten.bmm.default")
    if product is None or args[1] % 3 == 0:
        return None
    left = args[1] % 3 == 2  # which of the two the weights are
    weights, vector = product.inputs if left else product.inputs[::-1]
    found, column = _made(weights, "aten.index.Tensor"), _made(vector, "aten.unsqueeze.default")
    if found is None or column is None or len(found.inputs) != 2 or len(found.args[1]) != 1:
        return None
    weight, expert = found.inputs
    if (
        len(weight.shape) != 3
        or len(expert.shape) != 1
        or expert.dtype not in (torch.int64, torch.int32)
        or column.args[1] % 3 != args[1] % 3
    ):
        return None
    if left:
        turned = meta.new_empty(weight.shape[0], weight.shape[2], weight.shape[1])
        (weight,) = builder.add(aten.transpose.int, (weight, 1, 2), {}, [turned])
    return builder.add(expert_mm, (column.inputs[0], weight, expert), {}, [meta])[0]


def _inverted(index: Any) -> Value | None:
    """The order (indices of a sort) of which `index` is the inverse: argsort(order), or empty[order] = arange."""
    if not isinstance(index, Value):
        return None
    order: Value | None = None
    if (made := _made(index, "aten.argsort.default", "aten.argsort.stable")) is not None:
        order = made.inputs[0]
    elif (made := _made(index, "aten.index_put.default", "aten.scatter.src")) is not None and _made(made.inputs[2], "aten.arange.default"):
        order = made.inputs[1]
    found = _made(order, "aten.sort.default", "aten.sort.stable", "aten.argsort.default", "aten.argsort.stable") if order else None
    return order if found is not None and len(found.outputs[0].shape) == 1 else None


# Operators that treat each row (dim 0) alone, as long as no other dim named in their arguments is 0.
_ROWWISE = (
    *("add.Tensor", "sub.Tensor", "mul.Tensor", "div.Tensor", "rsub.Scalar", "neg.default", "reciprocal.default", "where.self"),
    *(
        "silu.default",
        "gelu.default",
        "relu.default",
        "sigmoid.default",
        "tanh.default",
        "square.default",
        "pow.Tensor_Scalar",
        "exp.default",
    ),
    *("clamp.default", "clamp_min.default", "clamp_max.default", "masked_fill.Scalar", "ge.Scalar", "lt.Scalar", "to.dtype"),
    *("_to_copy.default", "to.dtype_layout", "minimum.default", "maximum.default", "logical_not.default", "bitwise_not.default"),
    *("rms_norm.default", "layer_norm.default", "mean.dim", "rsqrt.default"),
)
_ALONG = {"unsqueeze.default": 1, "split.Tensor": 2, "split_with_sizes.default": 2, "chunk.default": 2, "slice.Tensor": 1, "mean.dim": 1}


class _Unsorted:
    """Writes values whose rows are sorted by `order` again, in the rows' own order."""

    def __init__(self, order: Value, builder: Builder, meta: Tensor) -> None:
        self.order, self.builder, self.meta = order, builder, meta
        self.rows = order.shape[0]
        self.known: dict[Value, Value | None] = {}

    def value(self, value: Value) -> Value | None:
        """The same value in the rows' own order; None if it cannot be told."""
        if value not in self.known:
            self.known[value] = None
            self._find(value)
        return self.known[value]

    def _find(self, value: Value) -> None:
        made = value.producer
        if made is None:
            return
        if made.outputs[-1] is self.order and made.name in ("aten.sort.default", "aten.sort.stable") and value is made.outputs[0]:
            self.known[value] = made.inputs[0]
        elif made.name == "aten.index.Tensor" and len(made.args[1]) == 1:
            self.known[value] = self._looked_up(value, *made.inputs)
        elif made.target is expert_mm:
            x, expert = self.value(made.inputs[0]), self.value(made.inputs[2])
            if x is not None and expert is not None:
                (self.known[value],) = self.builder.add(expert_mm, (x, made.inputs[1], expert), {}, [self._like(value)])
        elif self._rowwise(made):
            self._again(made)

    def _looked_up(self, value: Value, source: Value, index: Value) -> Value | None:
        if index is self.order:
            return source if source.shape[0] == self.rows else None
        divided = _made(index, "aten.floor_divide.default")
        if divided is not None and divided.inputs[0] is self.order and source.shape[0] * divided.args[1] == self.rows:
            return self.builder.add(aten.repeat_interleave.self_int, (source, divided.args[1], 0), {}, [self._like(value)])[0]
        own = self.value(index)
        return None if own is None else self.builder.add(aten.index.Tensor, (source, (own,)), {}, [self._like(value)])[0]

    def _rowwise(self, made: Op) -> bool:
        name, first = made.name.removeprefix("aten."), made.inputs[0].shape
        if (name not in _ROWWISE and name not in _ALONG) or any(not out.shape or out.shape[0] != self.rows for out in made.outputs):
            return False
        dims = made.argument(_ALONG[name], "dim", 0) if name in _ALONG else -1
        rank = len(first) + (name == "unsqueeze.default")
        return all(dim % rank != 0 for dim in (dims if isinstance(dims, (list, tuple)) else [dims])) and len(first) == max(
            len(each.shape) for each in made.inputs
        )

    def _again(self, made: Op) -> None:
        rank = len(made.outputs[0].shape) - (made.name == "aten.unsqueeze.default")
        tensors: list[Any] = []
        for each in made.inputs:
            alike = len(each.shape) < rank or each.shape[0] == 1  # the same for every row
            tensors.append(each if alike else self.value(each))
        if None in tensors:
            return
        args, kwargs = fill((made.args, made.kwargs), tensors)
        results = self.builder.add(made.target, args, kwargs, [self._like(each) for each in made.outputs])
        self.known.update(zip(made.outputs, results, strict=True))

    def _like(self, value: Value) -> Tensor:
        return self.meta.new_empty(value.shape, dtype=value.dtype)
