"""Normalisation. Layer and RMS norm keep the normalised dims whole; batch norm over a split batch uses the whole batch's statistics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shardwise.capture import operators
from shardwise.capture.graph import Op
from shardwise.sharding.collectives import all_reduce_sum
from shardwise.sharding.rules.registry import rule
from shardwise.sharding.rules.shape import simple_dims
from shardwise.sharding.signature import Call, Signature, Split

aten = torch.ops.aten


@rule(aten.layer_norm.default, aten.rms_norm.default)
def layer_norm(op: Op) -> Signature:
    shape = op.inputs[0].shape
    normalised = len(op.args[1])
    names = simple_dims(shape)
    kept = len(shape) - normalised
    weights = tuple(tuple(names[kept:]) for _ in op.inputs[1:])
    sizes = {f"d{index}": size for index, size in enumerate(shape)}
    splits = {f"d{index}": Split() for index in range(kept)}
    reasons = {f"d{index}": "it is normalised as a whole" for index in range(kept, len(shape))}
    return Signature(inputs=(tuple(names), *weights), outputs=(tuple(names),), sizes=sizes, splits=splits, reasons=reasons)


@rule(aten.group_norm.default)
def group_norm(op: Op) -> Signature:
    """n (g c) … : samples and groups are independent of each other."""
    shape = op.inputs[0].shape
    groups = op.args[1]
    channels = ("g", "c")
    names = [("d0",), channels, *simple_dims(shape)[2:]]
    sizes = {f"d{index}": size for index, size in enumerate(shape) if index != 1} | {"g": groups, "c": shape[1] // groups}
    weights = tuple((channels,) for _ in op.inputs[1:])
    splits = {"d0": Split(), "g": Split(blocked=False)}
    reasons = {name: "it is normalised as a whole" for name in sizes if name not in splits}
    return Signature(
        inputs=(tuple(names), *weights), outputs=(tuple(names),), sizes=sizes, splits=splits, reasons=reasons, local=_group_norm
    )


def _group_norm(call: Call, tensors: Sequence[Tensor]) -> Any:
    groups = call.sizes["g"]
    for split in call.splits.get("g", ()):
        groups = split.part.length
    return call.run(tensors, {1: groups})


@rule(operators.batch_norm)
def batch_norm(op: Op) -> Signature:
    """Channels are independent. Over a split batch or image the statistics are summed over the ranks, in both directions."""
    shape = op.inputs[0].shape
    names = simple_dims(shape)
    names[1] = ("c",)
    sizes = {f"d{index}": size for index, size in enumerate(shape) if index != 1} | {"c": shape[1]}
    vectors = tuple((("c",),) for _ in op.inputs[1:])
    splits = {name: Split(others="I", microbatches=False) for name in sizes if name != "c"} | {"c": Split()}
    return Signature(
        inputs=(tuple(names), *vectors), outputs=(tuple(names), (("c",),), (("c",),)), sizes=sizes, splits=splits, local=_batch_norm
    )


def _batch_norm(call: Call, tensors: Sequence[Tensor]) -> Any:
    groups = [split.group for name, splits in call.splits.items() if name != "c" for split in splits if split.ranks > 1]
    if not groups:
        return call.run(tensors)
    x, weight, bias, running_mean, running_var, momentum, eps = _arguments(call, tensors)
    dims = [dim for dim in range(x.dim()) if dim != 1]
    whole = call.op.inputs[0].shape
    count = call.op.inputs[0].numel // whole[1]
    mean = _sum_over(x.sum(dims), groups) / count
    var = _sum_over(((x - mean.reshape([1, -1] + [1] * (x.dim() - 2))) ** 2).sum(dims), groups) / count
    result = operators.normalise(x, mean, var, weight, bias, eps)
    with torch.no_grad():
        new_mean = running_mean + momentum * (mean - running_mean)
        new_var = running_var + momentum * (var * (count / max(count - 1, 1)) - running_var)
    return result, new_mean, new_var


def _arguments(call: Call, tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    from shardwise.capture.graph import fill

    return tuple(fill(call.op.args, list(tensors)))


def _sum_over(tensor: Tensor, groups: list[str]) -> Tensor:
    """The sum over all ranks, on every rank; its gradient is the sum of theirs."""
    for group in groups:
        tensor = all_reduce_sum(tensor, group)
    return tensor
