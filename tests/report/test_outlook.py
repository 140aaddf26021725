"""From the search among layouts of a known model to its page, and what would slow its best layout down."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tests.report.test_page import read
from typer.testing import CliRunner

import shardwise as sw
from shardwise.cli import app
from shardwise.cluster.model import Cluster, cluster_of
from shardwise.outlook import Outlook, Study, Wish
from shardwise.planner.proposal import Proposal
from shardwise.planner.space import Pins
from shardwise.report.outlook import prospect_of
from shardwise.scenario import layout_of, simulate_layout
from shardwise.simulate.slow import Slow


@pytest.fixture(scope="module")
def outlook() -> Outlook:
    found = Study.of("gpt3-1.3b").outlook(Cluster.parse("a100-40g:4x4"), Wish(global_batch=64))
    assert isinstance(found, Outlook)
    return found


def test_every_layout_that_was_put_together_is_a_point() -> None:
    outlook = Study.of("gpt3-6.7b").outlook(Cluster.parse("a100-40g:4x4"), Wish(global_batch=64))
    assert isinstance(outlook, Outlook)
    points = prospect_of(outlook).points
    assert len(points) == len(outlook.searched.considered) > 20
    limit = outlook.search.limit_bytes
    assert {each.kind for each in points} == {"chosen", "simulated", "estimated", "does not fit"}
    assert all((each.memory_bytes > limit) == (each.kind == "does not fit") for each in points)
    assert [each.layout for each in points if each.kind == "chosen"] == [str(outlook.found[0])]
    assert {str(each) for each in outlook.found} <= {each.layout for each in points}


def test_the_page_is_of_the_best_layout(outlook: Outlook) -> None:
    page, best = prospect_of(outlook), outlook.found[0]
    assert page.simulation.step_time_s == pytest.approx(best.seconds)
    assert max(page.simulation.memory_bytes) == best.memory_bytes
    assert page.sizes.stage_ranks * page.sizes.pp == 16 and page.choices[0].layout == str(best)
    assert any("failed" in change or "fails" in change for change, _ in page.what_if) and len(page.what_if) == 3


def test_what_is_slow_costs(outlook: Outlook) -> None:
    """A slow rank: at least what its own pipeline loses, at most everything; slow links: as the layout is costed on such machines."""
    search, best = outlook.search, outlook.found[0]
    healthy = simulate_layout(search, best).step_time_s
    slow = simulate_layout(search, best, Slow(ranks={5: 1.5})).step_time_s
    everything = simulate_layout(search, best, Slow(ranks=dict.fromkeys(range(16), 1.5))).step_time_s
    assert healthy < slow <= everything <= 1.5 * healthy + 1e-9
    levels = {"network": 0.2}
    assert search.cluster.machines is not None
    machines = search.cluster.machines.slowed(levels)
    again = Study.of("gpt3-1.3b").outlook(cluster_of(machines), Wish(global_batch=64, pins=_pins(outlook)))
    assert isinstance(again, Outlook)
    assert simulate_layout(search, best, Slow(levels=levels)).step_time_s == pytest.approx(again.found[0].seconds)
    with pytest.raises(sw.LayoutError, match="slow rank 16 is not among the 16 ranks"):
        simulate_layout(search, best, Slow(ranks={16: 2.0}))


def _pins(outlook: Outlook) -> Pins:
    plan = outlook.proposal()
    return Pins(**{name: getattr(plan, name) for name in ("dp", "tp", "pp", "cp", "zero", "microbatch", "schedule", "chunks", "recompute")})


def test_ranks_that_gather_parameters_from_each_other_share_a_pace(outlook: Outlook) -> None:
    """ZeRO-3: a slow rank slows all of its stage in every microbatch; without, its own replica alone."""
    scheme = replace(outlook.found[0].scheme, dp=8, tp=2, pp=1, zero=0, chunks=1)
    assert scheme.mesh.together == 2 and replace(scheme, zero=3).mesh.together == 16
    assert replace(scheme, dp=4, cp=2).mesh.together == 4


def test_a_proposal_is_costed_again_as_it_was(outlook: Outlook, tmp_path: Path) -> None:
    plan = outlook.proposal()
    plan.save(tmp_path / "plan.json")
    again = layout_of(Study.of(plan.model, plan.sequence), Proposal.load(tmp_path / "plan.json"))
    assert len(again.found) == 1 and str(again.found[0]) == plan.layout
    assert again.found[0].seconds == pytest.approx(plan.predicted.step_time_s)
    smaller = plan.model_copy(update={"cluster": "rtx4090:4x4", "global_batch": 64, "model": "gpt3-6.7b"})
    with pytest.raises(sw.PlanError, match=r"no longer fits rtx4090:4x4: .*make the plan again"):
        layout_of(Study.of("gpt3-6.7b", plan.sequence), smaller)


def test_the_command_line_reads_proposals(outlook: Outlook, tmp_path: Path) -> None:
    plan, page, trace = tmp_path / "plan.json", tmp_path / "new" / "report.html", tmp_path / "trace.json"
    outlook.proposal().save(plan)
    run = CliRunner().invoke(app, ["simulate", "--plan", str(plan), "--slow-rank", "3=1.3", "--out", str(trace), "--json"])
    assert run.exit_code == 0, run.output
    found = json.loads(run.stdout)
    assert found["healthy_step_time_s"] == pytest.approx(outlook.found[0].seconds)
    assert found["step_time_s"] > found["healthy_step_time_s"] and len(found["memory_bytes"]) == 16
    run = CliRunner().invoke(app, ["report", str(plan), "--out", str(page)])
    assert run.exit_code == 0, run.output
    text = read(page.read_text()).text
    assert "gpt3-1.3b on a100-40g:4x4" in text and "layouts were put together" in text and "Binding" in text
