"""The sweep over all layouts: which there are, who races whom, how sure its figures are, and what it concludes."""

import json
import random
from itertools import combinations, product
from pathlib import Path

import pytest
from benchmarks.heats import RANK_BYTES, heats, together
from benchmarks.intervals import Interval, coverage, least_count, median_interval
from benchmarks.local_sweep import groups, main
from benchmarks.race import Record
from benchmarks.sweep_layouts import Planned, every_layout
from benchmarks.sweep_result import Row, Sweep, as_json, rows_of
from benchmarks.verdict import Outcome, Sample
from benchmarks.workloads import SMALL

from shardwise.program.actions import Kind
from shardwise.program.tables import NAMES


def planned(name: str, predicted: float = 1.0, *, chosen: bool = False, nbytes: int = 0) -> Planned:
    memory = (nbytes,) * 4
    return Planned(name=name, path=Path(name), chosen=chosen, step_time_s=predicted, memory_bytes=memory, actions={"forward": predicted})


def record(*seconds: float, share: float = 0.0) -> Record:
    samples = [Sample(round=number, seconds=each, loss=1.0, others_share=share) for number, each in enumerate([9.0, 9.0, *seconds])]
    return Record(samples=samples, peak_bytes=[1, 2, 3, 4])


class TestIntervals:
    @pytest.mark.parametrize("count", range(1, 12))
    def test_coverage_is_that_of_all_ways_to_fall(self, count):
        """Each value lies below or above the median with equal chance, independently."""
        for place in range(1, (count + 1) // 2 + 1):
            ways = [place <= sum(below) <= count - place for below in product((0, 1), repeat=count)]
            assert coverage(count, place) == pytest.approx(sum(ways) / len(ways))

    @pytest.mark.parametrize(("count", "low", "high"), [(6, 1, 6), (8, 1, 8), (9, 2, 8), (12, 3, 10), (20, 6, 15), (25, 8, 18)])
    def test_agrees_with_the_printed_tables(self, count, low, high):
        """Of 95 %: Conover, "Practical nonparametric statistics", or any table of the sign test."""
        values = list(range(1, count + 1))
        random.Random(0).shuffle(values)
        interval = median_interval(values)
        assert (interval.low, interval.high) == (low, high)
        assert interval.median == (count + 1) / 2

    @pytest.mark.parametrize("count", range(6))
    def test_too_few_values_have_none(self, count):
        assert median_interval([1.0] * count) is None
        assert least_count() == 6

    def test_holds_the_median_as_often_as_it_says(self):
        draw = random.Random(1)
        held = 0
        for _ in range(2000):
            interval = median_interval([draw.lognormvariate(0, 1) for _ in range(9)])  # its median is 1
            held += interval.low <= 1 <= interval.high
        assert 0.95 <= held / 2000 <= 0.975, "9 values cover with 96.1 %"

    @pytest.mark.parametrize(("low", "high", "expected"), [(0, 1, False), (0, 2, True), (2.5, 2.6, True), (3, 9, True), (3.1, 9, False)])
    def test_overlap_both_ways(self, low, high, expected):
        one, other = Interval(median=2.5, low=2, high=3), Interval(median=low, low=low, high=high)
        assert one.overlaps(other) is other.overlaps(one) is expected


class TestLayouts:
    def test_are_all_there_are(self):
        """Every mesh of 4 ranks, and every schedule where there is a pipeline."""
        found = every_layout(4, 16)
        names = [str(layout) for layout in found]
        assert len(set(names)) == len(names)
        meshes = {sizes for sizes in product((1, 2, 4), repeat=4) if sizes[0] * sizes[1] * sizes[2] * sizes[3] == 4}
        assert {layout.mesh for layout in found} == meshes
        assert {layout.schedule for layout in found if layout.pp > 1} == set(NAMES)
        assert {layout.schedule for layout in found if layout.pp == 1} == {"1f1b"}
        assert all(16 % (layout.dp * layout.microbatches) == 0 for layout in found)

    def test_that_do_the_same_are_one(self):
        """Two stages with one microbatch: forward, backward, whether the schedule is called 1f1b or gpipe."""
        found = [layout.schedule for layout in every_layout(2, 1) if layout.pp == 2]
        assert "1f1b" in found and "gpipe" not in found and len(set(found)) == len(found)


class TestHeats:
    def test_everyone_once_and_the_chosen_always(self):
        plans = [planned(str(number), 10.0 - number, chosen=number == 3, nbytes=10) for number in range(9)]
        found = groups(plans, 4, 3 * 4 * (RANK_BYTES + 10))
        assert [len(heat) for heat in found] == [3, 3, 3, 3]
        assert all(heat[0].name == "3" for heat in found)
        assert [plan.name for heat in found for plan in heat[1:]] == ["8", "7", "6", "5", "4", "2", "1", "0"], (
            "those predicted alike together"
        )

    def test_fit_the_memory(self):
        sizes = {name: float(size) for size, name in enumerate("abcdefg")}
        found = heats(sizes, 8)
        assert [name for heat in found for name in heat[1:]] == list("bcdefg") and all(heat[0] == "a" for heat in found)
        assert all(len(heat) == 2 or sum(sizes[name] for name in heat) <= 8 for heat in found)
        assert heats(sizes, 21) == [list("abcdefg")]

    def test_nobody_is_left_out_where_nothing_fits(self):
        assert heats({"a": 1, "b": 1, "c": 1}, 0) == [["a", "b"], ["a", "c"]]

    def test_who_has_no_rival_races_alone(self):
        assert heats({"a": 1}, 0) == [["a"]]


class TestRows:
    def test_leave_out_warm_up_and_noise(self):
        (row,) = rows_of([planned("a", chosen=True)], [{"a": record(1, 2, 3)}])
        assert row.seconds == (1, 2, 3) and row.peak_bytes == (1, 2, 3, 4)
        (row,) = rows_of([planned("a", chosen=True)], [{"a": record(1, 2, 3, share=0.06)}])
        assert row.seconds == () and row.interval is None

    def test_a_slow_hour_is_taken_out(self):
        """The second heat ran at half the speed: b's 2 s there are as fast as a's 1 s."""
        heats_ = [{"a": record(1, 1, 1), "c": record(3, 3)}, {"a": record(2, 2, 2), "b": record(2, 2)}]
        rows = {row.plan.name: row.seconds for row in rows_of([planned("a", chosen=True), planned("b"), planned("c")], heats_)}
        assert rows["a"] == pytest.approx((1.5,) * 6)
        assert rows["b"] == pytest.approx((1.5, 1.5)) and rows["c"] == pytest.approx((4.5, 4.5))

    def test_of_the_heats_the_largest_peak_and_any_failure_count(self):
        one, other, gone = record(1), record(1), record(1)
        other.peak_bytes, gone.failure = [4, 1, 1, 1], "no memory"
        found = together([{"a": one, "b": gone}, {"a": other, "c": record(1)}], "a")
        assert found["a"].peak_bytes == [4, 2, 3, 4] and found["b"].failure == "no memory" and not found["a"].failure


def sweep(*rows: tuple[str, float, list[float]], chosen: str = "a") -> Sweep:
    made = tuple(Row(plan=planned(name, predicted, chosen=name == chosen), seconds=tuple(seconds)) for name, predicted, seconds in rows)
    return Sweep(workload=SMALL["gpt2"], ranks=4, rows=made, refused=())


def near(middle: float) -> list[float]:
    return [middle * (1 + 0.001 * step) for step in range(-4, 5)]


class TestFindings:
    @pytest.mark.parametrize(
        ("chosen", "outcome"),
        [(near(1.0), Outcome.PASS), (near(1.049), Outcome.PASS), (near(1.06), Outcome.FAIL), ([1.0, 1.0, *near(1.2)], Outcome.PASS)],
    )
    def test_choice(self, chosen, outcome):
        """Within 5 %, or so unsure that it cannot be told."""
        found = sweep(("a", 1, chosen), ("b", 2, near(1.0)), ("c", 3, near(3.0))).findings()[0]
        assert found.outcome is outcome and "chosen a" in found.text

    def test_order(self):
        times = [1.0, 2.0, 3.0, 4.0, 5.0]
        for wrong in range(3):
            predicted = times[:]
            for place in range(wrong):
                predicted[2 * place], predicted[2 * place + 1] = predicted[2 * place + 1], predicted[2 * place]
            rows = [(name, guess, near(truth)) for name, guess, truth in zip("abcde", predicted, times, strict=True)]
            judged = sweep(*rows)
            inversions = sum((p - q) * (t - u) < 0 for (p, t), (q, u) in combinations(list(zip(predicted, times, strict=True)), 2))
            assert judged.tau == pytest.approx(1 - 2 * inversions / 10)
            assert judged.findings()[1].outcome is (Outcome.PASS if judged.tau >= 0.8 else Outcome.FAIL)
            assert judged.repeatability == 1

    def test_a_layout_without_enough_steps_leaves_it_open(self):
        judged = sweep(("a", 1, near(1.0)), ("b", 2, [1.0] * 5))
        assert judged.outcome() is Outcome.INCONCLUSIVE
        assert "1 of 2 layouts, among them b" in judged.findings()[0].text
        assert [row.plan.name for row, _ in judged.measured] == ["a"]

    def test_goes_into_a_file(self):
        told = json.loads(json.dumps(as_json(sweep(("a", 1, near(1.0)), ("b", 2, near(2.0))))))
        assert told["outcome"] == "pass" and told["tau"] == 1
        assert [row["measured"]["median"] for row in told["rows"]] == [1, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--check", "--size", "small"], "leave out --only and --size small"),
        (["--check", "--only", "tp=2"], "leave out --only and --size small"),
        (["--check", "--steps", "5"], "at least 6 quiet steps: --steps 5 cannot suffice"),
        (["--models", "gpt3"], "no model gpt3; there are bert, gpt2, llama, moe, unet, vit"),
    ],
)
def test_options_that_cannot_work_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_a_sweep_runs_for_real(tmp_path, capsys):
    """Two ranks, the tiny model, one schedule beside the chosen layout; on a noisy machine steps do not count, but all are run."""
    path, layout = tmp_path / "sweep.json", "dp=1,tp=1,pp=2,microbatches=2,schedule=gpipe"
    arguments = ["--models", "gpt2", "--ranks", "2", "--size", "small", "--only", layout, "--steps", "1", "--breakdown"]
    assert main([*arguments, "--time-limit", "90", "--json", str(path)]) == 0, capsys.readouterr().out
    told = json.loads(path.read_text())["gpt2"]
    assert layout in {row["layout"] for row in told["rows"]}
    assert sum(row["chosen"] for row in told["rows"]) == 1
    for row in told["rows"]:
        assert len(row["peak_bytes"]) == 2 and row["predicted_s"] > 0
        assert set(row["actions_s"]) <= {kind.value for kind in Kind}, "none where no step counted"
