"""Which ranks a chart shows."""

from __future__ import annotations

from shardwise.planner.plan import Plan
from shardwise.program.build import rank_of

__all__ = ["MOST_RANKS", "omitted_text", "shown_ranks"]

MOST_RANKS = 24  # rows that a person still reads


def shown_ranks(plan: Plan) -> list[int]:
    """All, or of a large plan the first of each stage (those of a stage do alike), or the first of the first stages."""
    if plan.ranks <= MOST_RANKS:
        return list(range(plan.ranks))
    return [rank_of(stage, 0, 0, plan.dp, plan.tp, cp=plan.cp) for stage in range(plan.pp)][:MOST_RANKS]


def omitted_text(plan: Plan) -> str:
    """Says so where ranks are left out."""
    shown = len(shown_ranks(plan))
    return "" if shown == plan.ranks else f" Shown are {shown} of {plan.ranks} ranks, the first of each stage."
