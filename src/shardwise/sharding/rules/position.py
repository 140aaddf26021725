"""Operators in which an element's position matters: ends, corners, diagonals, windows. Such dims stay whole, but for what is said here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from shardwise.capture.graph import Op
from shardwise.sharding.rules.build import ALONE, apart, given, over, overloads, run_named, simple_dims, start_of, wrap
from shardwise.sharding.rules.registry import rule
from shardwise.sharding.signature import Call, Dim, Signature, Split

aten = torch.ops.aten


# -- ends --------------------------------------------------------------------------------------------------------------------------------


@rule(*overloads("_pad_circular", "_pad_enum", "constant_pad_nd", "pad", "reflection_pad1d", "reflection_pad2d", "reflection_pad3d"))
@rule(*overloads("replication_pad1d", "replication_pad2d", "replication_pad3d"))
def pad(op: Op) -> Signature:
    """Padded dims stay whole; a sum may be padded with zeros, or with elements of its own."""
    rank = len(op.inputs[0].shape)
    widths = given(op, "padding") or given(op, "pad") or []
    padded = {rank - 1 - index // 2 for index, width in enumerate(widths) if width}
    names = simple_dims(op.inputs[0].shape)
    outputs = [(f"out{dim}",) if dim in padded else name for dim, name in enumerate(names)]
    return over(op, [names], [outputs], whole=_because(padded, "elements are added at its ends"), linear=ALONE if _keeps_sums(op) else ())


_CONSTANT_MODE = 3  # of the padding modes in ATen's PadNd.h


def _keeps_sums(op: Op) -> bool:
    constant = given(op, "mode") in (None, "constant", _CONSTANT_MODE)
    return not constant or given(op, "value") in (None, 0)


def _because(dims: Iterable[int], reason: str) -> dict[str, str]:
    return {f"d{dim}": reason for dim in dims}


@rule(aten.roll.default)
def roll(op: Op) -> Signature:
    """Rolled dims stay whole: all of them when none is named, for then the tensor is rolled as one run."""
    rank = len(op.inputs[0].shape)
    rolled = {wrap(dim, rank) for dim in _listed(given(op, "dims"))} or set(range(rank))
    names = simple_dims(op.inputs[0].shape)
    return over(op, [names], [names], whole=_because(rolled, "elements go over its end"), linear=ALONE)


def _listed(dims: Any) -> list[int]:
    return list(dims) if isinstance(dims, (list, tuple)) else [dims]


@rule(*overloads("flip", "fliplr", "flipud"))
def flip(op: Op) -> Signature:
    names = simple_dims(op.inputs[0].shape)
    dims = {"flipud": [0], "fliplr": [1]}.get(op.name.split(".")[1], given(op, "dims"))
    flipped = {wrap(dim, len(names)) for dim in dims}
    return over(op, [names], [names], whole=_because(flipped, "its elements change places"), linear=ALONE)


@rule(aten.rot90.default)
def rotate(op: Op) -> Signature:
    names = simple_dims(op.inputs[0].shape)
    first, second = (wrap(dim, len(names)) for dim in given(op, "dims"))
    turned = list(names)
    quarters = given(op, "k") % 4
    if quarters % 2:
        turned[first], turned[second] = names[second], names[first]
    return over(op, [names], [turned], whole=_because({first, second}, "the tensor is turned in it") if quarters else {}, linear=ALONE)


# -- corners and diagonals ---------------------------------------------------------------------------------------------------------------


@rule(aten.tril.default, aten.triu.default)
def triangle(op: Op) -> Signature:
    """A rank's part of the rows or columns has the diagonal elsewhere."""
    names = [*simple_dims(op.inputs[0].shape[:-2]), ("row",), ("column",)]
    splits = dict.fromkeys(("row", "column"), Split(blocked=False, microbatches=False))
    return over(op, [names], [names], splits=splits, linear=ALONE, local=_triangle)


def _triangle(call: Call, tensors: Sequence[Tensor]) -> Any:
    shifted = given(call.op, "diagonal") + start_of(call, "row") - start_of(call, "column")
    return run_named(call, tensors, diagonal=shifted)


_OUTSIDE = "an element's two indices are compared"


@rule(*overloads("diagonal", "linalg_diagonal"))
def diagonal(op: Op) -> Signature:
    names, crossed = _crossed(op, len(op.inputs[0].shape))
    kept = [name for dim, name in enumerate(names) if dim not in crossed]
    return over(op, [names], [[*kept, ("out",)]], whole=_because(crossed, _OUTSIDE), linear=ALONE)


@rule(aten.diagonal_scatter.default)
def diagonal_scatter(op: Op) -> Signature:
    names, crossed = _crossed(op, len(op.inputs[0].shape))
    kept = [name for dim, name in enumerate(names) if dim not in crossed]
    whole = _because(crossed, _OUTSIDE) | {"out": _OUTSIDE}
    return over(op, [names, [*kept, ("out",)]], [names], whole=whole, linear=(frozenset({0, 1}),))


@rule(aten.diag_embed.default)
def diag_embed(op: Op) -> Signature:
    names, crossed = _crossed(op, len(op.outputs[0].shape))
    kept = [name for dim, name in enumerate(names) if dim not in crossed]
    return over(op, [[*kept, ("in",)]], [names], whole={"in": _OUTSIDE}, linear=ALONE)


def _crossed(op: Op, rank: int) -> tuple[list[Dim], list[int]]:
    dims = [wrap(given(op, name), rank) for name in ("dim1", "dim2")]
    return [(f"d{dim}",) for dim in range(rank)], dims


@rule(*overloads("combinations", "diag", "diagflat", "trace"))
def laid_out(op: Op) -> Signature:
    return apart(op, "an element's place in the result follows from all its indices", linear=ALONE)


# -- windows -----------------------------------------------------------------------------------------------------------------------------


@rule(aten.unfold.default)
def unfold(op: Op) -> Signature:
    """Windows of a dim, their elements in a new last dim. Windows that tile the dim make it (windows, n)."""
    names = simple_dims(op.inputs[0].shape)
    dim = wrap(given(op, "dimension"), len(names))
    tiled = _tiles(op)
    windows: Dim = ("windows",) if tiled else ("out",)
    outputs = [*names[:dim], windows, *names[dim + 1 :], ("n",)]
    sizes = {"n": given(op, "size")} | ({"windows": op.outputs[0].shape[dim]} if tiled else {})
    names[dim] = ("windows", "n") if tiled else ("in",)
    return over(op, [names], [outputs], sizes=sizes, whole={} if tiled else {"in": "windows overlap"}, linear=ALONE, local=_unfold)


def _tiles(op: Op) -> bool:
    shape = op.inputs[0].shape
    size = given(op, "size")
    return bool(shape) and size > 0 and size == given(op, "step") and shape[wrap(given(op, "dimension"), len(shape))] % size == 0


def _unfold(call: Call, tensors: Sequence[Tensor]) -> Any:
    if not _tiles(call.op):
        return call.run(tensors)
    dim = wrap(given(call.op, "dimension"), len(call.op.inputs[0].shape))
    return tensors[0].unflatten(dim, (call.shapes[0][dim], call.shapes[0][-1])).movedim(dim + 1, -1)


@rule(aten.im2col.default)
def im2col(op: Op) -> Signature:
    """n c h w -> n (c k) l: windows of an image, each a column."""
    return _columns(op, op.inputs[0].shape, op.outputs[0].shape, back=False)


@rule(aten.col2im.default)
def col2im(op: Op) -> Signature:
    return _columns(op, op.outputs[0].shape, op.inputs[0].shape, back=True)


def _columns(op: Op, image: Sequence[int], columns: Sequence[int], *, back: bool) -> Signature:
    batch: list[Dim] = simple_dims(image[:-3])
    whole: list[Dim] = [*batch, ("c",), ("h",), ("w",)]
    cut: list[Dim] = [*batch, ("c", "k"), ("l",)]
    sizes = {"c": image[-3], "k": columns[-2] // image[-3]}
    reasons = dict.fromkeys(("h", "w", "k", "l"), "windows overlap")
    return over(op, [cut if back else whole], [whole if back else cut], sizes=sizes, whole=reasons, linear=ALONE)
