"""`shardwise doctor`: what this machine has, what it measured, and what is wrong with it."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import sys

import psutil
import torch
import torch.distributed as dist
from pydantic import BaseModel, ConfigDict
from rich.table import Table

from shardwise.cluster.machine import available_cores, available_memory_bytes
from shardwise.cluster.rates import DISTURBED, CollectiveRate, Rates
from shardwise.errors import ShardwiseError

__all__ = ["Finding", "examine", "table"]

_OLDEST_TORCH = (2, 13)
_REQUIRED = ("torch", "highspy", "numpy", "plotly", "psutil", "pydantic", "rich", "torchdata", "typer")
_OPTIONAL = ("transformers", "safetensors")
_LEAST_MEMORY_BYTES = 2 * 10**9
_MEASURED = "local:2"


class Finding(BaseModel):
    """One line: problem is None when all is well, else what is wrong and the way out."""

    model_config = ConfigDict(frozen=True)

    group: str
    name: str
    value: str
    problem: str | None = None


def examine(*, measure: bool = True) -> list[Finding]:
    """Everything that `doctor` shows. measure: also measure the machine, which takes seconds the first time and is then cached."""
    findings = [*_versions(), *_tools(), *_machine(), *_backends()]
    return [*findings, *_figures()] if measure else findings


def table(findings: list[Finding]) -> Table:
    """The findings for people."""
    result = Table(show_edge=False, pad_edge=False)
    for heading in ("", "what", "found", ""):
        result.add_column(heading, overflow="fold")
    previous = ""
    for finding in findings:
        verdict = f"[red]{finding.problem}[/red]" if finding.problem else "[green]ok[/green]"
        result.add_row(finding.group if finding.group != previous else "", finding.name, finding.value, verdict)
        previous = finding.group
    return result


def _versions() -> list[Finding]:
    python = ".".join(map(str, sys.version_info[:3]))
    return [
        Finding(group="versions", name="python", value=python),
        *(_package(name, required=True) for name in _REQUIRED),
        *(_package(name, required=False) for name in _OPTIONAL),
    ]


def _package(name: str, *, required: bool) -> Finding:
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        problem = f"missing: pip install {name}" if required else None
        return Finding(group="versions", name=name, value="not installed" if required else "not installed (optional)", problem=problem)
    return Finding(group="versions", name=name, value=version, problem=_too_old(version) if name == "torch" else None)


def _too_old(version: str) -> str | None:
    numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:2])
    if numbers >= _OLDEST_TORCH:
        return None
    return f"{version} is older than {_OLDEST_TORCH[0]}.{_OLDEST_TORCH[1]}: pip install torch==2.13.0"


def _tools() -> list[Finding]:
    compiler = shutil.which("g++") or shutil.which("clang++")
    missing = None if compiler else "no C++ compiler, so torch.compile cannot be used on the CPU: install g++"
    return [Finding(group="tools", name="C++ compiler", value=compiler or "none", problem=missing)]


def _machine() -> list[Finding]:
    total, free = psutil.virtual_memory().total, available_memory_bytes()
    little = free < _LEAST_MEMORY_BYTES
    problem = f"only {free / 1e9:.1f} GB free, under {_LEAST_MEMORY_BYTES / 1e9:.0f} GB: close other programs" if little else None
    return [
        Finding(group="machine", name="system", value=f"{platform.system()} {platform.machine()}"),
        Finding(group="machine", name="cores", value=str(available_cores())),
        Finding(group="machine", name="memory", value=f"{total / 1e9:.1f} GB, {free / 1e9:.1f} GB free", problem=problem),
        *_gpus(),
    ]


def _gpus() -> list[Finding]:
    if not torch.cuda.is_available():
        return [Finding(group="machine", name="GPUs", value="none")]
    devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [
        Finding(group="machine", name=f"GPU {index}", value=f"{device.name}, {device.total_memory / 1e9:.1f} GB")
        for index, device in enumerate(devices)
    ]


def _backends() -> list[Finding]:
    return [
        _backend("gloo", present=dist.is_available() and dist.is_gloo_available(), needed=True),
        _backend("nccl", present=dist.is_available() and dist.is_nccl_available(), needed=torch.cuda.is_available()),
    ]


def _backend(name: str, *, present: bool, needed: bool) -> Finding:
    problem = f"this torch was built without {name}: install another build" if needed and not present else None
    return Finding(group="backends", name=name, value="yes" if present else "no", problem=problem)


def _figures() -> list[Finding]:
    from shardwise.cluster.model import Cluster

    try:
        cluster = Cluster.parse(_MEASURED)
    except ShardwiseError as error:
        return [Finding(group="measured", name=_MEASURED, value="failed", problem=str(error))]
    return [*_compute(cluster.rates), *(_collective(rate) for rate in cluster.rates.collectives)]


def _compute(rates: Rates) -> list[Finding]:
    size, streamed_bytes = 1024, 2.0**26
    told = f"measured {rates.contention:.2f} × slower than alone, over {DISTURBED}: other processes disturbed it"
    problem = told if rates.disturbed else None
    return [
        Finding(
            group="measured",
            name=f"matmul {size}³, {dtype}",
            value=f"{rate.flops_per_s(size, size, size) / 1e9:.1f} Gflop/s a rank",
            problem=problem,
        )
        for dtype, rate in rates.matmul.items()
    ] + [
        Finding(group="measured", name="memory, read", value=f"{rates.read_bytes_per_s.at(streamed_bytes) / 1e9:.1f} GB/s a rank"),
        Finding(group="measured", name="memory, write", value=f"{rates.write_bytes_per_s.at(streamed_bytes) / 1e9:.1f} GB/s a rank"),
    ]


def _collective(rate: CollectiveRate) -> Finding:
    return Finding(
        group="measured",
        name=f"{rate.kind} ({rate.impl}), {rate.ranks} ranks",
        value=f"{rate.latency_s * 1e6:.0f} µs, {rate.bytes_per_s / 1e9:.2f} GB/s",
    )
