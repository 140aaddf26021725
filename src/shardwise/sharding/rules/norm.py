"""Normalisation. Layer and RMS norm keep the normalised dims whole; batch norm over a split batch uses the whole batch's statistics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from shardwise.capture import operators
from shardwise.capture.graph import Op, Slot
from shardwise.sharding.collectives import all_reduce_sum
from shardwise.sharding.rules.registry import rule
from shardwise.sharding.rules.shape import simple_dims
from shardwise.sharding.signature import Call, Signature, Split

aten = torch.ops.aten


_WHOLE = "it is normalised as a whole"


@rule(
    aten.layer_norm.default,
    aten.rms_norm.default,
    aten.native_layer_norm.default,
    aten._fused_rms_norm.default,
)
def layer_norm(op: Op) -> Signature:
    """The last dims are normalised as a whole, the others are independent; further results are statistics of each."""
    shape = op.inputs[0].shape
    names = simple_dims(shape)
    kept = len(shape) - len(op.args[1])
    weights = tuple(tuple(names[kept:]) for _ in op.inputs[1:])
    sizes = {f"d{index}": size for index, size in enumerate(shape)}
    splits = {f"d{index}": Split() for index in range(kept)}
    reasons = {f"d{index}": _WHOLE for index in range(kept, len(shape))}
    statistics = (*names[:kept], *(() for _ in names[kept:]))
    outputs = (tuple(names), *(statistics for _ in op.outputs[1:]))
    return Signature(inputs=(tuple(names), *weights), outputs=outputs, sizes=sizes, splits=splits, reasons=reasons)


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
    reasons = {name: _WHOLE for name in sizes if name not in splits}
    return Signature(
        inputs=(tuple(names), *weights), outputs=(tuple(names),), sizes=sizes, splits=splits, reasons=reasons, local=_group_norm
    )


def _group_norm(call: Call, tensors: Sequence[Tensor]) -> Any:
    """Contiguous: for a batch of one torch takes some other orders of memory for channels-last, its kernel does not."""
    groups = call.sizes["g"]
    for split in call.splits.get("g", ()):
        groups = split.part.length
    return call.run([tensors[0].contiguous(), *tensors[1:]], {1: groups})


@rule(aten.instance_norm.default)
def instance_norm(op: Op) -> Signature:
    """n c …, c -> n c …: the image of each channel of each sample by itself."""
    found = _channelwise(op, Split())
    image = [name for name in found.sizes if name not in ("c", "d0")]
    splits = {name: split for name, split in found.splits.items() if name not in image}
    return replace(found, splits=splits, reasons=dict.fromkeys(image, _WHOLE))


@rule(operators.instance_norm)
def instance_norm_with_statistics(op: Op) -> Signature:
    """As without; over split samples the running statistics are summed over the ranks."""
    found = instance_norm(op)
    return replace(found, splits={**found.splits, "d0": Split(others="I", microbatches=False)}, local=_instance_norm)


def _instance_norm(call: Call, tensors: Sequence[Tensor]) -> Any:
    groups = [split.group for split in call.splits.get("d0", ()) if split.ranks > 1]
    if not groups:
        return call.run(tensors)
    x, weight, bias, running_mean, running_var, momentum, eps = _arguments(call, tensors)
    with torch.no_grad():
        samples = call.op.inputs[0].shape[0]
        mean, var = (_sum_over(each.sum(0), groups) / samples for each in operators.of_instances(x))
    result = torch.nn.functional.instance_norm(x, weight=weight, bias=bias, eps=eps)
    return result, *operators.moved(running_mean, running_var, mean, var, momentum, x[0, 0].numel())


@rule(operators.batch_norm_fixed)
def batch_norm_fixed(op: Op) -> Signature:
    """n c …, c -> n c …, each element alone."""
    return _channelwise(op, Split())


@rule(operators.batch_norm, operators.batch_norm_alone)
def batch_norm(op: Op) -> Signature:
    """Channels are independent. Over a split batch or image the statistics are summed over the ranks, in both directions."""
    return replace(_channelwise(op, Split(others="I", microbatches=False)), local=_batch_norm)


def _channelwise(op: Op, split: Split) -> Signature:
    """n c …, then vectors c -> n c …, and vectors c; all dims but c split as told."""
    shape = op.inputs[0].shape
    names = simple_dims(shape)
    names[1] = ("c",)
    sizes = {f"d{index}": size for index, size in enumerate(shape) if index != 1} | {"c": shape[1]}
    vectors = tuple((("c",),) for _ in op.inputs[1:])
    splits = {name: split for name in sizes if name != "c"} | {"c": Split()}
    outputs = (tuple(names), *((("c",),) for _ in op.outputs[1:]))
    affine = frozenset({1, 2} if isinstance(op.args[1], Slot) and isinstance(op.args[2], Slot) else ())
    linear = (affine,) if affine and len(op.outputs) == 1 else ()
    return Signature(inputs=(tuple(names), *vectors), outputs=outputs, sizes=sizes, splits=splits, linear=linear)


def _batch_norm(call: Call, tensors: Sequence[Tensor]) -> Any:
    groups = [split.group for name, splits in call.splits.items() if name != "c" for split in splits if split.ranks > 1]
    if not groups:
        return call.run(tensors)
    x, weight, bias, *rest = _arguments(call, tensors)
    dims = [dim for dim in range(x.dim()) if dim != 1]
    whole = call.op.inputs[0].shape
    count = call.op.inputs[0].numel // whole[1]
    wide = operators.widened(x)
    mean = _sum_over(wide.sum(dims), groups) / count
    var = _sum_over(((wide - mean.reshape([1, -1] + [1] * (x.dim() - 2))) ** 2).sum(dims), groups) / count
    result = operators.normalise(x, mean, var, weight, bias, rest[-1])
    if call.op.target is operators.batch_norm_alone:
        return result
    running_mean, running_var, momentum, _ = rest
    return result, *operators.moved(running_mean, running_var, mean, var, momentum, count)


@rule(operators.weight_norm)
def weight_norm(op: Op) -> Signature:
    """v o…, g -> v o…: each index of one dim is normalised by itself, and scaled."""
    shape, dim = op.inputs[0].shape, op.args[2]
    names = simple_dims(shape)
    scale = tuple(name if index == dim else () for index, name in enumerate(names)) if dim >= 0 else ()
    splits = {f"d{dim}": Split()} if dim >= 0 else {}
    sizes = {f"d{index}": size for index, size in enumerate(shape)}
    reasons = {name: _WHOLE for name in sizes if name not in splits}
    linear = (frozenset({1}),)
    return Signature(inputs=(tuple(names), scale), outputs=(tuple(names),), sizes=sizes, splits=splits, linear=linear, reasons=reasons)


def _arguments(call: Call, tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    from shardwise.capture.graph import fill

    return tuple(fill(call.op.args, list(tensors)))


def _sum_over(tensor: Tensor, groups: list[str]) -> Tensor:
    """The sum over all ranks, on every rank; its gradient is the sum of theirs."""
    for group in groups:
        tensor = all_reduce_sum(tensor, group)
    return tensor
