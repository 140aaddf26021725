"""One tensor cut into several along a dim, several put together, a piece taken out or put in.

Pieces of equal length make the dim (pieces, n): n may be split inside each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shardwise.capture.graph import Op
from shardwise.sharding.rules.build import ALONE, apart, given, over, overloads, simple_dims, wrap
from shardwise.sharding.rules.registry import rule
from shardwise.sharding.signature import Call, Dim, Dims, Signature

aten = torch.ops.aten

_OTHER_INDICES = "a slice takes other indices than the ranks hold"


# -- slices ------------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Slice:
    """`dim` read as (outer, inner), of which index `index` of one is taken; or, with outer == 0, elements that have no such pattern."""

    dim: int
    outer: int = 0
    inner: int = 0
    index: int = 0
    strided: bool = False  # index is of the inner one: every `inner`-th element

    @property
    def names(self) -> Dim:
        if not self.outer:
            return ("in",)
        return ("n", "step") if self.strided else ("pieces", "n")

    @property
    def sizes(self) -> dict[str, int]:
        return dict(zip(self.names, (self.outer, self.inner), strict=True)) if self.outer else {}

    def taken(self, x: Tensor) -> Tensor:
        """The slice of this rank's part."""
        return self._opened(x).select(self.dim + self.strided, self.index)

    def put(self, x: Tensor, source: Tensor) -> Tensor:
        """This rank's part with the slice replaced."""
        return self._opened(x).select_scatter(source, self.dim + self.strided, self.index).flatten(self.dim, self.dim + 1)

    def _opened(self, x: Tensor) -> Tensor:
        return x.unflatten(self.dim, (-1, self.inner) if self.strided else (self.outer, -1))


def _slice(op: Op) -> _Slice:
    """The call's slice: a whole piece of several equal ones, every k-th element from one of the first k on, or something else."""
    shape = op.inputs[0].shape
    dim = wrap(given(op, "dim"), len(shape))
    if op.name.startswith("aten.narrow"):
        start, length = given(op, "start"), given(op, "length")
        chosen, step = range(shape[dim])[start:][:length], 1
    else:
        step = given(op, "step")
        chosen = range(shape[dim])[slice(given(op, "start"), given(op, "end"), step)]
    size, n = shape[dim], len(chosen)
    if not n:
        return _Slice(dim=dim)
    if step == 1 and size % n == 0 and chosen.start % n == 0:
        return _Slice(dim=dim, outer=size // n, inner=n, index=chosen.start // n)
    if size % step == 0 and chosen.start < step and n == size // step:
        return _Slice(dim=dim, outer=n, inner=step, index=chosen.start, strided=True)
    return _Slice(dim=dim)


def _slice_dims(op: Op, found: _Slice) -> tuple[list[Dim], list[Dim], dict[str, str]]:
    """Of the whole and of the slice; what stays whole and why."""
    names = simple_dims(op.inputs[0].shape)
    whole = [*names[: found.dim], found.names, *names[found.dim + 1 :]]
    taken = [*names[: found.dim], ("n",) if found.outer else ("out",), *names[found.dim + 1 :]]
    reasons = {name: "one piece of several is taken" for name in found.names if name != "n"}
    return whole, taken, reasons if found.outer else dict.fromkeys(("in", "out"), _OTHER_INDICES)


@rule(aten.slice.Tensor, aten.narrow.default)
def slice_(op: Op) -> Signature:
    found = _slice(op)
    whole, taken, reasons = _slice_dims(op, found)
    return over(op, [whole], [taken], sizes=found.sizes, whole=reasons, linear=ALONE, local=_take)


def _take(call: Call, tensors: Sequence[Tensor]) -> Any:
    found = _slice(call.op)
    return found.taken(tensors[0]) if found.outer else call.run(tensors)


@rule(aten.slice_scatter.default)
def slice_scatter(op: Op) -> Signature:
    found = _slice(op)
    whole, taken, reasons = _slice_dims(op, found)
    return over(op, [whole, taken], [whole], sizes=found.sizes, whole=reasons, linear=(frozenset({0, 1}),), local=_put)


def _put(call: Call, tensors: Sequence[Tensor]) -> Any:
    found = _slice(call.op)
    return found.put(*tensors) if found.outer else call.run(tensors)


@rule(aten.select.int)
def select(op: Op) -> Signature:
    names, dim, reason = _selected(op)
    return over(op, [names], [[*names[:dim], *names[dim + 1 :]]], whole=reason, linear=ALONE)


@rule(aten.select_scatter.default)
def select_scatter(op: Op) -> Signature:
    names, dim, reason = _selected(op)
    return over(op, [names, [*names[:dim], *names[dim + 1 :]]], [names], whole=reason, linear=(frozenset({0, 1}),))


def _selected(op: Op) -> tuple[list[Dim], int, dict[str, str]]:
    names = simple_dims(op.inputs[0].shape)
    dim = wrap(given(op, "dim"), len(names))
    return names, dim, {f"d{dim}": "one index of it is selected"}


# -- one into several --------------------------------------------------------------------------------------------------------------------


@rule(*overloads("chunk", "dsplit", "hsplit", "split", "split_with_sizes", "tensor_split.indices", "tensor_split.sections"))
@rule(*overloads("unsafe_chunk", "unsafe_split", "unsafe_split_with_sizes", "vsplit"))
def split(op: Op) -> Signature:
    dim = _split_dim(op)
    names = simple_dims(op.inputs[0].shape)
    lengths = [value.shape[dim] for value in op.outputs]
    inner, joined, sizes, reasons = _pieces(lengths, "each piece is a result of its own")
    outputs = [[*names[:dim], name, *names[dim + 1 :]] for name in inner]
    names[dim] = joined
    return over(op, [names], outputs, sizes=sizes, whole=reasons, linear=ALONE, local=_split)


def _pieces(lengths: Sequence[int], reason: str) -> tuple[list[Dim], Dim, dict[str, int], dict[str, str]]:
    """Of pieces of these lengths: each one's factor, the joined dim's factors, sizes, what stays whole and why."""
    if len(set(lengths)) == 1:
        return [("n",)] * len(lengths), ("pieces", "n"), {"pieces": len(lengths), "n": lengths[0]}, {"pieces": reason}
    inner: list[Dim] = [(f"n{number}",) for number in range(len(lengths))]
    reasons = {name[0]: "the pieces have unequal lengths" for name in [*inner, ("whole",)]}
    return inner, ("whole",), {"whole": sum(lengths)}, reasons


def _split_dim(op: Op) -> int:
    rank = len(op.inputs[0].shape)
    fixed = {"hsplit": min(1, rank - 1), "vsplit": 0, "dsplit": 2}.get(op.name.split(".")[1])
    return wrap(given(op, "dim"), rank) if fixed is None else fixed


def _split(call: Call, tensors: Sequence[Tensor]) -> Any:
    dim = _split_dim(call.op)
    return tensors[0].split([shape[dim] for shape in call.shapes], dim)


@rule(aten.unbind.int)
def unbind(op: Op) -> Signature:
    names = simple_dims(op.inputs[0].shape)
    dim = wrap(given(op, "dim"), len(names))
    left = [*names[:dim], *names[dim + 1 :]]
    return over(op, [names], [left for _ in op.outputs], whole={f"d{dim}": "each index is a result of its own"}, linear=ALONE)


# -- several into one --------------------------------------------------------------------------------------------------------------------


@rule(*overloads("cat", "column_stack", "concat", "concatenate", "dstack", "hstack", "row_stack", "stack", "vstack"))
def join(op: Op) -> Signature:
    out = op.outputs[0].shape
    names = simple_dims(out)
    filled = [number for number, value in enumerate(op.inputs) if value.shape != (0,)]
    if len(filled) < len(op.inputs) and len(out) > 1:  # cat takes such inputs beside those of more dims
        return apart(op, "one of the inputs has no elements", linear=(frozenset(filled),))
    seats = [_seats(op, len(value.shape)) for value in op.inputs]
    dim = _join_dim(op)
    lengths = [dict(zip(seat, value.shape, strict=True)).get(dim, 1) for seat, value in zip(seats, op.inputs, strict=True)]
    inner, joined, sizes, reasons = _pieces(lengths, "each piece is an input of its own")
    inputs = [[piece if place == dim else names[place] for place in seat] for seat, piece in zip(seats, inner, strict=True)]
    names[dim] = joined
    return over(op, inputs, [names], sizes=sizes, whole=reasons, linear=(frozenset(range(len(op.inputs))),))


def _join_dim(op: Op) -> int:
    rank = len(op.outputs[0].shape)
    fixed = {"hstack": min(1, rank - 1), "vstack": 0, "row_stack": 0, "dstack": 2, "column_stack": 1}.get(op.name.split(".")[1])
    return wrap(given(op, "dim"), rank) if fixed is None else fixed


def _seats(op: Op, rank: int) -> list[int]:
    """Which dim of the result each dim of an input of `rank` dims becomes."""
    kind, dim = op.name.split(".")[1], _join_dim(op)
    if kind == "stack":
        return [place for place in range(rank + 1) if place != dim]
    if rank == 1 and kind in ("vstack", "row_stack", "dstack"):
        return [1]
    return list(range(rank))


@rule(aten.block_diag.default, aten.cartesian_prod.default)
def laid_out(op: Op) -> Signature:
    return apart(op, "each input has its own place in the result", linear=(frozenset(range(len(op.inputs))),))


@rule(*overloads("meshgrid"))
def meshgrid(op: Op) -> Signature:
    """Each vector along its own dim, repeated along the others; "xy" swaps the first two dims."""
    names: list[Dim] = [(f"d{number}",) for number in range(len(op.inputs))]
    inputs: list[Dims] = [(name,) if value.shape else () for name, value in zip(names, op.inputs, strict=True)]
    out: list[Dim] = [name if value.shape else () for name, value in zip(names, op.inputs, strict=True)]
    if given(op, "indexing") == "xy" and len(out) > 1:
        out[:2] = out[1::-1]
    return over(op, inputs, [out for _ in op.outputs], linear=(frozenset(range(len(op.inputs))),))
