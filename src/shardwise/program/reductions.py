"""Which gradients a rank sums over which groups once a step, in which order.

Gradients that are summed over the same groups travel together, in flat messages of about BUCKET_BYTES, those that the backward pass
finishes
first in the first, so that it can be sent while the pass goes on. The order is that of the groups' names, which is the same on every rank
that meets in them; data and tensor axes come before tied stages.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

import torch

from shardwise.program.actions import Kind
from shardwise.program.program import ParameterPart, Program
from shardwise.sharding.collectives import group_name

__all__ = ["DATA_AXES", "Reduction", "joined_ranks", "reductions", "tie_ranks"]


DATA_AXES = ("dp", "cp")  # gradients that are pending over both are summed over both at once
BUCKET_BYTES = 24 * 2**20  # large enough for the link's full rate, small enough that most is sent before the backward pass ends


@dataclass(frozen=True, kw_only=True)
class Reduction:
    """One flat message of gradients, summed over one group after the other (over none where nothing is pending)."""

    groups: tuple[str, ...]
    dtype: torch.dtype
    parameters: tuple[ParameterPart, ...]

    @property
    def sizes(self) -> list[int]:
        """Elements of each parameter's gradient."""
        return [prod(parameter.local) for parameter in self.parameters]

    @property
    def nbytes(self) -> int:
        """Of the message."""
        return sum(self.sizes) * self.dtype.itemsize


def reductions(program: Program) -> list[Reduction]:
    """All gradients of a rank, those that nothing is pending for first."""
    keyed: dict[tuple[tuple[str, ...], torch.dtype], list[ParameterPart]] = {}
    for parameter in program.parameters:
        if parameter.requires_grad:
            keyed.setdefault((_groups_of(program, parameter), parameter.dtype), []).append(parameter)
    done = _completion(program)
    ordered = sorted(keyed, key=lambda key: (len(key[0]), key[0], str(key[1])))
    return [found for groups, dtype in ordered for found in _messages(groups, dtype, keyed[groups, dtype], done)]


def _messages(
    groups: tuple[str, ...], dtype: torch.dtype, parameters: list[ParameterPart], done: dict[str, tuple[int, int]]
) -> list[Reduction]:
    """Stages meet tied parameters in unlike orders; in the message they lie in that of their names."""
    if any(name.startswith("tie:") for name in groups) or not groups:
        return [Reduction(groups=groups, dtype=dtype, parameters=tuple(sorted(parameters, key=lambda each: each.name)))]
    buckets: list[list[ParameterPart]] = [[]]
    for parameter in sorted(parameters, key=lambda each: (done.get(each.name, (-1, -1)), each.name)):
        if buckets[-1] and sum(prod(each.local) for each in buckets[-1]) * dtype.itemsize >= BUCKET_BYTES:
            buckets.append([])
        buckets[-1].append(parameter)
    return [Reduction(groups=groups, dtype=dtype, parameters=tuple(bucket)) for bucket in buckets]


def _completion(program: Program) -> dict[str, tuple[int, int]]:
    """Where each parameter's gradient is finished: the last action that adds to it, and the place in that one's graph."""
    number = {action: index for index, action in enumerate(program.actions)}
    places: dict[tuple[Kind, int], dict[str, int]] = {}
    for stage in program.stages.values():
        for kind, graph in stage.graphs.items():
            if kind in (Kind.BACKWARD, Kind.WEIGHT):
                place = {node: index for index, node in enumerate(graph.nodes)}
                places[kind, stage.stage] = {name: place[node] for name, node in stage.gradients(kind).items()}
    last = {name: actions[-1] for name, actions in program.writers().items()}
    return {name: (number[action], places[action.kind, action.stage][name]) for name, action in last.items()}


def tie_ranks(program: Program, parameter: ParameterPart) -> tuple[int, ...]:
    """The ranks of all stages that hold the same part of a tied parameter; empty when one rank has them all."""
    pipes = sorted({program.placement[stage] for stage in parameter.stages})
    if len(pipes) < 2:
        return ()
    stride = program.mesh["dp"] * program.mesh["cp"] * program.mesh["tp"]
    first = program.rank - program.coordinates["pp"] * stride
    return tuple(first + pipe * stride for pipe in pipes)


def joined_ranks(rank: int, groups: Iterable[tuple[int, ...]]) -> tuple[int, ...]:
    """The ranks that are reached from one by steps within its groups along several axes."""
    found = {rank}
    for group in groups:
        found = {each + other - rank for each in found for other in group}
    return tuple(sorted(found))


def _groups_of(program: Program, parameter: ParameterPart) -> tuple[str, ...]:
    data = [axis for axis in parameter.reduce if axis in DATA_AXES]
    names = [group_name("+".join(data), joined_ranks(program.rank, [program.groups[axis] for axis in data]))] if data else []
    names += [group_name(axis, program.groups[axis]) for axis in parameter.reduce if axis not in DATA_AXES]
    if ties := tie_ranks(program, parameter):
        names.append(group_name("tie", ties))
    return tuple(names)
