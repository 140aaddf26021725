"""Look-ups by index tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from shardwise.capture.graph import Op, Slot
from shardwise.sharding.rules.registry import rule
from shardwise.sharding.rules.shape import simple_dims
from shardwise.sharding.signature import Call, Dim, Signature, Split

aten = torch.ops.aten


@rule(aten.gather.default)
def gather(op: Op) -> Signature:
    """Dims other than the gathered one, where source and index have the same size; along that one, the index alone."""
    source, index = (value.shape for value in op.inputs)
    dim = op.args[1] % len(source)
    names = simple_dims(index)
    left: list[Dim] = [(f"s{d}",) if d == dim or source[d] != index[d] else names[d] for d in range(len(source))]
    sizes = {f"d{d}": size for d, size in enumerate(index)} | {f"s{d}": size for d, size in enumerate(source)}
    splits = {f"d{d}": Split() for d in range(len(index)) if left[d] == names[d]} | {f"d{dim}": Split()}
    reasons = {name: "the index covers only the first of the source's rows" for d in range(len(index)) for name in (f"s{d}", f"d{d}")}
    reasons |= {f"s{dim}": "any element of it may be asked for"}
    return Signature(
        inputs=(tuple(left), tuple(names)),
        outputs=(tuple(names),),
        sizes=sizes,
        splits=splits,
        linear=(frozenset({0}),),
        reasons={name: reason for name, reason in reasons.items() if name not in splits},
    )


@rule(aten.index.Tensor)
def index_tensor(op: Op) -> Signature:
    """x[i, :, j, …]: the dims r… of the broadcast index tensors stand where they are indexed, or first when indexed dims are not adjacent.

    An index that counts 0, 1, …, n−1 along one dim of the result picks each sample's own row (transformers' mask functions do so for the
    batch): that dim of the result and the indexed dim are then one factor, and each rank counts from its own first row.
    """
    slots = op.args[1]
    source = op.inputs[0].shape
    indexed = [dim for dim, slot in enumerate(slots) if isinstance(slot, Slot)]
    broadcast = torch.broadcast_shapes(*(op.inputs[slots[dim].index].shape for dim in indexed))
    names: list[Dim] = [(f"r{d}",) for d in range(len(broadcast))]
    left: list[Dim] = [(f"s{d}",) if d in indexed else (f"d{d}",) for d in range(len(source))]
    sizes = {f"r{d}": size for d, size in enumerate(broadcast)} | {left[d][0]: size for d, size in enumerate(source)}
    splits = {name[0]: Split() for name in [*names, *left] if not name[0].startswith("s")}
    reasons = {f"s{d}": "any row may be asked for" for d in indexed}
    rows = list(left)
    inputs: dict[int, tuple[Dim, ...]] = {}
    for dim in indexed:
        value = op.inputs[slots[dim].index]
        shift = len(broadcast) - len(value.shape)
        inputs[slots[dim].index] = tuple(
            () if size == 1 and broadcast[d + shift] != 1 else names[d + shift] for d, size in enumerate(value.shape)
        )
        if (along := counts_along(value, source[dim])) is not None:
            rows[dim] = names[along + shift]
            splits[names[along + shift][0]] = Split(blocked=False)
    return Signature(
        inputs=(tuple(rows), *(inputs[number] for number in sorted(inputs))),
        outputs=(tuple(_result(left, names, indexed)),),
        sizes=sizes,
        splits=splits,
        linear=(frozenset({0}),),
        local=_index,
        reasons=reasons,
    )


def _result(source: list[Dim], names: list[Dim], indexed: list[int]) -> list[Dim]:
    first = indexed[0] if indexed == list(range(indexed[0], indexed[-1] + 1)) else 0
    kept = [name for dim, name in enumerate(source) if dim not in indexed]
    return [*kept[:first], *names, *kept[first:]]


def counts_along(value: Any, size: int) -> int | None:
    """The dim along which this index tensor is arange(size), if it is that: made by arange and only unsqueezed since."""
    shape = value.shape
    while value.producer is not None and value.producer.target is aten.unsqueeze.default:
        value = value.producer.inputs[0]
    made = value.producer
    counts = made is not None and made.target is aten.arange.default and made.args[0] == size and size > 1
    return next(d for d, each in enumerate(shape) if each == size) if counts else None


def _index(call: Call, tensors: Sequence[torch.Tensor]) -> Any:
    """Index tensors that count with a split factor count from this rank's first row."""
    op = call.op
    shifted = list(tensors)
    slots = {dim: slot for dim, slot in enumerate(op.args[1]) if isinstance(slot, Slot)}
    dims = len(torch.broadcast_shapes(*(op.inputs[slot.index].shape for slot in slots.values())))
    for dim, slot in slots.items():
        value = op.inputs[slot.index]
        along = counts_along(value, op.inputs[0].shape[dim])
        if along is not None and call.splits.get(f"r{along + dims - len(value.shape)}"):
            count = torch.arange(tensors[0].shape[dim], device=tensors[0].device)
            shifted[slot.index] = count.reshape([-1 if d == along else 1 for d in range(len(value.shape))])
    return call.run(shifted)
