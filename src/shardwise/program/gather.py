"""Parameters that data ranks divide, where a stage's graphs use them: gathered before they are read, and their gradients reduced to the
ranks' parts as soon as they are whole.

    part ──all-gather──▶ whole ──▶ operators          gradient of the part ◀──reduce-scatter── gradient of the whole

Large parameters go alone, straight into their place; small ones of the same block go in one message:

    rank 0 has  a₀ b₀ c₀        message  a₀ b₀ c₀ | a₁ b₁ c₁        a = a₀ a₁, b = b₀ b₁, c = c₀ c₁
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from shardwise.program.program import ParameterPart
from shardwise.program.reductions import ALONE_BYTES
from shardwise.sharding.collectives import all_gather, reduce_scatter
from shardwise.sharding.division import Division

__all__ = ["Gathering", "gatherings", "packed", "packed_sizes", "unpacked"]

Choose = Callable[[str, int, int], str]


@dataclass(frozen=True, kw_only=True)
class Gathering:
    """Parameters that are gathered in one message.

    choose: (kind of collective, bytes of its message, ranks) → implementation.
    """

    parts: tuple[ParameterPart, ...]
    choose: Choose

    @property
    def key(self) -> Hashable:
        """Equal for those that do the same."""
        return "gather", tuple((part.local, part.dtype, part.wide, part.division) for part in self.parts), self.choose

    def __call__(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The whole tensors of the ranks' parts; differentiable."""
        return list(_Gathered.apply(self, *tensors))

    @property
    def _divisions(self) -> list[Division]:
        assert all(part.division is not None for part in self.parts)
        return [part.division for part in self.parts if part.division is not None]

    def _impl(self, kind: str) -> str:
        gathers = kind == "all_gather"
        nbytes = sum(prod(part.local) * (part.dtype if gathers else part.wide).itemsize for part in self.parts)
        return self.choose(kind, nbytes, self._divisions[0].ranks)

    def gather(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """All ranks' parts joined, as operators read them."""
        tensors = [each.to(part.dtype) for each, part in zip(tensors, self.parts, strict=True)]
        divisions, shapes, impl = self._divisions, [part.local for part in self.parts], self._impl("all_gather")
        if len(self.parts) == 1:
            return [all_gather(tensors[0], divisions[0].group, divisions[0].dim, divisions[0].lengths(shapes[0]), impl)]
        flat = torch.cat([each.reshape(-1) for each in tensors])
        joined = all_gather(flat, divisions[0].group, 0, packed_sizes(divisions, shapes), impl)
        return unpacked(joined, divisions, shapes)

    def scatter(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """This rank's parts of the sums over the ranks, which are taken in the masters' dtype."""
        gradients = [each.to(part.wide) for each, part in zip(gradients, self.parts, strict=True)]
        divisions, impl = self._divisions, self._impl("reduce_scatter")
        group, rank = divisions[0].group, divisions[0].rank
        if len(self.parts) == 1:
            dim, sizes = divisions[0].dim, divisions[0].lengths(self.parts[0].local)
            return [reduce_scatter(gradients[0], group, dim, sizes, rank, impl)]
        sizes = packed_sizes(divisions, [part.local for part in self.parts])
        mine = reduce_scatter(packed(divisions, [_as_described(each) for each in gradients]), group, 0, sizes, rank, impl)
        shapes = [division.shape(part.local) for division, part in zip(divisions, self.parts, strict=True)]
        return [piece.view(shape) for piece, shape in zip(mine.split([prod(shape) for shape in shapes]), shapes, strict=True)]


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, step: Gathering, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.step = step
        return tuple(step.gather(tensors))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *ctx.step.scatter(gradients))


def _as_described(gradient: Tensor) -> Tensor:
    """Contiguous where it runs, too: a convolution's gradients may lie with their channels last, which descriptions do not say."""
    return gradient.clone(memory_format=torch.contiguous_format) if gradient.dim() > 2 else gradient


def packed(divisions: Sequence[Division], wholes: Sequence[Tensor]) -> Tensor:
    """Flat: all tensors' parts of rank 0, then of rank 1, …; of one tensor whose parts are runs of memory, that memory."""
    if len(wholes) == 1 and prod(wholes[0].shape[: divisions[0].dim]) == 1:
        return wholes[0].reshape(-1)
    ranks = range(divisions[0].ranks)
    return torch.cat([division.take(whole, rank).reshape(-1) for rank in ranks for division, whole in zip(divisions, wholes, strict=True)])


def packed_sizes(divisions: Sequence[Division], shapes: Sequence[Sequence[int]]) -> list[int]:
    """Of each rank, how many elements of the flat tensor."""
    ranks = range(divisions[0].ranks)
    return [sum(prod(division.shape(shape, rank)) for division, shape in zip(divisions, shapes, strict=True)) for rank in ranks]


def unpacked(flat: Tensor, divisions: Sequence[Division], shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    """The whole tensors that `packed` made flat."""
    each = [division.shape(shape, rank) for rank in range(divisions[0].ranks) for division, shape in zip(divisions, shapes, strict=True)]
    pieces = [piece.view(shape) for piece, shape in zip(flat.split([prod(shape) for shape in each]), each, strict=True)]
    count = len(divisions)
    return [torch.cat(pieces[index::count], division.dim) for index, division in enumerate(divisions)]


def gatherings(parts: Iterable[ParameterPart], home: Mapping[str, str], choose: Choose) -> dict[str, Gathering]:
    """Parameter → what it is gathered with. home: parameter → its block, of those that one block alone reads."""
    messages: dict[Hashable, list[ParameterPart]] = {}
    for part in parts:
        small = prod(part.local) * part.dtype.itemsize < ALONE_BYTES and part.name in home
        group = part.division.group if part.division else ""
        key: Hashable = (home[part.name], group, part.dtype, part.wide, part.requires_grad) if small else part.name
        messages.setdefault(key, []).append(part)
    found = [Gathering(parts=tuple(message), choose=choose) for message in messages.values()]
    return {part.name: gathering for gathering in found for part in gathering.parts}
