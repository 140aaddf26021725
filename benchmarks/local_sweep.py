"""Does the planner choose the best layout of this machine, and does it know in which order the others come?

    python benchmarks/local_sweep.py [--models gpt2,llama,vit] [--time-limit 900] [--json out.json] [--check]

Plans every layout of `local:4` that can be emitted (data, tensor, context and pipeline parallelism and their mixes, microbatches,
schedules), runs each of them for real, and prints predicted beside measured step times, with 95 % intervals of the medians. Layouts
take turns (see race.py), as many at once as fit the memory, the chosen one always among them; only quiet steps count. Exit codes: 0
done; with --check also 1 a bound is broken (the chosen layout is neither within 5 % of the best nor their intervals overlap; rank
correlation below 0.8) and 75 inconclusive (too few quiet steps); 2 an error, wrong losses included.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console

from benchmarks.context import Contestant, RankContext
from benchmarks.heats import RANK_BYTES, Heat, free_bytes, heats
from benchmarks.intervals import least_count
from benchmarks.processes import Child, ChildFailed, receive
from benchmarks.race import Record, race
from benchmarks.ranks import Team
from benchmarks.step_time import EXIT_CODES, EXIT_ERROR, EXIT_INTERRUPTED, FILE_WIDTH
from benchmarks.sweep_layouts import Planned, Space, plan_all
from benchmarks.sweep_result import Sweep, as_json, rows_of, show
from benchmarks.verdict import Finding, WrongNumbers, overall
from benchmarks.workloads import FULL, MEDIUM, SMALL, Workload

PLAN_TIMEOUT_S = 600.0
SIZES = {"full": FULL, "medium": MEDIUM, "small": SMALL}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return the exit code."""
    options = _parse(arguments)
    console = Console(width=None if sys.stdout.isatty() else FILE_WIDTH)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_ERROR))
    sweeps = []
    try:
        for model in options.models:
            sweeps.append(sweep(SIZES[options.size][model], options, console))
            show(sweeps[-1], console, breakdown=options.breakdown)
    except (ChildFailed, WrongNumbers) as error:
        console.print(f"error: {error}", markup=False, soft_wrap=True)
        return EXIT_ERROR
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    finally:
        if options.json:
            options.json.write_text(json.dumps({each.workload.family: as_json(each) for each in sweeps}, indent=1) + "\n")
    findings: list[Finding] = [finding for each in sweeps for finding in each.findings()]
    console.print(f"result: {overall(findings).value}")
    return EXIT_CODES[overall(findings)] if options.check else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Predicted and measured seconds of a step in every layout of this machine.")
    parser.add_argument("--models", type=_models, default=["gpt2", "llama", "vit"], help=f"comma-separated, of {', '.join(sorted(FULL))}")
    parser.add_argument("--ranks", type=int, default=4, help="local ranks (default %(default)s)")
    parser.add_argument("--size", choices=list(SIZES), default="medium", help="of the models (default %(default)s); small measures nothing")
    parser.add_argument("--steps", type=int, default=9, help="quiet steps wanted of each layout (default %(default)s)")
    parser.add_argument("--only", default="", metavar="TEXT", help="only layouts whose text holds this, and the chosen one")
    parser.add_argument("--time-limit", type=float, default=900.0, metavar="S", help="for each model, all in all (default %(default)g)")
    parser.add_argument("--breakdown", action="store_true", help="print seconds by kind of action, too")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    parser.add_argument("--check", action="store_true", help="exit 1 if a bound is broken, 75 if there were too few quiet steps")
    options = parser.parse_args(arguments)
    if options.check and (options.size == "small" or options.only):
        parser.error("--check judges all layouts at a size that takes time: leave out --only and --size small")
    if options.check and options.steps < least_count():
        parser.error(f"--check needs at least {least_count()} quiet steps: --steps {options.steps} cannot suffice")
    return options


def _models(text: str) -> list[str]:
    if unknown := sorted(set(text.split(",")) - set(FULL)):
        raise argparse.ArgumentTypeError(f"no model {', '.join(unknown)}; there are {', '.join(sorted(FULL))}")
    return text.split(",")


def sweep(workload: Workload, options: argparse.Namespace, console: Console) -> Sweep:
    """Plan all layouts of a model, and race them heat by heat until all have their steps or the time is over."""
    deadline = time.monotonic() + options.time_limit
    with tempfile.TemporaryDirectory() as folder:
        space = _plans(workload, options, Path(folder))
        planned = groups(space.plans, options.ranks, free_bytes())
        console.print(f"{workload.family}: {len(space.plans)} layouts in {len(planned)} heats", soft_wrap=True)
        done = []
        for number, group in enumerate(planned):
            if time.monotonic() < deadline:
                each_s = (deadline - time.monotonic()) / (len(planned) - number)
                done.append(_race(workload, group, options, time.monotonic() + each_s, console))
    return Sweep(workload=workload, ranks=options.ranks, rows=rows_of(space.plans, done), refused=space.refused)


def groups(plans: Sequence[Planned], ranks: int, limit_bytes: int) -> list[list[Planned]]:
    """Which layouts race each other: those predicted alike, the chosen one always among them."""
    ordered = sorted(plans, key=lambda plan: (not plan.chosen, plan.step_time_s))
    named = {plan.name: plan for plan in ordered}
    taken = {plan.name: sum(plan.memory_bytes) + ranks * RANK_BYTES for plan in ordered}
    return [[named[name] for name in heat] for heat in heats(taken, limit_bytes)]


def _plans(workload: Workload, options: argparse.Namespace, folder: Path) -> Space:
    """Plan in a process of its own, which leaves no memory or threads behind in this one."""
    planner = Child("the planner", _send_plans, workload, options.ranks, folder, options.only)
    try:
        space: Space = receive([planner], PLAN_TIMEOUT_S, "the plans")[0]
    finally:
        planner.end()
    return space


def _send_plans(pipe: Connection, workload: Workload, ranks: int, folder: Path, only: str) -> None:
    pipe.send(plan_all(workload, ranks, folder, only))


def _race(workload: Workload, plans: Sequence[Planned], options: argparse.Namespace, deadline: float, console: Console) -> Heat:
    records = {plan.name: Record() for plan in plans}
    teams: dict[str, Team] = {}
    try:
        for plan in plans:
            if time.monotonic() > deadline:
                console.print(f"the time is over before {plan.name} is set up", markup=False, soft_wrap=True)
                return records
            teams[plan.name] = _team(workload, plan, options.ranks)
            records[plan.name].set_up_peak_bytes = teams[plan.name].wait_ready()
        left_s = max(0.0, deadline - time.monotonic())
        race(teams, records, steps=options.steps, limit_s=left_s, report=lambda line: console.print(line.partition(":")[0]))
    finally:
        for team in teams.values():
            team.end()
    return records


def _team(workload: Workload, plan: Planned, ranks: int) -> Team:
    threads = max(1, (os.cpu_count() or 1) // ranks)
    contestant = Contestant(name=plan.name, title=plan.name, builder="benchmarks.ours:build", ranks=ranks, threads=threads, is_peer=False)
    return Team(contestant, [RankContext(rank=rank, world_size=ranks, workload=workload, plan_path=plan.path) for rank in range(ranks)])


if __name__ == "__main__":
    sys.exit(main())
