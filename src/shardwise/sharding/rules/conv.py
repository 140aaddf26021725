"""Convolutions and pooling: split samples, groups of channels, output channels, or (a sum) input channels.

An image is split where its windows do not overlap; elsewhere neighbouring ranks would have to exchange borders.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shardwise.capture.graph import Op
from shardwise.sharding.rules.build import given, run_named, simple_dims
from shardwise.sharding.rules.registry import rule
from shardwise.sharding.signature import Call, Dim, Signature, Split

aten = torch.ops.aten
_HALO = "neighbouring ranks would have to exchange borders"
_WINDOW = "it is a window's"


@rule(
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
    aten.conv1d.padding,
    aten.conv2d.padding,
    aten.conv3d.padding,
    aten.conv_transpose1d.default,
    aten.conv_transpose2d.input,
    aten.conv_transpose3d.input,
    aten.convolution.default,
    aten._convolution.default,
)
def convolution(op: Op) -> Signature:
    """n (g i) …, (g o) i …, (g o) -> n (g o) …; transposed: n (g i) …, (g i) o …, (g o) -> n (g o) …"""
    source, kernel, out = op.inputs[0].shape, op.inputs[1].shape, op.outputs[0].shape
    transposed, groups = _transposed(op), given(op, "groups")
    batch: list[Dim] = [("n",)] if len(source) == len(kernel) else []
    channel = len(batch)
    group = ("g",) if groups > 1 else ()
    space = _space(op, channel + 1)
    sizes = space.sizes | {"i": source[channel] // groups, "o": out[channel] // groups} | dict.fromkeys(group, groups)
    sizes |= {"n": source[0]} if batch else {}
    ins, outs = (*group, "i"), (*group, "o")
    weight: list[Dim] = [ins, ("o",)] if transposed else [outs, ("i",)]
    bias = len(op.inputs) == 3
    inputs = [(*batch, ins, *space.image), (*weight, *space.window)] + ([(outs,)] if bias else [])
    free = [*(name for dim in batch for name in dim), "o", *group, *space.free]
    return Signature(
        inputs=tuple(tuple(each) for each in inputs),
        outputs=((*batch, outs, *space.result),),
        sizes=sizes,
        splits={name: Split() for name in free} | {"i": Split(addends=frozenset({2} if bias else ()))},
        linear=(frozenset({0, 2}), frozenset({1, 2})) if bias else (frozenset({0}), frozenset({1})),
        local=_convolve,
        reasons={name: _WINDOW if name.startswith("k") else _HALO for name in space.sizes if name not in space.free},
    )


def _transposed(op: Op) -> bool:
    return "transpose" in op.name or bool(given(op, "transposed"))


def _convolve(call: Call, tensors: Sequence[Tensor]) -> Any:
    splits = call.splits.get("g")
    return run_named(call, tensors, groups=splits[-1].part.length) if splits else call.run(tensors)


class _Space:
    """The factors of an image's dims before and after, and of a window's: x → z where windows overlap, (z k) → z where they do not."""

    def __init__(self) -> None:
        self.image: list[Dim] = []
        self.result: list[Dim] = []
        self.window: list[Dim] = []
        self.sizes: dict[str, int] = {}
        self.free: list[str] = []

    def overlapping(self, dim: int, before: int, after: int, window: int) -> None:
        """A dim whose windows may share elements."""
        names = [f"x{dim}", f"z{dim}", f"k{dim}"]
        for found, name, size in zip((self.image, self.result, self.window), names, (before, after, window), strict=True):
            found.append((name,))
            self.sizes[name] = size

    def apart(self, dim: int, pieces: int, window: int, *, grows: bool = False) -> None:
        """A dim of `pieces` windows side by side, each of which becomes one element; or the other way round, if it grows."""
        whole: Dim = (f"z{dim}", f"k{dim}") if window > 1 else (f"z{dim}",)
        self.image.append((f"z{dim}",) if grows else whole)
        self.result.append(whole if grows else (f"z{dim}",))
        self.window.append((f"k{dim}",))
        self.sizes |= {f"z{dim}": pieces, f"k{dim}": window}
        self.free.append(f"z{dim}")


def _space(op: Op, first: int) -> _Space:
    """Of a convolution whose image's dims begin at `first`."""
    source, kernel, out = op.inputs[0].shape, op.inputs[1].shape[2:], op.outputs[0].shape
    stride, dilation = (_each(given(op, name), len(kernel)) for name in ("stride", "dilation"))
    padding = given(op, "padding")
    grows = _transposed(op)
    outer = _each(given(op, "output_padding"), len(kernel)) if grows else [0] * len(kernel)
    found = _Space()
    for index, window in enumerate(kernel):
        dim = first + index
        padded = padding == "same" and window > 1 if isinstance(padding, str) else _each(padding, len(kernel))[index] > 0
        plain = stride[index] == window and (dilation[index] == 1 or window == 1) and not padded and not outer[index]
        if plain and (grows or source[dim] % window == 0):
            found.apart(dim, source[dim] if grows else out[dim], window, grows=grows)
        else:
            found.overlapping(dim, source[dim], out[dim], window)
    return found


def _each(value: Any, count: int) -> list[int]:
    """One number for each dim."""
    listed = list(value) if isinstance(value, (list, tuple)) else [value]
    return listed * count if len(listed) == 1 else listed


# -- pooling -----------------------------------------------------------------------------------------------------------------------------

_AVERAGES = {aten.avg_pool1d.default: 1, aten.avg_pool2d.default: 2, aten.avg_pool3d.default: 3}
_MAXIMA: dict[Any, int] = {aten.max_pool1d.default: 1, aten.max_pool2d.default: 2, aten.max_pool3d.default: 3}
_MAXIMA_WITH_INDICES: dict[Any, int] = {
    aten.max_pool1d_with_indices.default: 1,
    aten.max_pool2d_with_indices.default: 2,
    aten.max_pool3d_with_indices.default: 3,
    aten.adaptive_max_pool1d.default: 1,
    aten.adaptive_max_pool2d.default: 2,
    aten.adaptive_max_pool3d.default: 3,
}
_ADAPTIVE: dict[Any, int] = {
    aten.adaptive_avg_pool1d.default: 1,
    aten.adaptive_avg_pool2d.default: 2,
    aten.adaptive_avg_pool3d.default: 3,
    aten._adaptive_avg_pool2d.default: 2,
    aten._adaptive_avg_pool3d.default: 3,
}


@rule(*_AVERAGES, *_MAXIMA)
def pooling(op: Op) -> Signature:
    """Each channel alone, and each window where they lie side by side."""
    rank = (_AVERAGES | _MAXIMA)[op.target]
    source, out = op.inputs[0].shape, op.outputs[0].shape
    first = len(source) - rank
    window = _each(given(op, "kernel_size"), rank)
    stride = _each(given(op, "stride") or window, rank)
    plain = not any(_each(given(op, "padding"), rank)) and set(_each(given(op, "dilation") or 1, rank)) == {1}
    space = _Space()
    for index in range(rank):
        dim = first + index
        if plain and stride[index] == window[index] and source[dim] % window[index] == 0:
            space.apart(dim, out[dim], window[index])
        else:
            space.overlapping(dim, source[dim], out[dim], window[index])
    return _channelwise(op, space, linear=op.target in _AVERAGES)


def _channelwise(op: Op, space: _Space, *, linear: bool, local: Any = None, reason: str = _HALO) -> Signature:
    """Each channel (and sample) alone, and what is free of the space."""
    kept = simple_dims(op.inputs[0].shape[: len(op.inputs[0].shape) - len(space.image)])
    sizes = {name[0]: size for name, size in zip(kept, op.inputs[0].shape, strict=False)} | space.sizes
    splits = {name: Split() for name in [*(name[0] for name in kept), *space.free]}
    more = {"local": local} if local else {}
    return Signature(
        inputs=((*kept, *space.image),),
        outputs=tuple((*kept, *space.result) for _ in op.outputs),
        sizes=sizes,
        splits=splits,
        linear=(frozenset({0}),) if linear else (),
        reasons={name: _WINDOW if name.startswith("k") else reason for name in sizes if name not in splits},
        **more,
    )


@rule(*_MAXIMA_WITH_INDICES)
def pooling_with_indices(op: Op) -> Signature:
    """Each channel alone: an index counts in its whole image."""
    return _channelwise(op, _whole_space(op, _MAXIMA_WITH_INDICES[op.target]), linear=False)


def _whole_space(op: Op, rank: int) -> _Space:
    space = _Space()
    source, out = op.inputs[0].shape, op.outputs[0].shape
    for dim in range(len(source) - rank, len(source)):
        space.overlapping(dim, source[dim], out[dim], 1)
    return space


@rule(*_ADAPTIVE)
def adaptive_pooling(op: Op) -> Signature:
    """Each channel alone, and each window where they have one size."""
    rank = _ADAPTIVE[op.target]
    source, out = op.inputs[0].shape, op.outputs[0].shape
    space = _Space()
    for dim in range(len(source) - rank, len(source)):
        if source[dim] % out[dim] == 0:
            space.apart(dim, out[dim], source[dim] // out[dim])
        else:
            space.overlapping(dim, source[dim], out[dim], 1)
    return _channelwise(op, space, linear=True, local=_adaptive)


def _adaptive(call: Call, tensors: Sequence[Tensor]) -> Any:
    return run_named(call, tensors, output_size=list(call.shapes[0][-_ADAPTIVE[call.op.target] :]))


@rule(aten.max_unpool2d.default, aten.max_unpool3d.default)
def unpooling(op: Op) -> Signature:
    """n c …, the indices alike -> n c …: an index counts in its whole image."""
    rank = 2 if op.target is aten.max_unpool2d.default else 3
    found = _channelwise(op, _whole_space(op, rank), linear=True)
    return Signature(**{**found.__dict__, "inputs": found.inputs * 2})
