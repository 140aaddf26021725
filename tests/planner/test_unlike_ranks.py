"""Plans for ranks of unlike speed and memory: who is slower gets less, and is predicted as what it is."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.models import Example, llama, mlp

import shardwise as sw
from shardwise.capture.export import capture
from shardwise.cluster.model import Cluster
from shardwise.planner.preflight import preflight
from shardwise.verify.verify import Report

FILE = """
ranks = {ranks}
memory_gb = 8
backend = "gloo"
[rates]
matmul_flops = 1e10
memory_bytes_per_s = 1e10
call_s = 1e-7
{speeds}
[link]
latency_s = 1e-6
bytes_per_s = 4e9
"""


def machine(directory: Path, speeds: list[float]) -> Cluster:
    path = directory / "unlike.toml"
    path.write_text(FILE.format(ranks=len(speeds), speeds=f"speeds = {speeds}"))
    return Cluster.parse(path)


def planned(example: Example, cluster: Cluster, layout: str) -> sw.Plan:
    plan = sw.plan(*example, cluster, layout)
    assert isinstance(plan, sw.Plan), str(plan)
    return plan


def wide() -> Example:
    return mlp(hidden=512, samples=576)


def test_a_rank_of_half_the_speed_gets_half_the_samples(tmp_path: Path) -> None:
    cluster = machine(tmp_path, [1.0, 0.5])
    plan = planned(wide(), cluster, "dp=2,tp=1,pp=1,microbatches=1")
    assert plan.shares == [2, 1]
    even = planned(wide(), cluster, "shares=1:1,tp=1,pp=1,microbatches=1")
    assert even.shares == [] and plan.predicted.step_time_s < 0.75 * even.predicted.step_time_s
    assert "unlike/1: rank 1, 192 of 576 samples" in str(plan)


def test_equal_parts_wait_for_the_slowest(tmp_path: Path) -> None:
    """With equal parts a step is that of two ranks that are all as slow."""
    even = planned(wide(), machine(tmp_path, [1.0, 0.5]), "shares=1:1,tp=1,pp=1,microbatches=1")
    slow = planned(wide(), machine(tmp_path, [0.5, 0.5]), "dp=2,tp=1,pp=1,microbatches=1")
    assert even.predicted.step_time_s == pytest.approx(slow.predicted.step_time_s, rel=0.02)
    tensor = planned(wide(), machine(tmp_path, [1.0, 0.5]), "dp=1,tp=2,pp=1,microbatches=1")
    both = planned(wide(), machine(tmp_path, [0.5, 0.5]), "dp=1,tp=2,pp=1,microbatches=1")
    assert tensor.predicted.step_time_s == pytest.approx(both.predicted.step_time_s, rel=0.02)


def test_stages_are_cut_by_speed(tmp_path: Path) -> None:
    """Eight equal blocks on a fast and a slow rank: the fast one has more, wherever it stands."""
    example = llama(layers=8, hidden=128, samples=8)
    counts = []
    for speeds in ([1.0, 0.25], [0.25, 1.0], [1.0, 1.0]):
        plan = planned(example, machine(tmp_path, speeds), "dp=1,tp=1,pp=2,microbatches=4,schedule=1f1b")
        graph = capture(*example)
        first = next(number for number, op in enumerate(graph.ops) if op.key == plan.stages[1])
        counts.append(first / len(graph.ops))
    fast, slow, even = counts
    assert fast > even + 0.15 > slow + 0.3, counts


def test_each_rank_has_its_own_memory() -> None:
    """A share that only the larger device has room for is planned, and is refused where the plan says it has less."""
    cluster = Cluster.parse("1x1 a100-80g + 1x1 rtx4090, 100 GbE")
    assert [device.memory_bytes for device in cluster.devices] == [80_000_000_000, 24_000_000_000]
    plan = planned(wide(), cluster, "dp=2,tp=1,pp=1,microbatches=1")
    assert plan.predicted.limits == [80_000_000_000, 24_000_000_000]
    graph = capture(*wide())
    assert len(preflight(plan, graph)) == 2
    small = plan.model_copy(update={"predicted": plan.predicted.model_copy(update={"limits": [80_000_000_000, 1_000_000]})})
    with pytest.raises(sw.CheckError, match=r"rank 1 needs .* it has 0\.001 GB"):
        preflight(small, graph)


def test_numbers_of_unlike_ranks_are_those_of_one(tmp_path: Path) -> None:
    plan = planned(wide(), machine(tmp_path, [1.0, 0.5, 0.5]), "dp=3,tp=1,pp=1")
    assert plan.shares == [2, 1, 1]
    report = sw.verify(*wide(), plan=plan, processes=False)
    assert isinstance(report, Report) and report.ok, str(report)


@pytest.mark.parametrize(
    ("ranks", "speeds", "cores", "said"),
    [
        (2, "[1, 0.5, 1]", "", "rates.speeds has 3 numbers for ranks = 2; give one for each rank"),
        (2, "[1, 0]", "", "rates.speeds.1"),
        (2, "[1, 0.5]", "cores = 2", "rates.speeds differ, but the ranks share cores: leave cores out"),
    ],
)
def test_wrong_speeds(tmp_path: Path, ranks: int, speeds: str, cores: str, said: str) -> None:
    path = tmp_path / "wrong.toml"
    path.write_text(FILE.format(ranks=f"{ranks}\n{cores}", speeds=f"speeds = {speeds}"))
    with pytest.raises(sw.ClusterError, match=said):
        Cluster.parse(path)
