"""Whole tensors dealt out to all ranks of a mesh in one process, and put together again.

    whole tensor ──distribute──▶ [rank 0's, rank 1's, …] ──combine──▶ whole tensor

Nothing communicates here: it is for running an operator on parts to see whether a way of splitting it is right. It follows the definitions
of the types (`shardwise.sharding.types`) and, but for `part`, none of the code that a program runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product

import torch
from torch import Tensor

from shardwise.sharding.collectives import group_name
from shardwise.sharding.types import P, Placement, Shard, Type, part

__all__ = ["Mismatch", "combine", "coordinates", "distribute", "group_along", "inexact", "require_same"]


class Mismatch(Exception):
    """Ranks' parts do not make up the whole: the way of splitting is wrong."""


def coordinates(mesh: Mapping[str, int]) -> list[dict[str, int]]:
    """Every rank's place on each axis; the last axis runs fastest."""
    return [dict(zip(mesh, place, strict=True)) for place in product(*(range(ranks) for ranks in mesh.values()))]


def group_along(mesh: Mapping[str, int], axis: str, place: Mapping[str, int]) -> str:
    """The name of the group of ranks that differ from this one on `axis` alone."""
    return group_name(axis, [rank for rank, other in enumerate(coordinates(mesh)) if {**other, axis: place[axis]} == dict(place)])


def distribute(whole: Tensor, type_: Type, mesh: Mapping[str, int]) -> list[Tensor]:
    """What each rank holds of a tensor of this type; summands are random."""
    tensors = [whole]
    for axis, ranks in mesh.items():
        tensors = [each for tensor in tensors for each in _parts(tensor, type_[axis], ranks)]
    return tensors


def _parts(tensor: Tensor, placement: Placement, ranks: int) -> list[Tensor]:
    if isinstance(placement, Shard):
        pieces = (part(tensor.shape[placement.dim], placement, ranks, rank).indices() for rank in range(ranks))
        return [tensor.index_select(placement.dim, indices) for indices in pieces]
    if placement != P:
        return [tensor.clone() for _ in range(ranks)]
    summands = [_random_like(tensor) for _ in range(ranks - 1)]
    return [tensor - sum(summands, torch.zeros_like(tensor)), *summands]


def _random_like(tensor: Tensor) -> Tensor:
    return torch.randn_like(tensor) if inexact(tensor) else torch.randint_like(tensor, -9, 10)


def inexact(tensor: Tensor) -> bool:
    """Whether its numbers are rounded: floating or complex."""
    return tensor.is_floating_point() or tensor.is_complex()


def combine(held: Sequence[Tensor], type_: Type, mesh: Mapping[str, int], sizes: Sequence[int], tolerance: float = 1e-10) -> Tensor:
    """The whole tensor of `sizes` from what each rank holds. Raises Mismatch when ranks that must agree do not."""
    if not mesh:
        return held[0]
    (axis, ranks), *rest = mesh.items()
    placement = type_[axis]
    each = len(held) // ranks
    inner = [_local_sizes(sizes, placement, ranks, rank) for rank in range(ranks)]
    parts = [combine(held[rank * each : (rank + 1) * each], type_, dict(rest), inner[rank], tolerance) for rank in range(ranks)]
    if isinstance(placement, Shard):
        return _joined(parts, placement, sizes)
    if placement == P:
        return sum(parts[1:], parts[0])
    for rank, other in enumerate(parts[1:], 1):
        require_same(other, parts[0], f"ranks 0 and {rank} of {axis} hold different values where the type is {placement}", tolerance)
    return parts[0]


def _local_sizes(sizes: Sequence[int], placement: Placement, ranks: int, rank: int) -> list[int]:
    local = list(sizes)
    if isinstance(placement, Shard):
        local[placement.dim] = part(local[placement.dim], placement, ranks, rank).length
    return local


def _joined(parts: Sequence[Tensor], shard: Shard, sizes: Sequence[int]) -> Tensor:
    shape = list(parts[0].shape)
    shape[shard.dim] = sizes[shard.dim]
    whole = parts[0].new_zeros(shape)
    for rank, held in enumerate(parts):
        indices = part(sizes[shard.dim], shard, len(parts), rank).indices()
        if held.shape[shard.dim] != len(indices):
            raise Mismatch(f"rank {rank} holds {list(held.shape)}, not {len(indices)} elements of {shard}")
        whole.index_copy_(shard.dim, indices, held)
    return whole


def require_same(found: Tensor, wanted: Tensor, what: str, tolerance: float = 1e-10) -> None:
    """Same dtype and shape, and equal to `tolerance` (relative, or of the largest number; whole numbers exactly). Raises Mismatch."""
    if found.dtype != wanted.dtype or found.shape != wanted.shape:
        raise Mismatch(f"{what}: {found.dtype} {list(found.shape)}, not {wanted.dtype} {list(wanted.shape)}")
    if not inexact(found):
        if not torch.equal(found, wanted):
            raise Mismatch(f"{what}: {int((found != wanted).sum())} of {wanted.numel()} elements differ")
        return
    largest = float(wanted.detach().abs().nan_to_num(0.0, 0.0, 0.0).max()) if wanted.numel() else 0.0
    close = torch.isclose(found, wanted, rtol=tolerance, atol=tolerance * max(1.0, largest), equal_nan=True)
    if not close.all():
        raise Mismatch(f"{what}: differs by up to {(found - wanted).abs().max().item():.3g}")
