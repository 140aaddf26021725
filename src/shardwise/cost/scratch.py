"""Bytes that a message holds beside its input and its result until it has arrived: what `shardwise.runtime.collectives` copies, pads and
receives into, by implementation.

    all_gather      native      rows of equal length, where they are not the result itself
                    exchange    the parts, where they are not runs of memory in the result
    reduce_scatter  native      the same, and this rank's row where rows are longer than parts
                    exchange    every other rank's summand of this rank's part
                    all_reduce  the whole
    all_reduce      exchange    every other rank's summand of this rank's shard; of two ranks in place, the other's tensor
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from torch import fx

from shardwise.sharding.collectives import COLLECTIVES, group_ranks

__all__ = ["gathering_bytes", "node_scratch_bytes", "scattering_bytes", "summing_bytes"]


def gathering_bytes(impl: str, shape: Sequence[int], itemsize: int, dim: int, sizes: Sequence[int], rank: int) -> int:
    """Of an all_gather to a tensor of `shape`, of elements of so many bytes, from contiguous parts of `sizes` along `dim`."""
    line, inner, ranks = _line(shape, dim) * itemsize, prod(shape[:dim]) > 1, len(sizes)
    if ranks == 1 or not prod(shape) or impl == "all_reduce":
        return 0
    if impl == "exchange":
        return sum(sizes) * line if inner and sum(size > 0 for size in sizes) > 1 else 0
    rows = 0 if _even(sizes) and not inner else max(sizes) * ranks
    return (rows + (max(sizes) if sizes[rank] < max(sizes) else 0)) * line


def scattering_bytes(
    impl: str, shape: Sequence[int], itemsize: int, dim: int, sizes: Sequence[int], rank: int, *, contiguous: bool = True
) -> int:
    """Of a reduce_scatter of a tensor of `shape` to parts of `sizes` along `dim`."""
    line, apart, ranks = _line(shape, dim) * itemsize, prod(shape[:dim]) > 1 or not contiguous, len(sizes)
    whole = sum(sizes) * line
    if ranks == 1 or not prod(shape):
        return 0
    if impl == "all_reduce":
        return whole
    if impl == "exchange":
        return (whole if apart else 0) + (ranks - 1) * sizes[rank] * line
    if _even(sizes):
        return whole if apart else 0
    return (ranks + 1) * max(sizes) * line


def summing_bytes(
    impl: str, count: int, itemsize: int, ranks: int, *, contiguous: bool = True, inplace: bool = False, begun: bool = False
) -> int:
    """Of an all_reduce of so many elements, on the rank with the largest shard. inplace: whether its result is its input; begun: whether it
    is one of `begin_all_reduce`."""
    if ranks == 1 or impl != "exchange":
        return 0
    copied, shard = 0 if contiguous else count, -(-count // ranks)
    if ranks == 2:
        return (copied + (count if inplace else 0)) * itemsize
    return (copied + (ranks - 1) * shard + ((shard if begun else count) if inplace else 0)) * itemsize


def node_scratch_bytes(node: fx.Node) -> int:
    """Of a collective in a graph; 0 of those that send to each rank something else."""
    source: Any = node.args[0]
    kind, meta, impl = COLLECTIVES[node.target], source.meta["val"], str(node.args[-1])  # type: ignore[index]
    arguments: Any = node.args
    if kind == "all_gather":
        _, _, dim, sizes, _ = arguments
        rank = next((rank for rank, size in enumerate(sizes) if size == meta.shape[dim]), 0)  # one with as large a part
        return gathering_bytes(impl, node.meta["val"].shape, meta.element_size(), dim, sizes, rank)
    if kind == "reduce_scatter":
        _, _, dim, sizes, rank, _ = arguments
        return scattering_bytes(impl, meta.shape, meta.element_size(), dim, sizes, rank, contiguous=meta.is_contiguous())
    if kind == "all_reduce":
        ranks = len(group_ranks(arguments[1]))
        return summing_bytes(impl, meta.numel(), meta.element_size(), ranks, contiguous=meta.is_contiguous())
    return 0


def _line(shape: Sequence[int], dim: int) -> int:
    """Elements for each index along the dim."""
    return prod(size for place, size in enumerate(shape) if place != dim)


def _even(sizes: Sequence[int]) -> bool:
    return max(sizes) * len(sizes) == sum(sizes)
