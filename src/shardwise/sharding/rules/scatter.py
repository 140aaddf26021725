"""Elements put at places that index tensors name.

Into sums the values may be split: each rank adds its own, and the base is one more term.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from shardwise.capture.graph import Op, Slot
from shardwise.sharding.rules.build import ALONE, apart, broadcast, from_ranks, given, over, overloads, positions, simple_dims, wrap
from shardwise.sharding.rules.indexing import any_row, asks_for_true, indexed_dims, recounted
from shardwise.sharding.rules.registry import rule
from shardwise.sharding.signature import Call, Dim, Dims, Signature, Split, run_as_is

aten = torch.ops.aten

_ANY_PLACE = "any place of it may be written to"
_OVERWRITES = "what is written last stays"
_BOTH = (frozenset({0, 2}),)  # linear in the base and the values together


# -- at index tensors --------------------------------------------------------------------------------------------------------------------


@rule(aten.index_put.default, aten._unsafe_index_put.default)
def index_put(op: Op) -> Signature:
    """x[i, :, j, …] = values, or += values."""
    slots = given(op, "indices")
    (values,) = positions(op, "values")
    linear = (frozenset({0, values}),)
    if asks_for_true(op, slots):
        return _put_where(op, slots, linear)
    found = indexed_dims(op, slots)
    shape = {name: size for dim, size in zip(found.source, op.inputs[0].shape, strict=True) for name in dim}
    for number, dims in found.indices.items():
        shape |= {name: size for dim, size in zip(dims, op.inputs[number].shape, strict=True) for name in dim}
    out = [shape.get(name[0], 1) for name in found.result]
    inputs = {0: found.source, values: broadcast(op.inputs[values].shape, found.result, out), **found.indices}
    rows = {name for dims in found.indices.values() for dim in dims for name in dim} - found.counted
    splits = {name: Split(blocked=False) for name in found.counted}
    whole = dict.fromkeys(any_row(found.source), _ANY_PLACE)
    if given(op, "accumulate"):
        splits |= {name: Split(addends=frozenset({0})) for name in rows}
    else:
        whole |= dict.fromkeys(rows, _OVERWRITES)
    read = [inputs[number] for number in sorted(inputs)]
    return over(op, read, [found.source], splits=splits, whole=whole, linear=linear, local=_index_put)


def _index_put(call: Call, tensors: Sequence[Tensor]) -> Any:
    return call.run(recounted(call, tensors))


def _put_where(op: Op, slots: Sequence[Any], linear: tuple[frozenset[int], ...]) -> Signature:
    """x[mask] = value: every element alone, when there is one mask and one value."""
    masks = [(dim, slot.index) for dim, slot in enumerate(slots) if isinstance(slot, Slot)]
    (values,) = positions(op, "values")
    if len(masks) > 1 or op.inputs[values].numel > 1:
        return apart(op, "which value is written where depends on the data before it", linear=linear)
    ((start, mask),) = masks
    names = simple_dims(op.inputs[0].shape)
    inputs: dict[int, Sequence[Dim]] = {0: names, mask: names[start : start + len(op.inputs[mask].shape)]}
    inputs[values] = [()] * len(op.inputs[values].shape)
    return over(op, [inputs[number] for number in sorted(inputs)], [names], linear=linear, local=partial(_where, start=start, mask=mask))


def _where(call: Call, tensors: Sequence[Tensor], start: int, mask: int) -> Tensor:
    """Without asking how many elements the mask has: a program is traced on descriptions of tensors."""
    x, chosen = tensors[0], tensors[mask]
    (values,) = positions(call.op, "values")
    chosen = chosen.reshape(chosen.shape + (1,) * (x.dim() - start - chosen.dim())).to(torch.bool)
    value = tensors[values].reshape(())
    return torch.where(chosen, x + value if given(call.op, "accumulate") else value, x)


# -- along one dim: whole rows -----------------------------------------------------------------------------------------------------------


@rule(*overloads("index_add", "index_copy", "index_fill", "index_reduce"))
def put_rows(op: Op) -> Signature:
    """Rows of a source put at, or added to, the rows that a vector names."""
    shape = op.inputs[0].shape
    if not shape:
        return apart(op, "it is one number")
    names = simple_dims(shape)
    dim = wrap(given(op, "dim"), len(shape))
    row: list[Dim] = [("r",) for _ in op.inputs[1].shape]
    filled = op.name.startswith("aten.index_fill")
    source = [*names[:dim], *(row or [()]), *names[dim + 1 :]] if op.inputs[2:] and op.inputs[2].shape else []
    adds = op.target is aten.index_add.default
    whole = {f"d{dim}": _ANY_PLACE} | ({} if adds else {"r": "each place is filled once" if filled else _OVERWRITES})
    splits = {"r": Split(addends=frozenset({0}))} if adds and row else {}
    inputs: list[Sequence[Dim]] = [names, row, *([source] if op.inputs[2:] else [])]
    local = _fill_rows if op.target is aten.index_fill.int_Tensor else run_as_is
    return over(op, inputs, [names], splits=splits, whole=whole, linear=_linear_rows(op), local=local)


def _fill_rows(call: Call, tensors: Sequence[Tensor]) -> Tensor:
    """With a mask, for the operator itself looks at the indices, and a program is traced on descriptions of tensors."""
    x, index, value = tensors
    dim = wrap(given(call.op, "dim"), x.dim())
    rows = index.new_zeros(x.shape[dim], dtype=torch.bool).index_fill(0, index, True)
    return torch.where(rows.reshape([-1 if d == dim else 1 for d in range(x.dim())]), value.to(x.dtype), x)


def _linear_rows(op: Op) -> tuple[frozenset[int], ...]:
    if op.target is aten.index_reduce.default:
        return _BOTH if given(op, "reduce") == "mean" else ()
    if op.target is aten.index_fill.int_Scalar:
        return ALONE if given(op, "value") == 0 else ()
    return _BOTH


# -- along one dim: single elements ------------------------------------------------------------------------------------------------------


@rule(*overloads("scatter", "scatter_add", "scatter_reduce.two"))
def scatter(op: Op) -> Signature:
    """Dims in which base, index and values have the same size; along the scattered one index and values, into a sum."""
    shapes = [value.shape for value in op.inputs]
    dim = wrap(given(op, "dim"), len(shapes[0]))
    names: list[list[Dim]] = [[], [], []]
    splits: dict[str, Split] = {}
    whole: dict[str, str] = {}
    for d in range(len(shapes[0])):
        alike = len({shape[d] for shape in shapes[1 if d == dim else 0 :]}) == 1
        own = [f"d{d}" if alike and (d != dim or number) else f"{letter}{d}" for number, letter in enumerate("xiv")]
        reason = "index and values have other sizes than what they are put into" if not alike else _OVERWRITES
        if d == dim and alike and _is_sum(op):
            splits[f"d{d}"] = Split(addends=frozenset({0}))
        elif d == dim or not alike:
            whole |= dict.fromkeys(own, reason)
        if d == dim:
            whole[own[0]] = _ANY_PLACE
        for number, name in enumerate(own):
            names[number].append((name,))
    return over(op, names[: len(shapes)], [names[0]], splits=splits, whole=whole, linear=_linear(op))


def _is_sum(op: Op) -> bool:
    """Whether values are added to the base."""
    if op.target is aten.scatter_reduce.two:
        return given(op, "reduce") == "sum" and bool(given(op, "include_self"))
    return op.target is aten.scatter_add.default or given(op, "reduce") == "add"


def _linear(op: Op) -> tuple[frozenset[int], ...]:
    kind = given(op, "reduce")
    if op.target in (aten.scatter.value, aten.scatter.value_reduce):
        return ALONE if given(op, "value") == 0 or kind == "multiply" else ()
    if kind == "prod" and given(op, "include_self"):
        return ALONE
    return _BOTH if kind in (None, "sum", "add", "mean") else ()


# -- laid flat ---------------------------------------------------------------------------------------------------------------------------


@rule(aten.put.default)
def put(op: Op) -> Signature:
    """Into the base laid flat."""
    base, index, source = (value.shape for value in op.inputs)
    if index != source or not given(op, "accumulate"):
        return apart(op, _OVERWRITES, linear=_BOTH)
    names = simple_dims(index)
    left = simple_dims(base, "s")
    splits = {name: Split(addends=frozenset({0})) for (name,) in names}
    return over(op, [left, names, names], [left], splits=splits, whole=dict.fromkeys(any_row(left), _ANY_PLACE), linear=_BOTH)


@rule(aten.masked_scatter.default)
def masked_scatter(op: Op) -> Signature:
    """The elements under the mask take the source's in order: a rank skips as many as the mask has on the ranks before it."""
    shape = op.inputs[0].shape
    names = simple_dims(shape)
    mask: Dims = broadcast(op.inputs[1].shape, names, shape)
    source = simple_dims(op.inputs[2].shape, "s")
    first = next((name for name, size in zip(names, shape, strict=True) if size > 1), ())
    whole = {name: "elements are taken in the order of all dims" for (name,) in names if (name,) != first}
    whole |= dict.fromkeys(any_row(source), "any element of it may be needed")
    splits = {first[0]: Split(blocked=False, microbatches=False)} if first else {}
    return over(op, [names, mask, source], [names], splits=splits, whole=whole, linear=_BOTH, local=_masked_scatter)


def _masked_scatter(call: Call, tensors: Sequence[Tensor]) -> Any:
    axes = [split for splits in call.splits.values() for split in splits if split.ranks > 1]
    if not axes:
        return call.run(tensors)
    x, mask, source = tensors
    mask = mask.expand(x.shape)
    count = mask.sum()
    skipped = torch.zeros_like(count)
    for split in axes[::-1]:  # innermost first: outside it, all its ranks count together
        counts = from_ranks(count, split)
        skipped = skipped + counts[: split.rank].sum()
        count = counts.sum()
    place = mask.reshape(-1).cumsum(0) - 1 + skipped
    taken = source.reshape(-1)[place.clamp(0, source.numel() - 1)]
    return torch.where(mask, taken.reshape(x.shape), x)
