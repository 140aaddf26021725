"""Look-ups by index tensors: any dim that is not looked up in, and any of the indices'."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shardwise.capture.graph import Op, Slot, Value
from shardwise.sharding.rules.build import (
    ALONE,
    apart,
    broadcast,
    given,
    over,
    overloads,
    positions,
    run_named,
    simple_dims,
    start_of,
    wrap,
)
from shardwise.sharding.rules.registry import rule
from shardwise.sharding.signature import Call, Dim, Dims, Signature, Split

aten = torch.ops.aten

_ANY_ROW = "any row of it may be asked for"


# -- index tensors -----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Indexed:
    """x[i, :, j, …]: the dims r… of the broadcast index tensors stand where they are indexed, or first when indexed dims are not adjacent.

    An index that counts 0, 1, …, n−1 along one dim of the result picks each sample's own row (transformers' mask functions do so for the
    batch): that dim of the result and the indexed dim are then one factor, and each rank counts from its own first row.

    source, result: dims of x and of what is looked up; indices: input number → its dims; counted: factors of indices that count.
    """

    source: list[Dim]
    result: list[Dim]
    indices: Mapping[int, Dims]
    counted: frozenset[str]


def indexed_dims(op: Op, slots: Sequence[Any]) -> Indexed:
    """The dims of x[slots], of the indices and of the result; a dim of x that any index may reach is s…"""
    shape = op.inputs[0].shape
    where = [dim for dim, slot in enumerate(slots) if isinstance(slot, Slot)]
    values = {dim: op.inputs[slots[dim].index] for dim in where}
    common = torch.broadcast_shapes(*(value.shape for value in values.values()))
    rows: list[Dim] = [(f"r{d}",) for d in range(len(common))]
    source: list[Dim] = [(f"s{d}",) if d in values else (f"d{d}",) for d in range(len(shape))]
    result = _result(source, rows, where)
    counted: set[str] = set()
    for dim, value in values.items():
        if (along := counts_along(value, shape[dim])) is not None:
            source[dim] = rows[along + len(common) - len(value.shape)]
            counted.update(source[dim])
    indices = {slots[dim].index: broadcast(value.shape, rows, common) for dim, value in values.items()}
    return Indexed(source=source, result=result, indices=indices, counted=frozenset(counted))


def _result(source: list[Dim], rows: list[Dim], where: list[int]) -> list[Dim]:
    first = where[0] if where == list(range(where[0], where[-1] + 1)) else 0
    kept = [name for dim, name in enumerate(source) if dim not in where]
    return [*kept[:first], *rows, *kept[first:]]


def counts_along(value: Value, size: int) -> int | None:
    """The dim along which this index tensor is arange(size), if it is that: made by arange and only unsqueezed since."""
    shape = value.shape
    while value.producer is not None and value.producer.target is aten.unsqueeze.default:
        value = value.producer.inputs[0]
    made = value.producer
    counts = made is not None and made.target is aten.arange.default and made.args[0] == size and size > 1
    return next(d for d, each in enumerate(shape) if each == size) if counts else None


def asks_for_true(op: Op, slots: Sequence[Any]) -> bool:
    """Whether an index is a mask: how many rows it asks for depends on the data."""
    return any(isinstance(slot, Slot) and op.inputs[slot.index].dtype in (torch.bool, torch.uint8) for slot in slots)


@rule(aten.index.Tensor, aten._unsafe_index.Tensor)
def index_tensor(op: Op) -> Signature:
    slots = given(op, "indices")
    if asks_for_true(op, slots):
        return apart(op, "how many elements a mask takes depends on the data", linear=ALONE)
    found = indexed_dims(op, slots)
    inputs = [found.source, *(found.indices[number] for number in sorted(found.indices))]
    splits = {name: Split(blocked=False) for name in found.counted}
    return over(op, inputs, [found.result], splits=splits, whole=any_row(found.source), linear=ALONE, local=_index)


def any_row(source: Sequence[Dim]) -> dict[str, str]:
    return {name: _ANY_ROW for dim in source for name in dim if name.startswith("s")}


def _index(call: Call, tensors: Sequence[Tensor]) -> Any:
    return call.run(recounted(call, tensors))


def recounted(call: Call, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Index tensors that count with a split factor count from this rank's first row."""
    op = call.op
    shifted = list(tensors)
    found = indexed_dims(op, given(op, "indices"))
    for dim, slot in enumerate(given(op, "indices")):
        split = [name for name in found.source[dim] if name in found.counted and call.splits.get(name)] if isinstance(slot, Slot) else []
        if split:
            value = op.inputs[slot.index]
            along = counts_along(value, op.inputs[0].shape[dim])
            count = torch.arange(tensors[0].shape[dim], device=tensors[0].device)
            shifted[slot.index] = count.reshape([-1 if d == along else 1 for d in range(len(value.shape))])
    return shifted


# -- along one dim -----------------------------------------------------------------------------------------------------------------------


@rule(aten.index_select.default)
def index_select(op: Op) -> Signature:
    names = simple_dims(op.inputs[0].shape)
    index: list[Dim] = [("r",) for _ in op.inputs[1].shape]
    if not names:
        return apart(op, "it is one number", linear=ALONE)
    dim = wrap(given(op, "dim"), len(names))
    row: Dim = ("r",) if index else ()
    return over(op, [names, index], [[*names[:dim], row, *names[dim + 1 :]]], whole={f"d{dim}": _ANY_ROW}, linear=ALONE)


@rule(aten.gather.default)
def gather(op: Op) -> Signature:
    """Dims other than the gathered one, where source and index have the same size; along that one, the index alone.

    With the gathered dim of the source split a rank gives the elements that it has, and zero for the others: a summand.
    """
    source, index = (value.shape for value in op.inputs)
    dim = wrap(given(op, "dim"), len(source))
    names = simple_dims(index)
    fewer = {d for d in range(min(len(source), len(index))) if d != dim and source[d] != index[d]}
    left: list[Dim] = [(f"s{d}",) if d == dim or d in fewer else names[d] for d in range(len(source))]
    whole = {name: "the index covers only the first of the source's rows" for d in fewer for name in (f"s{d}", f"d{d}")}
    splits = {}
    if op.inputs[0].dtype == torch.bool:
        whole[f"s{dim}"] = "truth values are no summands"
    elif source:
        splits[f"s{dim}"] = Split(blocked=False, microbatches=False)
    return over(op, [left, names], [names], splits=splits, whole=whole, linear=ALONE, local=_gather)


def _gather(call: Call, tensors: Sequence[Tensor]) -> Any:
    source, index = tensors
    dim = wrap(given(call.op, "dim"), source.dim())
    if not call.splits.get(f"s{dim}"):
        return call.run(tensors)
    local = index - start_of(call, f"s{dim}")
    here = (local >= 0) & (local < source.shape[dim])
    found = call.run([source, torch.where(here, local, 0)])
    return torch.where(here, found, torch.zeros((), dtype=found.dtype, device=found.device))


@rule(aten.take_along_dim.default)
def take_along_dim(op: Op) -> Signature:
    """As gather, source and index being broadcast against each other; without a dim both are laid flat."""
    source, index = (value.shape for value in op.inputs)
    if given(op, "dim") is None:
        return _taken_flat(op)
    dim = wrap(given(op, "dim"), len(source))
    out = op.outputs[0].shape
    names = simple_dims(out)
    left: list[Dim] = [("s",) if d == dim else names[d] if size == out[d] else () for d, size in enumerate(source)]
    return over(op, [left, broadcast(index, names, out)], [names], whole={"s": _ANY_ROW}, linear=ALONE)


def _taken_flat(op: Op) -> Signature:
    left, names = simple_dims(op.inputs[0].shape, "s"), simple_dims(op.inputs[1].shape)
    flat = [tuple(name for (name,) in names)]
    return over(op, [left, names], [flat], whole=any_row(left), linear=ALONE)


@rule(aten.take.default)
def take(op: Op) -> Signature:
    """From the source laid flat."""
    left, names = simple_dims(op.inputs[0].shape, "s"), simple_dims(op.inputs[1].shape)
    return over(op, [left, names], [names], whole=any_row(left), linear=ALONE)


# -- values among values -----------------------------------------------------------------------------------------------------------------


@rule(aten.searchsorted.Tensor)
def searchsorted(op: Op) -> Signature:
    """Each row of values in its own sorted row, or all in the only one."""
    names = simple_dims(op.outputs[0].shape)
    among: list[Dim] = [*names[:-1], ("s",)] if len(op.inputs[0].shape) > 1 else [("s",)]
    inputs: dict[int, list[Dim]] = dict.fromkeys((*positions(op, "sorted_sequence"), *positions(op, "sorter")), among)
    inputs |= dict.fromkeys(positions(op, "self"), names)
    return over(op, [inputs[number] for number in sorted(inputs)], [names], whole={"s": "it is searched as a whole"})


@rule(aten.bucketize.Tensor, aten.isin.Tensor_Tensor, aten.isin.Tensor_Scalar)
def among(op: Op) -> Signature:
    """Each element of the first tensor among all of the second."""
    names = simple_dims(op.inputs[0].shape)
    others = [simple_dims(value.shape, "s") for value in op.inputs[1:]]
    whole = {name: "it is searched as a whole" for other in others for (name,) in other}
    return over(op, [names, *others], [names], whole=whole)


@rule(aten.one_hot.default)
def one_hot(op: Op) -> Signature:
    names = simple_dims(op.inputs[0].shape)
    return over(op, [names], [[*names, ("classes",)]], local=_one_hot)


def _one_hot(call: Call, tensors: Sequence[Tensor]) -> Any:
    """As many classes as the whole tensor has, whatever the largest of this rank's is."""
    return run_named(call, tensors, num_classes=call.shapes[0][-1])


@rule(*overloads("bucketize.Scalar", "isin.Scalar_Tensor", "nonzero_static", "searchsorted.Scalar"))
def searched(op: Op) -> Signature:
    return apart(op, "it is searched as a whole")
