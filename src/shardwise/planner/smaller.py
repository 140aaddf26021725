"""A plan that ran out of memory: what it was to take, and the next plan on the same ranks that takes less."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from shardwise.capture.graph import Graph
from shardwise.errors import ShardwiseError
from shardwise.planner.apply import apply_plan
from shardwise.planner.plan import Plan
from shardwise.program.build import build_programs, rank_of
from shardwise.program.recompute import RECOMPUTE
from shardwise.program.trace import Tracer
from shardwise.simulate.memory import memory_use

__all__ = ["Smaller", "memory_table", "next_smaller", "smaller_text"]

_LESS = 0.95  # of what the plan takes: less is worth while
_MOST_ZERO = 3
_PATIENCE_S = 30.0  # others wait for the message


@dataclass(frozen=True, kw_only=True)
class Smaller:
    """layout: the words that pin it; memory_bytes: of its fullest rank."""

    layout: str
    memory_bytes: int


def memory_table(use: Mapping[str, int]) -> str:
    """Bytes by kind as lines, the largest first, and their sum."""
    kinds = [(kind, nbytes) for kind, nbytes in sorted(use.items(), key=lambda each: -each[1]) if nbytes]
    rows = [*kinds, ("together", sum(use.values()))]
    return "\n".join(f"  {kind:11}{nbytes / 1e9:9.3f} GB" for kind, nbytes in rows)


def next_smaller(plan: Plan, graph: Graph) -> Smaller | None:
    """The plan that costs least more time and takes at least 5 % less on its fullest rank, by lowering plans that differ in microbatches,
    recomputation and what data ranks divide; None where there is none, or none is found in half a minute."""
    least = _LESS * max(plan.predicted.memory_bytes)
    known = [each for each in plan.considered if each.step_time_s is not None and each.memory_bytes is not None and not each.note]
    fitting = [each for each in known if (each.memory_bytes or 0) <= least]
    if fitting:
        best = min(fitting, key=lambda each: each.step_time_s or 0.0)
        return Smaller(layout=best.layout, memory_bytes=best.memory_bytes or 0)
    deadline, tracer = time.monotonic() + _PATIENCE_S, Tracer(device=torch.device("cpu"))
    for change in _changes(plan):
        if time.monotonic() > deadline:
            return None
        peak = _peak(plan, change, graph, tracer)
        if peak is not None and peak <= least:
            return Smaller(layout=plan.model_copy(update=change).layout, memory_bytes=peak)
    return None


def smaller_text(plan: Plan, graph: Graph) -> str:
    """What to do about a plan that takes too much."""
    found = next_smaller(plan, graph)
    if found is None:
        return "no plan on these ranks is known to take less: plan for more ranks, or with a smaller global batch"
    return (
        f"the next smaller plan, {found.layout}, takes {found.memory_bytes / 1e9:.3g} GB on its fullest rank instead of "
        f"{max(plan.predicted.memory_bytes) / 1e9:.3g} GB: plan again with this layout"
    )


def _changes(plan: Plan) -> Iterator[dict[str, Any]]:
    """What costs less time first: more microbatches hardly any, dividing some of the messages, computing again up to a third."""
    zeros = range(plan.zero, _MOST_ZERO + 1) if plan.dp * plan.cp > 1 else [plan.zero]
    kinds = RECOMPUTE[RECOMPUTE.index(plan.recompute) :]
    counts = [plan.microbatches * times for times in (1, 2, 4)] if not plan.table else [plan.microbatches]
    for recompute in kinds:
        for zero in zeros:
            for microbatches in counts:
                change = {"recompute": recompute, "recompute_blocks": 0, "zero": zero, "microbatches": microbatches}
                if any(getattr(plan, name) != value for name, value in change.items()):
                    yield change


def _peak(plan: Plan, change: Mapping[str, Any], graph: Graph, tracer: Tracer) -> int | None:
    """Of the fullest of each stage's first ranks; None where the model or the schedule does not allow the change."""
    try:
        changed = Plan.model_validate({**plan.model_dump(), **change})
        applied = apply_plan(changed, graph)
        ranks = {rank_of(pipe, 0, 0, plan.dp, plan.tp, c=c, cp=plan.cp) for pipe in range(plan.pp) for c in (0, plan.cp - 1)}
        programs = build_programs(
            applied.assignment, applied.cut, changed.tables, changed.chooser(), device=torch.device("cpu"), ranks=ranks, tracer=tracer
        )
    except (ShardwiseError, ValueError):
        return None
    return max(memory_use(program, plan.optimizer).total for program in programs.values())
