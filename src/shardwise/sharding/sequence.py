"""Splitting the sequence: the types on the context axis.

The sequence dim of each input is followed through the operators as the batch dim is (`shardwise.sharding.data`), and split where one
holds it. What cannot be split there (a sum of all tokens before, a shift) is done whole by every rank of the axis, and so are the keys and
values of attention: the reshard before it gathers, the one after it takes each rank's part.

Every rank has the whole inputs, and makes of the prelude what it reads, without communicating: an operator of which all readers want the
same part makes that part alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from shardwise.capture.graph import Graph, Op, Value
from shardwise.errors import BatchError
from shardwise.sharding.assignment import Assignment, over_microbatches, possible, set_choice, split_sizes
from shardwise.sharding.data import place_of, places_of, without_split
from shardwise.sharding.signature import Choice, Signature, choice_for, variant
from shardwise.sharding.types import Shard

__all__ = ["read_as_split", "sequence_choices", "sequence_dims", "split_sequence"]


def sequence_dims(graph: Graph, given: Mapping[str, int | None] | None = None) -> dict[str, int]:
    """Batch input → the dim of its sequence.

    Tokens (whole numbers or truth values, [batch, sequence]) and sequences of vectors ([batch, sequence, features]) have one; `given` names
    those of others, or None for an input whose second dim is no sequence. Raises BatchError for an input or dim that is not there.
    """
    found: dict[str, int] = {}
    for name, batch_dim in graph.batch_dims.items():
        value = graph.inputs[name]
        dims = 3 if value.dtype.is_floating_point or value.dtype.is_complex else 2
        if batch_dim <= 1 and len(value.shape) == dims:
            found[name] = 1 - batch_dim
    for name, dim in (given or {}).items():
        if name not in graph.batch_dims:
            raise BatchError(f"sequence_dims names {name!r}, which is no input with samples; there are {sorted(graph.batch_dims)}")
        if dim is not None and (not 0 <= dim < len(graph.inputs[name].shape) or dim == graph.batch_dims[name]):
            shape = list(graph.inputs[name].shape)
            raise BatchError(f"sequence_dims={{{name!r}: {dim}}} is no dim of {name} {shape} beside that of its samples")
        found.pop(name, None)
        if dim is not None:
            found[name] = dim
    return {name: dim for name, dim in found.items() if graph.inputs[name].shape[dim] > 1}


def sequence_choices(graph: Graph, signatures: Mapping[Op, Signature], dims: Mapping[str, int]) -> dict[Op, Choice]:
    """The operators that hold a sequence of the inputs (input → its dim), with the factor that it is in them.

    An operator may meet two sequences (queries and keys): that in its results goes before one that it sums over, then the first.
    """
    places = {graph.inputs[name]: Shard(dim) for name, dim in dims.items()}
    choices: dict[Op, Choice] = {}
    found = True
    while found:
        found = False
        for ops in (graph.ops, graph.ops[::-1]):
            for op in ops:
                if op in choices:
                    continue
                if (choice := _chosen(op, signatures[op], places)) is not None:
                    choices[op], found = choice, True
                    made = places_of(op, signatures[op], choice)
                else:
                    made = _beyond(op, places)
                for value, shard in made:
                    if value.producer is not None:
                        places.setdefault(value, shard)
    return choices


def _chosen(op: Op, sig: Signature, places: Mapping[Value, Shard]) -> Choice | None:
    """The factor that holds a sequence."""
    tensors = zip((*sig.inputs, *sig.outputs), (*op.inputs, *op.outputs), strict=True)
    offers = [choice_for(sig, tensor, places[value], sig.sizes) for tensor, value in tensors if value in places]
    choices = [choice for choice in offers if choice is not None]
    kept = [choice for choice in choices if all(place_of(tensor, choice, sig.sizes) is not None for tensor in sig.outputs)]
    return next(iter(kept or choices), None)


def _beyond(op: Op, places: Mapping[Value, Shard]) -> list[tuple[Value, Shard]]:
    """Where a sequence goes on behind an operator that cannot be split over it, but lengthens, cuts or moves it."""
    found = []
    for value in op.inputs:
        dim = places[value].dim if value in places else 0
        if value in places and places[value] == Shard(dim):
            for out in op.outputs:
                before, after = (list(each.shape[:dim] + each.shape[dim + 1 :]) for each in (value, out))
                alike = len(out.shape) == len(value.shape) and (before == after or out.shape[dim] == value.shape[dim])
                if alike and out.shape[dim] > 1:
                    found.append((out, Shard(dim)))
    return found


def split_sequence(assignment: Assignment, sequence: Mapping[Op, Choice], batch: Mapping[Op, Choice], prelude: set[Op]) -> None:
    """Chooses for every operator on the axis `cp`, when `dp` and `mb` are decided. sequence: the factors that hold it, of whole sizes."""
    graph = assignment.graph
    for op in graph.ops:
        set_choice(assignment, op, "cp", Choice("R"))
    if assignment.mesh["cp"] == 1:
        return
    splits = {op: left for op, choice in sequence.items() if (left := _left_of(assignment, op, choice, batch)) is not None}
    for op in graph.ops:
        if op not in prelude:
            set_choice(assignment, op, "cp", splits.get(op) or without_split(assignment, op, "cp"))
    readers = graph.consumers()
    for op in reversed(graph.ops):
        if op in prelude and op in splits and read_as_split(assignment, op, "cp", splits[op], readers, prelude):
            set_choice(assignment, op, "cp", splits[op])


def _left_of(assignment: Assignment, op: Op, choice: Choice, batch: Mapping[Op, Choice]) -> Choice | None:
    """The choice on what the data axes leave of its factor; None where the ranks cannot split that."""
    whole, left = assignment.signatures[op].sizes[choice.factor], split_sizes(assignment, op, "cp")[choice.factor]
    if left != whole:  # sequence and samples are one factor
        samples = batch[op]
        each = samples.blocks * samples.unit
        before, now = whole // each, left // each
        if choice.blocks % (samples.blocks * before) == 0:
            choice = replace(choice, blocks=choice.blocks // before * now)
        elif choice.unit % (samples.unit * before) == 0:
            choice = replace(choice, unit=choice.unit // before * now)
        else:
            return None
    return choice if possible(assignment, op, "cp", choice) else None


def read_as_split(
    assignment: Assignment, op: Op, axis: str, choice: Choice, readers: Mapping[Value, list[tuple[Op, int]]], prelude: set[Op]
) -> bool:
    """Whether all who read an operator of the prelude want what the choice gives each rank; no rank needs another one's then."""
    sig, graph = assignment.signatures[op], assignment.graph
    if not sig.splits[choice.factor].microbatches:  # its local code communicates
        return False
    made = variant(op, sig, choice, split_sizes(assignment, op, axis), assignment.mesh[axis])
    place = dict.fromkeys(assignment.mesh, 0)
    for value, type_ in zip(op.outputs, made.outputs, strict=True):
        for reader, index in readers[value]:
            wanted = {each: found.inputs[index] for each, found in assignment.variants[reader].items()}
            if reader not in prelude:
                wanted, _ = over_microbatches(assignment, value, wanted, place)
            if not isinstance(type_, Shard) or wanted[axis] != type_:
                return False
    return any(readers[value] for value in op.outputs) and {graph.loss, *graph.outputs}.isdisjoint(op.outputs)
