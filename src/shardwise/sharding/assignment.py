"""Which choice every operator makes on every axis, and the types of all tensors that follow.

The mesh's axes, outermost first: `dp` splits the batch, `mb` (microbatches, one after the other) splits what dp leaves of it, `tp` splits
anything else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from shardwise.capture.graph import Graph, Op, Value
from shardwise.sharding.signature import Choice, Signature, Variant, factor_part, variant
from shardwise.sharding.types import Placement, R

__all__ = ["AXES", "Assignment", "set_choice", "split_sizes"]

AXES = ("dp", "mb", "tp")


@dataclass(kw_only=True)
class Assignment:
    """mesh: axis → ranks (or microbatches), outermost first. variants: operator → axis → variant. sources: parameter, buffer or input →
    axis → the type in which a rank keeps it.
    """

    graph: Graph
    mesh: dict[str, int]
    signatures: Mapping[Op, Signature]
    variants: dict[Op, dict[str, Variant]] = field(default_factory=dict)
    sources: dict[Value, dict[str, Placement]] = field(default_factory=dict)

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
    sizes = dict(assignment.signatures[op].sizes)
    for axis, ranks in assignment.mesh.items():
        if axis == before:
            break
        choice = assignment.variants[op][axis].choice
        if choice.mode == "split":
            sizes[choice.factor] = factor_part(choice, sizes[choice.factor], ranks, 0).length
    return sizes


def set_choice(assignment: Assignment, op: Op, axis: str, choice: Choice) -> None:
    """Makes `op` take `choice` on `axis`; the choices of the axes outside it stand already."""
    sizes = split_sizes(assignment, op, axis)
    assignment.variants.setdefault(op, {})[axis] = variant(op, assignment.signatures[op], choice, sizes, assignment.mesh[axis])
