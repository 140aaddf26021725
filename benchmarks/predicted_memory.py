"""What ranks of real training steps take at their peak, against what their plans predicted.

    python benchmarks/predicted_memory.py                          the layouts below of all six families, about 20 minutes
    python benchmarks/predicted_memory.py --only llama moe --steps 3 [--json out.json] [--check]
    python benchmarks/predicted_memory.py --case gpt2 2 pp=2,schedule=zb-h1 --case gpt2 4 -

Each layout is planned and its ranks are started anew, as `step_time.py` does; they take some steps, one thread each. A rank's figure is its
resident size at the highest, less what it had before the model was there. Other work on the machine does not disturb it.
Exit codes: 0 done; with --check also 1 where a rank's prediction is further off than the bound; 2 an error.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console
from rich.table import Table

from benchmarks.context import CONTESTANTS, OURS, RankContext
from benchmarks.ours import plan_apart
from benchmarks.processes import ChildFailed
from benchmarks.ranks import Team
from benchmarks.result import mib
from benchmarks.verdict import relative_error, worst_error
from benchmarks.workloads import FULL, SMALL, Workload

BOUND = 0.1
EXIT_ERROR = 2
LAYOUTS = (
    *((family, 4, "-") for family in FULL),
    *((family, 2, "dp=2") for family in FULL),
    ("gpt2", 2, "pp=2"),
    ("llama", 2, "pp=2"),
    ("unet", 2, "pp=2"),
    ("gpt2", 2, "tp=2"),
    ("bert", 2, "tp=2"),
    ("gpt2", 2, "dp=2,zero=3"),
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """A layout, and the bytes of each of its ranks. layout: as it was asked for, "-" the planner's choice; chosen: what it is."""

    family: str
    ranks: int
    layout: str
    chosen: str
    predicted_bytes: list[float]
    measured_bytes: list[int]

    @property
    def errors(self) -> list[float]:
        """Of each rank, relative to what was measured."""
        return [relative_error(*each) for each in zip(self.predicted_bytes, self.measured_bytes, strict=True)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return the exit code."""
    options = _parse(arguments)
    console = Console(width=None if sys.stdout.isatty() else 140)
    sizes = SMALL if options.small else FULL
    rows: list[Row] = []
    try:
        for family, ranks, layout in _cases(options):
            rows.append(_measured(sizes[family], family, ranks, layout, options.steps))
            row = rows[-1]
            worst = worst_error(row.predicted_bytes, row.measured_bytes)
            console.print(f"{family} {row.chosen}: {mib(row.predicted_bytes)} MiB, measured {mib(row.measured_bytes)}: {worst:+.1%}")
    except ChildFailed as error:
        console.print(f"error: {error}", markup=False)
        return EXIT_ERROR
    _show(console, rows)
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    return 1 if options.check and any(abs(error) > options.bound for row in rows for error in row.errors) else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(FULL), default=list(FULL), help="these families")
    parser.add_argument(
        "--case", nargs=3, action="append", metavar=("FAMILY", "RANKS", "LAYOUT"), help='instead; LAYOUT "-": what is chosen'
    )
    parser.add_argument("--steps", type=int, default=14, help="of each layout (default %(default)s)")
    parser.add_argument("--small", action="store_true", help="models of some kilobytes, to try the harness itself")
    parser.add_argument("--json", type=Path, help="write every rank's figures to this file")
    parser.add_argument("--bound", type=float, default=BOUND, help="for --check (default %(default)s)")
    parser.add_argument("--check", action="store_true", help="exit 1 where a rank's prediction is further off than the bound")
    options = parser.parse_args(arguments)
    for family, ranks, _ in options.case or ():
        if family not in FULL or not ranks.isdigit():
            parser.error(f"--case {family} {ranks}: one of {', '.join(FULL)} and a number of ranks are wanted")
    return options


def _cases(options: argparse.Namespace) -> Iterator[tuple[str, int, str]]:
    if options.case:
        yield from ((family, int(ranks), layout) for family, ranks, layout in options.case)
    else:
        yield from (case for case in LAYOUTS if case[0] in options.only)


def _measured(workload: Workload, family: str, ranks: int, layout: str, steps: int) -> Row:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.json"
        prediction = plan_apart(workload, ranks, None if layout == "-" else layout, path)
        chosen = json.loads(path.read_text())
        contexts = [RankContext(rank=rank, world_size=ranks, workload=workload, plan_path=path) for rank in range(ranks)]
        team = Team(CONTESTANTS[OURS].at(ranks), contexts)
        try:
            team.wait_ready()
            measured = [[rank.peak_bytes for rank in team.step(number)] for number in range(steps)][-1]
        finally:
            team.end()
    sizes = ",".join(f"{axis}={chosen[axis]}" for axis in ("dp", "tp", "cp", "pp", "chunks", "zero") if chosen[axis] > 1)
    return Row(
        family=family,
        ranks=ranks,
        layout=layout,
        chosen=f"{sizes},microbatches={chosen['microbatches']},{chosen['schedule']}",
        predicted_bytes=list(prediction.memory_bytes),
        measured_bytes=measured,
    )


def _show(console: Console, rows: Sequence[Row]) -> None:
    table = Table(title="peak MiB a rank")
    for name in ("model", "layout", "predicted", "measured", "error of the worst"):
        table.add_column(name)
    for row in rows:
        error = worst_error(row.predicted_bytes, row.measured_bytes)
        table.add_row(row.family, row.chosen, mib(row.predicted_bytes), mib(row.measured_bytes), f"{error:+.1%}")
    console.print(table)
    errors = [error for row in rows for error in row.errors]
    within = {bound: sum(abs(error) <= bound for error in errors) for bound in (0.05, 0.08, 0.1)}
    console.print(
        f"{len(errors)} ranks: off by {statistics.mean(map(abs, errors)):.1%} in the mean, {min(errors):+.1%} to {max(errors):+.1%}; "
        + ", ".join(f"{count} within {bound:.0%}" for bound, count in within.items())
    )


if __name__ == "__main__":
    sys.exit(main())
