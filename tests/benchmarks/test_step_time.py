"""The race against the peers: what --check makes of it, with and without torch.compile, and where the layout matters."""

import json
import os
import random
import re
import signal
import time
from dataclasses import replace
from io import StringIO
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from benchmarks.blocks import ends
from benchmarks.context import CONTESTANTS, contestants, missing_packages
from benchmarks.hosts import why_not
from benchmarks.ours import Prediction, plan_anew
from benchmarks.processes import Child, ChildFailed
from benchmarks.race import Record, _agree, spared
from benchmarks.result import Result, as_json, show
from benchmarks.scenarios import FULL as SCENARIOS
from benchmarks.step_time import main
from benchmarks.throttle import Throttled
from benchmarks.verdict import Outcome, Sample, WrongNumbers
from benchmarks.workloads import FULL, SMALL, Workload
from rich.console import Console
from tests.clusters import made_up

from shardwise.cluster.model import Cluster


def record(seconds: float, peak: int = 100, failure: str = "") -> Record:
    samples = [Sample(round=number, seconds=seconds, loss=1.0, others_share=0.0) for number in range(9)]
    return Record(samples=samples, peak_bytes=[peak, peak], set_up_peak_bytes=[1, 1], failure=failure)


def result(layout: str | None = None, scenario: str | None = None, **records: Record) -> Result:
    """Of two ranks; names with `_compile` for `+compile`. What ours was predicted is right."""
    found = {name.replace("_compile", "+compile"): each for name, each in records.items()}
    field = contestants(FULL["gpt2"], 2, compiled=list(CONTESTANTS))
    ours = found["ours"]
    prediction = Prediction(text="", step_time_s=ours.samples[0].seconds, memory_bytes=tuple(map(float, ours.peak_bytes)))
    return Result(
        workload=FULL["gpt2"],
        contestants={name: field[name] for name in found},
        records=found,
        prediction=prediction,
        layout=layout,
        scenario=scenario,
    )


def told(found: Result) -> list[str]:
    return [f"{finding.outcome.value}: {finding.text}" for finding in found.findings()[:-2]]  # the last two are the prediction's


class TestBetterOfEagerAndCompiled:
    def test_of_ours_the_faster_counts(self):
        assert told(result(ours=record(1.1), ours_compile=record(0.8), ddp=record(1.0)))[0].startswith("pass: speed 1.250 x torch DDP (")
        assert told(result(ours=record(0.8), ours_compile=record(1.1), ddp=record(1.0)))[0].startswith("pass: speed 1.250 x torch DDP (")

    def test_of_the_peers_the_faster_counts(self):
        for eager, compiled, title in ((1.0, 0.5, "torch DDP, compiled"), (0.5, 1.0, "torch DDP")):
            found = result(ours=record(1.0), ddp=record(eager), ddp_compile=record(compiled), tp=record(0.9))
            assert told(found) == [f"fail: speed 0.500 x {title} (bound: at least 1.0)"]

    def test_of_one_process_the_faster_counts(self):
        found = result(ours=record(1.0), ddp=record(2.0), single=record(1.0), single_compile=record(0.9))
        assert told(found)[1] == "fail: speed 0.900 x one process, all threads, compiled (bound: at least 0.95)"

    def test_memory_is_that_of_what_was_timed(self):
        found = result("dp=2", ours=record(1.0, peak=100), ours_compile=record(0.5, peak=210), ddp=record(1.0, peak=100))
        assert told(found)[1] == "fail: peak memory 2.100 x torch DDP (bound: at most 1.05)"

    def test_what_was_predicted_is_the_eager_step(self):
        found = result(ours=record(1.0), ours_compile=record(0.5), ddp=record(1.0))
        assert [finding.text.split(" (")[0] for finding in found.findings()[-2:]] == [
            "predicted step time off by +0.0%",
            "predicted peak memory off by +0.0%",
        ]


class TestTheMachineChanges:
    @pytest.mark.parametrize(
        ("predicted", "afterwards", "outcome"),
        [
            (0.8, None, Outcome.FAIL),
            (0.8, 0.87, Outcome.FAIL),
            (0.8, 0.9, Outcome.INCONCLUSIVE),
            (1.2, 1.0, Outcome.INCONCLUSIVE),
            (0.9, 1.2, Outcome.PASS),
        ],
    )
    def test_a_step_that_is_not_as_predicted_says_nothing_then(self, predicted, afterwards, outcome):
        found = result(ours=record(1.0), ddp=record(1.0))
        before = replace(found.prediction, step_time_s=predicted)
        found = replace(found, prediction=before, afterwards=afterwards and replace(before, step_time_s=afterwards))
        *_, step_time, memory = found.findings()
        assert (step_time.outcome, memory.outcome) == (outcome, Outcome.PASS)
        assert ("the machine changed" in step_time.text) is (outcome is Outcome.INCONCLUSIVE)
        console = Console(width=200, file=StringIO())
        show(found, console)
        assert ("after the race" in console.file.getvalue()) is bool(afterwards)

    def test_the_machine_is_measured_once_more_and_what_is_kept_stays(self, tmp_path, monkeypatch):
        def parse(spec):
            if isinstance(spec, Cluster):
                return spec
            (tmp_path / "asked").write_text(f"{spec} {os.environ['SHARDWISE_CACHE']}")
            return made_up(2)

        monkeypatch.setattr(Cluster, "parse", parse)
        monkeypatch.setenv("SHARDWISE_CACHE", "kept")
        found = plan_anew(SMALL["gpt2"], 2, "pp=2,microbatches=2,schedule=1f1b")
        assert found.layout.startswith("dp=1,tp=1,pp=2,microbatches=2,schedule=1f1b") and found.step_time_s > 0
        spec, folder = (tmp_path / "asked").read_text().split()
        assert spec == "local:2" and folder != "kept" and not Path(folder).exists()
        assert os.environ["SHARDWISE_CACHE"] == "kept"


class TestWhereTheLayoutMatters:
    @pytest.mark.parametrize(("seconds", "expected"), [(1.24, Outcome.FAIL), (1.26, Outcome.PASS)])
    def test_a_quarter_more_than_the_best_peer_is_wanted_and_no_more_of_one_process(self, seconds, expected):
        found = result(scenario="slow-rank", ours=record(1.0), ddp=record(seconds), tp=record(1.5), single=record(0.5))
        assert found.outcome() is expected
        assert len(told(found)) == 1

    def test_peers_that_do_not_run_are_left_out_and_told(self):
        found = result(scenario="memory-limit", ours=record(1.0), ddp=record(0.1, failure="can't allocate memory"), tp=record(1.5))
        assert told(found) == ["pass: speed 1.500 x torch tensor-parallel (bound: at least 1.25)"]
        console = Console(width=200, file=StringIO())
        show(found, console)
        assert "torch DDP did not run to the end: can't allocate memory" in console.file.getvalue()
        assert as_json(found)["contestants"]["ddp"]["failure"] == "can't allocate memory"

    def test_without_any_peer_nothing_is_proved(self):
        found = result(scenario="memory-limit", ours=record(1.0), ddp=record(0.1, failure="can't allocate memory"))
        assert found.outcome() is Outcome.INCONCLUSIVE

    @pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
    def test_what_is_limited_holds_less_than_the_state_of_the_model(self, family):
        scenario = SCENARIOS["memory-limit"]
        with torch.device("meta"):
            model = scenario.of(FULL[family]).build()
        assert 16 * sum(parameter.numel() for parameter in model.parameters()) > scenario.data_bytes

    def test_pipelines_of_peers_are_cut_by_the_ranks_speeds(self):
        workload = Workload(family="vit", layers=9)
        assert ends(workload, [1, 1]) == [4, 9]
        assert ends(workload, [1, 0.5]) == [6, 9]
        assert ends(workload, [1, 0.5, 1, 0.5]) == [3, 4, 8, 9]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--workload", "unet", "--scenario", "wide-vocabulary"], "is for the workloads gpt2, llama, bert, not for unet"),
            (["--workload", "gpt2", "--scenario", "slow-rank", "--layout", "tp=2", "--check"], "leave out --layout"),
            (["--workload", "gpt2", "--scenario", "sunshine"], "invalid choice"),
            (["--workload", "gpt2", "--ranks", "4", "--batch-size", "6"], "--batch-size 6 cannot be divided over 4 ranks"),
        ],
    )
    def test_options_that_cannot_work_are_refused(self, arguments, message, capsys):
        with pytest.raises(SystemExit):
            main(arguments)
        assert message in capsys.readouterr().err


def spin(pipe):
    pipe.send("spinning")
    while True:
        pass


class TestThrottle:
    @pytest.mark.parametrize("speed", [0.25, 0.5, 0.9])
    @pytest.mark.parametrize("late_s", [0.0, 0.002])
    def test_it_runs_for_its_part_of_the_time_also_when_pauses_last_too_long(self, speed, late_s, monkeypatch):
        """By a clock of the test's own."""
        now, draw, sent = 0.0, random.Random(0), []
        throttled = Throttled([1], speed)

        def sleep(seconds):
            nonlocal now
            now += max(seconds, 1e-6) + draw.random() * late_s
            if now > 10:
                throttled._ended.set()

        monkeypatch.setattr("benchmarks.throttle.time", SimpleNamespace(monotonic=lambda: now, sleep=sleep))
        monkeypatch.setattr("benchmarks.throttle.os", SimpleNamespace(kill=lambda _, number: sent.append((now, number))))
        throttled._alternate()
        runs = sum(end - start for (start, number), (end, _) in pairwise(sent) if number == signal.SIGCONT)
        assert runs / now == pytest.approx(speed, abs=0.01 + late_s * 25)
        assert sent[-1][1] == signal.SIGCONT

    def test_a_process_is_stopped_now_and_then_and_runs_afterwards(self):
        child, deadline = Child("spin", spin), time.monotonic() + 30
        try:
            process, seen = psutil.Process(child.pid), set()
            with Throttled([child.pid], 0.5):
                while len(seen) < 2 and time.monotonic() < deadline:
                    seen.add(process.status() == psutil.STATUS_STOPPED)
                    time.sleep(0.0017)
            assert seen == {True, False}
            before = process.cpu_times().user
            while process.cpu_times().user < before + 0.05 and time.monotonic() < deadline:
                time.sleep(0.01)
            assert process.cpu_times().user >= before + 0.05
        finally:
            child.end()

    @pytest.mark.parametrize("speed", [0.0, 1.0, 2.0])
    def test_no_part_is_refused(self, speed):
        with pytest.raises(ValueError, match="is none between 0 and 1"):
            Throttled([os.getpid()], speed)


class Failing:
    """Stands for a team."""

    def __init__(self, contestant):
        self.contestant, self.ended = contestant, False

    def end(self):
        self.ended = True


def test_who_may_fail_does_so_alone():
    limited = contestants(SMALL["gpt2"], 2, compiled=["tp"], limited=True)
    assert [name for name, each in limited.items() if not each.may_fail] == ["ours"]
    plain = contestants(SMALL["gpt2"], 2, compiled=["tp", "ours"])
    assert [name for name, each in plain.items() if each.may_fail] == ["tp+compile"]
    teams, records = {name: Failing(limited[name]) for name in ("ours", "ddp")}, {name: Record() for name in ("ours", "ddp")}
    ddp = teams["ddp"]
    with spared("ddp", teams, records["ddp"]):
        raise ChildFailed("rank 0 failed:\nTraceback\n  …\nMemoryError: no more\n")
    assert ddp.ended and list(teams) == ["ours"] and records["ddp"].failure == "MemoryError: no more"
    with pytest.raises(ChildFailed), spared("ours", teams, records["ours"]):
        raise ChildFailed("no more")


def test_a_compiled_peer_that_computes_something_else_is_ended_alone():
    found = contestants(SMALL["gpt2"], 2, compiled=["ddp", "tp", "ours"])
    names = ("ours", "ours+compile", "ddp", "ddp+compile", "tp", "tp+compile")
    teams, records = {name: Failing(found[name]) for name in names}, {name: Record() for name in names}
    wrong = teams["ddp+compile"], teams["tp+compile"]
    _agree({**dict.fromkeys(names, 0.9389), "ddp+compile": 0.9487, "tp+compile": float("nan")}, teams, records, 1)
    assert list(teams) == ["ours", "ours+compile", "ddp", "tp"] and all(team.ended for team in wrong)
    assert "step 1: losses differ" in records["ddp+compile"].failure and "ddp+compile 0.9487" in records["ddp+compile"].failure
    assert "tp+compile nan" in records["tp+compile"].failure and not records["ddp"].failure
    for name in teams:
        with pytest.raises(WrongNumbers, match=rf"step 2: .*{re.escape(name)} 0\.9487"):
            _agree({**dict.fromkeys(teams, 0.9389), name: 0.9487}, dict(teams), records, 2)


class TestPackages:
    def test_who_lacks_a_package_is_left_out_and_told(self, monkeypatch, capsys):
        monkeypatch.setattr("benchmarks.context.find_spec", lambda package: None if package == "deepspeed" else package)
        assert not [name for name in contestants(FULL["llama"], 2) if "deepspeed" in name]
        console = Console(width=200, file=StringIO())
        show(result(ours=record(1.0), ddp=record(1.0)), console)
        assert "deepspeed: not installed" in console.file.getvalue()
        with pytest.raises(SystemExit):
            main(["--workload", "llama", "--only", "ours,deepspeed-zero2"])
        assert "--only names contestants that need deepspeed, which is not installed" in capsys.readouterr().err

    def test_who_has_it_takes_part(self, monkeypatch):
        monkeypatch.setattr("benchmarks.context.find_spec", lambda package: package)
        assert {name for name in contestants(FULL["gpt2"], 2) if "deepspeed" in name} == {"deepspeed-zero2", "deepspeed-zero3"}
        assert contestants(FULL["llama"], 2)["deepspeed-pp"].divides_as("pp=2")
        assert contestants(FULL["llama"], 4)["deepspeed-zero3"].divides_as("zero=3,dp=4")

    @pytest.mark.parametrize(
        ("layout", "expected"),
        [
            ("pp=2", {"1f1b", "deepspeed-pp"}),
            ("pp=2,microbatches=4,schedule=1f1b", {"1f1b", "deepspeed-pp"}),
            ("schedule=interleaved,pp=2,chunks=2,microbatches=4", {"interleaved"}),
            ("pp=2,chunks=2", set()),
            ("zero=3,dp=2", {"fsdp2", "deepspeed-zero3"}),
            ("microbatches=4", set()),
        ],
    )
    def test_who_divides_alike_whatever_the_order(self, layout, expected):
        found = contestants(FULL["gpt2"], 2)
        assert {name for name, each in found.items() if each.is_peer and each.divides_as(layout)} == expected & found.keys()


def race(capsys, path, *arguments: str, limit_s: str = "4") -> dict:
    code = main([*arguments, "--ranks", "2", "--small", "--steps", "1", "--time-limit", limit_s, "--json", str(path)])
    assert code == 0, capsys.readouterr().out
    return json.loads(path.read_text())["contestants"]


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.usefixtures("made_up_machine")
class TestForReal:
    """Two ranks, small models; on a noisy machine steps do not count, but all are run and their losses compared."""

    def test_a_limit_ends_those_that_hold_the_whole_state(self, tmp_path, capsys):
        found = race(capsys, tmp_path / "limit.json", "--workload", "gpt2", "--scenario", "memory-limit", "--only", "ours,ddp,1f1b")
        assert "memory" in found["ddp"]["failure"]
        for name in ("ours", "1f1b"):
            assert found[name]["failure"] is None and found[name]["samples"]

    def test_half_the_speed(self, tmp_path, capsys):
        found = race(capsys, tmp_path / "slow.json", "--workload", "vit", "--scenario", "slow-rank", "--only", "ours,ddp,1f1b")
        assert all(each["samples"] and each["failure"] is None for each in found.values())

    def test_deepspeed(self, tmp_path, capsys):
        if missing_packages():
            pytest.skip("DeepSpeed, an optional peer, is not installed")
        names = "ddp,deepspeed-zero2,deepspeed-zero3,deepspeed-pp"
        found = race(capsys, tmp_path / "deepspeed.json", "--workload", "llama", "--only", names, limit_s="20")
        assert set(found) == set(names.split(",")) and all(len(each["samples"]) > 2 for each in found.values())

    def test_a_link_between_hosts(self, tmp_path, capsys):
        if reason := why_not():
            pytest.skip(reason)
        found = race(capsys, tmp_path / "link.json", "--workload", "llama", "--scenario", "shaped-link", "--only", "ours,ddp")
        assert all(each["samples"] and each["failure"] is None for each in found.values())
