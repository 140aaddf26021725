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
    """Dims other than the gathered one, where source and index have the same size."""
    source, index = (value.shape for value in op.inputs)
    dim = op.args[1] % len(source)
    names = simple_dims(index)
    left: list[Dim] = [(f"s{d}",) if d == dim or source[d] != index[d] else names[d] for d in range(len(source))]
    sizes = {f"d{d}": size for d, size in enumerate(index)} | {f"s{d}": size for d, size in enumerate(source)}
    splits = {f"d{d}": Split() for d in range(len(index)) if left[d] == names[d]} | {f"d{dim}": Split()}
    return Signature(inputs=(tuple(left), tuple(names)), outputs=(tuple(names),), sizes=sizes, splits=splits, linear=(frozenset({0}),))


@rule(aten.index.Tensor)
def index_tensor(op: Op) -> Signature:
    """x[i, j, …] with index tensors at adjacent dims from the first.

    An index that counts 0, 1, …, n−1 along one dim of the result picks each sample's own row (transformers' mask functions do so for the
    batch): that dim of the result and the indexed dim are then one factor, and each rank counts from its own first row.
    """
    slots = op.args[1]
    source, out = op.inputs[0].shape, op.outputs[0].shape
    indexed = [dim for dim, slot in enumerate(slots) if isinstance(slot, Slot)]
    assert indexed == list(range(len(indexed))), f"{op.name} in {op.module}: indices must stand at the first dims"
    broadcast = torch.broadcast_shapes(*(op.inputs[slots[dim].index].shape for dim in indexed))
    names = [(f"r{d}",) for d in range(len(broadcast))]
    rest = [(f"d{d}",) for d in range(len(indexed), len(source))]
    sizes = {f"r{d}": size for d, size in enumerate(broadcast)} | {f"d{d}": source[d] for d in range(len(indexed), len(source))}
    left: list[Dim] = [(f"s{d}",) for d in indexed]
    sizes |= {f"s{d}": source[d] for d in indexed}
    inputs: dict[int, tuple[Dim, ...]] = {}
    splits = {name[0]: Split() for name in [*names, *rest]}
    for dim in indexed:
        value = op.inputs[slots[dim].index]
        shift = len(broadcast) - len(value.shape)
        inputs[slots[dim].index] = tuple(() if size == 1 and broadcast[d + shift] != 1 else names[d + shift] for d, size in enumerate(value.shape))
        if (along := counts_along(value, source[dim])) is not None:
            left[dim] = names[along + shift]
            splits[names[along + shift][0]] = Split(blocked=False, microbatches=True)
    ordered = tuple(inputs[number] for number in sorted(inputs))
    return Signature(
        inputs=((*left, *rest), *ordered), outputs=((*names, *rest),), sizes=sizes, splits=splits, linear=(frozenset({0}),), local=_index,
        reasons={f"s{d}": "any row may be asked for" for d in indexed},
    )  # fmt: skip


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
    for dim, slot in enumerate(op.args[1]):
        along = counts_along(op.inputs[slot.index], op.inputs[0].shape[dim])
        if along is None:
            continue
        shape = op.inputs[slot.index].shape
        factor = f"r{along + len(op.outputs[0].shape) - len(op.inputs[0].shape) + len(op.args[1]) - len(shape)}"
        if call.splits.get(factor):
            local = tensors[0].shape[dim]
            view = [1] * len(shape)
            view[along] = local
            shifted[slot.index] = torch.arange(local, device=tensors[0].device).reshape(view)
    return call.run(shifted)
