"""Plan + graph ──▶ every rank's program, checked, before a process is started or memory is taken."""

from __future__ import annotations

import torch

from shardwise.capture.graph import Graph
from shardwise.planner.apply import apply_plan
from shardwise.planner.plan import Plan
from shardwise.program.build import build_programs
from shardwise.program.check import check_memory, check_programs
from shardwise.program.program import Program
from shardwise.program.trace import Tracer
from shardwise.simulate.memory import memory_use

__all__ = ["preflight"]


def preflight(
    plan: Plan, graph: Graph, *, limit_bytes: int | None = None, same_fingerprint: bool = True, tracer: Tracer | None = None
) -> dict[int, Program]:
    """All ranks' programs. limit_bytes: what each rank has, the plan's own figure by default. same_fingerprint: as of `apply_plan`.

    tracer: one that has traced calls of this model before.

    Raises PlanError when the plan is not for the graph, CheckError when its programs do not go together or do not fit.
    """
    applied = apply_plan(plan, graph, same_fingerprint=same_fingerprint)
    programs = build_programs(applied.assignment, applied.cut, plan.tables, plan.chooser(), device=torch.device("cpu"), tracer=tracer)
    check_programs(programs, applied.assignment, applied.cut, plan.chooser())
    limit = plan.predicted.limit_bytes if limit_bytes is None else limit_bytes
    limits = plan.predicted.limits if limit_bytes is None and plan.predicted.limits else [limit] * plan.ranks
    check_memory([memory_use(programs[rank], plan.optimizer).total for rank in sorted(programs)], limits)
    return programs
