"""The type in which a value goes from one stage to another.

It is the type in which the value is made, but for rows at their experts, which go home first, and for summands of which every reader there
wants a part: they are added up before they are sent, so that parts travel and not whole tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import takewhile

from shardwise.capture.graph import Op, Value
from shardwise.sharding.assignment import Assignment
from shardwise.sharding.types import P, Placement, Routed, Shard

__all__ = ["at_home", "edge_type"]


def edge_type(
    assignment: Assignment, stage_of: Mapping[Op, int], readers: Iterable[tuple[Op, int]], value: Value, target: int
) -> dict[str, Placement]:
    """Of `value` on its way to stage `target`. readers: the operators that read it, and as which of their inputs."""
    found = at_home(assignment.produced(value))
    wanted = [at_home(assignment.wanted(op, index)) for op, index in readers if stage_of.get(op) == target]
    for axis, made in found.items():
        wants = {each[axis] for each in wanted}
        if made == P and axis != "mb" and len(wants) == 1 and isinstance(part := wants.pop(), Shard) and _stays(found, wanted, axis, part):
            found[axis] = part
    return found


def at_home(type_: Mapping[str, Placement]) -> dict[str, Placement]:
    """With rows where they are when they are not at their experts."""
    return {axis: each.home if isinstance(each, Routed) else each for axis, each in type_.items()}


def _stays(found: Mapping[str, Placement], wanted: Iterable[Mapping[str, Placement]], axis: str, part: Shard) -> bool:
    """Whether the part is one of what the readers have there: the axes outside split its dim for them as on the way."""
    outside = takewhile(lambda each: each != axis, found)
    pairs = [(found[other], each[other]) for other in outside for each in wanted]
    return all(one == another for one, another in pairs if any(isinstance(p, Shard) and p.dim == part.dim for p in (one, another)))
