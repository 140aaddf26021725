"""Images in other sizes, and at other places: each channel alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shardwise.capture.graph import Op
from shardwise.sharding.rules.build import ALONE, given, over, run_named, simple_dims
from shardwise.sharding.rules.registry import rule
from shardwise.sharding.signature import Call, Dim, Signature

aten = torch.ops.aten
_BETWEEN = "a result lies between neighbours, which other ranks may hold"

_NEAREST = [
    getattr(getattr(aten, f"{name}{rank}d"), form)
    for name in ("upsample_nearest", "_upsample_nearest_exact")
    for rank in (1, 2, 3)
    for form in ("default", "vec")
]
_WEIGHTED = [
    getattr(getattr(aten, name), form)
    for name in (
        *("upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d", "upsample_bicubic2d"),
        *("_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa"),
    )
    for form in ("default", "vec")
]


@rule(*_WEIGHTED)
def interpolation(op: Op) -> Signature:
    """n c … -> n c …"""
    source = op.inputs[0].shape
    outputs = [*simple_dims(source)[:2], *simple_dims(source, "z")[2:]]
    inputs = [*simple_dims(source)[:2], *simple_dims(source, "x")[2:]]
    whole = {name[0]: _BETWEEN for name in (*inputs[2:], *outputs[2:])}
    return over(op, [inputs], [outputs], whole=whole, linear=ALONE)


@rule(*_NEAREST)
def nearest(op: Op) -> Signature:
    """n c … -> n c …; where each pixel is repeated x -> (x copies)."""
    source, out = op.inputs[0].shape, op.outputs[0].shape
    inputs, outputs = simple_dims(source), simple_dims(source)
    sizes: dict[str, int] = {}
    whole: dict[str, str] = {}
    for dim in range(2, len(source)):
        if out[dim] % source[dim] == 0:
            outputs[dim] = (f"d{dim}", f"copies{dim}")
            sizes |= {f"copies{dim}": out[dim] // source[dim]}
        else:
            outputs[dim] = (f"z{dim}",)
            whole |= {f"d{dim}": _BETWEEN, f"z{dim}": _BETWEEN}
    whole |= dict.fromkeys(sizes, "copies are made together")
    return over(op, [inputs], [outputs], whole=whole, sizes=sizes, linear=ALONE, local=_nearest)


def _nearest(call: Call, tensors: Sequence[Tensor]) -> Any:
    """With the sizes of the local result, unless the image is whole: then the given scales count."""
    if not any(name in call.splits for name in call.sizes if name not in ("d0", "d1")):
        return call.run(tensors)
    scales = [argument.name for argument in call.op.target._schema.arguments if argument.name.startswith("scale")]  # type: ignore[attr-defined]
    return run_named(call, tensors, output_size=list(call.shapes[0][2:]), **dict.fromkeys(scales))


@rule(aten.grid_sampler.default, aten.grid_sampler_2d.default, aten.grid_sampler_3d.default)
def grid_sampler(op: Op) -> Signature:
    """n c …, n z… xy -> n c z…: each place of the result is looked up by itself, in the whole image."""
    source, grid = (value.shape for value in op.inputs)
    image: list[Dim] = [("n",), ("c",), *simple_dims(source, "x")[2:]]
    places = simple_dims(grid, "z")[1:-1]
    whole = {name[0]: "any pixel may be asked for" for name in image[2:]} | {"xy": "a place is given by all of it"}
    return over(op, [image, [("n",), *places, ("xy",)]], [[("n",), ("c",), *places]], whole=whole, linear=ALONE)


@rule(aten.affine_grid_generator.default)
def affine_grid(op: Op) -> Signature:
    """n xy w -> n … xy"""
    out = op.outputs[0].shape
    places = simple_dims(out, "z")[1:-1]
    whole = {"xy": "the rows of one matrix", "w": "the columns of one matrix"}
    whole |= {name[0]: "coordinates go over the whole image" for name in places}
    return over(op, [[("n",), ("xy",), ("w",)]], [[("n",), *places, ("xy",)]], whole=whole, linear=ALONE, local=_affine_grid)


def _affine_grid(call: Call, tensors: Sequence[Tensor]) -> Any:
    return run_named(call, tensors, size=[tensors[0].shape[0], *given(call.op, "size")[1:]])
