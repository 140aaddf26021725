"""Convolutions and pooling: split samples, groups of channels, output channels, or (a sum) input channels. Images stay whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from shardwise.capture.graph import Op
from shardwise.sharding.rules.registry import rule
from shardwise.sharding.rules.shape import simple_dims
from shardwise.sharding.signature import Call, Signature, Split

aten = torch.ops.aten
_HALO = "neighbouring ranks would have to exchange borders"


@rule(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.conv2d.padding)
def convolution(op: Op) -> Signature:
    """n (g i) …, (g o) i …, (g o) -> n (g o) …"""
    return _convolution(op, transposed=False)


@rule(aten.conv_transpose1d.default, aten.conv_transpose2d.input)
def convolution_transposed(op: Op) -> Signature:
    """n (g i) …, (g i) o …, (g o) -> n (g o) …"""
    return _convolution(op, transposed=True)


def _convolution(op: Op, *, transposed: bool) -> Signature:
    source, kernel, out = op.inputs[0].shape, op.inputs[1].shape, op.outputs[0].shape
    groups = _groups(op)
    group = ("g",) if groups > 1 else ()
    space = range(2, len(source))
    image, window, result = ([(f"{letter}{dim}",) for dim in space] for letter in "xkz")
    reasons = {name[0]: _HALO for name in (*image, *window, *result)}
    sizes = {f"{letter}{dim}": shape[dim] for letter, shape in (("x", source), ("k", kernel), ("z", out)) for dim in space}
    sizes |= {"n": source[0], "i": source[1] // groups, "o": out[1] // groups} | dict.fromkeys(group, groups)
    ins, outs = (*group, "i"), (*group, "o")
    weight = [ins, ("o",)] if transposed else [outs, ("i",)]
    bias = len(op.inputs) == 3
    inputs = [(("n",), ins, *image), (*weight, *window)] + ([(outs,)] if bias else [])
    return Signature(
        inputs=tuple(tuple(each) for each in inputs),
        outputs=((("n",), outs, *result),),
        sizes=sizes,
        splits={name: Split() for name in ("n", "o", *group)} | {"i": Split(addends=frozenset({2} if bias else ()))},
        linear=(frozenset({0, 2}), frozenset({1, 2})) if bias else (frozenset({0}), frozenset({1})),
        local=_convolve,
        reasons=reasons,
    )


def _groups(op: Op) -> int:
    return int(op.argument(6, "groups", 1))


def _convolve(call: Call, tensors: Sequence[torch.Tensor]) -> Any:
    splits = call.splits.get("g")
    return call.run(tensors, {6: splits[-1].part.length}) if splits else call.run(tensors)


@rule(
    aten.max_pool2d.default,
    aten.avg_pool2d.default,
    aten.adaptive_avg_pool1d.default,
    aten.adaptive_avg_pool2d.default,
    aten.upsample_nearest2d.vec,
    aten.upsample_bilinear2d.vec,
    aten.upsample_bicubic2d.vec,
)
def pooling(op: Op) -> Signature:
    """n c … -> n c …, each channel alone."""
    source, out = op.inputs[0].shape, op.outputs[0].shape
    names = simple_dims(source)
    kept = len(source) - (1 if op.target is aten.adaptive_avg_pool1d.default else 2)
    outputs = [*names[:kept], *((f"o{dim}",) for dim in range(kept, len(source)))]
    sizes = {f"d{dim}": size for dim, size in enumerate(source)} | {f"o{dim}": out[dim] for dim in range(kept, len(source))}
    splits = {f"d{dim}": Split() for dim in range(kept)}
    linear = () if op.target is aten.max_pool2d.default else (frozenset({0}),)
    reasons = {name: _HALO for name in sizes if name not in splits}
    return Signature(inputs=(tuple(names),), outputs=(tuple(outputs),), sizes=sizes, splits=splits, linear=linear, reasons=reasons)
