"""Layouts for many devices: what is found fits, and nothing that was looked at and fits is faster."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.models import llama
from typer.testing import CliRunner

import shardwise as sw
from shardwise.capture.export import capture
from shardwise.cli import app
from shardwise.cluster.model import Cluster
from shardwise.outlook import outlook
from shardwise.planner.scale import ScaleSearch


@pytest.fixture(scope="module")
def search() -> ScaleSearch:
    model, batch = llama(layers=3, hidden=128, samples=4, sequence=64)
    cluster = replace(Cluster.parse("a100-80g:2x8"), memory_bytes=4 * 10**9)
    return ScaleSearch(graph=capture(model.to(torch.bfloat16), batch), counts=(16,), cluster=cluster, global_batch=64)


def test_the_best_is_no_slower_than_any_that_fits(search: ScaleSearch) -> None:
    found = search.search()
    assert found
    best = found[0]
    assert best.step_time_s is not None and best.memory_bytes <= search.cluster.memory_bytes
    others = [search.simulated(each) for each in found[8:40:4]]
    assert all(best.seconds <= each.seconds * 1.02 for each in others), "estimates rank as the simulator does"


def test_estimates_are_near_the_simulator(search: ScaleSearch) -> None:
    for each in list(search.estimates((1,)))[::7]:
        step = search.simulated(each)
        assert each.estimate_s == pytest.approx(step.seconds, rel=0.15), str(each)
        assert each.memory_bytes == pytest.approx(step.memory_bytes, rel=0.1), str(each)


def test_all_layouts_take_all_devices(search: ScaleSearch) -> None:
    schemes = [scheme for scheme, _ in search.schemes((1, 2))]
    assert {scheme.dp * scheme.tp * scheme.pp for scheme in schemes} == {16}
    assert {scheme.tp for scheme in schemes} == {1, 2, 4, 8}, "tp stays inside a node"
    assert {scheme.zero for scheme in schemes} == {0, 1, 3}


def test_only_what_runs(search: ScaleSearch) -> None:
    only = replace(search, only_runnable=True)
    assert all(each.runs for each in only.estimates((1,)))


def test_a_known_model_in_the_command_line() -> None:
    run = CliRunner().invoke(app, ["layouts", "--model", "gpt3-125m", "--cluster", "a100-80g:8", "--global-batch", "64", "--json"])
    assert run.exit_code == 0, run.output
    document: dict[str, Any] = json.loads(run.stdout)
    first = document["layouts"][0]
    assert first["simulated"] and 0.05 < first["model_flops_utilisation"] < 0.8
    assert first["step_time_s"] == min(each["step_time_s"] for each in document["layouts"] if each["simulated"])


def test_a_model_that_fits_nowhere_says_so() -> None:
    run = CliRunner().invoke(app, ["layouts", "--model", "gpt3-175b", "--cluster", "rtx4090:4", "--global-batch", "4", "--runnable"])
    assert run.exit_code == 3 or "fits no layout" in run.output, run.output


def test_parameters_decide_the_flops() -> None:
    """Six for each parameter and token beside attention (Kaplan et al. 2020, section 2.1)."""
    found = outlook("gpt3-1.3b", Cluster.parse("a100-80g:8"), 64, runnable=True)
    tokens, parameters = 64 * 2048, 1.3e9
    assert found.flops == pytest.approx(6 * parameters * tokens, rel=0.25)


def test_a_plan_for_thousands_says_where_to_look() -> None:
    model, batch = llama(layers=2)
    with pytest.raises(sw.LayoutError, match=r"has 1024 ranks, more than the 64 .* `shardwise layouts`"):
        sw.plan(model, batch, "h100:128x8")
