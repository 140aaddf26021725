"""Masks of attention that depend on neither the batch nor the weights: said in attention's own arguments, where that can be.

    hides nothing                           no mask
    hides from each query all later keys    is_causal

Kernels are faster for it (a causal one computes half), no mask is kept, and attention in a ring may use the fused kernel. While a model is
exported its code cannot ask what a mask holds, so masks stand in graphs of which the model's own eager code would have made none.

Models make such masks by comparing counted positions along rows with those along columns. An operator's result is known as

    a tensor     computed, where it is small: positions, segments, small masks
    All          of truth values, all true, of any size
    Causal       [..., n, n], n > 1: each row true up to its own column
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum, auto

import torch
from torch import Tensor

from shardwise.capture import operators
from shardwise.capture.graph import Op, Slot, Value, call, operator_name
from shardwise.capture.keyed import is_random
from shardwise.capture.opaque import Opaque

__all__ = ["without_masks"]

aten = torch.ops.aten
_ATTENTION = (aten.scaled_dot_product_attention.default, operators.dropped_attention)
_MASK, _CAUSAL = 3, 5  # places among the arguments of both
_SMALL = 2**20  # elements of a tensor that is computed


class _Known(Enum):
    ALL = auto()
    CAUSAL = auto()


_Found = Tensor | _Known | None
_AND = ("__and__", "bitwise_and", "logical_and")
_KEPT = ("alias", "clone", "expand", "reshape", "unsqueeze", "view")  # an operator of these keeps what the last two dims hold
_SEES = {"le": operator.le, "lt": operator.lt}  # a column's position, a row's
_MIRRORED = {"ge": "le", "gt": "lt"}
_COMPARISONS = ("eq", *_SEES, *_MIRRORED)


def without_masks(ops: Sequence[Op], constants: Mapping[str, Tensor], small: int = _SMALL) -> list[Op]:
    """The operators, attention without the masks that it need not be given; what made those is left in. constants: buffers whose values
    are part of the model's code. small: elements of a tensor that may be computed."""
    known = _Constants(constants=constants, small=small)
    return [_without_mask(op, known) if op.target in _ATTENTION else op for op in ops]


def _without_mask(op: Op, known: _Constants) -> Op:
    mask = op.argument(_MASK, "attn_mask")
    if not isinstance(mask, Slot) or op.argument(_CAUSAL, "is_causal", False):
        return op
    value = op.inputs[mask.index]
    hides = _mask_of(known.of(value), value)
    queries, keys = (each.shape[-2] for each in op.inputs[:2])
    if hides is None or (hides is _Known.CAUSAL and (queries != keys or value.shape[-2:] != (queries, keys))):
        return op
    places: list[Slot | None] = [Slot(index - (index > mask.index)) for index in range(len(op.inputs))]
    places[mask.index] = None
    args = [places[each.index] if isinstance(each, Slot) else each for each in op.args]
    args += [None, 0.0, False][len(args) - _MASK :] if len(args) <= _CAUSAL else []
    args[_MASK], args[_CAUSAL] = None, hides is _Known.CAUSAL
    kwargs = {name: each for name, each in op.kwargs.items() if name not in ("attn_mask", "dropout_p", "is_causal")}
    inputs = tuple(each for index, each in enumerate(op.inputs) if index != mask.index)
    made = replace(op, args=tuple(args), kwargs=kwargs, inputs=inputs)
    for each in op.outputs:
        each.producer = made
    return made


def _mask_of(found: _Found, value: Value) -> _Known | None:
    """What a mask is, if one of the two. Scores to which so little is added that it is as good as minus infinity are hidden."""
    if not isinstance(found, Tensor):
        return found
    if found.is_floating_point():
        if not bool(((found == 0) | (found <= torch.finfo(found.dtype).min)).all()):
            return None
        found = found == 0
    if found.dtype != torch.bool:
        return None
    if bool(found.all()):
        return _Known.ALL
    rows, columns = value.shape[-2:] if len(value.shape) > 1 else (1, 1)
    causal = rows == columns > 1 and bool((found == torch.ones(rows, columns, dtype=torch.bool).tril()).all())
    return _Known.CAUSAL if causal else None


@dataclass(kw_only=True)
class _Constants:
    """What is known of values that depend on constants alone."""

    constants: Mapping[str, Tensor]
    small: int
    found: dict[Value, _Found] = field(default_factory=dict)

    def of(self, wanted: Value) -> _Found:
        """Of one, and of what it is made of, the first made first."""
        waiting = [wanted]
        while waiting:
            value = waiting[-1]
            op = value.producer
            if value in self.found:
                waiting.pop()
            elif op is None or value.requires_grad or len(op.outputs) > 1 or is_random(op.target) or isinstance(op.target, Opaque):
                self.found[value] = self._source(value)
            elif missing := [each for each in op.inputs if each not in self.found]:
                waiting += missing
            else:
                self.found[value] = self._made(op, [self.found[each] for each in op.inputs], value)
        return self.found[wanted]

    def _source(self, value: Value) -> _Found:
        found = self.constants.get(value.name) if value.kind == "buffer" else None
        return found if found is None or (found.device.type == "cpu" and found.numel() <= self.small) else None

    def _made(self, op: Op, given: list[_Found], value: Value) -> _Found:
        name = operator_name(op.target).split(".")[1]
        tensors = [each for each in given if isinstance(each, Tensor)]
        if len(tensors) == len(given) and value.numel <= self.small:
            (result,) = call(op, tensors)
            return result
        if name in _AND and len(given) == 2 and value.dtype == torch.bool:
            return _both(*(_whole(each) for each in given))
        if name in _COMPARISONS and len(tensors) == len(given):
            left, right = (tensors[each.index] if isinstance(each, Slot) else torch.as_tensor(each) for each in op.args[:2])
            return _compared(name, left, right, value.shape)
        if name in _KEPT and len(given) == 1 and isinstance(op.args[0], Slot):
            return _kept(_whole(given[0]), op.inputs[0], value)
        return None


def _whole(found: _Found) -> _Known | None:
    """Of a tensor whether all is true; it is too small to be a causal mask of what is large."""
    if isinstance(found, Tensor):
        return _Known.ALL if found.dtype == torch.bool and bool(found.all()) else None
    return found


def _both(one: _Known | None, other: _Known | None) -> _Known | None:
    if one is None or other is None:
        return None
    return other if one is _Known.ALL else one


def _kept(found: _Known | None, source: Value, value: Value) -> _Known | None:
    """Of a value of the same elements, or of these again and again along further dims."""
    return None if found is _Known.CAUSAL and source.shape[-2:] != value.shape[-2:] else found


def _compared(name: str, left: Tensor, right: Tensor, shape: Sequence[int]) -> _Known | None:
    """A comparison too large to be computed, of results that are broadcast."""
    if not left.numel() or not right.numel():
        return None
    if name == "eq":
        return _Known.ALL if bool((left == left.flatten()[0]).all() & (right == left.flatten()[0]).all()) else None
    if name in _MIRRORED:
        left, right, name = right, left, _MIRRORED[name]
    if bool(_SEES[name](left.max(), right.min())):
        return _Known.ALL
    if len(shape) < 2 or shape[-1] != shape[-2] or shape[-1] < 2:
        return None
    columns, rows = _along(left, -1), _along(right, -2)
    if columns is None or rows is None or len(columns) != shape[-1] or len(rows) != shape[-2]:
        return None
    return _Known.CAUSAL if _each_up_to_its_own(columns, rows, _SEES[name]) else None


def _along(x: Tensor, dim: int) -> Tensor | None:
    """The elements along one dim, where all others have equal ones."""
    if x.dim() < -dim:
        return None
    lines = x.movedim(dim, -1).flatten(0, -2) if x.dim() > 1 else x[None]
    return lines[0] if bool((lines == lines[0]).all()) else None


def _each_up_to_its_own(columns: Tensor, rows: Tensor, sees: Callable[[Tensor, Tensor], Tensor]) -> bool:
    """Whether row i sees the columns 0 to i: columns do not fall, it sees column i, and not column i + 1."""
    grows, own, next_one = columns[1:] >= columns[:-1], sees(columns, rows), sees(columns[1:], rows[:-1])
    return bool(grows.all() & own.all() & next_one.logical_not().all())
