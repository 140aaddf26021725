"""What is known of an operator for every size of its tensors: a Signature without sizes, that can be written to a file.

Finding ──on(op)──▶ Signature
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

from shardwise.capture.graph import Op, Value
from shardwise.sharding.signature import Dims, Signature, Source, Split

__all__ = ["Finding", "Misfit", "whole"]


class Misfit(Exception):
    """A description of an operator's dims does not fit the call."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """As in Signature, which this becomes on a call; only the operator itself is run on the parts, and no part is taken in blocks."""

    inputs: tuple[Dims, ...]
    outputs: tuple[Dims, ...]
    splits: Mapping[str, Split] = field(default_factory=dict)
    linear: tuple[frozenset[int], ...] = ()
    reasons: Mapping[str, str] = field(default_factory=dict)

    def on(self, op: Op, source: Source) -> Signature:
        """Raises Misfit when it does not describe the call's tensors."""
        sizes = _sizes((*self.inputs, *self.outputs), (*op.inputs, *op.outputs))
        more = {"splits": self.splits, "linear": self.linear, "reasons": self.reasons}
        return Signature(inputs=self.inputs, outputs=self.outputs, sizes=sizes, source=source, **more)  # type: ignore[arg-type]


def _sizes(tensors: Sequence[Dims], values: Sequence[Value]) -> dict[str, int]:
    """Every factor's size: known where it is alone in a dim, or all others of the dim are known."""
    if len(tensors) != len(values):
        raise Misfit(f"it describes {len(tensors)} tensors, and there are {len(values)}")
    sizes: dict[str, int] = {}
    pairs = []
    for tensor, value in zip(tensors, values, strict=True):
        if len(tensor) != len(value.shape):
            raise Misfit(f"it describes a tensor of {len(tensor)} dims, and {value!r} has {len(value.shape)}")
        pairs += list(zip(tensor, value.shape, [value] * len(tensor), strict=True))
    open_pairs = pairs
    while open_pairs:
        known = [(dim, size, {name for name in dim if name not in sizes}) for dim, size, _ in open_pairs]
        solved = {
            next(iter(left)): size // max(1, prod(sizes[n] for n in dim if n in sizes)) for dim, size, left in known if len(left) == 1
        }
        if not solved:
            unknown = sorted({name for _, _, left in known for name in left})
            if unknown:
                raise Misfit(f"the sizes of {', '.join(unknown)} do not follow from the shapes")
            break
        sizes |= solved
    for dim, size, value in pairs:
        if prod(sizes[name] for name in dim) != size:
            parts = " × ".join(f"{name}={sizes[name]}" for name in dim) or "1"
            raise Misfit(f"{parts} is not the {size} of {value!r}")
    return sizes


def whole(op: Op, reason: str) -> Signature:
    """The call kept whole on every rank."""
    counted = iter(range(sum(len(value.shape) for value in (*op.inputs, *op.outputs))))

    def named(values: Sequence[Value]) -> tuple[Dims, ...]:
        return tuple(tuple((f"d{next(counted)}",) for _ in value.shape) for value in values)

    inputs, outputs = named(op.inputs), named(op.outputs)
    every = zip((*inputs, *outputs), (*op.inputs, *op.outputs), strict=True)
    sizes = {dim[0]: size for tensor, value in every for dim, size in zip(tensor, value.shape, strict=True)}
    return Signature(inputs=inputs, outputs=outputs, sizes=sizes, reasons={"*": reason}, source="whole")
