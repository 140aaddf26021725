"""Measures this machine with as many real ranks as a plan would use, once, and keeps the figures.

    local_rates(ranks) ── kept, and not disturbed? ── yes ─▶ Rates
                             └──── no ──▶ measure(ranks): N ranks start
                                            min(N, cores) of them compute, all at once   → rates of one rank
                                            all N communicate, by groups of every size   → collectives
                                          ─▶ keep as JSON

Computing is measured on as many ranks as there are cores: where more share them, whoever uses the figures models the sharing.
The figures are kept for each processor, number of cores, torch version, number of ranks and version of this probe. Those that other
processes disturbed are used for a quarter of an hour, then measured anew; the less disturbed ones stay.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pydantic import ValidationError

from shardwise.cluster import probe_compute
from shardwise.cluster.machine import available_cores, processor_name
from shardwise.cluster.probe_collectives import collective_rates
from shardwise.cluster.rates import Rates
from shardwise.cluster.timing import Stopwatch
from shardwise.environment import cache_directory, rank_environment
from shardwise.heap import MAPPED_FROM_BYTES

__all__ = ["Budget", "cache_file", "local_rates", "measure"]

_PROBE_VERSION = 11  # raise it when what is measured changes: figures kept by an older probe are then measured anew
_WAIT_S = 60.0
_LOOK_EVERY_S = 0.1
_DISTURBED_FOR_S = 900.0  # how long disturbed figures do


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How long to measure: seconds for each point, and which messages."""

    compute_s: float = 0.012
    collective_s: float = 0.03
    message_bytes: tuple[int, ...] = (1 << 10, 1 << 15, 1 << 18, 1 << 21, 1 << 24)


def local_rates(ranks: int, *, refresh: bool = False, directory: Path | None = None) -> Rates:
    """The figures of this machine with ``ranks`` ranks on it, measured where none are kept or ``refresh`` asks for it.

    Kept ones that other processes disturbed are measured anew when they are old, but for a rank of a job, which cannot measure.
    directory: where they are kept, by default the user's cache.
    """
    path = cache_file(ranks, directory or cache_directory())
    if not refresh and (kept := _kept(path)) and _does(kept, path):
        return kept
    with _alone(path.parent):
        kept = None if refresh else _kept(path)  # another process may just have measured
        if kept is not None and _does(kept, path):
            return kept
        rates = min(filter(None, (measure(ranks), kept)), key=lambda each: each.contention)
        _keep(rates, path)
        return rates


def _does(kept: Rates, path: Path) -> bool:
    return not kept.disturbed or rank_environment() is not None or time.time() - path.stat().st_mtime < _DISTURBED_FOR_S


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """One process of the user's measures at a time; the others wait, longer than measuring can take, and then measure all the same."""
    directory.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 2 * _WAIT_S
    with (directory / "measuring.lock").open("w") as lock:
        while time.monotonic() < deadline:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(_LOOK_EVERY_S)
        yield


def measure(ranks: int, budget: Budget | None = None) -> Rates:
    """Start ``ranks`` local ranks and measure; seconds to some 15 s. Raises ClusterError from within a rank, RankFailed when one fails."""
    from shardwise.runtime.launch import launch  # the one arrow upwards: measuring is running something small

    threads = max(1, available_cores() // ranks)
    results = launch(_rank, (budget or Budget(), min(ranks, available_cores())), ranks=ranks, threads=threads, timeout_s=_WAIT_S)
    return _merged([result for result in results if result is not None])


def cache_file(ranks: int, directory: Path) -> Path:
    """The file that keeps the figures of this machine with ``ranks`` ranks."""
    key = f"{processor_name()}|{available_cores()}|{torch.__version__}|{ranks}|{_PROBE_VERSION}"
    return directory / f"rates-{ranks}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def _kept(path: Path) -> Rates | None:
    """What a file holds; None where there is none or it is damaged, for then one measures again."""
    try:
        return Rates.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None


def _keep(rates: Rates, path: Path) -> None:
    """Write beside and rename, so that a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
        file.write(rates.model_dump_json(indent=1))
    os.replace(file.name, path)


def _rank(budget: Budget, computing: int) -> dict[str, Any] | None:
    """What each rank measures; None from those that only communicate."""
    rank = dist.get_rank()
    torch.manual_seed(rank)
    dist.barrier()
    found = _compute(Stopwatch(budget_s=budget.compute_s)) if rank < computing else None
    dist.barrier()
    collectives = collective_rates(budget.message_bytes, budget.collective_s)
    return None if found is None else {**found, "collectives": [rate.model_dump() for rate in collectives]}


def _compute(watch: Stopwatch) -> dict[str, Any]:
    products = (torch.float32, torch.float64, torch.bfloat16)
    matmul = {_name(dtype): probe_compute.matmul_rate(dtype, watch).model_dump() for dtype in products}
    read, write = probe_compute.streaming_bytes_per_s(watch)
    attention = probe_compute.attention_flops(watch)
    call_s, view_s = probe_compute.call_seconds(watch)
    return {
        "matmul": matmul,
        "attention_flops": _dumped(attention),
        "attention_ragged": probe_compute.attention_ragged(attention, watch),
        "convolution_flops": _dumped(probe_compute.convolution_flops(watch)),
        "read_bytes_per_s": read.model_dump(),
        "write_bytes_per_s": write.model_dump(),
        "cached_bytes_per_s": probe_compute.cached_bytes_per_s(watch),
        "fresh_bytes_per_s": probe_compute.fresh_bytes_per_s(watch),
        "fresh_from_bytes": float(MAPPED_FROM_BYTES),
        "element_s": {_name(dtype): probe_compute.element_seconds(dtype, watch) for dtype in products},
        "call_s": call_s,
        "view_s": view_s,
        "optimizers": _dumped(probe_compute.optimizer_rates(watch)),
        "contention": watch.contention,
        "unsteadiness": watch.unsteadiness,
    }


def _dumped(curves: dict[str, Any]) -> dict[str, Any]:
    return {name: curve.model_dump() for name, curve in curves.items()}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _merged(results: Sequence[dict[str, Any]]) -> Rates:
    """The median over the ranks of every figure; computing is as slow as calls are on average."""
    figures = _combined(results, statistics.median)
    unsteadiness = figures.pop("unsteadiness")
    return Rates.model_validate(figures).times_as_fast(1 / unsteadiness)


def _combined(values: Sequence[Any], combine: Callable[[list[float]], float]) -> Any:
    first = values[0]
    if isinstance(first, dict):
        return {key: _combined([value[key] for value in values], combine) for key in first}
    if isinstance(first, list | tuple):
        return [_combined([value[place] for value in values], combine) for place in range(len(first))]
    return combine(list(values)) if isinstance(first, float) else first
