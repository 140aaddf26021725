"""Searches for ways of splitting an operator by trying them: give the ranks parts or summands of its inputs, run it, and see whether what
they make can be put together to the whole, forward and backward.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor

from shardwise.capture.graph import Op
from shardwise.sharding.dealing import Mismatch, combine, distribute, inexact, require_same
from shardwise.sharding.reshard import dual
from shardwise.sharding.trial import Reference, Sample, execute, gradients_of, leaves_of
from shardwise.sharding.types import P, Placement, R, Shard, Type

__all__ = ["Candidate", "candidates", "too_small", "works_on"]

Candidate = tuple[Placement, ...]  # the type of every input


def candidates(case: Sample, *, blocked: bool = False) -> Iterator[Candidate]:
    """For each input a dim that is split (several inputs: dims of equal size), a sum, or the whole; not all whole.

    blocked: dims also in every number of blocks.
    """
    options: list[list[Placement]] = []
    for tensor, value in zip(case.tensors, case.op.inputs, strict=True):
        sums: list[Placement] = [P] if value.requires_grad else []
        options.append([R, *sums, *_shards(tensor, blocked=blocked)])
    for candidate in product(*options):
        sizes = {tensor.shape[each.dim] for tensor, each in zip(case.tensors, candidate, strict=True) if isinstance(each, Shard)}
        if len(sizes) < 2 and any(each != R for each in candidate):
            yield candidate


def _shards(tensor: Tensor, *, blocked: bool) -> list[Shard]:
    """Every dim; in every number of blocks, too."""
    counts = {dim: range(1, size if blocked else 2) for dim, size in enumerate(tensor.shape)}
    return [Shard(dim, blocks) for dim, size in enumerate(tensor.shape) for blocks in counts[dim] if size % blocks == 0 and size > blocks]


def too_small(case: Sample, candidate: Candidate, ranks: int) -> bool:
    """Whether some rank would get nothing."""
    split = [(tensor.shape[each.dim], each.blocks) for tensor, each in zip(case.tensors, candidate, strict=True) if isinstance(each, Shard)]
    return any(size // blocks < ranks for size, blocks in split)


def works_on(case: Sample, op: Op, candidate: Candidate, whole: Reference, ranks: int) -> tuple[Placement, ...] | None:
    """The outputs' placements if `op` itself, run on the parts that so many ranks hold, recombines forward and backward."""
    mesh = {"tp": ranks}
    inputs = [distribute(tensor, {"tp": each}, mesh) for tensor, each in zip(case.tensors, candidate, strict=True)]
    leaves = [leaves_of([held[rank] for held in inputs], op) for rank in range(ranks)]
    try:
        made = [execute(op, each) for each in leaves]
    except Exception:  # whatever an operator raises when it is given parts: it cannot be split so
        return None
    if any(len(each) != len(whole.outputs) for each in made):
        return None
    outputs = [_recombined([each[index].detach() for each in made], out, case.tolerance) for index, out in enumerate(whole.outputs)]
    placements = tuple(each for each in outputs if each is not None)
    if len(placements) < len(outputs):
        return None
    seeds = [_dealt(seed, placements[index], [each[index] for each in made]) for index, seed in enumerate(whole.seeds)]
    gradients = [gradients_of(made[rank], [held[rank] for held in seeds], leaves[rank]) for rank in range(ranks)]
    for index, (wanted, each) in enumerate(zip(whole.gradients, candidate, strict=True)):
        held = [found[index] for found in gradients]
        if op.inputs[index].requires_grad and not _agree(held, {"tp": dual(each)}, mesh, wanted, case.tolerance):
            return None
    return placements


def _agree(held: list[Tensor], type_: Type, mesh: Mapping[str, int], wanted: Tensor, tolerance: float) -> bool:
    try:
        require_same(combine(held, type_, mesh, wanted.shape, tolerance), wanted, "", tolerance)
    except Mismatch:
        return False
    return True


def _recombined(parts: list[Tensor], wanted: Tensor, tolerance: float) -> Placement | None:
    """How these parts make up the whole: joined along a dim (in blocks), or added."""
    if any(each.dtype != wanted.dtype or each.dim() != wanted.dim() for each in parts):
        return None
    if inexact(wanted) and all(each.shape == wanted.shape for each in parts) and _same_values(sum(parts), wanted, tolerance):
        return P
    for dim, size in enumerate(wanted.shape):
        if sum(each.shape[dim] for each in parts) != size or any(_other_sizes(each, dim) != _other_sizes(wanted, dim) for each in parts):
            continue
        for blocks in range(1, size + 1):
            fits = all(each.shape[dim] and each.shape[dim] % blocks == 0 for each in parts)
            if fits and _same_values(_blocked_cat(parts, dim, blocks), wanted, tolerance):
                return Shard(dim, blocks)
    return None


def _same_values(found: Any, wanted: Tensor, tolerance: float) -> bool:
    return _agree([found], {}, {}, wanted, tolerance)


def _other_sizes(tensor: Tensor, dim: int) -> tuple[int, ...]:
    return (*tensor.shape[:dim], *tensor.shape[dim + 1 :])


def _blocked_cat(parts: Sequence[Tensor], dim: int, blocks: int) -> Tensor:
    opened = [each.unflatten(dim, (blocks, -1)) for each in parts]
    return torch.cat(opened, dim + 1).flatten(dim, dim + 1)


def _dealt(seed: Tensor, placement: Placement, parts: Sequence[Tensor]) -> list[Tensor]:
    """Each rank's gradient of an output, in the sizes that its parts have."""
    if not isinstance(placement, Shard) or not seed.shape:
        return [seed] * len(parts)
    opened = seed.unflatten(placement.dim, (placement.blocks, -1))
    pieces = opened.split([each.shape[placement.dim] // placement.blocks for each in parts], placement.dim + 1)
    return [each.flatten(placement.dim, placement.dim + 1) for each in pieces]
