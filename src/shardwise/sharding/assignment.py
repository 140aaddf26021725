"""Which choice every operator makes on every axis, and the types of all tensors that follow.

The mesh's axes, outermost first: `dp` splits the batch, `mb` (microbatches, one after the other) splits what dp leaves of it, `ep` (where
it is there) splits experts and otherwise what mb leaves of the batch, `cp` splits the sequence, `tp` splits anything else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import takewhile

from shardwise.capture.graph import Graph, Op, Value
from shardwise.sharding.signature import Choice, Signature, Variant, factor_part, variant
from shardwise.sharding.types import Placement, R, Shard, canonical, local_shape, part

__all__ = ["AXES", "Assignment", "over_microbatches", "possible", "routed_rows", "set_choice", "split_sizes"]

AXES = ("dp", "mb", "ep", "cp", "tp")


@dataclass(kw_only=True)
class Assignment:
    """mesh: axis → ranks (or microbatches), outermost first. variants: operator → axis → variant. sources: parameter, buffer or input →
    axis → the type in which a rank keeps it. shares: in which proportion the ranks of dp divide the samples; () evenly. zero, shard: what
    data ranks divide of the parameters, and in groups of how many (0: all of them), as of `shardwise.sharding.division`.
    """

    graph: Graph
    mesh: dict[str, int]
    signatures: Mapping[Op, Signature]
    variants: dict[Op, dict[str, Variant]] = field(default_factory=dict)
    sources: dict[Value, dict[str, Placement]] = field(default_factory=dict)
    shares: tuple[int, ...] = ()
    zero: int = 0
    shard: int = 0

    def produced(self, value: Value) -> dict[str, Placement]:
        """The type in which a tensor comes into being."""
        if value.producer is None:
            return {axis: self.sources.get(value, {}).get(axis, R) for axis in self.mesh}
        index = value.producer.outputs.index(value)
        return {axis: self.variants[value.producer][axis].outputs[index] for axis in self.mesh}

    def wanted(self, op: Op, index: int) -> dict[str, Placement]:
        """The type in which an operator takes its input number `index`."""
        return {axis: self.variants[op][axis].inputs[index] for axis in self.mesh}

    def sizes(self, op: Op, before: str) -> dict[str, int]:
        """What the axes outside `before` leave of the operator's factors (on their first rank)."""
        return split_sizes(self, op, before)


def split_sizes(assignment: Assignment, op: Op, before: str) -> dict[str, int]:
    """What the axes outside `before` leave of the operator's factors (on their first rank)."""
    return _all_sizes(assignment, op, before)[0]


def _all_sizes(assignment: Assignment, op: Op, before: str) -> list[dict[str, int]]:
    """What the axes outside `before` leave of the factors: on their first ranks, then where these parts are unequal."""
    found = [dict(assignment.signatures[op].sizes)]
    for axis, ranks in assignment.mesh.items():
        if axis == before:
            break
        choice = assignment.variants[op][axis].choice
        if choice.mode == "route":
            found = [sizes | {choice.factor: sizes[choice.factor] // ranks} for sizes in found]
        if (parts := choice.parts) and ranks > 1:
            found = [sizes | {parts.factor: length} for sizes in found for length in _lengths(parts, sizes[parts.factor], ranks)]
    return found


def _split_outside(assignment: Assignment, op: Op, axis: str) -> set[str]:
    """The factors that axes outside split."""
    outside = takewhile(lambda each: each != axis, assignment.mesh)
    choices = [assignment.variants[op][each].choice for each in outside if assignment.mesh[each] > 1]
    return {choice.factor for choice in choices if choice.mode == "split"}


def _lengths(choice: Choice, size: int, ranks: int) -> list[int]:
    """How much of a factor the ranks get, each length once, the first rank's first."""
    some = range(ranks) if choice.shares else (0, ranks - 1)  # evenly spread, the ranks between get what the first or the last does
    return list(dict.fromkeys(factor_part(choice, size, ranks, rank).length for rank in some))


def possible(assignment: Assignment, op: Op, axis: str, choice: Choice) -> bool:
    """Whether the operator can be split so on the axis, and to the same types on all ranks of the axes outside it: where these left
    unequal parts, blocks and units that are counted in one rank's elements would be wrong on another. Local code that takes no blocks of a
    factor takes no part of a part either."""
    sig, ranks = assignment.signatures[op], assignment.mesh[axis]
    if axis == "tp" and choice.factor == routed_rows(assignment, op):
        return False
    if not sig.splits[choice.factor].blocked and choice.factor in _split_outside(assignment, op, axis):
        return False
    split = sig.splits[choice.factor]
    if choice.mirrored and not (split.blocked if split.mirrored is None else split.mirrored):
        return False
    every = _all_sizes(assignment, op, axis)
    for sizes in every:
        pieces, rest = divmod(sizes[choice.factor], choice.blocks * choice.unit)
        if rest or not sig.splits[choice.factor].allows(pieces, choice.blocks, ranks, choice.owner):
            return False
    return len(every) == 1 or len({variant(op, sig, choice, sizes, ranks) for sizes in every}) == 1


def routed_rows(assignment: Assignment, op: Op) -> str:
    """The factor that is the rows which the expert axis takes to their experts; "" where it does not."""
    found = assignment.variants[op].get("ep")
    return found.choice.factor if found and found.choice.mode == "route" else ""


def set_choice(assignment: Assignment, op: Op, axis: str, choice: Choice) -> None:
    """Makes `op` take `choice` on `axis`; the choices of the axes outside it stand already."""
    sizes = split_sizes(assignment, op, axis) if choice.mode in ("split", "route") else {}
    assignment.variants.setdefault(op, {})[axis] = variant(op, assignment.signatures[op], choice, sizes, assignment.mesh[axis])


def over_microbatches(
    assignment: Assignment, value: Value, type_: Mapping[str, Placement], place: Mapping[str, int]
) -> tuple[dict[str, Placement], Shard | None]:
    """A type of one microbatch's part as that of the tensor of all microbatches, and how these divide what the rank at `place` holds.

    An axis inside `mb` that splits the same dim splits it in each microbatch's part. Where it splits what lies inside the samples these
    parts are blocks of the whole; where it splits what the samples lie in, its units grow.
    """
    mesh, split = assignment.mesh, type_["mb"]
    found = dict(type_) | {"mb": R}
    if mesh["mb"] == 1 or not isinstance(split, Shard):
        return found, None
    axes = list(mesh)
    outer, inner = axes[: axes.index("mb")], axes[axes.index("mb") + 1 :]
    size = local_shape(value.shape, {axis: type_[axis] for axis in outer}, mesh, place)[split.dim]
    blocks = split.blocks
    for axis in inner:
        shard = type_.get(axis)
        if not isinstance(shard, Shard) or shard.dim != split.dim:
            continue
        inside = shard.blocks % blocks == 0
        more = replace(shard, blocks=shard.blocks * mesh["mb"]) if inside else replace(shard, unit=shard.unit * mesh["mb"])
        found[axis] = more = canonical(more, size, mesh[axis])
        left = part(size, more, mesh[axis], place[axis]).length
        size, blocks = left, blocks if inside else blocks * left // size
    return found, Shard(split.dim, blocks, split.unit)
