"""What rules are made of: operators by name, arguments by name, signatures from named dims."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from shardwise.capture.graph import Op, Slot
from shardwise.sharding.reshard import Axis, Reshard, reshard
from shardwise.sharding.signature import AxisSplit, Call, Dim, Dims, Signature, Split
from shardwise.sharding.types import I, Placement, Shard

__all__ = [
    "ALONE",
    "broadcast",
    "every",
    "from_ranks",
    "given",
    "over",
    "overloads",
    "positions",
    "run_named",
    "simple_dims",
    "start_of",
    "wrap",
]

ALONE = (frozenset({0}),)  # linear in the first tensor alone


def overloads(*names: str) -> list[Any]:
    """Every functional form of these ATen operators that reads and makes tensors: `add` gives add.Tensor and add.Scalar.

    A name with a dot is one form.
    """
    return [form for name in names for form in _forms(name)]


def _forms(name: str) -> Iterator[Any]:
    packet, _, form = name.partition(".")
    found = getattr(torch.ops.aten, packet)
    yield from (getattr(found, each) for each in ([form] if form else found.overloads()) if form or _of_tensors(getattr(found, each)))


def _of_tensors(form: Any) -> bool:
    schema = form._schema
    reads = any("Tensor" in str(argument.type) for argument in schema.arguments)
    makes = bool(schema.returns) and all("Tensor" in str(result.type) for result in schema.returns)
    return reads and makes and not schema.is_mutable and "Dimname" not in str(schema)


def given(op: Op, name: str) -> Any:
    """The argument of this name, however it was passed, or the operator's own default; None when it has no such argument."""
    for index, argument in enumerate(op.target._schema.arguments):  # type: ignore[attr-defined]
        if argument.name == name:
            default = argument.default_value if argument.has_default_value() else None
            return op.argument(index, name, default)
    return None


def run_named(call: Call, tensors: Sequence[Tensor], **constants: Any) -> Any:
    """The operator on local tensors with the named constants exchanged, wherever they were passed."""
    names = [argument.name for argument in call.op.target._schema.arguments]  # type: ignore[attr-defined]
    placed = {names.index(name): value for name, value in constants.items() if names.index(name) < len(call.op.args)}
    return call.run(tensors, placed, **{name: value for name, value in constants.items() if names.index(name) not in placed})


def positions(op: Op, name: str) -> list[int]:
    """Which of the op's tensor inputs this argument holds: none, one, or those of a list."""
    found = given(op, name)
    each = found if isinstance(found, (list, tuple)) else [found]
    return [slot.index for slot in each if isinstance(slot, Slot)]


def wrap(dim: int, rank: int) -> int:
    """A dim counted from the front; a number's only dim is 0."""
    return dim % max(rank, 1)


def every(dims: Any, rank: int) -> list[int]:
    """A dim, a list of them, or None and [] for all of them, counted from the front."""
    listed = list(dims) if isinstance(dims, (list, tuple)) else [] if dims is None else [dims]
    return [wrap(dim, rank) for dim in listed] if listed else list(range(rank))


def simple_dims(shape: Sequence[int], prefix: str = "d") -> list[Dim]:
    """One factor for each dim."""
    return [(f"{prefix}{index}",) for index in range(len(shape))]


def broadcast(shape: Sequence[int], names: Sequence[Dim], out: Sequence[int]) -> Dims:
    """What an input of `shape` holds of a result `out` whose dims are `names`; () where it is broadcast."""
    shift = len(out) - len(shape)
    return tuple(names[dim + shift] if size == out[dim + shift] else () for dim, size in enumerate(shape))


def over(
    op: Op,
    inputs: Sequence[Sequence[Dim]],
    outputs: Sequence[Sequence[Dim]],
    *,
    whole: Mapping[str, str] | None = None,
    splits: Mapping[str, Split] | None = None,
    sizes: Mapping[str, int] | None = None,
    **more: Any,
) -> Signature:
    """A signature whose factors are split wherever inputs and outputs share them.

    whole: factors that stay whole → why; splits: how others are split, those of one side only among them;
    sizes: of factors that never stand alone in a dim. Every other keyword is Signature's.
    """
    whole, splits, sizes = whole or {}, splits or {}, dict(sizes or {})
    for tensor, value in zip((*inputs, *outputs), (*op.inputs, *op.outputs), strict=True):
        alone = {dim[0]: size for dim, size in zip(tensor, value.shape, strict=True) if len(dim) == 1}
        for name, size in alone.items():
            assert sizes.setdefault(name, size) == size, f"{op.name}: {name} is both {sizes[name]} and {size}"
    shared = _names(inputs) & _names(outputs)
    chosen = {name: splits.get(name, Split()) for name in sizes if (name in shared or name in splits) and name not in whole}
    read, made = (tuple(tuple(dim for dim in tensor) for tensor in side) for side in (inputs, outputs))
    return Signature(inputs=read, outputs=made, sizes=sizes, splits=chosen, reasons=whole, **more)


def apart(op: Op, reason: str, **more: Any) -> Signature:
    """Nothing is split: each dim of each tensor is a factor of its own."""
    inputs = [simple_dims(value.shape, f"in{number}.") for number, value in enumerate(op.inputs)]
    outputs = [simple_dims(value.shape, f"out{number}.") for number, value in enumerate(op.outputs)]
    return over(op, inputs, outputs, whole={"*": reason}, **more)


def _names(tensors: Iterable[Sequence[Dim]]) -> set[str]:
    return {name for tensor in tensors for dim in tensor for name in dim}


# -- for local code ----------------------------------------------------------------------------------------------------------------------


def start_of(call: Call, factor: str) -> int:
    """Where this rank's range of the factor (not in blocks) begins in the whole."""
    return sum(split.part.start for split in call.splits.get(factor, ()))


def from_ranks(x: Tensor, split: AxisSplit, target: Placement = I) -> Tensor:
    """Every rank's x, stacked along a new first dim, on every rank; the gradient of each goes back to its rank.

    target: I where all ranks compute the same with the stack, R where each has a use of its own.
    """
    assert split.rank is not None, "microbatches cannot exchange values"
    axis = Axis(name=split.axis, group=split.group, ranks=split.ranks, rank=split.rank)
    return reshard(x.unsqueeze(0), Reshard(source=Shard(0), target=target, axis=axis, source_size=split.ranks))
