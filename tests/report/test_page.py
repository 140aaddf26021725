"""The page as text: complete, self-contained, safe."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import plotly.graph_objects as go
import pytest

from shardwise.planner.plan import Plan
from shardwise.report import Measured, write_report
from shardwise.report.layouts import points_of, tradeoff_figure
from shardwise.report.memory import memory_figure
from shardwise.report.ranks import shown_ranks
from shardwise.report.timeline import timeline_figure
from shardwise.simulate.profile import EdgeProfile
from shardwise.simulate.simulator import Simulation, simulate_profile


class Reader(HTMLParser):
    """What a browser sees: attributes that load something, and text outside of scripts and styles."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.raw = ""
        self.inside = ""

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.inside = tag
        self.loads += [
            f"{tag} {name}={value}" for name, value in attributes if name in ("src", "href", "srcset", "data", "action", "poster")
        ]

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside == "style":
            self.raw += data
        elif self.inside != "script":
            self.text += data


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    return reader


@pytest.fixture
def page(tmp_path: Path, plan: Plan, simulation: Simulation, measured: Measured) -> str:
    write_report(tmp_path / "report.html", plan, simulation, measured)
    return (tmp_path / "report.html").read_text(encoding="utf-8")


def test_loads_nothing(page: str) -> None:
    reader = read(page)
    assert reader.loads == []
    assert not {"link", "img", "iframe", "object", "embed", "base"} & set(reader.tags)
    assert "url(" not in reader.raw and "@import" not in reader.raw
    assert "default-src 'none'" in page, "the browser refuses what a script would load"
    assert page.count("plotly.js v") == 1


def test_names_every_rank_and_stage(page: str, plan: Plan) -> None:
    text = read(page).text
    for rank in range(plan.ranks):
        assert f"rank {rank}" in text
        assert f"rank {rank}\\u003c/b>" in page, "in the timeline"
    assert "Stage 0" in text and "Stage 1" in text
    for held in ("embed", "layers.0", "layers.1 … 3", "<i>head"):
        assert held in text
    assert "131\u00a0kB" in text and "2\u00a0M parameters" in text


def test_escapes_names(page: str) -> None:
    reader = read(page)
    assert "<script>alert" not in page
    assert "Evil<script>alert(1)</script>" in reader.text
    assert "It is <so> because" in reader.text and "needs 3 < 4 GB" in reader.text
    assert "norm<b>.weight" in reader.text
    assert reader.tags.count("script") == 5, "three figures, plotly and the page's own"


def test_compares_with_what_was_measured(page: str) -> None:
    text = read(page).text
    assert "−9.1\u00a0%" in text, "of the time: 1 / 1.1"
    assert "Same numbers as one device" in text and "yes" in text and "2.0e-14" in text
    assert "from 5.000 in 3 steps" in text


def test_other_numbers_are_not_called_the_same(tmp_path: Path, plan: Plan, simulation: Simulation) -> None:
    wrong = Measured(step_time_s=1.0, memory_bytes=[1, 2, 3, 4], same_numbers=0.02)
    write_report(tmp_path / "r.html", plan, simulation, wrong)
    assert ">NO<" in (tmp_path / "r.html").read_text()


def test_says_what_each_axis_splits(page: str) -> None:
    text = read(page).text
    assert "columns split: a rank makes part of the output features, inside each of 3 blocks" in text
    assert "rows split: a rank multiplies part of the input features" in text
    assert "stored split along dim 1, gathered for use" in text
    assert "whole: every rank holds all of it" in text
    assert "Drag over a part" in text and "2 ranks share each operator" in text


def test_light_and_dark(page: str) -> None:
    css = read(page).raw
    assert "prefers-color-scheme: dark" in css and "color-scheme: light dark" in css
    light, dark = (set(re.findall(r"(--[a-z-]+):", part)) for part in css.split("prefers-color-scheme: dark", 1))
    assert light == {name for name in dark if name in light}, "every colour has its dark counterpart"


def test_without_a_run(tmp_path: Path, plan: Plan, simulation: Simulation) -> None:
    write_report(tmp_path / "r.html", plan, simulation)
    text = read((tmp_path / "r.html").read_text(encoding="utf-8")).text
    assert "Step time, predicted" in text
    assert "measured" not in text.lower()


def test_figures_are_plotlys(plan: Plan, simulation: Simulation, measured: Measured) -> None:
    """plotly's own check of names and values."""
    ranks = shown_ranks(plan.mesh)
    for figure in (
        timeline_figure(ranks, simulation, measured),
        memory_figure(ranks, simulation, measured, 25e6),
        tradeoff_figure(points_of(plan), 25e6),
    ):
        go.Figure(figure)


def test_ranks_that_share_sequences(tmp_path: Path, plan: Plan) -> None:
    layout = "dp=2,cp=2,tp=2,pp=2,microbatches=2,attention=gather,schedule=1f1b"
    considered = [plan.considered[0].model_copy(update={"layout": layout})]
    wide = plan.model_copy(update={"ranks": 16, "dp": 2, "cp": 2, "sequence_dims": {"input_ids": 1}, "considered": considered})
    write_report(tmp_path / "r.html", wide, simulate_profile(wide.profile, wide.mesh))
    text = read((tmp_path / "r.html").read_text(encoding="utf-8")).text
    assert "2 ranks share each sequence (dim 1 of input_ids)" in text and "cp 2" in text
    assert all(f"dp {d} cp {c}" in text for d in range(2) for c in range(2)), "a row of ranks each"
    assert wide.layout == layout and "★" in text


def test_timelines_share_an_axis(plan: Plan, simulation: Simulation, measured: Measured) -> None:
    figure = timeline_figure(shown_ranks(plan.mesh), simulation, measured)
    assert len(figure["layout"]["yaxis"]["tickvals"]) == 2 * plan.ranks
    bars = sum(len(each["x"]) for each in figure["data"])
    assert bars == len(simulation.timeline) + len(measured.timeline)


def test_the_limit_is_drawn_where_it_is_near(simulation: Simulation) -> None:
    assert memory_figure(range(4), simulation, None, 25_000_000)["layout"]["shapes"][0]["x0"] == 25_000_000
    assert "shapes" not in memory_figure(range(4), simulation, None, 10**12)["layout"]


def test_a_large_plan_shows_one_rank_of_each_stage(tmp_path: Path, plan: Plan) -> None:
    skip = EdgeProfile(name="skip", source=0, target=2, nbytes=1000, transfer_s=1e-5, requires_grad=False)
    profile = plan.profile.model_copy(
        update={
            "stages": [plan.profile.stages[0]] * 3,
            "edges": [plan.profile.edges[0], plan.profile.edges[0].model_copy(update={"name": "e", "source": 1, "target": 2}), skip],
        }
    )
    large = plan.model_copy(update={"ranks": 192, "dp": 8, "tp": 8, "pp": 3, "profile": profile, "stages": ["a:b:0"] * 3})
    write_report(tmp_path / "r.html", large, simulate_profile(large.profile, large.mesh))
    text = read((tmp_path / "r.html").read_text(encoding="utf-8")).text
    assert "Shown are 3 of 192 ranks" in text
    assert "stage 0 → stage 2" in text, "an edge that skips a stage has a line of its own"
