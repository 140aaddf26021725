"""Operators that move, join, open, repeat or name dims anew without touching an element."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import gcd, prod
from typing import Any

import torch
from torch import Tensor

from shardwise.capture import operators
from shardwise.capture.graph import Op
from shardwise.sharding.rules.build import ALONE, apart, given, over, overloads, simple_dims, wrap
from shardwise.sharding.rules.registry import rule
from shardwise.sharding.signature import Call, Dim, Dims, Signature, Split

aten = torch.ops.aten

__all__ = ["common_factors", "simple_dims"]


# -- dims in another order ---------------------------------------------------------------------------------------------------------------


@rule(*overloads("alias", "clone", "contiguous", "data", "detach", "lift", "lift_fresh", "lift_fresh_copy"))
def same(op: Op) -> Signature:
    names = simple_dims(op.inputs[0].shape)
    return over(op, [names], [names], linear=ALONE)


@rule(
    *overloads("adjoint", "mH.default", "mT.default", "matrix_H.default", "moveaxis", "movedim", "numpy_T.default", "permute", "swapaxes"),
    *overloads("swapdims", "t", "transpose.int"),
)
def permute(op: Op) -> Signature:
    """Strides that tell the dims apart show where each one goes."""
    value = op.inputs[0]
    names = simple_dims(value.shape)
    probe = torch.empty_strided(value.shape, [2**dim for dim in range(len(names))], dtype=value.dtype, device="meta")
    moved = op.target(probe, *op.args[1:], **op.kwargs)
    return over(op, [names], [[names[stride.bit_length() - 1] for stride in moved.stride()]], linear=ALONE)


# -- dims joined, opened, put in and left out --------------------------------------------------------------------------------------------


@rule(aten.unsqueeze.default)
def unsqueeze(op: Op) -> Signature:
    names = simple_dims(op.inputs[0].shape)
    place = given(op, "dim") % (len(names) + 1)
    return over(op, [names], [[*names[:place], (), *names[place:]]], linear=ALONE)


@rule(*overloads("squeeze"))
def squeeze(op: Op) -> Signature:
    shape = op.inputs[0].shape
    given_dims = given(op, "dim")
    dims = range(len(shape)) if given_dims is None else given_dims if isinstance(given_dims, (list, tuple)) else [given_dims]
    gone = {wrap(dim, len(shape)) for dim in dims if shape and shape[dim] == 1}
    names: list[Dim] = [() if dim in gone else name for dim, name in enumerate(simple_dims(shape))]
    kept = [name for dim, name in enumerate(names) if dim not in gone]
    return over(op, [names], [kept], linear=ALONE, local=_reshape)  # a rank's part of another dim may be of size 1, too, and must stay


@rule(
    *overloads("_unsafe_view", "atleast_1d.default", "atleast_2d.default", "atleast_3d.default", "flatten.using_ints", "ravel", "reshape"),
    *overloads("reshape_as", "unflatten.int", "view.default", "view_as"),
)
def reshape(op: Op) -> Signature:
    """Of a second tensor only the shape is read."""
    source, out = op.inputs[0].shape, op.outputs[0].shape
    if 0 in source:
        return apart(op, "it has no elements", linear=ALONE)
    inputs, outputs, sizes = common_factors(source, out)
    splits = {name: Split() for name in sizes if name.startswith("f")}
    reasons = {name: "its elements are in dims of other sizes before and after" for name in sizes if name not in splits}
    read = (inputs, *(outputs for _ in op.inputs[1:]))
    return Signature(inputs=read, outputs=(outputs,), sizes=sizes, splits=splits, linear=ALONE, local=_reshape, reasons=reasons)


def _reshape(call: Call, tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0].reshape(call.shapes[0])


def common_factors(source: Sequence[int], out: Sequence[int]) -> tuple[Dims, Dims, dict[str, int]]:
    """Both shapes as products of the same factors f0, f1, …; x… where a run of elements has no common factors.

    [6, 4] → [24] gives (f0) (f1) → (f0 f1); [6, 4] → [4, 6] gives (f0 x1) (x2 f2) → (f0 x3) (x4 f2): the outermost and the innermost
    divisor that both sides have may still be split.
    """
    pairs = _Pairs(inputs=[[] for _ in source], outputs=[[] for _ in out])
    left, right = ([(dim, size) for dim, size in enumerate(shape) if size != 1] for shape in (source, out))
    while left and right:
        (i, a), (j, b) = left.pop(0), right.pop(0)
        small, large = min(a, b), max(a, b)
        if large % small:
            pairs.run([(i, a)], [(j, b)], left, right)
            continue
        pairs.share(i, j, small)
        if a > small:
            left.insert(0, (i, a // small))
        if b > small:
            right.insert(0, (j, b // small))
    return tuple(map(tuple, pairs.inputs)), tuple(map(tuple, pairs.outputs)), pairs.sizes


Sized = list[tuple[int, int]]


@dataclass(kw_only=True)
class _Pairs:
    """The factors found so far: of each input dim, of each output dim, and their sizes."""

    inputs: list[list[str]]
    outputs: list[list[str]]
    sizes: dict[str, int] = field(default_factory=dict)

    def share(self, i: int, j: int, size: int) -> None:
        """A factor of input dim i and output dim j."""
        if size > 1:
            self._append("f", self.inputs[i], size)
            self._append("", self.outputs[j], size)

    def _append(self, letter: str, dim: list[str], size: int) -> None:
        """A new factor named by `letter`, or the last one when there is none."""
        name = f"{letter}{len(self.sizes)}" if letter else next(reversed(self.sizes))
        self.sizes[name] = size
        dim.append(name)

    def run(self, a: Sized, b: Sized, left: Sized, right: Sized) -> None:
        """Takes dims from both sides until their products agree; shares what divides both first dims and what divides both last ones."""
        while (size_a := prod(size for _, size in a)) != (size_b := prod(size for _, size in b)):
            if size_a < size_b:
                a.append(left.pop(0))
            else:
                b.append(right.pop(0))
        front = gcd(a[0][1], b[0][1])
        self.share(a[0][0], b[0][0], front)
        a[0], b[0] = (a[0][0], a[0][1] // front), (b[0][0], b[0][1] // front)
        back = gcd(a[-1][1], b[-1][1])
        a[-1], b[-1] = (a[-1][0], a[-1][1] // back), (b[-1][0], b[-1][1] // back)
        for side, members in ((self.inputs, a), (self.outputs, b)):
            for dim, size in members:
                if size > 1:
                    self._append("x", side[dim], size)
        self.share(a[-1][0], b[-1][0], back)


@rule(aten.view_as_real.default)
def view_as_real(op: Op) -> Signature:
    """A last dim of two: the real and the imaginary part."""
    names = simple_dims(op.inputs[0].shape)
    return over(op, [names], [[*names, ("two",)]], linear=ALONE)


@rule(aten.view_as_complex.default)
def view_as_complex(op: Op) -> Signature:
    names = simple_dims(op.outputs[0].shape)
    return over(op, [[*names, ("two",)]], [names], whole={"two": "the real and the imaginary part"}, linear=ALONE, local=_view_as_complex)


def _view_as_complex(call: Call, tensors: Sequence[Tensor]) -> Any:
    return call.run([tensors[0].contiguous()])


@rule(aten.view.dtype)
def view_bits(op: Op) -> Signature:
    """The same bits as another dtype, of another width perhaps."""
    names = simple_dims(op.inputs[0].shape)
    if op.inputs[0].shape == op.outputs[0].shape:
        return over(op, [names], [names], local=_view_bits)
    return over(op, [names], [[*names[:-1], ("out",)]], whole={names[-1][0]: "elements are joined or cut"}, local=_view_bits)


def _view_bits(call: Call, tensors: Sequence[Tensor]) -> Any:
    return call.run([tensors[0].contiguous()])


# -- copies ------------------------------------------------------------------------------------------------------------------------------


@rule(aten.expand.default, aten.expand_as.default, aten.broadcast_to.default)
def expand(op: Op) -> Signature:
    """A new or repeated dim's factor is held by the result alone: every rank makes its share of the copies."""
    source, out = op.inputs[0].shape, op.outputs[0].shape
    outputs = simple_dims(out)
    shift = len(out) - len(source)
    inputs: list[Dim] = [outputs[dim + shift] if size == out[dim + shift] else () for dim, size in enumerate(source)]
    splits = {dim[0]: Split() for dim in outputs}
    return over(op, [inputs, *(outputs for _ in op.inputs[1:])], [outputs], splits=splits, linear=ALONE, local=_expand)


def _expand(call: Call, tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0].expand(call.shapes[0])


@rule(aten.repeat.default, aten.tile.default)
def repeat(op: Op) -> Signature:
    """d -> (copies d): each copy is split alike."""
    source, out = op.inputs[0].shape, op.outputs[0].shape
    names = simple_dims(source)
    shift = len(out) - len(source)
    copies = {f"copies{dim}": size // (source[dim - shift] if dim >= shift else 1) for dim, size in enumerate(out) if size}
    outputs = [(f"copies{dim}", *(names[dim - shift] if dim >= shift else ())) for dim in range(len(out))]
    if 0 in out:
        return apart(op, "it has no elements", linear=ALONE)
    return over(op, [names], [outputs], sizes=copies, linear=ALONE)


@rule(aten.repeat_interleave.self_int)
def repeat_interleave(op: Op) -> Signature:
    """d -> (d copies); without a dim all of them are laid flat."""
    source, dim = op.inputs[0].shape, given(op, "dim")
    names = simple_dims(source)
    outputs: list[Dim] = list(names)
    if dim is None:
        outputs = [(*(name for each in names for name in each), "copies")]
    else:
        outputs[dim] = (*names[dim], "copies")
    return over(op, [names], [outputs], sizes={"copies": given(op, "repeats")}, linear=ALONE, local=_repeat_interleave)


def _repeat_interleave(call: Call, tensors: Sequence[Tensor]) -> Any:
    return call.run(tensors, output_size=None)


@rule(aten.repeat_interleave.self_Tensor)
def repeat_each(op: Op) -> Signature:
    """As many copies of each row as a second tensor says."""
    source, dim = op.inputs[0].shape, given(op, "dim")
    if dim is None:
        return apart(op, "how often an element is repeated depends on the data", linear=ALONE)
    names = simple_dims(source)
    dim = wrap(dim, len(source))
    why = "how often a row is repeated depends on the data"
    times = simple_dims(op.inputs[1].shape, "times")
    whole = {f"d{dim}": why, "out": why} | {name[0]: why for name in times}
    return over(op, [names, times], [[*names[:dim], ("out",), *names[dim + 1 :]]], whole=whole, linear=ALONE)


@rule(aten.repeat_interleave.Tensor)
def repeat_numbers(op: Op) -> Signature:
    return apart(op, "how often a number is repeated depends on the data")


@rule(aten.kron.default)
def kron(op: Op) -> Signature:
    """Each dim is (that of the first, that of the second); linear in each."""
    out = len(op.outputs[0].shape)
    names = [simple_dims(value.shape, letter) for value, letter in zip(op.inputs, "ab", strict=True)]
    padded = [[(), *[()] * (out - len(each) - 1), *each] if len(each) < out else each for each in names]
    outputs = [(*first, *second) for first, second in zip(*padded, strict=True)]
    return over(op, names, [outputs], linear=(frozenset({0}), frozenset({1})))


# -- channels and pixels -----------------------------------------------------------------------------------------------------------------


@rule(aten.pixel_shuffle.default)
def pixel_shuffle(op: Op) -> Signature:
    """(c r q), h, w -> c, (h r), (w q)."""
    return _pixels(op, given(op, "upscale_factor"), unshuffle=False)


@rule(aten.pixel_unshuffle.default)
def pixel_unshuffle(op: Op) -> Signature:
    return _pixels(op, given(op, "downscale_factor"), unshuffle=True)


def _pixels(op: Op, scale: int, *, unshuffle: bool) -> Signature:
    few, large = (op.outputs[0].shape, op.inputs[0].shape) if unshuffle else (op.inputs[0].shape, op.outputs[0].shape)
    batch = simple_dims(few[:-3])
    deep: list[Dim] = [*batch, ("c", "r", "q"), ("h",), ("w",)]
    wide: list[Dim] = [*batch, ("c",), ("h", "r"), ("w", "q")]
    sizes = {"c": large[-3], "r": scale, "q": scale, "h": few[-2], "w": few[-1]}
    whole = dict.fromkeys("rq", "a pixel's parts lie in channels and beside each other")
    return over(op, [wide if unshuffle else deep], [deep if unshuffle else wide], sizes=sizes, whole=whole, linear=ALONE)


@rule(aten.channel_shuffle.default, aten.native_channel_shuffle.default)
def channel_shuffle(op: Op) -> Signature:
    """n (g k) … -> n (k g) …"""
    shape, groups = op.inputs[0].shape, given(op, "groups")
    names = simple_dims(shape)
    sizes = {"g": groups, "k": shape[1] // groups}
    left, right = [names[0], ("g", "k"), *names[2:]], [names[0], ("k", "g"), *names[2:]]
    return over(op, [left], [right], sizes=sizes, linear=ALONE, local=_channel_shuffle)


def _channel_shuffle(call: Call, tensors: Sequence[Tensor]) -> Any:
    held = [split.part.length for split in call.splits.get("g", ())]
    return call.run(tensors, {1: held[-1] if held else call.sizes["g"]})


# -- elements by their number ------------------------------------------------------------------------------------------------------------


@rule(operators.strided)
def strided(op: Op) -> Signature:
    """The outermost dim may be split where it stays what it is: each index of it is read from its own elements alone."""
    shape, (size, stride, offset) = op.inputs[0].shape, op.args[1:4]
    inner = prod(shape[1:])
    reach = offset + sum((count - 1) * step for count, step in zip(size[1:], stride[1:], strict=True))
    alone = bool(shape) and bool(size) and size[0] == shape[0] and stride[0] == inner and reach < inner
    names = [("d0",) if alone and dim == 0 else (f"s{dim}",) for dim in range(len(shape))]
    results = [("d0",) if alone and dim == 0 else (f"z{dim}",) for dim in range(len(size))]
    sizes = {name[0]: count for name, count in (*zip(names, shape, strict=True), *zip(results, size, strict=True))}
    reasons = {name: "elements are read by their number in the whole tensor" for name in sizes if name != "d0"}
    return Signature(
        inputs=(tuple(names),),
        outputs=(tuple(results),),
        sizes=sizes,
        splits={"d0": Split()} if alone else {},
        linear=ALONE,
        local=_strided,
        reasons=reasons,
    )


def _strided(call: Call, tensors: Sequence[Tensor]) -> Tensor:
    return operators.strided(tensors[0], call.shapes[0], call.op.args[2], call.op.args[3])
