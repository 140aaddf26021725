"""A plan file of either kind ──▶ its page."""

from __future__ import annotations

from pathlib import Path

from shardwise.cluster.model import Cluster
from shardwise.errors import PlanError
from shardwise.outlook import Study, Wish
from shardwise.planner.plan import Infeasible, simulate
from shardwise.planner.proposal import Proposal
from shardwise.report.outlook import prospect_of
from shardwise.report.page import write_report
from shardwise.report.prospect import write_prospect
from shardwise.scenario import layout_of
from shardwise.whatif import load_plan

__all__ = ["report_file"]


def report_file(plan_file: Path, out: Path) -> None:
    """Writes the page about a plan. A proposal's layouts are searched again, to draw all of them.

    Raises PlanError for a file that is no plan, or whose layout fits no more.
    """
    plan = load_plan(plan_file)
    if not isinstance(plan, Proposal):
        write_report(out, plan, simulate(plan))
        return
    study = Study.of(plan.model, plan.sequence)
    wish = Wish(global_batch=plan.global_batch, price_per_hour=plan.price_per_hour, precision=plan.precision)
    searched = study.outlook(Cluster.parse(plan.cluster), wish)
    chosen = layout_of(study, plan).found[0]
    if isinstance(searched, Infeasible):
        raise PlanError(f"no layout of {plan.model} fits {plan.cluster} any more: {searched.reasons[0]}; make the plan again")
    write_prospect(out, prospect_of(searched, chosen, plan.explanation))
