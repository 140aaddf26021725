"""Plan + graph ──▶ Assignment and Cut: what the lowering needs. The plan's words become objects again, and are checked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from shardwise.capture.blocks import block_pattern
from shardwise.capture.graph import Graph, Op, Value
from shardwise.errors import LayoutError, PlanError
from shardwise.planner.plan import Plan, Random, looked_up, op_with_key, read_choice, read_placement
from shardwise.program.lower import Cut
from shardwise.sharding.assignment import Assignment, possible, routed_rows, set_choice, split_sizes
from shardwise.sharding.context import SharedAttention, share_attention
from shardwise.sharding.data import batch_choices, microbatch_obstacle, prelude_of, split_batch
from shardwise.sharding.experts import Experts, experts_of, split_experts
from shardwise.sharding.rules import signature_of
from shardwise.sharding.rules.random import fast
from shardwise.sharding.sequence import sequence_choices, sequence_dims, split_sequence
from shardwise.sharding.signature import Choice, Signature
from shardwise.sharding.types import I, Placement, Shard

__all__ = ["Analysis", "Applied", "analyse", "apply_plan", "assign", "check_choice"]


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """What every layout of a graph has in common. sequence_dims: batch input → its sequence dim."""

    graph: Graph
    signatures: dict[Op, Signature]
    prelude: set[Op]
    batch: dict[Op, Choice]
    sequence_dims: dict[str, int]

    @cached_property
    def sequence(self) -> dict[Op, Choice]:
        """The operators that hold the sequence, with the factor that it is in them."""
        return sequence_choices(self.graph, self.signatures, self.sequence_dims)

    @cached_property
    def experts(self) -> Experts:
        """What there is for the expert axis to divide."""
        return experts_of(self.graph, self.signatures, self.batch)

    @cached_property
    def obstacle(self) -> str:
        """Why the batch must not be cut into microbatches, "" when it may be."""
        return microbatch_obstacle(self.graph, self.signatures, self.batch, self.prelude)

    def shared(self, attention: str, cp: int, tp: int) -> SharedAttention:
        """Which attention the ranks of cp can do together in this way."""
        return share_attention(attention, self.signatures, self.sequence, self.batch, cp=cp, tp=tp)


@dataclass(frozen=True, kw_only=True)
class Applied:
    """A plan made concrete on a graph."""

    assignment: Assignment
    cut: Cut


def analyse(graph: Graph, random: Random = "keyed", named: Mapping[str, int | None] | None = None) -> Analysis:
    """Signatures, prelude, batch and sequence factors. random: as of `Plan`; named: input → its sequence dim, as of `sequence_dims`.

    Raises RuleError for an operator without a rule, BatchError for a sequence dim that is not there.
    """
    signatures = {op: signature_of(op) for op in graph.ops}
    if random == "fast":
        signatures = {op: fast(op, sig) for op, sig in signatures.items()}
    return Analysis(
        graph=graph,
        signatures=signatures,
        prelude=prelude_of(graph),
        batch=batch_choices(graph, signatures),
        sequence_dims=sequence_dims(graph, named),
    )


def assign(
    analysis: Analysis,
    dp: int,
    microbatches: int,
    tp: int,
    cp: int = 1,
    shares: Sequence[int] = (),
    *,
    ep: int = 1,
    attention: str = "gather",
    zero: int = 0,
    shard: int = 0,
) -> Assignment:
    """An assignment whose data, expert and context axes are decided and whose tensor axis is not.

    ep: of the dp data ranks so many neighbours divide the experts; LayoutError where there are none, or ep does not divide them.
    shares: in which proportion the data ranks divide the samples; LayoutError where an operator takes equal parts of them only.
    attention: how the ranks of cp do it together, where they can. zero, shard: as of `Assignment`.
    """
    if equal := [op for op, choice in analysis.batch.items() if shares and not analysis.signatures[op].splits[choice.factor].uneven]:
        where = f"{equal[0].name} in {equal[0].module or 'the model'}"
        raise LayoutError(
            f"shares={':'.join(map(str, shares))} divides the batch unevenly, but {where} takes equal parts only; leave them out"
        )
    mesh = {"dp": dp // ep, "mb": microbatches} | ({"ep": ep} if ep > 1 else {}) | {"cp": cp, "tp": tp}
    shared = analysis.shared(attention, cp, tp) if cp > 1 else SharedAttention()
    signatures = {**analysis.signatures, **shared.signatures}
    assignment = Assignment(graph=analysis.graph, mesh=mesh, signatures=signatures, shares=tuple(shares), zero=zero, shard=shard)
    split_batch(assignment, analysis.batch, analysis.prelude)
    if ep > 1:
        split_experts(assignment, analysis.experts, analysis.batch, analysis.prelude)
    sequence = {**analysis.sequence, **shared.choices} if cp > 1 else {}
    if shared.mirrored(cp):
        sequence = {op: replace(choice, mirrored=True) for op, choice in sequence.items()}
    split_sequence(assignment, sequence, analysis.batch, analysis.prelude)
    return assignment


def apply_plan(plan: Plan, graph: Graph, *, same_fingerprint: bool = True) -> Applied:
    """Raises PlanError when the plan is for another model or names what the graph does not have.

    same_fingerprint=False: the graph is the plan's in another precision.
    """
    if same_fingerprint and plan.precision != graph.precision:
        raise PlanError(
            f"the plan computes in {plan.precision}, the model was captured in {graph.precision}; capture it in the plan's precision"
        )
    if same_fingerprint and plan.fingerprint != graph.fingerprint():
        raise PlanError(
            f"the plan was made for {plan.model} with fingerprint {plan.fingerprint} and a batch of "
            f"{plan.global_batch}; this model and batch have "
            f"{graph.fingerprint()} (batch {graph.global_batch}); plan again for this model and batch"
        )
    _check_names("operator", plan.operators, (op.key for op in graph.ops))
    _check_names("parameter", plan.parameters, graph.parameters)
    analysis = analyse(graph, plan.random, _sequence_dims(plan, graph))
    if plan.microbatches > 1 and analysis.obstacle:
        raise PlanError(f"microbatches={plan.microbatches} would change the numbers: {analysis.obstacle}; use microbatches=1")
    assignment = assign(
        analysis,
        plan.dp,
        plan.microbatches,
        plan.tp,
        plan.cp,
        plan.shares,
        ep=plan.ep,
        attention=plan.attention,
        zero=plan.zero,
        shard=plan.shard,
    )
    for op in graph.ops:
        text = looked_up(plan.operators, op.key) or "R"
        choice = Choice("R") if op in analysis.prelude else read_choice(text, op.key)
        check_choice(assignment, op, choice)
        set_choice(assignment, op, "tp", choice)
    for name, value in graph.parameters.items():
        given = looked_up(plan.parameters, name)
        kept = I if given is None else read_placement(given, name)
        _check_placement(value, kept, plan.tp)
        assignment.sources.setdefault(value, {})["tp"] = kept
    cut = _cut(plan, graph, analysis.prelude)
    for what, ops in (analysis.experts.together if plan.ep > 1 else {}).items():
        if len(stages := sorted({cut.stage_of[op] for op in ops})) > 1:
            raise PlanError(f"stages {stages[0]} and {stages[-1]} part {what}; let the later one begin elsewhere")
    return Applied(assignment=assignment, cut=cut)


def _sequence_dims(plan: Plan, graph: Graph) -> dict[str, int | None] | None:
    """What the plan says, of all inputs; None where it says nothing."""
    return {name: plan.sequence_dims.get(name) for name in (*graph.batch_dims, *plan.sequence_dims)} if plan.sequence_dims else None


def _check_names(kind: str, entries: Iterable[str], known: Iterable[str]) -> None:
    """An entry that names nothing would have no effect."""
    names = set(known)
    names |= {block_pattern(name) for name in names}
    if unknown := [entry for entry in entries if entry not in names]:
        raise PlanError(f"the plan names {kind} {unknown[0]}, which the model does not have; correct or remove the entry")


def _check_placement(value: Value, kept: Placement, ranks: int) -> None:
    if not isinstance(kept, Shard):
        return
    size = value.shape[kept.dim] if kept.dim < len(value.shape) else 0
    if kept.owner is not None and kept.owner >= ranks:
        raise PlanError(f"{value.name} cannot be kept as {kept!r} on tp={ranks}: its ranks are 0 to {ranks - 1}")
    pieces, rest = divmod(size, kept.blocks * kept.unit)
    if kept.owner is None and (rest or pieces < ranks):
        raise PlanError(f"{value.name} {list(value.shape)} cannot be kept as {kept!r} on tp={ranks}: that dim has no {ranks} such pieces")


def check_choice(assignment: Assignment, op: Op, choice: Choice) -> None:
    """Raises PlanError where the operator cannot be split so on the tensor axis; the choices of the axes outside it stand already."""
    sig = assignment.signatures[op]
    if choice.mode == "P" and choice.linear >= len(sig.linear):
        raise PlanError(f"{op.key} is not linear in its inputs: it cannot work on summands; choose I or R")
    if choice.mode != "split":
        return
    split = sig.splits.get(choice.factor)
    if split is None:
        reason = sig.reasons.get(choice.factor, "it is none of its splittable factors")
        raise PlanError(f"{op.key} cannot be split over {choice.factor!r}: {reason}; it can over {', '.join(sig.splits) or 'nothing'}")
    if choice.factor == routed_rows(assignment, op):
        raise PlanError(
            f"{op.key}: {choice.factor} are the rows that ep takes to their experts: tp cannot split them; choose another, I or R"
        )
    size, ranks = split_sizes(assignment, op, "tp")[choice.factor], assignment.mesh["tp"]
    pieces, rest = divmod(size, choice.blocks * choice.unit)
    if choice.owner is not None and not split.allows(pieces, 1, ranks, choice.owner):
        why = f"its ranks on tp={ranks} are 0 to {ranks - 1}" if split.owned else "only a table's rows can be"
        raise PlanError(f"{op.key}: {choice.factor} cannot be on rank {choice.owner} alone: {why}")
    if choice.owner is None and not split.ranges:
        raise PlanError(f"{op.key}: {choice.factor} cannot be divided: {sig.reasons.get(choice.factor, 'it can only be on one rank')}")
    if rest or not split.allows(pieces, choice.blocks, ranks, choice.owner):
        raise PlanError(
            f"{op.key}: {choice.factor} of {size} in {choice.blocks} blocks by {choice.unit} has {pieces} pieces, which "
            f"tp={ranks} does not divide; "
            "use a tp that divides them"
        )
    if not possible(assignment, op, "tp", choice):
        raise PlanError(f"{op.key}: {choice} is not the same part on all ranks of the other axes, whose shares are unequal; choose I or R")


def _cut(plan: Plan, graph: Graph, prelude: set[Op]) -> Cut:
    starts = [graph.ops.index(op_with_key(graph, key)) for key in plan.stages]
    if len(starts) != plan.pp * plan.chunks or starts != sorted(starts):
        chunks = f" × chunks={plan.chunks}" if plan.chunks > 1 else ""
        raise PlanError(f"the plan has pp={plan.pp}{chunks} but names {len(starts)} stage starts, which must be in the order of the model")
    stage_of: dict[Op, int] = {}
    for index, op in enumerate(graph.ops):
        if op not in prelude:
            stage_of[op] = max((stage for stage, start in enumerate(starts) if start <= index), default=0)
    return Cut(stage_of=stage_of, prelude=frozenset(prelude), recompute=plan.recompute, recompute_blocks=plan.recompute_blocks)
