"""Starts ranks on this machine, through torchrun's own API, and brings back what they return.

    parent ── elastic agent ─┬─ rank 0: join the group → function(*args) → result ─┐
                             ├─ rank 1:        "                "          "       ├─▶ [result of rank 0, of rank 1, …]
                             └─ …                                                 ─┘
A rank that fails leaves a report (failure.py); the agent then ends all others, and the parent raises RankFailed.

Ranks are forked where that is safe: they start in milliseconds with every import done, and `function` may be a closure. It is not
safe once CUDA is initialised, nor with several threads a rank: GNU OpenMP hangs in a child whose parent has used its threads.
There, fresh processes are spawned, and `function` must be importable.
"""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import pickle
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from shardwise.environment import rank_environment
from shardwise.errors import ClusterError, LayoutError
from shardwise.runtime.failure import Death, first_cause, read_reports, report_failure
from shardwise.runtime.group import die_with_parent, port_in_use, process_group, threads_per_rank

__all__ = ["launch"]

_HOST = "127.0.0.1"
_LOOK_EVERY_S = 0.1
_STARTED, _BEGUN = "started-", "begun-"  # files by which ranks say how far they are
_START_S, _POLL_S = 20.0, 0.005
_SHUTDOWN_S = 3  # after a failure, before the ranks that are left are killed outright
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)  # those that the agent handles

_AGENT_LOGGERS = ("torch.distributed.elastic", "torch.distributed.launcher", "torch.multiprocessing")


@dataclass(frozen=True, kw_only=True)
class _Job:
    function: Callable[..., Any]
    args: tuple[Any, ...]
    timeout_s: float
    threads: int
    backend: str
    parent: int
    reports: Path


def launch(
    function: Callable[..., Any],
    args: Sequence[Any] = (),
    *,
    ranks: int,
    timeout_s: float = 60.0,
    threads: int | None = None,
    port: int = 0,
    backend: str = "gloo",
    end_s: int | None = None,
) -> list[Any]:
    """Run `function(*args)` on `ranks` new local processes that form one group; their results, by rank.

    timeout_s: how long any collective, send or receive may wait; threads: of each rank, None shares the cores equally;
    port: of the rendezvous, 0 takes a free one. end_s: how long ranks may take to end after a signal or a failure, for functions that heed
    signals; then they are killed.
    Raises RankFailed with the first failing rank's own error, ClusterError for a port in use or when called from within a rank.
    """
    _check(ranks, port)
    threads = threads_per_rank(ranks) if threads is None else threads
    with (
        tempfile.TemporaryDirectory(prefix="shardwise-ranks-") as directory,
        _quiet_agent(),
        _own_signals(),
        _frozen_objects(),
        _daemons_too(),
    ):
        job = _Job(
            function=function,
            args=tuple(args),
            timeout_s=timeout_s,
            threads=threads,
            backend=backend,
            parent=os.getpid(),
            reports=Path(directory),
        )
        results = _run(_configuration(job, ranks=ranks, port=port, end_s=end_s or _SHUTDOWN_S), job, ranks)
    return [pickle.loads(results[rank]) for rank in range(ranks)]  # bytes that our own child wrote, not a file


def _check(ranks: int, port: int) -> None:
    if ranks < 1:
        raise LayoutError(f"cannot start {ranks} ranks: at least 1 is needed.")
    if rank_environment() is not None:
        raise ClusterError("a rank cannot start ranks: this process is one already (RANK is set). Call this outside torchrun.")
    if port:
        _check_port(port)


def _check_port(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((_HOST, port))
        except OSError as error:
            raise port_in_use(_HOST, port) from error


def _configuration(job: _Job, *, ranks: int, port: int, end_s: int) -> LaunchConfig:
    return LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id="shardwise",
        role="rank",
        rdzv_backend="c10d",
        rdzv_endpoint=f"localhost:{port}",
        rdzv_configs={"timeout": 60},
        local_addr=_HOST,
        max_restarts=0,
        monitor_interval=_LOOK_EVERY_S,
        start_method=_start_method(job),
        logs_specs=DefaultLogsSpecs(log_dir=str(job.reports / "agent")),
        shutdown_timeout=end_s,
    )


def _start_method(job: _Job) -> str:
    safe = job.backend == "gloo" and job.threads == 1 and not torch.cuda.is_initialized()
    return "fork" if safe and hasattr(os, "fork") else "spawn"


def _run(configuration: LaunchConfig, job: _Job, ranks: int, *, again: bool = True) -> dict[int, bytes]:
    try:
        return elastic_launch(configuration, _rank_main)(job)
    except ChildFailedError as error:
        if again and not list(job.reports.glob(f"{_BEGUN}*")):  # a forked rank hung before its first line; nothing was done yet
            for stale in [*job.reports.glob("*.json"), *job.reports.glob(f"{_STARTED}*")]:
                stale.unlink()
            return _run(configuration, job, ranks, again=False)
        rank, failure = error.get_first_failure()
        raise first_cause(read_reports(job.reports), Death(rank=rank, exit_code=failure.exitcode), ranks=ranks) from None
    except Exception as error:
        number = _signal_behind(error)
        if number is None:
            raise
        raise (KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + int(number))) from None


def _signal_behind(error: BaseException | None) -> signal.Signals | None:
    """The signal that ended the wait; the agent's own clean-up may have raised something else on top of it."""
    while error is not None and not isinstance(error, SignalException):
        error = error.__context__
    return error.sigval if error is not None else None


def _rank_main(job: _Job) -> bytes:
    """What a rank does, from its start to its end."""
    die_with_parent(job.parent)
    for one in _SIGNALS:  # the parent's handlers are inherited, and would wait for a collective to return
        signal.signal(one, signal.SIG_DFL)
    try:
        _wait_for_all(job)
        with process_group(timeout_s=job.timeout_s, threads=job.threads, backend=job.backend) as joined:
            (job.reports / f"{_BEGUN}{joined.rank}").touch()
            return pickle.dumps(job.function(*job.args))
    except BaseException as error:
        place = rank_environment()
        report_failure(error, rank=place.rank if place else -1, directory=job.reports)
        raise


def _wait_for_all(job: _Job) -> None:
    """Until every rank runs. A process forked from one with other threads may, rarely, hang at once on a lock that one of them held."""
    place = rank_environment()
    assert place is not None
    (job.reports / f"{_STARTED}{place.rank}").touch()
    deadline = time.monotonic() + min(_START_S, job.timeout_s)
    while len(started := list(job.reports.glob(f"{_STARTED}*"))) < place.ranks:
        if time.monotonic() > deadline:
            missing = sorted(set(range(place.ranks)) - {int(path.name.removeprefix(_STARTED)) for path in started})
            raise ClusterError(f"of {place.ranks} ranks {missing} did not start within {_START_S:g} s; this machine may be overloaded")
        time.sleep(_POLL_S)


@contextmanager
def _frozen_objects() -> Iterator[None]:
    """Keep a forked rank's garbage collector off the parent's objects.

    A failed job leaves its agent and store behind as garbage; a rank of the next job that collected them died of a segmentation fault.
    """
    if gc.get_freeze_count():  # the program froze its own objects, and would not want them thawed
        yield
        return
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def _daemons_too() -> Iterator[None]:
    """Lets a daemonic process (a worker of a multiprocessing.Pool) start ranks as well: unlike other children, they end with it."""
    here = multiprocessing.current_process()
    if not here.daemon:
        yield
        return
    here.daemon = False
    try:
        yield
    finally:
        here.daemon = True


@contextmanager
def _quiet_agent() -> Iterator[None]:
    """The agent logs a rank's failure as its own; ours says it better."""
    names = [name for name in logging.root.manager.loggerDict if name.startswith(_AGENT_LOGGERS)]
    levels = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


@contextmanager
def _own_signals() -> Iterator[None]:
    """The agent replaces signal handlers and leaves them; put the program's own back."""
    handlers = {one: signal.getsignal(one) for one in _SIGNALS}
    try:
        yield
    finally:
        for one, handler in handlers.items():
            if handler is not None and signal.getsignal(one) is not handler:
                signal.signal(one, handler)
