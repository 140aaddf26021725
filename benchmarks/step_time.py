"""How fast is one training step, ours against torch's own ways, on the ranks of this machine?

    python benchmarks/step_time.py --workload gpt2 [--ranks 2] [--steps 8] [--json out.json] [--check]
    python benchmarks/step_time.py --workload gpt2 --layout tp=2 --check     our tp=2 against torch's tensor parallelism alone
    python benchmarks/step_time.py --workload gpt2 --compiled ours,ddp       these two also with torch.compile; `all`: everyone
    python benchmarks/step_time.py --workload gpt2 --ranks 4                 in several heats, where not all fit the memory at once
    python benchmarks/step_time.py --workload gpt2 --scenario slow-rank      where the layout matters (see scenarios.py)

Runs our chosen layout, DDP, FSDP2, tensor parallelism, 1F1B and interleaved pipelining (with four ranks FSDP2 × tensor parallelism and
DDP × 1F1B, too), DeepSpeed's ZeRO-2, ZeRO-3 and pipeline where that package is installed (see peers_deepspeed.py), and one process with a
thread for each rank on the same model and batches, in turn (see race.py, heats.py), and prints a table.
--check takes each as it is or compiled, whichever is faster of those that took part.
Exit codes: 0 done; with --check also 1 a bound is broken and 75 inconclusive (too few quiet steps, no peer that runs); 75 where there can
be no two hosts for --scenario shaped-link; 2 an error, wrong losses included.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console

from benchmarks import (
    ours,
    peers,  # noqa: F401  imported before the ranks fork, so that they need not
    scenarios,
)
from benchmarks.context import CONTESTANTS, OURS, Contestant, RankContext, contestants, missing_packages
from benchmarks.heats import RANK_BYTES, free_bytes, heats, together
from benchmarks.hosts import Hosts, why_not
from benchmarks.processes import ChildFailed
from benchmarks.race import Record, race, spared
from benchmarks.ranks import Team
from benchmarks.result import Result, as_json, show
from benchmarks.scenarios import PLAIN, Scenario, host_of
from benchmarks.verdict import MIN_QUIET_STEPS, Outcome, WrongNumbers
from benchmarks.workloads import FULL, SMALL, Workload

EXIT_CODES = {Outcome.PASS: 0, Outcome.FAIL: 1, Outcome.INCONCLUSIVE: 75}
EXIT_ERROR = 2
EXIT_NO_HOSTS = 75
EXIT_INTERRUPTED = 130
FILE_WIDTH = 140


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return the exit code."""
    options = _parse(arguments)
    console = Console(width=None if sys.stdout.isatty() else FILE_WIDTH)
    if options.scenario == "shaped-link" and (reason := why_not()):
        console.print(f"inconclusive: {reason}", soft_wrap=True)
        return EXIT_NO_HOSTS
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_ERROR))
    try:
        result = run(options, console)
    except (ChildFailed, WrongNumbers) as error:
        console.print(f"error: {error}", markup=False, soft_wrap=True)
        return EXIT_ERROR
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    show(result, console)
    if options.json:
        options.json.write_text(json.dumps(as_json(result), indent=1) + "\n")
    return EXIT_CODES[result.outcome()] if options.check else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Seconds of one training step: ours and torch's own ways, on local ranks.")
    parser.add_argument("--workload", choices=sorted(FULL), required=True)
    parser.add_argument("--ranks", type=int, choices=(2, 4), default=2, help="of every contestant (default %(default)s)")
    parser.add_argument("--steps", type=int, default=8, help="quiet steps wanted of each contestant (default %(default)s)")
    parser.add_argument("--batch-size", type=int, metavar="N", help="samples of the global batch (default: as many as the workload has)")
    parser.add_argument("--only", type=_names, default=list(CONTESTANTS), help=f"comma-separated, of {', '.join(CONTESTANTS)}")
    parser.add_argument("--compiled", type=_names, default=[], help="contestants that take part a second time, with torch.compile")
    parser.add_argument(
        "--scenario", choices=sorted(scenarios.FULL), help="a condition under which the layout matters; --check wants more then"
    )
    parser.add_argument("--layout", help="pin the layout of ours, as in tp=2; --check then compares with torch's own way of the same")
    parser.add_argument("--time-limit", type=float, default=480.0, metavar="S", help="end each heat after S seconds (default %(default)g)")
    parser.add_argument("--small", action="store_true", help="tiny models: tries the benchmark, measures nothing")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    parser.add_argument("--check", action="store_true", help="exit 1 if a bound is broken, 75 if there were too few quiet steps")
    options = parser.parse_args(arguments)
    _refuse_useless(parser, options)
    return options


def _names(text: str) -> list[str]:
    wanted = list(CONTESTANTS) if text == "all" else text.split(",")
    unknown = sorted(set(wanted) - set(CONTESTANTS))
    if unknown:
        raise argparse.ArgumentTypeError(f"no contestant {', '.join(unknown)}; there are {', '.join(CONTESTANTS)}")
    return [name for name in CONTESTANTS if name in wanted]


def _refuse_useless(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    if options.check and options.small:
        parser.error("--check judges the full size: leave out --small")
    if options.check and options.only != list(CONTESTANTS):
        parser.error("--check compares with all contestants: leave out --only")
    if options.check and options.steps < MIN_QUIET_STEPS:
        parser.error(f"--check needs at least {MIN_QUIET_STEPS} quiet steps: --steps {options.steps} cannot suffice")
    if options.batch_size is not None and (options.batch_size < 1 or options.batch_size % options.ranks):
        parser.error(f"--batch-size {options.batch_size} cannot be divided over {options.ranks} ranks")
    if options.scenario and (families := _scenario(options).families) and options.workload not in families:
        parser.error(f"--scenario {options.scenario} is for the workloads {', '.join(families)}, not for {options.workload}")
    if options.scenario and options.layout and options.check:
        parser.error("--check judges what is chosen in a scenario: leave out --layout")
    if options.only != list(CONTESTANTS) and (lacking := {CONTESTANTS[name].package for name in options.only} & set(missing_packages())):
        parser.error(f"--only names contestants that need {', '.join(lacking)}, which is not installed")
    if options.layout and OURS not in options.only:
        parser.error("--layout pins the layout of ours, which --only leaves out")
    if options.compiled != list(CONTESTANTS) and (missing := sorted(set(options.compiled) - set(options.only))):
        parser.error(f"--compiled names {', '.join(missing)}, which --only leaves out")


def _scenario(options: argparse.Namespace) -> Scenario:
    return (scenarios.SMALL if options.small else scenarios.FULL)[options.scenario] if options.scenario else PLAIN


def run(options: argparse.Namespace, console: Console) -> Result:
    """Plan, and race all contestants, in heats if need be."""
    scenario = _scenario(options)
    workload = scenario.of((SMALL if options.small else FULL)[options.workload])
    if options.batch_size:
        workload = replace(workload, batch_size=options.batch_size)
    field = _field(workload, options)
    with tempfile.TemporaryDirectory() as folder, scenario.hosts() as hosts:
        plan_path = Path(folder) / "plan.json"
        link_bytes_per_s = hosts.measured_bytes_per_s() if hosts else None
        prediction = _plan(workload, options, plan_path, link_bytes_per_s, console) if OURS in field else None
        done, groups = [], _heats(field, prediction)
        for number, names in enumerate(groups, 1):
            console.print(f"heat {number} of {len(groups)}: {', '.join(names)}", soft_wrap=True)
            contexts = {name: _contexts(field[name], workload, plan_path, scenario, hosts) for name in names}
            done.append(_race({name: field[name] for name in names}, contexts, options, console))
        afterwards = None
        if prediction is not None and options.check:
            afterwards = ours.plan_anew(workload, options.ranks, prediction.layout, scenario, link_bytes_per_s)
    records = together(done, next(iter(field)))
    return Result(
        workload=workload,
        contestants=field,
        records=records,
        prediction=prediction,
        afterwards=afterwards,
        layout=options.layout,
        scenario=options.scenario,
    )


def _heats(field: dict[str, Contestant], prediction: ours.Prediction | None) -> list[list[str]]:
    """Who races whom: all at once where nothing is predicted, or everything fits."""
    if prediction is None:
        return [list(field)]
    most = sum(prediction.memory_bytes)
    team_bytes = {name: most + each.ranks * (RANK_BYTES + prediction.state_bytes * each.is_peer) for name, each in field.items()}
    return heats(team_bytes, free_bytes())


def _race(
    field: dict[str, Contestant], contexts: dict[str, list[RankContext]], options: argparse.Namespace, console: Console
) -> dict[str, Record]:
    """Start these contestants, race them, end them."""
    records = {name: Record() for name in field}
    teams: dict[str, Team] = {}
    try:
        for name, contestant in field.items():
            teams[name] = Team(contestant, contexts[name])
            with spared(name, teams, records[name]):
                records[name].set_up_peak_bytes = teams[name].wait_ready()
        race(teams, records, steps=options.steps, limit_s=options.time_limit, report=console.print)
    finally:
        for team in teams.values():
            team.end()
    return records


def _field(workload: Workload, options: argparse.Namespace) -> dict[str, Contestant]:
    """Who takes part; where a layout is pinned to be judged, ours and who divides the model alike."""
    found = contestants(workload, options.ranks, compiled=options.compiled, limited=_scenario(options).data_bytes is not None)
    alike = options.check and options.layout
    return {
        name: each
        for name, each in found.items()
        if each.base in options.only and (not alike or each.base == OURS or each.divides_as(options.layout))
    }


def _plan(workload: Workload, options: argparse.Namespace, path: Path, link_bytes_per_s: float | None, console: Console) -> ours.Prediction:
    """Plan as a user does, and print what was chosen."""
    prediction = ours.plan_apart(workload, options.ranks, options.layout, path, _scenario(options), link_bytes_per_s)
    console.print(prediction.text, markup=False)
    return prediction


def _contexts(contestant: Contestant, workload: Workload, plan_path: Path, scenario: Scenario, hosts: Hosts | None) -> list[RankContext]:
    path = plan_path if contestant.base == OURS else None
    ranks = contestant.ranks
    return [
        RankContext(
            rank=rank,
            world_size=ranks,
            workload=workload,
            plan_path=path,
            compiled=contestant.compiled,
            scenario=scenario,
            host=host_of(rank, ranks, hosts),
        )
        for rank in range(ranks)
    ]


if __name__ == "__main__":
    sys.exit(main())
