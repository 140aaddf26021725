"""Which gradients a rank sums over which groups once a step, and which updated parameters it gathers, in which order.

Gradients that are summed over the same groups travel together, in flat messages of about BUCKET_BYTES, those that the backward pass
finishes first in the first, so that it can be sent while the pass goes on. The order is that of the groups' names, which is the same on
every rank that meets in them; data and tensor axes come before tied stages.

Where data ranks divide the optimizer's states (ZeRO-1) a message is reduced to the ranks' parts before what else it is summed over; where
they divide gradients (ZeRO-2, 3) the backward graph has done so. Parameters of which each rank has updated its part, and which all have
whole, are gathered after the update. Large parameters that are reduced to parts or gathered go alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

import torch

from shardwise.program.actions import Action
from shardwise.program.program import ParameterPart, Program
from shardwise.sharding.collectives import group_name
from shardwise.sharding.division import Division

__all__ = [
    "ALONE_BYTES",
    "DATA_AXES",
    "UNDER_WAY",
    "Reduction",
    "Regathering",
    "beginnings",
    "joined_ranks",
    "pending",
    "reductions",
    "regatherings",
    "tie_ranks",
]


DATA_AXES = ("dp", "ep", "cp")  # gradients that are pending over several of them are summed over these at once
BUCKET_BYTES = 24 * 2**20  # large enough for the link's full rate, small enough that most is sent before the backward pass ends
ALONE_BYTES = 2**20  # of a parameter that goes alone where others would have to be copied for a message: worth its latency
UNDER_WAY = 2  # messages at once during the backward pass: one travels while the next is made


@dataclass(frozen=True, kw_only=True)
class Reduction:
    """One flat message of gradients, reduced to the ranks' parts over `scatter` (if not ""), then summed over one group after the other
    (over none where nothing is pending)."""

    groups: tuple[str, ...]
    dtype: torch.dtype
    parameters: tuple[ParameterPart, ...]
    scatter: str = ""

    @property
    def early(self) -> bool:
        """Whether it can be begun during the backward pass.

        Not sums over two groups or between tied stages, whose backward passes end at other times and which number their messages otherwise;
        but what is reduced to parts first is begun.
        """
        return bool(self.scatter) or (len(self.groups) == 1 and not self.groups[0].startswith("tie:"))

    @property
    def sizes(self) -> list[int]:
        """Elements of each parameter's gradient, as the backward graph makes it."""
        return [prod(parameter.gradient) for parameter in self.parameters]

    @property
    def nbytes(self) -> int:
        """Of the message."""
        return sum(self.sizes) * self.dtype.itemsize

    @property
    def summed(self) -> int:
        """Elements that are summed over the groups."""
        return sum(prod(parameter.updated) for parameter in self.parameters)

    @property
    def divisions(self) -> list[Division]:
        """Of the parameters that the ranks of `scatter` divide."""
        return [parameter.division for parameter in self.parameters if parameter.division is not None]


@dataclass(frozen=True, kw_only=True)
class Regathering:
    """One flat message of parameters of which each rank of the group has updated its part."""

    group: str
    dtype: torch.dtype
    parameters: tuple[ParameterPart, ...]

    @property
    def divisions(self) -> list[Division]:
        """Of the parameters."""
        return [parameter.division for parameter in self.parameters if parameter.division is not None]

    @property
    def numel(self) -> int:
        """Elements of the whole."""
        return sum(prod(parameter.local) for parameter in self.parameters)

    @property
    def nbytes(self) -> int:
        """Of the whole."""
        return self.numel * self.dtype.itemsize


def reductions(program: Program) -> list[Reduction]:
    """All gradients of a rank, those that nothing is pending for first."""
    keyed: dict[tuple[tuple[str, ...], str, torch.dtype], list[ParameterPart]] = {}
    for parameter in program.parameters:
        if parameter.requires_grad:
            scatter = parameter.division.group if parameter.division and parameter.zero == 1 else ""
            keyed.setdefault((_groups_of(program, parameter), scatter, parameter.wide), []).append(parameter)
    done = _completion(program)
    ordered = sorted(keyed, key=lambda key: (len(key[0]), key[0], key[1], str(key[2])))
    return [
        Reduction(groups=groups, dtype=dtype, parameters=parameters, scatter=scatter)
        for groups, scatter, dtype in ordered
        for parameters in (_alone if scatter else _messages)(groups, keyed[groups, scatter, dtype], done)
    ]


def pending(program: Program) -> list[Reduction]:
    """Those of a rank's gradients that are sent."""
    return [reduction for reduction in reductions(program) if reduction.groups or reduction.scatter]


def beginnings(program: Program) -> dict[Action, dict[int, set[str]]]:
    """Action of the backward pass → the messages that it begins, by their numbers among `pending`: each as soon as the gradients of the
    named parameters are there."""
    writers = program.writers()
    number = {action: index for index, action in enumerate(program.actions)}
    found: dict[Action, dict[int, set[str]]] = {}
    for message, reduction in enumerate(pending(program)):
        names = {parameter.name for parameter in reduction.parameters} if reduction.early else set()
        last = max((writers[name][-1] for name in names if name in writers), key=number.__getitem__, default=None)
        if last is not None:
            found.setdefault(last, {})[message] = names
    return found


def regatherings(program: Program) -> list[Regathering]:
    """The parameters that a rank gathers after their update."""
    keyed: dict[tuple[str, torch.dtype], list[ParameterPart]] = {}
    for parameter in program.parameters:
        if parameter.requires_grad and parameter.division and parameter.zero in (1, 2):
            keyed.setdefault((parameter.division.group, parameter.dtype), []).append(parameter)
    ordered = sorted(keyed, key=lambda key: (key[0], str(key[1])))
    return [
        Regathering(group=group, dtype=dtype, parameters=parameters)
        for group, dtype in ordered
        for parameters in _alone((group,), keyed[group, dtype], {})
    ]


def _alone(groups: tuple[str, ...], parameters: list[ParameterPart], done: dict[str, tuple[int, int]]) -> list[tuple[ParameterPart, ...]]:
    """Parts of several parameters have to be put together for a message and taken apart again; large ones are spared that."""
    small = [each for each in parameters if prod(each.local) * each.wide.itemsize < ALONE_BYTES]
    large = sorted((each for each in parameters if each not in small), key=lambda each: (done.get(each.name, (-1, 0)), each.name))
    return [*((each,) for each in large), *(_messages((*groups, "divided"), small, done) if small else [])]


def _messages(
    groups: tuple[str, ...], parameters: list[ParameterPart], done: dict[str, tuple[int, int]]
) -> list[tuple[ParameterPart, ...]]:
    """Stages meet tied parameters in unlike orders; in the message they lie in that of their names."""
    if any(name.startswith("tie:") for name in groups) or not any(groups):
        return [tuple(sorted(parameters, key=lambda each: each.name))]
    buckets: list[list[ParameterPart]] = [[]]
    for parameter in sorted(parameters, key=lambda each: (done.get(each.name, (-1, 0)), each.name)):
        if buckets[-1] and sum(prod(each.local) * each.wide.itemsize for each in buckets[-1]) >= BUCKET_BYTES:
            buckets.append([])
        buckets[-1].append(parameter)
    return [tuple(bucket) for bucket in buckets]


def _completion(program: Program) -> dict[str, tuple[int, int]]:
    """When each parameter's gradient is finished: the last action that adds to it, and there what is read last comes first.

    Not its place in that action's graph: ranks with unlike shares of the batch have unlike graphs, and must order their messages alike.
    """
    number = {action: index for index, action in enumerate(program.actions)}
    last = {name: actions[-1] for name, actions in program.writers().items()}
    return {
        part.name: (number[last[part.name]], -index)
        for stage in program.stages.values()
        for index, part in enumerate(stage.parameters)
        if part.name in last and last[part.name].stage == stage.stage
    }


def tie_ranks(program: Program, parameter: ParameterPart) -> tuple[int, ...]:
    """The ranks of all stages that hold the same part of a tied parameter; empty when one rank has them all."""
    pipes = sorted({program.placement[stage] for stage in parameter.stages})
    if len(pipes) < 2:
        return ()
    stride = program.stage_ranks
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
    if parameter.division is not None:  # over its group the gradient is reduced to parts
        names = [parameter.division.copies] if parameter.division.copies else []
    names += [group_name(axis, program.groups[axis]) for axis in parameter.reduce if axis not in DATA_AXES]
    if ties := tie_ranks(program, parameter):
        names.append(group_name("tie", ties))
    return tuple(names)
