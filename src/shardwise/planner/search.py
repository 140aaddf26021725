"""Chooses a plan: every layout is estimated, the best few are lowered and simulated, and other ways to do these that promise to be faster;
the fastest that fits is taken and explained.

Layouts ──intra, stages, estimate──▶ ranking ──lower, simulate──▶ the best few ──other schedules, ZeRO-1──▶ Plan | Infeasible
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping

import torch

from shardwise.capture.graph import Graph
from shardwise.cluster.model import Cluster
from shardwise.errors import LayoutError
from shardwise.planner.apply import analyse
from shardwise.planner.estimator import Estimator
from shardwise.planner.fitting import fit
from shardwise.planner.garbage import young_garbage_alone
from shardwise.planner.layout import Layout
from shardwise.planner.op_costs import OpCosts
from shardwise.planner.plan import Infeasible, Plan, Random
from shardwise.planner.result import make_plan, no_plan
from shardwise.planner.trial import Trial, best_of, first_of_each
from shardwise.planner.ways import other_ways
from shardwise.program.trace import Tracer

__all__ = ["search"]

_MESHES, _NEIGHBOURS = 3, 1  # layouts that are lowered and simulated: of unlike meshes, and beside the best
_HOPELESS = 1.25  # times the best: an estimate is not further off than that


def search(
    graph: Graph,
    cluster: Cluster,
    pinned: Layout,
    optimizer: str,
    model: str,
    *,
    random: Random = "keyed",
    tracer: Tracer | None = None,
    sequence_dims: Mapping[str, int | None] | None = None,
) -> Plan | Infeasible:
    """The best plan for the graph on the cluster.

    random: as of `Plan`; tracer: one that has traced calls of this model before; sequence_dims: batch input → the dim that cp splits.
    """
    if sequence_dims and (pinned.cp or 1) == 1:
        raise LayoutError('sequence_dims says what cp splits, but cp is 1: pin it (layout="cp=2") or leave sequence_dims out')
    start, tracer = time.perf_counter(), tracer or Tracer(device=torch.device("cpu"))
    with young_garbage_alone():
        run = Estimator(
            graph=graph,
            cluster=cluster,
            pinned=pinned,
            optimizer=optimizer,
            random=random,
            analysis=analyse(graph, random, sequence_dims),
            tracer=tracer,
            costs=OpCosts(cluster=cluster, tracer=tracer),
        )
        return _search(run, model, start)


def _search(run: Estimator, model: str, start: float) -> Plan | Infeasible:
    trials = _tried(run, run.trials())
    if best_of(trials) is None:
        trials += _tried(run, run.last_trials())
    best = best_of(trials)
    return no_plan(run, trials) if best is None else make_plan(run, best, trials, time.perf_counter() - start, model)


def _tried(run: Estimator, trials: list[Trial]) -> list[Trial]:
    """All of them estimated, the best simulated, and other ways to do these that promise to be faster."""
    for trial in trials:
        run.estimate(trial)
    ranked = sorted((trial for trial in trials if trial.applied), key=lambda trial: trial.estimate_s)
    _simulate_best(run, ranked)
    return [*trials, *other_ways(run, ranked)]


def _simulate_best(run: Estimator, ranked: list[Trial]) -> None:
    """Simulates the best of each mesh in the order of the estimates, then the winner's other numbers of microbatches, while they may be
    better."""
    seen: list[Trial] = []

    def look_at(trials: Iterable[Trial], most: int) -> None:
        for trial in trials:
            fitting = [each for each in seen if not each.note]
            best_s = min((each.simulated_s for each in fitting), default=float("inf"))
            if len(fitting) >= most or trial.estimate_s > _HOPELESS * best_s:
                return
            if trial.simulation is None:
                fit(run, trial)
                seen.append(trial)

    look_at(first_of_each(ranked), _MESHES)
    if fitting := [trial for trial in seen if not trial.note]:
        best = min(fitting, key=lambda trial: trial.simulated_s)
        look_at([trial for trial in ranked if trial.layout.mesh == best.layout.mesh], len(fitting) + _NEIGHBOURS)
    else:
        look_at(ranked, 1)
