"""Operators that move or rename dims without touching an element."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import gcd, prod
from typing import Any

import torch

from shardwise.capture.graph import Op
from shardwise.sharding.rules.registry import rule
from shardwise.sharding.signature import Call, Dim, Dims, Signature, Split

aten = torch.ops.aten
_ALONE = (frozenset({0}),)


def simple_dims(shape: Sequence[int], prefix: str = "d") -> list[Dim]:
    """One factor for each dim."""
    return [(f"{prefix}{index}",) for index in range(len(shape))]


def _moved(op: Op, inputs: Sequence[Dim], outputs: Sequence[Dim], **more: Any) -> Signature:
    """A signature of one tensor in and one out that is linear; the factors on both sides may be split."""
    found: dict[str, int] = {}
    for dims, shape in ((inputs, op.inputs[0].shape), (outputs, op.outputs[0].shape)):
        found |= {dim[0]: size for dim, size in zip(dims, shape, strict=True) if len(dim) == 1}
    sizes = found | more.pop("sizes", {})
    shared = {name for dim in inputs for name in dim} & {name for dim in outputs for name in dim}
    splits = more.pop("splits", {name: Split() for name in sizes if name in shared})
    return Signature(inputs=(tuple(inputs),), outputs=(tuple(outputs),), sizes=sizes, splits=splits, linear=_ALONE, **more)


@rule(aten.transpose.int)
def transpose(op: Op) -> Signature:
    names = simple_dims(op.inputs[0].shape)
    turned = list(names)
    first, second = op.args[1] % len(names), op.args[2] % len(names)
    turned[first], turned[second] = names[second], names[first]
    return _moved(op, names, turned)


@rule(aten.t.default, aten.numpy_T.default)
def reverse(op: Op) -> Signature:
    names = simple_dims(op.inputs[0].shape)
    return _moved(op, names, names[::-1])


@rule(aten.permute.default)
def permute(op: Op) -> Signature:
    names = simple_dims(op.inputs[0].shape)
    return _moved(op, names, [names[dim] for dim in op.args[1]])


@rule(aten.alias.default, aten.contiguous.default, aten.clone.default, aten.detach.default, aten.lift_fresh_copy.default)
def same(op: Op) -> Signature:
    names = simple_dims(op.inputs[0].shape)
    return _moved(op, names, names)


@rule(aten.unsqueeze.default)
def unsqueeze(op: Op) -> Signature:
    names = simple_dims(op.inputs[0].shape)
    place = op.args[1] % (len(names) + 1)
    return _moved(op, names, [*names[:place], (), *names[place:]])


@rule(aten.squeeze.dim, aten.squeeze.default, aten.squeeze.dims)
def squeeze(op: Op) -> Signature:
    shape = op.inputs[0].shape
    given = op.argument(1, "dim")
    chosen = range(len(shape)) if given is None else [dim % len(shape) for dim in (given if isinstance(given, (list, tuple)) else [given])]
    gone = {dim for dim in chosen if shape[dim] == 1}
    names: list[Dim] = [() if dim in gone else name for dim, name in enumerate(simple_dims(shape))]
    kept = [name for dim, name in enumerate(names) if dim not in gone]
    return _moved(op, names, kept, local=_reshape)  # a rank's part of another dim may be of size 1, too, and must stay


@rule(aten.expand.default, aten.expand_as.default, aten.broadcast_to.default)
def expand(op: Op) -> Signature:
    """A new or repeated dim's factor is held by the result alone: every rank makes its share of the copies."""
    source, out = op.inputs[0].shape, op.outputs[0].shape
    outputs = simple_dims(out)
    shift = len(out) - len(source)
    inputs: list[Dim] = [outputs[dim + shift] if size == out[dim + shift] else () for dim, size in enumerate(source)]
    splits = {dim[0]: Split() for dim in outputs}
    others = tuple(() for _ in op.inputs[1:])
    sizes = dict(zip((dim[0] for dim in outputs), out, strict=True))
    rest = tuple(tuple(outputs) for _ in others)
    return Signature(inputs=(tuple(inputs), *rest), outputs=(tuple(outputs),), sizes=sizes, splits=splits, linear=_ALONE, local=_expand)


def _expand(call: Call, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return tensors[0].expand(call.shapes[0])


@rule(aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int, aten.view_as.default)
def reshape(op: Op) -> Signature:
    inputs, outputs, sizes = common_factors(op.inputs[0].shape, op.outputs[0].shape)
    splits = {name: Split() for name in sizes if name.startswith("f")}
    reasons = {name: "its elements are in dims of other sizes before and after" for name in sizes if name not in splits}
    read = (inputs, *(outputs for _ in op.inputs[1:]))
    return Signature(inputs=read, outputs=(outputs,), sizes=sizes, splits=splits, linear=_ALONE, local=_reshape, reasons=reasons)


def _reshape(call: Call, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
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


@rule(aten.slice.Tensor)
def slice_(op: Op) -> Signature:
    """The sliced dim stays whole."""
    return _except(op, op.argument(1, "dim", 0), removed=False, reason="a slice takes other indices than the ranks hold")


@rule(aten.select.int)
def select(op: Op) -> Signature:
    return _except(op, op.args[1], removed=True, reason="one index of it is selected")


def _except(op: Op, dim: int, *, removed: bool, reason: str) -> Signature:
    names = simple_dims(op.inputs[0].shape)
    dim %= len(names)
    outputs = [*names[:dim], *([] if removed else [("out",)]), *names[dim + 1 :]]
    return _moved(op, names, outputs, reasons={f"d{dim}": reason, "out": reason})


@rule(aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int)
def split(op: Op) -> Signature:
    """Pieces of one dim. Equal pieces make it (pieces, n): n may be split inside each piece."""
    source = op.inputs[0].shape
    dim = (op.argument(1, "dim", 0) if op.target is aten.unbind.int else op.argument(2, "dim", 0)) % len(source)
    names = simple_dims(source)
    inner: list[Dim] = [] if op.target is aten.unbind.int else [("n",)]
    lengths = {value.shape[dim] for value in op.outputs} if inner else {1}
    equal = len(lengths) == 1
    outputs = tuple((*names[:dim], *inner, *names[dim + 1 :]) for _ in op.outputs) if equal else _unequal(op, names, dim)
    sizes = {f"d{index}": size for index, size in enumerate(source) if index != dim}
    if equal:
        names[dim] = ("pieces", *(name for each in inner for name in each))
        sizes |= {"pieces": len(op.outputs), "n": source[dim] // len(op.outputs)}
        if not inner:
            sizes.pop("n")
    else:
        names[dim] = ("whole",)
        sizes |= {"whole": source[dim]} | {f"n{index}": value.shape[dim] for index, value in enumerate(op.outputs)}
    splits = {name: Split() for name in sizes if name == "n" or name.startswith("d")}
    reasons = {"pieces": "each piece is a result of its own", "whole": "the pieces are unequal"}
    return Signature(inputs=(tuple(names),), outputs=outputs, sizes=sizes, splits=splits, linear=_ALONE, local=_split, reasons=reasons)


def _unequal(op: Op, names: list[Dim], dim: int) -> tuple[Dims, ...]:
    return tuple((*names[:dim], (f"n{index}",), *names[dim + 1 :]) for index in range(len(op.outputs)))


def _split(call: Call, tensors: Sequence[torch.Tensor]) -> Any:
    dim = call.op.argument(1 if call.op.target is aten.unbind.int else 2, "dim", 0)
    if call.op.target is aten.unbind.int:
        return tensors[0].unbind(dim)
    return tensors[0].split([shape[dim] for shape in call.shapes], dim)


@rule(aten.cat.default)
def cat(op: Op) -> Signature:
    """The dim that is put together stays whole, but equal inputs make it (pieces, n) and n may be split inside each."""
    out = op.outputs[0].shape
    dim = op.argument(1, "dim", 0) % len(out)
    names = simple_dims(out)
    lengths = [value.shape[dim] for value in op.inputs]
    sizes = {f"d{index}": size for index, size in enumerate(out) if index != dim}
    if len(set(lengths)) == 1:
        inputs = tuple((*names[:dim], ("n",), *names[dim + 1 :]) for _ in op.inputs)
        names[dim] = ("pieces", "n")
        sizes |= {"pieces": len(op.inputs), "n": lengths[0]}
    else:
        inputs = tuple((*names[:dim], (f"n{index}",), *names[dim + 1 :]) for index in range(len(op.inputs)))
        names[dim] = ("whole",)
        sizes |= {"whole": out[dim]} | {f"n{index}": size for index, size in enumerate(lengths)}
    splits = {name: Split() for name in sizes if name == "n" or name.startswith("d")}
    reason = "each piece is an input of its own" if "pieces" in sizes else "the inputs have unequal lengths"
    reasons = {name: reason for name in sizes if name not in splits}
    everything = (frozenset(range(len(op.inputs))),)
    return Signature(inputs=inputs, outputs=(tuple(names),), sizes=sizes, splits=splits, linear=everything, reasons=reasons)


@rule(aten.stack.default)
def stack(op: Op) -> Signature:
    out = op.outputs[0].shape
    dim = op.argument(1, "dim", 0) % len(out)
    names = simple_dims(out)
    inner = tuple((*names[:dim], *names[dim + 1 :]) for _ in op.inputs)
    sizes = {f"d{index}": size for index, size in enumerate(out)}
    splits = {name: Split() for name in sizes if name != f"d{dim}"}
    everything = (frozenset(range(len(op.inputs))),)
    reasons = {f"d{dim}": "each index is an input of its own"}
    return Signature(inputs=inner, outputs=(tuple(names),), sizes=sizes, splits=splits, linear=everything, reasons=reasons)


@rule(aten.pad.default, aten.constant_pad_nd.default)
def pad(op: Op) -> Signature:
    """Padded dims stay whole; a sum may be padded with zeros only."""
    shape = op.inputs[0].shape
    widths = op.args[1]
    padded = {len(shape) - 1 - index // 2 for index, width in enumerate(widths) if width}
    names = simple_dims(shape)
    outputs = [("out" + str(dim),) if dim in padded else name for dim, name in enumerate(names)]
    reason = {f"d{dim}": "elements are added at its ends" for dim in padded}
    found = _moved(op, names, outputs, reasons=reason)
    zero = (op.args[2] if op.target is aten.constant_pad_nd.default and len(op.args) > 2 else op.argument(3, "value")) in (None, 0)
    return found if zero else Signature(**{**found.__dict__, "linear": ()})


@rule(aten.repeat.default)
def repeat(op: Op) -> Signature:
    """d -> (copies d): each copy is split alike."""
    source, copies = op.inputs[0].shape, list(op.args[1])
    names = simple_dims(source)
    shift = len(copies) - len(names)
    sizes = {f"copies{dim}": count for dim, count in enumerate(copies)} | {name[0]: size for name, size in zip(names, source, strict=True)}
    outputs = [(f"copies{dim}", *(names[dim - shift] if dim >= shift else ())) for dim in range(len(copies))]
    return _moved(op, names, outputs, sizes=sizes)


@rule(aten.repeat_interleave.self_int)
def repeat_interleave(op: Op) -> Signature:
    """d -> (d copies); without a dim all of them are laid flat."""
    source, dim = op.inputs[0].shape, op.argument(2, "dim")
    names = simple_dims(source)
    sizes = {name[0]: size for name, size in zip(names, source, strict=True)} | {"copies": op.args[1]}
    if dim is None:
        outputs: list[Dim] = [(*(name for each in names for name in each), "copies")]
    else:
        outputs = list(names)
        outputs[dim] = (*names[dim], "copies")
    return _moved(op, names, outputs, sizes=sizes, local=_repeat_interleave)


def _repeat_interleave(call: Call, tensors: Sequence[torch.Tensor]) -> Any:
    return call.run(tensors, output_size=None)


@rule(aten.roll.default)
def roll(op: Op) -> Signature:
    """Rolled dims stay whole: all of them when none is named, for then the tensor is rolled as one run."""
    names = simple_dims(op.inputs[0].shape)
    given = op.argument(2, "dims", [])
    rolled = {dim % len(names) for dim in given} or set(range(len(names)))
    outputs = [(f"out{dim}",) if dim in rolled else name for dim, name in enumerate(names)]
    return _moved(op, names, outputs, reasons={f"d{dim}": "elements go over its end" for dim in rolled})


@rule(aten.diff.default, aten.cumsum.default)
def along(op: Op) -> Signature:
    """Runs along one dim, which stays whole, as do the same dims of what is put before and after."""
    shape = op.inputs[0].shape
    dim = (op.argument(2, "dim", -1) if op.target is aten.diff.default else op.args[1]) % len(shape)
    names = simple_dims(shape)
    lengths = {f"d{dim}": shape[dim]} | {f"more{n}": value.shape[dim] for n, value in enumerate(op.inputs[1:], 1)}
    inputs = tuple((*names[:dim], (name,), *names[dim + 1 :]) for name in lengths)
    lengths["out"] = op.outputs[0].shape[dim]
    sizes = {f"d{index}": size for index, size in enumerate(shape)} | lengths
    return Signature(
        inputs=inputs,
        outputs=((*names[:dim], ("out",), *names[dim + 1 :]),),
        sizes=sizes,
        splits={name: Split() for name in sizes if name not in lengths},
        reasons=dict.fromkeys(lengths, "each element depends on those before it"),
        linear=(frozenset(range(len(op.inputs))),),
    )
