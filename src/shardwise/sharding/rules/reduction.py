"""Sums and means over dims, and operators that need a whole dim at once."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch

from shardwise.capture.graph import Op
from shardwise.sharding.rules.registry import rule
from shardwise.sharding.rules.shape import simple_dims
from shardwise.sharding.signature import Call, Dim, Signature, Split

aten = torch.ops.aten


def reduced(op: Op, dims: Sequence[int], keepdim: bool, **more: Any) -> Signature:
    """The factors of a reduction of `dims`."""
    names = simple_dims(op.inputs[0].shape)
    gone = {dim % len(names) for dim in dims}
    outputs: list[Dim] = [() if dim in gone else name for dim, name in enumerate(names) if keepdim or dim not in gone]
    sizes = {f"d{dim}": size for dim, size in enumerate(op.inputs[0].shape)}
    kept = {f"d{dim}" for dim in range(len(names)) if dim not in gone}
    splits = more.pop("splits", {name: Split() for name in sizes if name in kept})
    return Signature(inputs=(tuple(names),), outputs=tuple(tuple(outputs) for _ in op.outputs), sizes=sizes, splits=splits, **more)


def _dims(op: Op) -> list[int]:
    given = op.argument(1, "dim")
    if op.target in (aten.sum.default, aten.mean.default) or given is None or given == []:
        return list(range(len(op.inputs[0].shape)))
    return list(given) if isinstance(given, (list, tuple)) else [given]


@rule(aten.sum.dim_IntList, aten.sum.default)
def sum_(op: Op) -> Signature:
    """Every dim may be split; those summed away leave summands."""
    splits = {f"d{dim}": Split() for dim in range(len(op.inputs[0].shape))}
    return reduced(op, _dims(op), bool(op.argument(2, "keepdim", False)), splits=splits, linear=(frozenset({0}),))


@rule(aten.mean.dim, aten.mean.default)
def mean(op: Op) -> Signature:
    """A sum divided by the whole tensor's count."""
    splits = {f"d{dim}": Split() for dim in range(len(op.inputs[0].shape))}
    return reduced(op, _dims(op), bool(op.argument(2, "keepdim", False)), splits=splits, linear=(frozenset({0}),), local=_mean)


def _mean(call: Call, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    dims = _dims(call.op)
    count = prod(call.op.inputs[0].shape[dim] for dim in dims)
    local = prod(tensors[0].shape[dim] for dim in dims)
    result: torch.Tensor = call.run(tensors)
    return result if local == count else result * (local / count)


@rule(aten.amax.default, aten.max.dim, aten.argmax.default, aten.argmin.default, aten.var.correction)
def whole_dim(op: Op) -> Signature:
    """The reduced dims stay whole."""
    keepdim = bool(op.argument(2, "keepdim", False))
    return reduced(op, _dims(op), keepdim, reasons={"*": "the reduced dims are compared as a whole"})


@rule(aten.softmax.int, aten.log_softmax.int, aten._softmax.default, aten._log_softmax.default)
def softmax(op: Op) -> Signature:
    """Any dim but the normalised one."""
    names = simple_dims(op.inputs[0].shape)
    dim = op.args[1] % len(names)
    sizes = {f"d{index}": size for index, size in enumerate(op.inputs[0].shape)}
    splits = {name: Split() for name in sizes if name != f"d{dim}"}
    reasons = {f"d{dim}": "it is normalised as a whole"}
    return Signature(inputs=(tuple(names),), outputs=(tuple(names),), sizes=sizes, splits=splits, reasons=reasons)
