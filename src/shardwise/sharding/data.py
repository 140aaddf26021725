"""Splitting the batch: the types on the data axis and on the sequential axis of microbatches.

The batch dim of each input is followed through the operators, forwards and backwards, as the factor that holds it. An operator with such a
factor splits it; one without is done by every rank (R: its parameters' gradients are pending sums, reduced once a step). Summands go on
through what is linear in them, and elsewhere are reduced: over data ranks at once, over microbatches not at all, so that an operator which
would need that allows one microbatch only.

What depends on no parameter (masks, positions, shifted labels, the count of valid ones) is the *prelude*: it is computed once a step for
all microbatches together.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from math import prod

from shardwise.capture.graph import Graph, Op, Value
from shardwise.capture.normalize import RANDOM_STATE
from shardwise.sharding.assignment import Assignment, set_choice
from shardwise.sharding.reshard import collective_of
from shardwise.sharding.signature import Choice, Dims, Signature, choice_for
from shardwise.sharding.types import P, R, Shard, canonical

__all__ = ["batch_choices", "microbatch_obstacle", "place_of", "places_of", "prelude_of", "split_batch", "without_split"]


def prelude_of(graph: Graph) -> set[Op]:
    """The operators that depend on batch inputs and fixed buffers alone. What changes a buffer is no part of it."""
    known = {value for name, value in graph.inputs.items() if name != RANDOM_STATE}
    known |= {value for name, value in graph.buffers.items() if name not in graph.updates and name not in graph.changing}
    found: set[Op] = set()
    changing = set(graph.updates.values())
    for op in graph.ops:
        if not op.requires_grad and all(value in known for value in op.inputs) and changing.isdisjoint(op.outputs):
            found.add(op)
            known.update(op.outputs)
    return found


def batch_choices(graph: Graph, signatures: Mapping[Op, Signature]) -> dict[Op, Choice]:
    """The operators that hold the batch, with the factor that it is in them."""
    places = {graph.inputs[name]: Shard(dim) for name, dim in graph.batch_dims.items()}
    readers = graph.consumers()
    choices: dict[Op, Choice] = {}
    pending = deque(places)
    while pending:
        value = pending.popleft()
        around = [(op, False, index) for op, index in readers[value]]
        if value.producer is not None:
            around.append((value.producer, True, value.producer.outputs.index(value)))
        for op, is_output, index in around:
            sig = signatures[op]
            tensor = (sig.outputs if is_output else sig.inputs)[index]
            if op in choices or (choice := choice_for(sig, tensor, places[value], sig.sizes)) is None:
                continue
            choices[op] = choice
            for other, shard in places_of(op, sig, choice):
                if other not in places and (other.producer is not None or other.name in graph.batch_dims):
                    places[other] = shard
                    pending.append(other)
    return choices


def places_of(op: Op, sig: Signature, choice: Choice) -> list[tuple[Value, Shard]]:
    """Where the chosen factor lies in the tensors of the call."""
    found = []
    for tensor, value in zip((*sig.inputs, *sig.outputs), (*op.inputs, *op.outputs), strict=True):
        if (shard := place_of(tensor, choice, sig.sizes)) is not None:
            found.append((value, shard))
    return found


def place_of(tensor: Dims, choice: Choice, sizes: Mapping[str, int]) -> Shard | None:
    for index, dim in enumerate(tensor):
        if choice.factor in dim:
            at = dim.index(choice.factor)
            outer, inner = prod(sizes[name] for name in dim[:at]), prod(sizes[name] for name in dim[at + 1 :])
            return Shard(index, outer * choice.blocks, inner * choice.unit)
    return None


def split_batch(assignment: Assignment, batch: Mapping[Op, Choice], prelude: set[Op]) -> None:
    """Chooses for every operator on the axes `dp` and `mb`."""
    graph = assignment.graph
    for name, dim in graph.batch_dims.items():
        whole = graph.inputs[name].shape[dim]
        assignment.sources[graph.inputs[name]] = {"dp": canonical(Shard(dim, shares=assignment.shares), whole, assignment.mesh["dp"])}
    for axis in ("dp", "mb"):
        for op in graph.ops:
            set_choice(assignment, op, axis, _choice(assignment, op, axis, batch, prelude))


def _choice(assignment: Assignment, op: Op, axis: str, batch: Mapping[Op, Choice], prelude: set[Op]) -> Choice:
    whole = Choice("R")
    if axis == "mb" and (op in prelude or assignment.mesh["mb"] == 1):
        return whole
    sig = assignment.signatures[op]
    if op in batch and axis == "dp":
        return replace(batch[op], shares=assignment.shares)
    if op in batch and sig.splits[batch[op].factor].microbatches:
        return batch[op]
    return without_split(assignment, op, axis)


def without_split(assignment: Assignment, op: Op, axis: str) -> Choice:
    """On summands where the operator is linear in the inputs that are summands, else whole."""
    sig = assignment.signatures[op]
    summands = {index for index, value in enumerate(op.inputs) if assignment_type(assignment, value, axis) == P}
    if summands:
        for number, linear in enumerate(sig.linear):
            if linear == summands:
                return Choice("P", linear=number)
    return Choice("R")


def assignment_type(assignment: Assignment, value: Value, axis: str) -> object:
    """The type in which a value comes into being on one axis whose choices are being made."""
    if value.producer is None:
        return assignment.sources.get(value, {}).get(axis, R)
    return assignment.variants[value.producer][axis].outputs[value.producer.outputs.index(value)]


def microbatch_obstacle(graph: Graph, signatures: Mapping[Op, Signature], batch: Mapping[Op, Choice], prelude: set[Op]) -> str:
    """Why the batch cannot be cut into microbatches with the same result; "" when it can."""
    if graph.updates:
        return f"the forward pass changes the buffer {next(iter(graph.updates))}, which microbatches would change once each"
    trial = Assignment(graph=graph, mesh={"dp": 1, "mb": graph.global_batch}, signatures=signatures)
    split_batch(trial, batch, prelude)
    for op in graph.ops:
        for index, value in enumerate(op.inputs):
            made, wanted = trial.produced(value)["mb"], trial.wanted(op, index)["mb"]
            early = value.producer in prelude or value.kind == "input"
            free = early and made == R and isinstance(wanted, Shard)
            if (
                made != wanted
                and not free
                and op not in prelude
                and (value.requires_grad or collective_of(made, wanted) or isinstance(wanted, Shard))
            ):
                where = f"{op.name} in {op.module or 'the model'}"
                return f"{where} combines the samples of the whole batch ({value.name} is {made} over microbatches, it needs {wanted})"
    if not graph.outputs and (made := trial.produced(graph.loss)["mb"]) != P:
        return f"the loss is {made} over microbatches, not a sum over samples"
    return ""
