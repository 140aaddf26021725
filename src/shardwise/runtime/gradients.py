"""Where a rank's gradients lie, and their reduction at the end of a step.

Gradients that are summed over the same groups lie next to each other in one buffer, so that each such sum is one collective.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from shardwise.program.program import ParameterPart, Program
from shardwise.runtime import collectives
from shardwise.sharding.collectives import group_name

__all__ = ["Gradients", "tie_ranks"]

Choose = Callable[[str, int, int], str]
Groups = dict[str, torch.distributed.ProcessGroup]


@dataclass(frozen=True, kw_only=True)
class _Bucket:
    groups: tuple[str, ...]
    flat: Tensor


def tie_ranks(program: Program, parameter: ParameterPart) -> tuple[int, ...]:
    """The ranks of all stages that hold the same part of a tied parameter; empty when one stage holds it."""
    if len(parameter.stages) < 2:
        return ()
    stride = program.mesh["dp"] * program.mesh["tp"]
    first = program.rank - program.stage.stage * stride
    return tuple(first + stage * stride for stage in parameter.stages)


class Gradients:
    """Buffers for all gradients of a rank: `of[name]` is a parameter's, in its local shape."""

    def __init__(self, program: Program, groups: Groups, choose: Choose, device: torch.device) -> None:
        self.groups, self.choose = groups, choose
        self.of: dict[str, Tensor] = {}
        self.buckets: list[_Bucket] = []
        keyed: dict[tuple[tuple[str, ...], torch.dtype], list[ParameterPart]] = {}
        for parameter in program.stage.parameters:
            if parameter.requires_grad:
                keyed.setdefault((_groups_of(program, parameter), parameter.dtype), []).append(parameter)
        for (names, dtype), parameters in keyed.items():
            self._place(names, dtype, parameters, device)

    def _place(self, names: tuple[str, ...], dtype: torch.dtype, parameters: list[ParameterPart], device: torch.device) -> None:
        sizes = [_count(parameter) for parameter in parameters]
        if not names:
            self.of |= {p.name: torch.zeros(p.local, dtype=dtype, device=device) for p in parameters}
            return
        flat = torch.zeros(sum(sizes), dtype=dtype, device=device)
        self.of |= {p.name: piece.view(p.local) for p, piece in zip(parameters, flat.split(sizes), strict=True)}
        self.buckets.append(_Bucket(groups=names, flat=flat))

    def reduce(self) -> None:
        """Sums what is pending. All ranks meet the groups in the same order: data and tensor axes first, then tied stages."""
        for bucket in sorted(self.buckets, key=lambda each: (len(each.groups), each.groups)):
            for name in bucket.groups:
                group = self.groups[name]
                impl = self.choose("all_reduce", bucket.flat.nbytes, group.size())
                collectives.all_reduce(bucket.flat, group, impl, inplace=True)


def _groups_of(program: Program, parameter: ParameterPart) -> tuple[str, ...]:
    names = [group_name(axis, program.groups[axis]) for axis in parameter.reduce]
    if ties := tie_ranks(program, parameter):
        names.append(group_name("tie", ties))
    return tuple(names)


def _count(parameter: ParameterPart) -> int:
    count = 1
    for size in parameter.local:
        count *= size
    return count
