"""The launcher with real ranks: results, deaths, signals, orphans, ports."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from shardwise.errors import ClusterError, LayoutError, RankFailed
from shardwise.runtime import launch as launch_module
from shardwise.runtime.launch import launch

pytestmark = pytest.mark.distributed


def all_reduced(factor: int) -> tuple[int, float, torch.Tensor]:
    total = torch.tensor([float(dist.get_rank() * factor)])
    dist.all_reduce(total)
    return dist.get_rank(), total.item(), torch.full((3,), float(dist.get_rank()))


def threads() -> int:
    return torch.get_num_threads()


def test_results_come_by_rank() -> None:
    results = launch(all_reduced, (10,), ranks=3, threads=1)
    assert [(rank, total) for rank, total, _ in results] == [(0, 30.0), (1, 30.0), (2, 30.0)]
    assert torch.equal(results[2][2], torch.full((3,), 2.0))


def launched_from_a_pool(factor: int) -> list[float]:
    return [total for _, total, _ in launch(all_reduced, (factor,), ranks=2, threads=1)]


def test_a_worker_of_a_pool_may_start_ranks() -> None:
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.map(launched_from_a_pool, [1, 10]) == [[1.0, 1.0], [10.0, 10.0]]
        assert pool.apply(daemonic), "the worker is what it was"


def daemonic() -> bool:
    return multiprocessing.current_process().daemon


def test_closures_and_large_results_are_fine() -> None:
    local = torch.arange(4.0)

    def function() -> torch.Tensor:
        return torch.zeros(1_000_000) + local.sum()

    results = launch(function, ranks=2, threads=1)
    assert all(result.shape == (1_000_000,) and result[0] == 6.0 for result in results)


def test_ranks_with_several_threads_work_after_the_parent_used_its_own() -> None:
    """A forked child would hang here: GNU OpenMP's threads do not survive a fork."""
    torch.randn(500, 500).exp().sum()
    assert launch(threads, ranks=1, threads=2) == [2]


def test_many_starts_in_a_row_are_fast() -> None:
    started = time.monotonic()
    for _ in range(3):
        launch(threads, ranks=2, threads=1)
    assert time.monotonic() - started < 10


def leave_a_failed_job_as_garbage() -> None:
    try:
        launch(raises_on_rank_1, ranks=2, threads=1)
    except RankFailed as error:  # its traceback holds the agent and its store
        cycle: list[object] = [error]
        cycle.append(cycle)


def test_ranks_may_collect_garbage_after_a_failed_job() -> None:
    """Ranks died of a segmentation fault: they destroyed what a failed job had left in their parent (see `_frozen_objects`)."""
    wanted = [True]
    os.register_at_fork(after_in_child=lambda: wanted and gc.collect())
    gc.disable()
    try:
        leave_a_failed_job_as_garbage()
        assert launch(threads, ranks=3, threads=1) == [1, 1, 1]
    finally:
        gc.enable()
        wanted.clear()


def raises_on_rank_1() -> None:
    if dist.get_rank() == 1:
        raise ValueError("the number was 3, not 4")
    dist.barrier()


def dies_on_rank_1() -> None:
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def leaves_on_rank_1() -> None:
    if dist.get_rank() == 1:
        os._exit(7)
    dist.barrier()


def test_the_first_error_is_shown_first() -> None:
    started = time.monotonic()
    with pytest.raises(RankFailed, match=r"rank 1 of 3 failed: ValueError: the number was 3, not 4") as caught:
        launch(raises_on_rank_1, ranks=3, threads=1)
    assert time.monotonic() - started < 10
    assert (caught.value.rank, caught.value.kind) == (1, "ValueError")
    assert "in raises_on_rank_1" in caught.value.trace


@pytest.mark.parametrize(("function", "kind"), [(dies_on_rank_1, "SIGKILL"), (leaves_on_rank_1, "exit code 7")])
def test_a_silent_death_is_named_and_not_its_consequences(function: object, kind: str) -> None:
    started = time.monotonic()
    with pytest.raises(RankFailed) as caught:
        launch(function, ranks=3, threads=1)  # type: ignore[arg-type]
    assert time.monotonic() - started < 10
    assert (caught.value.rank, caught.value.kind) == (1, kind)


def waits_for_nobody() -> None:
    if dist.get_rank() == 1:
        time.sleep(60)
    dist.barrier()


def test_a_wait_ends_by_itself() -> None:
    started = time.monotonic()
    with pytest.raises(RankFailed, match=r"rank 0 of 2 failed.*[Tt]imed out"):
        launch(waits_for_nobody, ranks=2, threads=1, timeout_s=1)
    assert time.monotonic() - started < 6


def test_no_process_is_left_after_a_failure() -> None:
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    with pytest.raises(RankFailed):
        launch(raises_on_rank_1, ranks=4, threads=1)
    left = [child for child in psutil.Process().children(recursive=True) if child.pid not in before and child.status() != "zombie"]
    assert left == []


PARENT = """
import os, sys, time
import torch.distributed as dist
from shardwise.runtime.launch import launch

def function(path):
    with open(f"{path}/{dist.get_rank()}.tmp", "w") as file:
        file.write(str(os.getpid()))
    os.rename(file.name, f"{path}/{dist.get_rank()}.pid")
    time.sleep(60)

launch(function, (sys.argv[1],), ranks=2, threads=1)
"""


def start_parent(directory: Path) -> tuple[subprocess.Popen[bytes], list[int]]:
    environment = os.environ | {"TMPDIR": str(directory)}  # a killed parent cannot clean up
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(directory)], stderr=subprocess.DEVNULL, env=environment)
    deadline = time.monotonic() + 30
    while len(list(directory.glob("*.pid"))) < 2:
        assert time.monotonic() < deadline and parent.poll() is None, "the ranks did not start"
        time.sleep(0.05)
    return parent, [int(path.read_text()) for path in directory.glob("*.pid")]


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_ranks_do_not_outlive_their_parent(tmp_path: Path, number: signal.Signals) -> None:
    parent, ranks = start_parent(tmp_path)
    parent.send_signal(number)
    assert (
        parent.wait(timeout=10)
        == {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 128 + signal.SIGTERM, signal.SIGINT: -signal.SIGINT}[number]
    )
    deadline = time.monotonic() + 5
    while any(alive(pid) for pid in ranks):  # the kernel needs a moment
        assert time.monotonic() < deadline, f"ranks outlived their parent after {number.name}"
        time.sleep(0.05)


def test_a_port_in_use_is_told_before_any_rank_starts() -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        with pytest.raises(ClusterError, match=rf"port {port} on 127\.0\.0\.1 is already in use .*--port"):
            launch(threads, ranks=2, port=port)


def test_a_port_in_use_is_told_under_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    from shardwise.runtime.group import process_group

    with socket.socket() as holder:
        holder.bind(("", 0))
        holder.listen()
        port = holder.getsockname()[1]
        for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(ClusterError, match=rf"port {port} on 127\.0\.0\.1 is already in use"), process_group(timeout_s=2):
            pass


def test_a_chosen_port_works() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    assert launch(threads, ranks=2, threads=1, port=port) == [1, 1]


def test_no_ranks_is_refused() -> None:
    with pytest.raises(LayoutError, match="cannot start 0 ranks"):
        launch(threads, ranks=0)


def test_a_rank_cannot_start_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ClusterError, match="a rank cannot start ranks"):
        launch(threads, ranks=2)


def test_the_programs_own_signal_handlers_come_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    launch(threads, ranks=1, threads=1)
    assert signal.getsignal(signal.SIGINT) is before


def test_outside_a_job_there_is_no_group_to_join() -> None:
    from shardwise.runtime.group import process_group

    with pytest.raises(ClusterError, match="started by no launcher"), process_group(timeout_s=1):
        pass


def test_a_rank_that_hangs_before_its_first_line_is_started_once_more(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wait_for_all, hung = launch_module._wait_for_all, tmp_path / "hung"

    def hang_once(job: launch_module._Job) -> None:
        if os.environ["RANK"] == "1" and not hung.exists():
            hung.touch()
            time.sleep(60)
        wait_for_all(job)

    monkeypatch.setattr(launch_module, "_START_S", 1.0)
    monkeypatch.setattr(launch_module, "_wait_for_all", hang_once)
    started = time.monotonic()
    assert launch(lambda: os.environ["RANK"], ranks=2, threads=1) == ["0", "1"]
    assert hung.exists()
    assert time.monotonic() - started < 20
