"""Does the planner, told how fast the link between two hosts is, choose the layout that is the fastest there?

    python benchmarks/two_hosts.py [--links full,1] [--steps 9] [--size full] [--check] [--json two_hosts.json]

Two hosts of two ranks each (network namespaces, see hosts.py; root and iproute2 are needed), each with half of this machine's cores, their
link as fast as the machine and then shaped to 1 Gbit/s. The link is measured and written into a cluster file; the planner chooses with that
file, and every mesh is planned, too, with the best of its microbatches that the planner finds. `torchrun` starts the ranks on both hosts,
which run all plans in turn, in rounds; losses must be equal. Exit codes: 0; 75 where there can be no hosts, or too few quiet steps for
--check; with --check 1 where the choice is the same for both links, or neither within 5 % of the best nor its interval overlaps the best's.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import psutil
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

import shardwise as sw
from benchmarks.hosts import Hosts, why_not
from benchmarks.intervals import Interval, least_count, median_interval
from benchmarks.quiet import is_quiet, others_share, read_cpu
from benchmarks.workloads import Workload, optimizer
from shardwise.capture.export import capture
from shardwise.cluster.model import Cluster
from shardwise.planner.layout import Layout
from shardwise.planner.search import search
from shardwise.program.trace import Tracer

RANKS = 4
EXIT_INCONCLUSIVE = 75
NEAR = 1.05
_LATENCY_S = 100e-6
_MESHES = ("dp=4", "tp=4", "pp=4", "dp=2,tp=2", "dp=2,pp=2", "tp=2,pp=2")
SIZES = {
    "full": Workload(family="gpt2", layers=4, hidden=512, ffn=2048, heads=8, vocabulary=4096, sequence=256, batch_size=8),
    "small": Workload(family="gpt2", layers=4, hidden=64, ffn=256, heads=4, vocabulary=512, sequence=32, batch_size=8),
}
"""As many samples as two copies in four microbatches take: pipelines have bubbles, as they have where a sample is large."""

_CLUSTER = """
name = "two hosts, {name}"
ranks = 4
nodes = 2
like = "local:4"

[network]
latency_s = {latency_s}
bytes_per_s = {bytes_per_s:.4g}
"""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A plan and what its steps took, s; chosen: by the planner."""

    layout: str
    chosen: bool
    predicted_s: float
    seconds: list[float]
    loss: float

    @property
    def median_s(self) -> float:
        return statistics.median(self.seconds)

    @property
    def interval(self) -> Interval | None:
        return median_interval(self.seconds)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return the exit code."""
    options = _parse(arguments)
    if options.rank is not None:
        return _rank(options.rank, SIZES[options.size], options.steps)
    console = Console(width=None if sys.stdout.isatty() else 130)
    if reason := why_not():
        console.print(f"inconclusive: {reason}")
        return EXIT_INCONCLUSIVE
    found: dict[str, list[Row]] = {}
    with Hosts() as hosts:
        for link in options.links.split(","):
            hosts.shape(None if link == "full" else float(link) * 1e9 / 8)
            rate = hosts.measured_bytes_per_s()
            found[link] = measured(hosts, link, rate, options)
            _show(console, found[link], f"link of {link} Gbit/s" if link != "full" else "unshaped link", rate)
    if options.json:
        rows = {link: [{**vars(row), "median_s": row.median_s} for row in each] for link, each in found.items()}
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    code, text = _verdict(found)
    console.print(text)
    return code if options.check else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The planner's choice on two hosts with a fast and a slow link, against all layouts.")
    parser.add_argument("--links", default="full,1", help="rates in Gbit/s, or full (default %(default)s)")
    parser.add_argument("--size", choices=list(SIZES), default="full", help="of the model (default %(default)s); small tries the harness")
    parser.add_argument("--steps", type=int, default=9, help="of each layout (default %(default)s)")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    parser.add_argument("--check", action="store_true", help="exit 1 where a bound is broken")
    parser.add_argument("--rank", type=Path, help=argparse.SUPPRESS)  # what torchrun starts
    return parser.parse_args(arguments)


def measured(hosts: Hosts, link: str, bytes_per_s: float, options: argparse.Namespace) -> list[Row]:
    """Plans for a link, and runs all plans on the hosts."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file = folder / "cluster.toml"
        file.write_text(_CLUSTER.format(name=link, latency_s=_LATENCY_S, bytes_per_s=bytes_per_s))
        plans, chosen = plan_all(SIZES[options.size], Cluster.parse(file))
        for number, plan in enumerate(plans):
            plan.save(folder / f"{number}.json")
        command = [str(Path(__file__).resolve()), "--rank", name, "--size", options.size, "--steps", str(options.steps)]
        source = str(Path(sw.__file__).resolve().parents[1])
        done = hosts.finished(hosts.torchrun(RANKS // 2, command, CUDA_VISIBLE_DEVICES="", PYTHONPATH=source), timeout_s=1800)
        if any(code for code, _ in done):
            raise RuntimeError("\n".join(text for _, text in done))
        steps = json.loads((folder / "steps.json").read_text())
    return [
        Row(layout=plan.layout, chosen=plan is chosen, predicted_s=plan.predicted.step_time_s, seconds=seconds, loss=loss)
        for plan, (seconds, loss) in zip(plans, steps, strict=True)
    ]


def plan_all(workload: Workload, cluster: Cluster) -> tuple[list[sw.Plan], sw.Plan]:
    """A plan of each mesh, and the one chosen among all layouts, which is one of them or added."""
    graph, tracer = capture(workload.build(), workload.batch(0)), Tracer(device=torch.device("cpu"))

    def best(pinned: str | None) -> sw.Plan:
        made = search(graph, cluster, Layout.parse(pinned), "adamw", workload.family, tracer=tracer)
        if not isinstance(made, sw.Plan):
            raise RuntimeError(str(made))
        return made

    chosen, plans = best(None), [best(mesh) for mesh in _MESHES]
    same = next((number for number, plan in enumerate(plans) if plan.layout == chosen.layout), None)
    if same is None:
        return [chosen, *plans], chosen
    plans[same] = chosen
    return plans, chosen


def _rank(folder: Path, workload: Workload, steps: int) -> int:
    """One rank: sets all plans up, then steps in rounds, and rank 0 writes down the slowest rank's times."""
    from shardwise.runtime.group import join_group

    place = int(os.environ["RANK"]) // (RANKS // 2)
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[place * len(cores) // 2 : (place + 1) * len(cores) // 2] or cores)
    torch.set_num_threads(1)
    join_group(300.0)
    jobs: list[Any] = []
    for number in range(len(list(folder.glob("[0-9]*.json")))):
        plan = sw.Plan.load(folder / f"{number}.json")
        jobs.append(sw.parallelize(workload.build(), workload.batch(0), plan=plan, optimizer=optimizer))
    times: list[list[float]] = [[] for _ in jobs]
    losses = [0.0 for _ in jobs]
    root = _launcher()
    for step in range(steps + 1):
        for number, job in enumerate(jobs):
            dist.barrier()
            before, start = read_cpu(root), time.perf_counter()
            losses[number] = job.step(workload.batch(step))
            slowest = torch.tensor([time.perf_counter() - start, 0.0 if is_quiet(others_share(before, read_cpu(root))) else 1.0])
            dist.all_reduce(slowest, dist.ReduceOp.MAX)
            if step:  # the first takes memory
                times[number].append(slowest[0].item())
    if dist.get_rank() == 0:
        (folder / "steps.json").write_text(json.dumps([[each, loss] for each, loss in zip(times, losses, strict=True)]))
    dist.barrier()
    dist.destroy_process_group()
    return 0


def _launcher() -> psutil.Process:
    """The process that started the hosts: all that the benchmark does descends from it."""
    process = psutil.Process()
    while (parent := process.parent()) is not None and "two_hosts" in " ".join(parent.cmdline()):
        process = parent
    return process


def _show(console: Console, rows: Sequence[Row], title: str, bytes_per_s: float) -> None:
    table = Table(title=f"{title}, measured {bytes_per_s / 1e6:,.0f} MB/s; seconds a step")
    for name in ("layout", "chosen", "predicted", "measured", "95 % of the median"):
        table.add_column(name, justify="left" if name == "layout" else "right")
    for row in sorted(rows, key=lambda row: row.median_s):
        between = (
            f"{row.interval.low:.3f} to {row.interval.high:.3f}" if row.interval else f"{min(row.seconds):.3f} to {max(row.seconds):.3f}"
        )
        table.add_row(row.layout, "*" if row.chosen else "", f"{row.predicted_s:.3f}", f"{row.median_s:.3f}", between)
    console.print(table)


def _verdict(found: dict[str, list[Row]]) -> tuple[int, str]:
    """(exit code, in words)."""
    wrong = []
    for link, rows in found.items():
        chosen, best = next(row for row in rows if row.chosen), min(rows, key=lambda row: row.median_s)
        overlap = chosen.interval is not None and best.interval is not None and chosen.interval.overlaps(best.interval)
        if chosen.median_s > NEAR * best.median_s and not overlap:
            wrong.append(f"{link}: {chosen.layout} was chosen, {best.layout} is {chosen.median_s / best.median_s:.2f} times as fast")
        losses = [row.loss for row in rows]
        if max(losses) - min(losses) > 1e-3 * abs(losses[0]):
            wrong.append(f"{link}: losses differ, {min(losses):.6f} to {max(losses):.6f}")
    choices = {link: next(row.layout for row in rows if row.chosen) for link, rows in found.items()}
    if len(choices) > 1 and len(set(choices.values())) == 1:
        wrong.append(f"the same layout is chosen for all links: {next(iter(choices.values()))}")
    if wrong:
        return 1, "\n".join(["result: fails", *wrong])
    if any(len(row.seconds) < least_count() for rows in found.values() for row in rows):
        return EXIT_INCONCLUSIVE, "result: inconclusive, too few steps"
    return 0, "result: passes"


if __name__ == "__main__":
    sys.exit(main())
