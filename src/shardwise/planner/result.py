"""What planning ends with: the plan, or why there is none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from shardwise.planner.choices import layout_choices
from shardwise.planner.estimator import FULL_MEMORY, Estimator
from shardwise.planner.explain import explain
from shardwise.planner.fitting import fit
from shardwise.planner.plan import Infeasible, Plan, Prediction, by_pattern, choice_text
from shardwise.planner.trial import Trial, first_of_each, gigabytes

__all__ = ["make_plan", "no_plan"]

_THIN = 4  # layouts that are tried to say how much memory would do


def no_plan(run: Estimator, trials: Sequence[Trial]) -> Infeasible:
    """Why nothing fits, and how much memory would do."""
    reasons = [f"{trial.layout}: {trial.note}" for trial in trials if trial.note]
    have, need = run.cluster.memory_bytes, _least_bytes(run, trials) / FULL_MEMORY
    more = max(run.cluster.ranks + 1, -(-int(run.cluster.ranks * need) // have))
    remedy = f"ranks with {gigabytes(need)} of memory instead of {gigabytes(have)}, or about {more} ranks, or a smaller global batch"
    return Infeasible(reasons=reasons[:8], remedy=remedy)


def _least_bytes(run: Estimator, trials: Sequence[Trial]) -> float:
    """What a rank needs in the layouts that spread the model most thinly, found with memory enough."""
    roomy = replace(run, cluster=run.cluster.with_memory(1 << 62))
    thin = sorted(trials, key=lambda trial: (trial.mesh.dp, -trial.mesh.microbatches))
    again = [Trial(layout=run.thriftiest(trial.layout), lean=True) for trial in first_of_each(thin)[:_THIN]]
    for trial in again:
        roomy.estimate(trial)
        if trial.applied:
            fit(roomy, trial)
    return min(max(trial.simulation.memory_bytes) for trial in again if trial.simulation)


def make_plan(run: Estimator, best: Trial, trials: Sequence[Trial], seconds: float, model: str) -> Plan:
    """The trial as a Plan, explained."""
    assert best.applied and best.simulation and best.profile
    assignment, cut, mesh = best.applied.assignment, best.applied.cut, best.mesh
    body = [op for op in run.graph.ops if op not in cut.prelude]
    starts = [next(op.key for op in body if cut.stage_of[op] == stage) for stage in range(cut.stages)]
    operators = by_pattern((op.key, choice_text(assignment.variants[op]["tp"].choice)) for op in body) if mesh.tp != 1 else {}
    parameters = (
        by_pattern((name, repr(assignment.sources[value]["tp"])) for name, value in run.graph.parameters.items()) if mesh.tp != 1 else {}
    )
    simulation = best.simulation
    limits = [device.memory_bytes for device in run.cluster.devices[: best.layout.ranks]] if run.cluster.unlike else []
    predicted = Prediction(
        step_time_s=simulation.step_time_s,
        memory_bytes=simulation.memory_bytes,
        by_kind=simulation.memory,
        bubble=simulation.bubble,
        communication_s=simulation.communication_s,
        limit_bytes=max(limits, default=run.cluster.memory_bytes),
        limits=limits,
    )
    plan = Plan(
        model=model,
        fingerprint=run.graph.fingerprint(),
        cluster=run.cluster.name,
        backend=run.cluster.backend,
        ranks=best.layout.ranks,
        dp=best.layout.dp or 1,
        cp=best.layout.cp or 1,
        ep=best.layout.ep or 1,
        tp=mesh.tp,
        pp=mesh.pp,
        microbatches=mesh.microbatches,
        chunks=mesh.chunks,
        schedule=mesh.schedule,
        table=best.layout.table.splitlines(),
        global_batch=run.graph.global_batch,
        optimizer=run.optimizer,
        random=run.random,
        precision=run.graph.precision,
        zero=best.layout.zero or 0,  # type: ignore[arg-type]
        shard=best.layout.shard or 0,
        recompute=best.layout.recompute or "none",  # type: ignore[arg-type]
        recompute_blocks=best.layout.recompute_blocks or 0,
        sequence_dims=run.analysis.sequence_dims if (best.layout.cp or 1) > 1 else {},
        attention=best.layout.attention or "gather",  # type: ignore[arg-type]
        shares=list(best.layout.shares or ()),
        stages=starts,
        operators=operators,
        collectives=layout_choices(run.cluster, best.layout),
        parameters=parameters,
        profile=best.profile,
        predicted=predicted,
        gap=best.gap,
        considered=[trial.candidate() for trial in sorted(trials, key=lambda t: t.estimate_s)],
    )
    return plan.model_copy(
        update={"explanation": explain(plan, best.applied, run.graph, run.cluster, run.analysis.obstacle, seconds, run.whole_s)}
    )
