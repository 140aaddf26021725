"""Which ways of splitting each operator over the tensor axis are worth choosing among.

An operator offers its own factors. Beyond these, a neighbour may want a tensor split in blocks (a fused q,k,v projection is split inside
each of its three parts) or by units (whole heads): such wants travel along the edges to every operator that can follow them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Container, Iterable, Mapping

from shardwise.capture.graph import Op, Value
from shardwise.sharding.assignment import Assignment, possible, split_sizes
from shardwise.sharding.signature import Choice, Signature, Variant, choice_for, variant
from shardwise.sharding.types import Shard

__all__ = ["candidates"]

_MOST = 16  # variants of one operator

Representative = Callable[[Op], Op]


def candidates(
    assignment: Assignment,
    ops: Iterable[Op],
    batch: Mapping[Op, Choice],
    representative: Representative,
    owners: Mapping[Op, int],
    forbidden: Mapping[Op, Container[str]],
) -> dict[Op, list[Variant]]:
    """The variants on axis `tp` of the given operators (one of each group of equal ones). owners: `shardwise.planner.tables`;
    forbidden: operator → factors of it that are not to be split."""
    chosen = list(ops)
    sizes = {op: split_sizes(assignment, op, "tp") for op in chosen}
    ranks = assignment.mesh["tp"]
    found: dict[Op, dict[tuple[object, ...], Variant]] = {op: {} for op in chosen}
    around = _neighbours(assignment, chosen, representative)
    pending: deque[tuple[Op, Variant]] = deque()

    def offer(op: Op, choice: Choice) -> None:
        if len(found[op]) >= _MOST or not _free(assignment, op, choice, batch.get(op), forbidden.get(op, ())):
            return
        made = variant(op, assignment.signatures[op], choice, sizes[op], ranks)
        if (made.inputs, made.outputs) not in found[op]:
            found[op][made.inputs, made.outputs] = made
            pending.append((op, made))

    for op in chosen:
        for name, split in assignment.signatures[op].splits.items():
            offer(op, Choice("split", name))
            if split.owned and op in owners:
                offer(op, Choice("split", name, owner=owners[op]))
    while pending:
        op, made = pending.popleft()
        for index, placement in enumerate((*made.inputs, *made.outputs)):
            if isinstance(placement, Shard):
                for other, tensor in around[op, index]:
                    sig = assignment.signatures[other]
                    choice = choice_for(sig, (*sig.inputs, *sig.outputs)[tensor], placement, sizes[other])
                    if choice is not None:
                        offer(other, choice)
    return {op: _whole(op, assignment.signatures[op], sizes[op], ranks) + list(variants.values()) for op, variants in found.items()}


def _whole(op: Op, sig: Signature, sizes: Mapping[str, int], ranks: int) -> list[Variant]:
    choices = [Choice("I"), Choice("R")] if any(v.requires_grad for v in (*op.inputs, *op.outputs)) else [Choice("R")]
    choices += [Choice("P", linear=number) for number in range(len(sig.linear))] if op.requires_grad else []
    return [variant(op, sig, choice, sizes, ranks) for choice in choices]


def _free(assignment: Assignment, op: Op, choice: Choice, batch: Choice | None, forbidden: Container[str]) -> bool:
    """Whether it can be split so, and splits neither what must not be nor the data axes' part of a factor: the samples."""
    if choice.factor in forbidden or not possible(assignment, op, "tp", choice):
        return False
    if batch is None or batch.factor != choice.factor:
        return True
    samples = split_sizes(assignment, op, "cp")[choice.factor] // batch.unit
    return choice.blocks % samples == 0


def _neighbours(assignment: Assignment, chosen: list[Op], representative: Representative) -> dict[tuple[Op, int], list[tuple[Op, int]]]:
    """(operator, tensor: inputs then outputs) → the other operators that hold the same tensor, and as which."""
    readers = assignment.graph.consumers()
    members = set(chosen)
    found: dict[tuple[Op, int], list[tuple[Op, int]]] = {}
    for op in chosen:
        for index, value in enumerate((*op.inputs, *op.outputs)):
            found[op, index] = [place for place in _holders(value, readers, representative) if place[0] in members]
    return found


def _holders(value: Value, readers: Mapping[Value, list[tuple[Op, int]]], representative: Representative) -> list[tuple[Op, int]]:
    holders = [(representative(op), index) for op, index in readers[value]]
    if value.producer is not None:
        maker = value.producer
        holders.append((representative(maker), len(maker.inputs) + maker.outputs.index(value)))
    return holders
