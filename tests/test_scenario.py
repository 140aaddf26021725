"""What-if words: durations, what goes together, and what is said."""

from __future__ import annotations

import json
from typing import Any

import pytest

import shardwise as sw
from shardwise.scenario import Scenario, read_duration
from shardwise.simulate.simulator import Simulation


def step(seconds: float, ranks: int = 4) -> Simulation:
    return Simulation(step_time_s=seconds, timeline=[], memory=[{"parameters": 10**9}] * ranks, bubble=0.25, communication_s=0.1)


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("90s", 90), ("1.5 min", 90), ("3h", 10800), ("2D", 172800), ("250ms", 0.25), ("1e3h", 3.6e6)]
)
def test_durations(text: str, seconds: float) -> None:
    assert read_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "h", "3 weeks", "-3h", "1..5s", "nan"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(sw.ShardwiseError, match=r"--mtbf .* is no duration; write a number and one of ms, s, min, h, d"):
        Scenario.parse(times={"mtbf": text, "checkpoint": "1s"})


@pytest.mark.parametrize(
    ("times", "said"),
    [
        ({"mtbf": "3h"}, "add --checkpoint"),
        ({"checkpoint": "30s"}, "--checkpoint has no effect without --mtbf"),
        ({"checkpoint-every": "30s"}, "--checkpoint-every has no effect"),
        ({"restart": "30s"}, "--restart has no effect"),
        ({"mtbf": "3h", "job-mtbf": "1h", "checkpoint": "30s"}, "give one of the two"),
    ],
)
def test_what_does_not_go_together(times: dict[str, str], said: str) -> None:
    with pytest.raises(sw.ShardwiseError, match=said):
        Scenario.parse(times=times)


def test_a_jobs_failures_are_those_of_its_devices() -> None:
    of_one = Scenario.parse(times={"mtbf": "400h", "checkpoint": "30s", "checkpoint-every": "1h", "restart": "5min"}).failures(100)
    of_all = Scenario.parse(times={"job-mtbf": "4h", "checkpoint": "30s", "checkpoint-every": "1h", "restart": "5min"}).failures(100)
    assert of_one == of_all and of_one is not None and of_one.mtbf_s == 4 * 3600 and of_one.every_s == 3600
    assert Scenario().failures(100) is None


def test_figures_for_programs_and_for_people() -> None:
    scenario = Scenario.parse(ranks=["3=1.3"], times={"mtbf": "16h", "checkpoint": "30s", "restart": "5min"})
    outcome = scenario.outcome(step(1.3), step(1.0))
    found: dict[str, Any] = json.loads(json.dumps(outcome.as_json(), allow_nan=False))
    assert (found["step_time_s"], found["healthy_step_time_s"], found["memory_bytes"]) == (1.3, 1.0, [10**9] * 4)
    failures = found["failures"]
    assert failures["job_mtbf_s"] == 4 * 3600
    assert failures["useful"] + failures["checkpoints"] + failures["lost"] + failures["restarts"] == pytest.approx(1)
    lines = outcome.lines()
    assert lines["as it should be"] == "1 s: what is slow costs 30.0%"
    assert lines["memory"] == "1 GB on each of 4 ranks"
    assert lines["a failure"] == "every 4 h, on average" and lines["a checkpoint"].endswith("steps), which wastes least")
    assert lines["useful"].startswith(f"{failures['useful']:.1%} of all time")


def test_a_job_that_never_gets_on() -> None:
    scenario = Scenario.parse(times={"job-mtbf": "1s", "checkpoint": "1h"})
    outcome = scenario.outcome(step(1.0), step(1.0))
    assert json.loads(json.dumps(outcome.as_json(), allow_nan=False))["failures"]["step_time_s"] is None
    assert outcome.lines()["step, all in"].startswith("none ever lasts")


def test_thousands_of_ranks_are_not_listed() -> None:
    lines = Scenario().outcome(step(1.0, 16384), step(1.0, 16384)).lines()
    assert lines["memory"] == "1 GB on each of 16,384 ranks" and "as it should be" not in lines
