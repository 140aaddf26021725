"""Plan + graph captured for inference ──▶ Assignment, Cut and the order of microbatches: the ranks that train answer, too.

Ranks keep the parameters as the plan says, so an operator does what its namesake in training does, in the stage that holds what it reads.
One that training does not have (or that cannot be split so for this batch) is done whole by every rank of its stage.

    samples of the batch     data ranks                                    microbatches
    those of the plan        as planned                                    as planned
    others                   evenly, the first ones having one more        as many of them as divide every rank's part
    fewer than data ranks    every rank has all of them                    the same
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from shardwise.capture.graph import Graph, Op
from shardwise.errors import PlanError
from shardwise.planner.apply import Analysis, Applied, analyse, assign, check_choice
from shardwise.planner.plan import Plan, looked_up, read_choice, read_placement
from shardwise.program.actions import Kind
from shardwise.program.lower import Cut
from shardwise.program.tables import Tables
from shardwise.sharding.assignment import Assignment, possible, set_choice
from shardwise.sharding.signature import Choice
from shardwise.sharding.types import I, R, Shard, lengths

__all__ = ["Answering", "apply_to_inference"]


@dataclass(frozen=True, kw_only=True)
class Answering:
    """A plan made concrete on a graph for inference. tables: the forwards of each pipeline rank, in their order."""

    applied: Applied
    tables: Tables


def apply_to_inference(plan: Plan, graph: Graph, trained: Applied) -> Answering:
    """graph: with `outputs`. trained: the plan on the graph that it was made for.

    Raises PlanError where the pipeline ranks hold other parameters than their operators read here.
    """
    named = {name: plan.sequence_dims.get(name) for name in graph.batch_dims} if plan.sequence_dims else None
    analysis = analyse(graph, plan.random, named)
    for shares in dict.fromkeys((tuple(plan.shares), ())):
        parts = _parts(graph.global_batch, plan.dp, shares)
        if plan.ep > 1 and len(set(parts)) > 1:
            continue
        if parts and (found := _assigned(plan, analysis, parts, shares)):
            break
    else:
        if plan.ep > 1:
            raise PlanError(
                f"a batch of {graph.global_batch} is not divided evenly over dp={plan.dp}, or an operator takes no such parts, and "
                f"ep={plan.ep} needs that; give batches of a multiple of dp"
            )
        alone = Analysis(
            graph=graph, signatures=analysis.signatures, prelude=analysis.prelude, batch={}, sequence_dims=analysis.sequence_dims
        )
        found = _assign(plan, alone, 1, ())
        for name in graph.batch_dims:
            found.sources[graph.inputs[name]] = {"dp": R}
    _choose(plan, found, analysis, trained.assignment)
    cut = Cut(stage_of=_stages(graph, analysis.prelude, trained), prelude=frozenset(analysis.prelude))
    count = found.mesh["mb"]
    tables = [[slot for slot in row if slot.kind is Kind.FORWARD and slot.microbatch < count] for row in plan.tables]
    return Answering(
        applied=Applied(assignment=found, cut=cut), tables=[[slot for slot in row if slot.stage < cut.stages] for row in tables]
    )


def _parts(samples: int, ranks: int, shares: tuple[int, ...]) -> list[int]:
    """How many samples each data rank has; none where they cannot be divided so."""
    if shares:
        return [] if samples % sum(shares) else [samples // sum(shares) * each for each in shares]
    return lengths(samples, Shard(0), ranks) if samples >= ranks else []


def _assigned(plan: Plan, analysis: Analysis, parts: list[int], shares: tuple[int, ...]) -> Assignment | None:
    """With the samples divided among the data ranks; None where an operator does not take such parts."""
    count = 1
    if not analysis.obstacle:
        count = max(each for each in range(1, plan.microbatches + 1) if not any(part % each for part in parts))
    found = _assign(plan, analysis, count, shares)
    choices = [(op, found.variants[op]["dp"].choice) for op in analysis.graph.ops]
    whole = plan.dp == 1 or all(choice.mode != "split" or possible(found, op, "dp", choice) for op, choice in choices)
    return found if whole else None


def _assign(plan: Plan, analysis: Analysis, microbatches: int, shares: tuple[int, ...]) -> Assignment:
    divided = plan.zero if plan.zero == 3 else 0  # the others divide what only training has
    shard = plan.shard if divided else 0
    return assign(analysis, plan.dp, microbatches, plan.tp, plan.cp, shares, ep=plan.ep, zero=divided, shard=shard)


def _choose(plan: Plan, assignment: Assignment, analysis: Analysis, trained: Assignment) -> None:
    """On the tensor axis; and ranks keep what they keep in training."""
    for op in analysis.graph.ops:
        set_choice(assignment, op, "tp", _choice(plan, assignment, analysis, op))
    for name, value in analysis.graph.parameters.items():
        given = looked_up(plan.parameters, name)
        kept = assignment.sources.setdefault(value, {})
        kept["tp"] = I if given is None else read_placement(given, name)
        if plan.ep > 1 and name in trained.graph.parameters:  # which eval mode may not take for experts
            kept["ep"] = trained.produced(trained.graph.parameters[name])["ep"]


def _choice(plan: Plan, assignment: Assignment, analysis: Analysis, op: Op) -> Choice:
    text = looked_up(plan.operators, op.key)
    if text is None or op in analysis.prelude:
        return Choice("R")
    try:
        choice = read_choice(text, op.key)
        check_choice(assignment, op, choice)
    except PlanError:  # another operator of this name, or another size
        return Choice("R")
    return choice


def _stages(graph: Graph, prelude: set[Op], trained: Applied) -> dict[Op, int]:
    """An operator's stage is that of its namesake in training, else the first that holds what it reads."""
    known = {op.key: stage for op, stage in trained.cut.stage_of.items()}
    holders = _holders(trained)
    found: dict[Op, int] = {}
    for op in graph.ops:
        if op in prelude:
            continue
        least = max((found[value.producer] for value in op.inputs if value.producer in found), default=0)
        held = [set(holders[value.name]) for value in op.inputs if value.name in holders]
        common = set.intersection(*held) if held else set()
        stage = known.get(op.key)
        if stage is None or (common and stage not in common):
            stage = min((each for each in common if each >= least), default=least)
        found[op] = max(stage, least)
        if common and found[op] not in common:
            value = next(value for value in op.inputs if value.name in holders)
            raise PlanError(
                f"{op.key} reads {value.name} in stage {found[op]}, after what it needs; in training stage {min(common)} holds it: "
                "plan with pp=1, or let the model do the same in train() and eval() up to its loss"
            )
    return found


def _holders(trained: Applied) -> Mapping[str, set[int]]:
    """Parameter or buffer → the stages that hold it in training; buffers that it does not change can be anywhere."""
    graph, found = trained.assignment.graph, dict[str, set[int]]()
    for op, stage in trained.cut.stage_of.items():
        for value in op.inputs:
            if value.kind == "parameter" or value.name in graph.updates:
                found.setdefault(value.name, set()).add(stage)
    return found
