from __future__ import annotations

import fcntl
import os
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import cycle
from pathlib import Path

import pytest
import torch

from shardwise.cluster import probe
from shardwise.cluster.probe_kernels import KERNELS
from shardwise.cluster.rates import IMPLEMENTATIONS, KERNEL_WORKING_SET_BYTES, Curve, MatmulRate, Rates
from shardwise.cluster.timing import Stopwatch


def _rates(flops: float) -> Rates:
    curve = Curve.constant(flops)
    return Rates(
        matmul={"float32": MatmulRate(cubes_flops=curve, thinness=Curve.constant(1), batched_flops=curve)},
        attention_flops={},
        convolution_flops={},
        read_bytes_per_s=curve,
        write_bytes_per_s=curve,
        fresh_bytes_per_s=1,
        fresh_from_bytes=float("inf"),
        element_s={},
        call_s=0,
        view_s=0,
        collectives=(),
        optimizers={},
    )


@pytest.mark.distributed
def test_a_rank_without_a_pair_stands_by() -> None:
    rates = probe.measure(3, probe.Budget(compute_s=0.0, collective_s=0.0, message_bytes=(1 << 10, 1 << 18)))
    assert {rate.ranks for rate in rates.collectives if rate.kind == "shift"} == {2, 3}


@pytest.mark.distributed
def test_two_ranks_measure_everything() -> None:
    rates = probe.measure(2, probe.Budget(compute_s=0.0, collective_s=0.0, message_bytes=(1 << 10, 1 << 18)))
    assert {(rate.kind, rate.impl) for rate in rates.collectives} == {
        (kind, impl) for kind in IMPLEMENTATIONS for impl in IMPLEMENTATIONS[kind]
    }
    assert all(rate.ranks == 2 and 1e-7 < rate.latency_s <= rate.seconds[-1] < 5 for rate in rates.collectives)
    assert all(len(rate.busy_s) == 2 and 0 <= rate.busy_s[0] <= rate.busy_s[1] < 5 for rate in rates.collectives)
    assert any(rate.busy_s[1] > 0 for rate in rates.collectives)
    assert rates.cached_bytes_per_s is not None
    assert rates.cached_bytes_per_s[0] > rates.read_bytes_per_s.at(KERNEL_WORKING_SET_BYTES), "working sets of any size are met cold"
    assert 1e9 < rates.matmul_of("float32").flops_per_s(512, 512, 512) < 1e14
    assert rates.matmul_of("float32").thinness.at(1) < 0.9
    assert 1e8 < rates.read_bytes_per_s.at(1 << 26) < 1e12
    assert rates.kernel_s("gelu", "float32") > rates.kernel_s("add", "float32") > 0
    assert set(rates.element_s["float64"]) == set(KERNELS)
    assert set(rates.attention_flops) == {"forward", "backward", "forward_causal", "backward_causal"}
    plain = {"forward", "backward_input", "backward_weight"}
    assert set(rates.convolution_flops) == plain | {part + "_transposed" for part in plain}
    assert rates.optimizers["adamw"].element_s.at(1 << 20) > rates.optimizers["sgd"].element_s.at(1 << 20)
    assert 1e-8 < rates.call_s < 1e-3
    assert rates.contention >= 0.9
    assert Rates.model_validate_json(rates.model_dump_json()) == rates


def test_figures_are_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(probe, "measure", lambda ranks: asked.append(ranks) or _rates(float(len(asked))))
    first = probe.local_rates(2, directory=tmp_path / "new")
    assert probe.local_rates(2, directory=tmp_path / "new") == first == _rates(1.0)
    assert asked == [2]
    assert probe.local_rates(3, directory=tmp_path / "new") == _rates(2.0)
    assert probe.local_rates(2, refresh=True, directory=tmp_path / "new") == _rates(3.0)
    assert probe.local_rates(2, directory=tmp_path / "new") == _rates(3.0)
    assert asked == [2, 3, 2]
    assert len(list((tmp_path / "new").glob("rates-*"))) == 2


def test_only_one_process_measures_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def measure(ranks: int) -> Rates:
        asked.append(ranks)
        time.sleep(0.5)
        return _rates(1.0)

    monkeypatch.setattr(probe, "measure", measure)
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda _: probe.local_rates(2, directory=tmp_path), range(3)))
    assert asked == [2] and found == [_rates(1.0)] * 3


def test_a_lock_that_is_never_given_back_holds_nobody_up_for_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "measure", lambda _ranks: _rates(1.0))
    monkeypatch.setattr(probe, "_WAIT_S", 0.2)
    with (tmp_path / "measuring.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert probe.local_rates(2, directory=tmp_path) == _rates(1.0)


def test_disturbed_figures_are_measured_again_when_they_are_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contention = iter((7.0, 9.0, 3.0, 1.1))
    monkeypatch.setattr(probe, "measure", lambda _ranks: _rates(1.0).model_copy(update={"contention": next(contention)}))

    def found(age_s: float) -> float:
        if (path := probe.cache_file(2, tmp_path)).exists():
            os.utime(path, (path.stat().st_atime, path.stat().st_mtime - age_s))
        return probe.local_rates(2, directory=tmp_path).contention

    assert [found(0), found(600), found(600)] == [7.0, 7.0, 7.0]  # the third was measured, and was worse
    assert [found(600), found(0), found(600)] == [7.0, 7.0, 3.0]
    assert [found(1000), found(1e6)] == [1.1, 1.1]


def test_a_rank_takes_disturbed_figures_for_it_cannot_measure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = probe.cache_file(2, tmp_path)
    path.write_text(_rates(1.0).model_copy(update={"contention": 7.0}).model_dump_json())
    os.utime(path, (0, 0))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert probe.local_rates(2, directory=tmp_path).contention == 7.0


@pytest.mark.parametrize("damage", ["", "{}", '{"matmul": 3}'])
def test_damaged_figures_are_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    monkeypatch.setattr(probe, "measure", lambda _ranks: _rates(5.0))
    probe.cache_file(2, tmp_path).write_text(damage)
    assert probe.local_rates(2, directory=tmp_path) == _rates(5.0)


def test_figures_are_kept_for_a_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = probe.cache_file(2, tmp_path)
    assert here == probe.cache_file(2, tmp_path) != probe.cache_file(4, tmp_path)
    monkeypatch.setattr(probe, "processor_name", lambda: "another")
    assert probe.cache_file(2, tmp_path) != here


def test_ranks_are_merged_by_the_median() -> None:
    results = [{"a": 1.0, "b": [{"c": 10.0, "d": "x"}]}, {"a": 3.0, "b": [{"c": 30.0, "d": "x"}]}]
    assert probe._combined(results, lambda values: sum(values) / len(values)) == {"a": 2.0, "b": [{"c": 20.0, "d": "x"}]}


def test_what_is_predicted_is_what_calls_take_on_average() -> None:
    merged = probe._merged([{**_rates(900.0).model_dump(), "unsteadiness": each} for each in (1.0, 1.5, 3.0)])
    assert merged.read_bytes_per_s.at(1) == merged.matmul_of("float32").flops_per_s(64, 64, 64) == pytest.approx(600.0)


@pytest.mark.parametrize("name", list(KERNELS))
def test_kernels_run_in_every_dtype(name: str) -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        call, elements = KERNELS[name](torch.randn(64, 512).to(dtype))
        call()
        assert elements >= 64 * 512


def _busy(seconds: float) -> None:
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


def test_stopwatch_counts_the_cpu_alone() -> None:
    watch = Stopwatch(budget_s=0.0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert watch.seconds(lambda: time.sleep(0.02)) < 0.01
        assert watch.seconds(lambda: None, before=partial(_busy, 0.01)) < 0.005, "what comes before is not counted"
    finally:
        torch.set_num_threads(threads)
    assert watch.contention > 2


@pytest.mark.parametrize(("threads", "unsteadiness"), [(1, 2.0), (2, 1.0)])
def test_stopwatch_tells_how_much_longer_than_the_quicker_ones_calls_take_on_average(threads: int, unsteadiness: float) -> None:
    watch, slow, before = Stopwatch(budget_s=0.5), cycle((False, False, True)), torch.get_num_threads()
    assert watch.unsteadiness == 1.0
    torch.set_num_threads(threads)
    try:
        watch.seconds(lambda: _busy(0.004 if next(slow) else 0.001))
    finally:
        torch.set_num_threads(before)
    assert watch.unsteadiness == pytest.approx(unsteadiness, rel=0.15)
