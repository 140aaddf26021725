"""Convolutions and pooling: split samples, output channels, or (a sum) input channels. Images stay whole."""

from __future__ import annotations

from typing import Any

import torch

from shardwise.capture.graph import Op
from shardwise.sharding.rules.registry import rule
from shardwise.sharding.rules.shape import simple_dims
from shardwise.sharding.signature import Dim, Signature, Split

aten = torch.ops.aten
_HALO = "neighbouring ranks would have to exchange borders"


@rule(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.conv2d.padding)
def convolution(op: Op) -> Signature:
    """n i …, o i …, o -> n o …"""
    return _convolution(op, transposed=False, groups=op.argument(6, "groups", 1))


@rule(aten.conv_transpose1d.default, aten.conv_transpose2d.input)
def convolution_transposed(op: Op) -> Signature:
    """n i …, i o …, o -> n o …"""
    return _convolution(op, transposed=True, groups=op.argument(6, "groups", 1))


def _convolution(op: Op, *, transposed: bool, groups: int) -> Signature:
    source, kernel, out = op.inputs[0].shape, op.inputs[1].shape, op.outputs[0].shape
    space = range(2, len(source))
    image, window, result = ([(f"{letter}{dim}",) for dim in space] for letter in "iko")
    sizes = {f"{letter}{dim}": shape[dim] for letter, shape in (("i", source), ("k", kernel), ("o", out)) for dim in space}
    sizes |= {"n": source[0], "ci": source[1], "co": out[1]}
    weight: list[Dim] = [("ci",), ("co",)] if transposed else [("co",), ("ci",)]
    bias = len(op.inputs) == 3
    splits = {"n": Split()}
    reasons = {name: _HALO for name in sizes if name[0] in "iok" and name not in ("ci", "co")}
    channels: Any = ("ci",)
    if groups == 1:
        splits |= {"co": Split(), "ci": Split(addends=frozenset({2}) if bias else frozenset())}
    else:
        reasons |= {"ci": "channels are grouped", "co": "channels are grouped"}
        weight = [("wi",) if dim == ("ci",) else dim for dim in weight]
        sizes["wi"] = kernel[0 if transposed else 1]
        if transposed:
            weight = [("ci",), ("wo",)]
            sizes["wo"] = kernel[1]
    inputs = [(("n",), channels, *image), (*weight, *window)] + ([(("co",),)] if bias else [])
    linear = (frozenset({0, 2}), frozenset({1, 2})) if bias else (frozenset({0}), frozenset({1}))
    return Signature(
        inputs=tuple(tuple(each) for each in inputs), outputs=((("n",), ("co",), *result),), sizes=sizes, splits=splits, linear=linear, reasons=reasons
    )


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
