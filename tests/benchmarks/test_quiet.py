"""Which steps count, and what they come to."""

import subprocess
import sys
import time

import psutil
import pytest
from benchmarks.quiet import CpuReading, is_quiet, others_share
from benchmarks.verdict import Finding, Outcome, Sample, Timing, WrongNumbers

from benchmarks import quiet, verdict


def reading(clock: float, busy: float, own: float) -> CpuReading:
    return CpuReading(clock_s=clock, busy_s=busy, own_s=own)


def sample(seconds: float, *, round_: int = 5, share: float = 0.0) -> Sample:
    return Sample(round=round_, seconds=seconds, loss=1.0, others_share=share)


def timing(median: float, steps: int = 9) -> Timing:
    return Timing(median_s=median, min_s=median, max_s=median, steps=steps)


class TestOthersShare:
    def test_is_the_machine_less_the_benchmark(self):
        share = others_share(reading(10, 100, 50), reading(20, 118, 66), cpus=2)
        assert share == pytest.approx(2 / 20)

    def test_own_work_is_no_noise(self):
        assert others_share(reading(0, 0, 0), reading(10, 20, 20), cpus=2) == 0

    @pytest.mark.parametrize(("busy", "own", "expected"), [(19, 20, 0.0), (30, 0, 1.0)])
    def test_stays_a_share_when_counters_disagree(self, busy, own, expected):
        assert others_share(reading(0, 0, 0), reading(10, busy, own), cpus=2) == expected

    def test_refuses_readings_in_the_wrong_order(self):
        with pytest.raises(ValueError, match=r"second reading \(1 s\) must be later than the first \(2 s\)"):
            others_share(reading(2, 0, 0), reading(1, 0, 0), cpus=2)

    def test_five_percent_is_quiet(self):
        assert is_quiet(0.05)
        assert not is_quiet(0.0501)

    def test_counts_the_work_of_children_as_own(self):
        busy_child = [sys.executable, "-c", "import time\nwhile time.process_time() < 0.3: pass"]
        before = quiet.read_cpu(psutil.Process())
        subprocess.run(busy_child, check=True)
        after = quiet.read_cpu(psutil.Process())
        assert after.own_s - before.own_s >= 0.2

    def test_measures_this_process_alone_when_it_has_no_children(self):
        before = quiet.read_cpu(psutil.Process())
        end = time.process_time() + 0.2
        while time.process_time() < end:
            pass
        after = quiet.read_cpu(psutil.Process())
        assert 0.1 <= after.own_s - before.own_s <= 0.5


class TestTiming:
    def test_leaves_out_warm_up_and_noisy_steps(self):
        samples = [sample(9, round_=0), sample(9, round_=1), sample(1, round_=2), sample(9, share=0.06), sample(2), sample(3)]
        assert verdict.timing(samples) == Timing(median_s=2, min_s=1, max_s=3, steps=3)
        assert verdict.quiet_steps(samples) == 3

    def test_is_none_without_a_step_that_counts(self):
        assert verdict.timing([sample(1, share=0.5)]) is None


class TestLosses:
    def test_may_differ_by_rounding(self):
        verdict.check_losses({"ours": 8.0005, "ddp": 8.0, "tp": 8.0}, 3)

    @pytest.mark.parametrize("wrong", [8.001, 7.999, float("nan")])
    def test_that_differ_are_an_error_that_shows_them(self, wrong):
        with pytest.raises(WrongNumbers, match=r"step 3: .*ours .*ddp 8"):
            verdict.check_losses({"ours": wrong, "ddp": 8.0, "tp": 8.0}, 3)


class TestVerdict:
    def test_best_peer_is_the_fastest(self):
        assert verdict.best_peer({"ours": timing(1), "ddp": timing(3), "tp": timing(2)}, ["ddp", "tp"]) == "tp"

    def test_there_is_no_best_peer_while_one_is_missing(self):
        assert verdict.best_peer({"ddp": timing(3), "tp": None}, ["ddp", "tp"]) is None

    def test_needs_five_quiet_steps_of_everyone(self):
        assert verdict.enough({"ours": timing(1, 5), "ddp": timing(1, 5)})
        assert not verdict.enough({"ours": timing(1, 5), "ddp": timing(1, 4)})
        assert not verdict.enough({"ours": timing(1, 5), "ddp": None})

    @pytest.mark.parametrize(("ours_s", "outcome"), [(0.9, Outcome.PASS), (1 / 0.971, Outcome.PASS), (1 / 0.969, Outcome.FAIL)])
    def test_speed_bound(self, ours_s, outcome):
        assert verdict.speed_finding(timing(ours_s), "torch DDP", timing(1.0), 0.97).outcome is outcome

    @pytest.mark.parametrize(("ours", "outcome"), [([104, 50], Outcome.PASS), ([50, 106], Outcome.FAIL)])
    def test_memory_bound_is_of_the_fullest_rank(self, ours, outcome):
        assert verdict.memory_finding(ours, "torch DDP", [10, 100], 1.05).outcome is outcome

    @pytest.mark.parametrize(
        ("error", "outcome"), [(0.25, Outcome.PASS), (-0.25, Outcome.PASS), (0.26, Outcome.FAIL), (-0.26, Outcome.FAIL)]
    )
    def test_prediction_bound_holds_both_ways(self, error, outcome):
        assert verdict.error_finding("step time", error, 0.25).outcome is outcome

    def test_the_worst_rank_is_judged(self):
        assert verdict.worst_error([110, 80], [100, 100]) == pytest.approx(-0.2)

    @pytest.mark.parametrize(
        ("outcomes", "expected"),
        [
            ([], Outcome.INCONCLUSIVE),
            ([Outcome.PASS, Outcome.PASS], Outcome.PASS),
            ([Outcome.PASS, Outcome.FAIL], Outcome.FAIL),
            ([Outcome.FAIL, Outcome.INCONCLUSIVE], Outcome.INCONCLUSIVE),
        ],
    )
    def test_overall(self, outcomes, expected):
        assert verdict.overall([Finding(text="", outcome=outcome) for outcome in outcomes]) is expected
