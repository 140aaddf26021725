"""Sample calls of operators that move elements without computing with them."""

from __future__ import annotations

from collections.abc import Iterator
from sys import maxsize
from typing import Any

import torch
from tests.sharding.brute_force import Sample, sample
from tests.sharding.make import complex_numbers, ints, x

from shardwise.capture import operators

__all__ = ["shape_samples"]

aten = torch.ops.aten


def shape_samples() -> Iterator[Sample]:
    yield from _moved()
    yield from _reshaped()
    yield from _copied()
    yield from _sliced()
    yield from _split()
    yield from _joined()
    yield from _ends()
    yield from _diagonals()
    yield from _windows()
    yield sample(operators.strided, x(4, 10), [4, 4, 4], [10, 2, 1], 0)
    yield sample(operators.strided, x(5, 6), [4, 3], [6, 2], 1)


def _moved() -> Iterator[Sample]:
    for name in ("alias", "contiguous", "clone", "data", "detach", "lift", "lift_fresh", "lift_fresh_copy"):
        yield sample(getattr(aten, name).default, x(4, 5), frozen=(0,) if name == "data" else ())
    yield sample(aten.clone.default, x(), memory_format=torch.contiguous_format)
    yield sample(aten.transpose.int, x(4, 3, 5), 0, -1)
    for name in ("swapaxes", "swapdims"):
        yield sample(getattr(aten, name).default, x(4, 1, 5), -2, 0)
    for target in (aten.t, aten.numpy_T, aten.adjoint, aten.mT, aten.mH, aten.matrix_H):
        yield sample(target.default, x(4, 5))
    yield sample(aten.t.default, x(5))
    yield sample(aten.numpy_T.default, x(4, 3, 5))
    yield sample(aten.mT.default, x(4, 3, 5))
    yield sample(aten.mH.default, complex_numbers(4, 3, 5))
    yield sample(aten.permute.default, x(4, 3, 5), [1, -1, 0])
    yield sample(aten.permute.default, x(), [])
    for name in ("movedim", "moveaxis"):
        yield sample(getattr(aten, name).int, x(4, 3, 5), -1, 0)
        yield sample(getattr(aten, name).intlist, x(4, 3, 5, 2), [0, -1], [-2, 0])


def _reshaped() -> Iterator[Sample]:
    yield sample(aten.unsqueeze.default, x(4, 5), -1)
    yield sample(aten.unsqueeze.default, x(4, 5), dim=1)
    yield sample(aten.unsqueeze.default, x(), 0)
    yield sample(aten.squeeze.dim, x(4, 1, 5), 1)
    yield sample(aten.squeeze.dim, x(4, 1, 5), 0)
    yield sample(aten.squeeze.dim, x(), 0)
    yield sample(aten.squeeze.dims, x(4, 1, 5, 1), [-1, 1])
    yield sample(aten.squeeze.default, x(1, 4, 1, 5))
    yield from (_reshape(*each) for each in _RESHAPES)
    yield sample(aten.reshape.default, x(0, 5), [5, 0])
    yield sample(aten._unsafe_view.default, x(4, 6), [24], rewrites=[{1: [-1]}])
    yield sample(aten.view.default, x(4, 6), [2, 2, 6], rewrites=[{1: [-1, 2, 6]}, {1: [2, -1, 6]}, {1: [2, 2, -1]}])
    yield sample(aten.view_as.default, x(4, 6), x(4, 2, 3))
    yield sample(aten.reshape_as.default, x(4, 6), x(24))
    yield sample(aten.flatten.using_ints, x(4, 3, 5), 1, 2)
    yield sample(aten.flatten.using_ints, x(4, 3, 5))
    yield sample(aten.ravel.default, x(4, 5))
    yield sample(aten.unflatten.int, x(4, 6), 1, [2, 3], rewrites=[{2: [2, -1]}, {2: [-1, 3]}])
    for name, shapes in {"atleast_1d": ((), (4,)), "atleast_2d": ((4,), (4, 5)), "atleast_3d": ((4,), (4, 5))}.items():
        yield from (sample(getattr(aten, name).default, x(*shape)) for shape in shapes)
    yield sample(aten.view_as_real.default, complex_numbers(4, 5))
    yield sample(aten.view_as_complex.default, x(4, 5, 2))
    yield sample(aten.view.dtype, x(4, 5), torch.int64, frozen=(0,))
    yield sample(aten.view.dtype, ints(9, 4, 5), torch.int32)
    yield sample(aten.pixel_shuffle.default, x(4, 12, 3, 5), 2)
    yield sample(aten.pixel_shuffle.default, x(8, 3, 5), 2)
    yield sample(aten.pixel_unshuffle.default, x(3, 4, 6), 2)
    for name in ("channel_shuffle", "native_channel_shuffle"):
        yield sample(getattr(aten, name).default, x(5, 8, 3), 4, rewrites=[{1: 2}], frozen=(0,) if name.startswith("native") else ())


_RESHAPES: tuple[tuple[list[int], list[int]], ...] = (
    ([4, 6], [24]),
    ([24], [4, 6]),
    ([4, 6, 5], [24, 5]),
    ([4, 6, 5], [4, 30]),
    ([4, 5, 12], [4, 5, 3, 4]),
    ([4, 5, 3, 4], [20, 12]),
    ([6, 4], [4, 6]),
    ([4, 6, 5], [4, 10, 3]),
    ([1, 4, 5], [4, 1, 5]),
    ([4, 5], [4, 5]),
    ([2, 4, 3], [8, 3]),
    ([6], [2, 3, 1]),
    ([5, 7], [35]),
    ([8, 9], [6, 12]),
    ([1, 1], []),
    ([], [1]),
)


def _reshape(source: list[int], out: list[int]) -> Sample:
    one_open = [{1: [-1 if place == dim else size for place, size in enumerate(out)]} for dim in range(len(out))]
    return sample(aten.reshape.default, x(*source), out, rewrites=one_open)


def _copied() -> Iterator[Sample]:
    yield sample(aten.expand.default, x(4, 1, 5), [4, 3, 5], rewrites=[{1: [-1, 3, -1]}])
    yield sample(aten.expand.default, x(4, 5), [6, -1, 5], rewrites=[{1: [6, -1, -1]}])
    yield sample(aten.expand.default, x(1, 5), [4, 1, 5], rewrites=[{1: [4, -1, -1]}])
    yield sample(aten.expand.default, x(), [4])
    yield sample(aten.broadcast_to.default, x(4, 1), [4, 5], rewrites=[{1: [-1, 5]}])
    yield sample(aten.expand_as.default, x(4, 1), x(3, 4, 5))
    yield sample(aten.repeat.default, x(4, 5), [3, 1, 2])
    yield sample(aten.repeat.default, x(4, 5), [2, 1])
    yield sample(aten.repeat.default, x(), [3])
    yield sample(aten.repeat.default, x(4, 5), [0, 1])
    yield sample(aten.tile.default, x(4, 5), [2])
    yield sample(aten.tile.default, x(4), [2, 3])
    yield sample(aten.repeat_interleave.self_int, x(4, 5), 3, 0)
    yield sample(aten.repeat_interleave.self_int, x(4, 5), 2, -1, output_size=10)
    yield sample(aten.repeat_interleave.self_int, x(4, 5), 2)
    yield sample(aten.repeat_interleave.self_Tensor, x(4, 5), ints(3, 5), -1)
    yield sample(aten.repeat_interleave.self_Tensor, x(4, 5), torch.tensor(2))
    yield sample(aten.repeat_interleave.self_Tensor, x(4, 2), torch.tensor([2, 3]), 1, output_size=5)
    yield sample(aten.repeat_interleave.Tensor, ints(3, 5) + 1)
    yield sample(aten.kron.default, x(4, 3), x(2, 5))
    yield sample(aten.kron.default, x(4), x(3, 5))


def _sliced() -> Iterator[Sample]:
    for target in (aten.slice.Tensor, aten.slice_scatter.default):
        for shape, *arguments in _SLICES:
            whole = x(*shape)
            piece = torch.randn_like(aten.slice.Tensor(whole, *arguments))
            if target is aten.slice.Tensor:
                yield sample(target, whole, *arguments, rewrites=_halved(arguments))
            elif 0 < piece.numel() < whole.numel():  # a slice of everything or of nothing is all or none of the result
                yield sample(target, whole, piece, *arguments)
    yield sample(aten.slice.Tensor, x(8, 5), dim=0, end=4, rewrites=[])
    yield sample(aten.narrow.default, x(4, 6), 1, 2, 3)
    yield sample(aten.narrow.default, x(4, 6), -1, -3, 3, rewrites=[{2: -1, 3: 1}])
    yield sample(aten.select.int, x(4, 5, 6), 1, -1)
    yield sample(aten.select_scatter.default, x(4, 5), x(4), 1, -1)


_SLICES: tuple[tuple[Any, ...], ...] = (
    ([4, 5, 6], 1, 1, 4),
    ([8, 5], 0, 0, maxsize, 2),
    ([4, 9], 1, 2, 9, 3),
    ([4, 9], 1, 4, maxsize, 3),
    ([8, 5], -1, -2),
    ([8, 5],),
    ([4, 6], -1, 3),
    ([5, 12], 1, 4, 8),
    ([5, 8], 1, None, -4),
    ([5, 4], 1, 2, 2),
)


def _halved(arguments: list[Any]) -> list[dict[int, Any]]:
    """The same slice of a part half as long."""
    numbers = {place: value // 2 for place, value in enumerate(arguments, 1) if place in (2, 3) and value and abs(value) < maxsize}
    return [numbers] if numbers else []


def _split() -> Iterator[Sample]:
    for target in (aten.split.Tensor, aten.unsafe_split.Tensor):
        yield sample(target, x(4, 12), 4, 1, rewrites=[{1: 2}])
        yield sample(target, x(7, 5), 3)
    for target in (aten.split_with_sizes.default, aten.unsafe_split_with_sizes.default, aten.split.sizes, aten.split.default):
        yield sample(target, x(4, 12, 5), [4, 4, 4], -2, rewrites=[{1: [2, 2, 2]}])
        yield sample(target, x(4, 9), [2, 3, 4], 1)
    for target in (aten.chunk.default, aten.unsafe_chunk.default):
        yield sample(target, x(4, 8), 2, -1)
        yield sample(target, x(8, 5), 2)
        yield sample(target, x(7, 5), chunks=3)
    yield sample(aten.tensor_split.sections, x(4, 9), 2, 1)
    yield sample(aten.tensor_split.indices, x(4, 9), [3, 6], dim=-1)
    yield sample(aten.hsplit.int, x(4, 6), 2)
    yield sample(aten.hsplit.array, x(6), [2, 3])
    yield sample(aten.vsplit.int, x(4, 6), 2)
    yield sample(aten.vsplit.array, x(4, 6), [1])
    yield sample(aten.dsplit.int, x(4, 3, 6), 2)
    yield sample(aten.dsplit.array, x(4, 3, 6), [2])
    yield sample(aten.unbind.int, x(4, 3, 5), 1)
    yield sample(aten.unbind.int, x(3, 5))


def _joined() -> Iterator[Sample]:
    for target in (aten.cat.default, aten.concat.default, aten.concatenate.default):
        yield sample(target, [x(4, 3), x(4, 3)], -1)
        yield sample(target, [x(4, 3), x(4, 5)], 1)
        yield sample(target, [x(4, 5), x(4, 5), x(4, 5)])
    yield sample(aten.cat.default, [x(0), x(4, 5)], frozen=(0,))
    yield sample(aten.cat.default, [x(4, 5), x(4, 5)], dim=1)
    yield sample(aten.stack.default, [x(4, 5), x(4, 5)])
    yield sample(aten.stack.default, [x(4, 5), x(4, 5), x(4, 5)], -1)
    yield sample(aten.stack.default, [x(), x(), x()])
    for target in (aten.hstack, aten.vstack, aten.row_stack, aten.dstack, aten.column_stack):
        yield sample(target.default, [x(4), x(4)])
        yield sample(target.default, [x(4, 6), x(4, 6)])
    yield sample(aten.hstack.default, [x(4, 3), x(4, 2)])
    yield sample(aten.vstack.default, [x(5), x(4, 5)])
    yield sample(aten.column_stack.default, [x(4), x(4, 5)])
    yield sample(aten.block_diag.default, [x(4, 3), x(2, 5)])
    yield sample(aten.cartesian_prod.default, [x(4), x(3)])
    yield sample(aten.meshgrid.default, [x(4), x(3)])
    yield sample(aten.meshgrid.indexing, [x(4), x(3), x()], indexing="ij")
    yield sample(aten.meshgrid.indexing, [x(4), x(3)], indexing="xy")


def _ends() -> Iterator[Sample]:
    yield sample(aten.pad.default, x(4, 3, 5), [1, 2])
    yield sample(aten.pad.default, x(4, 3, 5), [0, 0, 1, 0], "constant", 2.0)
    yield sample(aten.pad.default, x(4, 3, 5), [2, 1], mode="reflect")
    yield sample(aten._pad_enum.default, x(4, 3, 5), [2, 1], 1)
    yield sample(aten._pad_enum.default, x(4, 5), [2, 1], 3, 3.0)
    yield sample(aten._pad_circular.default, x(4, 3, 5), [2, 1])
    yield sample(aten.constant_pad_nd.default, x(4, 5), [0, 0, 1, 1], -1.0)
    yield sample(aten.constant_pad_nd.default, x(4, 5), [0, -1])
    for kind in ("reflection", "replication"):
        yield sample(getattr(aten, f"{kind}_pad1d").default, x(4, 3, 5), [2, 1])
        yield sample(getattr(aten, f"{kind}_pad2d").default, x(4, 3, 5), [2, 1, 0, 1])
        yield sample(getattr(aten, f"{kind}_pad3d").default, x(4, 3, 5, 2), [0, 0, 2, 1, 0, 0])
    yield sample(aten.roll.default, x(4, 5, 6), [1], [-2])
    yield sample(aten.roll.default, x(4, 5), [2])
    yield sample(aten.flip.default, x(4, 3, 5), [0, -1])
    yield sample(aten.flip.default, x(4, 5), [])
    yield sample(aten.fliplr.default, x(4, 3, 5))
    yield sample(aten.flipud.default, x(4, 3, 5))
    for quarters in (0, 1, 2, -1):
        yield sample(aten.rot90.default, x(4, 3, 5), quarters, [0, -1])
    yield sample(aten.rot90.default, x(4, 5))


def _diagonals() -> Iterator[Sample]:
    for target in (aten.tril.default, aten.triu.default):
        yield sample(target, x(5, 4))
        yield sample(target, x(3, 4, 6), 1)
        yield sample(target, x(4, 6), diagonal=-2)
    yield sample(aten.diagonal.default, x(4, 3, 5))
    yield sample(aten.diagonal.default, x(4, 3, 5), 1, -1, 0)
    yield sample(aten.linalg_diagonal.default, x(4, 3, 5), offset=-1)
    yield sample(aten.diagonal_scatter.default, x(4, 3, 5), x(5, 3))
    yield sample(aten.diagonal_scatter.default, x(4, 3, 5), x(3, 4), 1, 0, -1)
    yield sample(aten.diag_embed.default, x(4, 5))
    yield sample(aten.diag_embed.default, x(4, 5), -1, 0, 2)
    yield sample(aten.diag.default, x(4))
    yield sample(aten.diag.default, x(4, 5), 1)
    yield sample(aten.diagflat.default, x(2, 2))
    yield sample(aten.trace.default, x(4, 5))
    yield sample(aten.combinations.default, x(5))


def _windows() -> Iterator[Sample]:
    yield sample(aten.unfold.default, x(4, 9, 5), 1, 3, 2)
    yield sample(aten.unfold.default, x(4, 12), -1, 4, 4, rewrites=[{2: 2, 3: 2}])
    yield sample(aten.im2col.default, x(4, 3, 5, 6), [2, 2], [1, 1], [0, 1], [1, 2])
    yield sample(aten.im2col.default, x(3, 5, 6), [2, 1], [1, 1], [0, 0], [1, 1])
    yield sample(aten.col2im.default, x(4, 12, 20), [5, 6], [2, 2], [1, 1], [0, 0], [1, 1])
    yield sample(aten.col2im.default, x(12, 20), [5, 6], [2, 2], [1, 1], [0, 0], [1, 1])
