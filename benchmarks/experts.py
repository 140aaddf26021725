"""Whether the layout that is found is at least as good as the one that experts published, both by the simulator.

    python benchmarks/experts.py --tables DIR [--only NAME] [--most N] [--budget SECONDS] [--json experts.json] [--check]

For each model, machine and batch in the files of DIR (their form: docs/concepts/predictions.md) the best of the published layouts that the
search's space covers is simulated, and the space is searched from the same pieces. Gain: how much longer the published one takes. Layouts
that do not fit the devices by our count of memory are not compared; why a row is left out is counted.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from math import lcm
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console
from rich.progress import track
from rich.table import Table as Shown

from benchmarks.published_machines import machines_of
from benchmarks.published_models import TwinError, twin
from benchmarks.published_rows import Row, read_directory
from shardwise.capture.export import capture
from shardwise.cluster.model import cluster_of
from shardwise.errors import ShardwiseError
from shardwise.planner.compose import Scheme
from shardwise.planner.scale import ScaleSearch
from shardwise.planner.space import Split, layout_text

_SAMPLES = 8  # of the largest microbatch that is tried
_SCHEDULES = {
    "1f1b": "1f1b",
    "gpipe": "gpipe",
    "interleaved": "interleaved",
    "zb-1p": "zb-h1",
    "zb-h1": "zb-h1",
    "zb-2p": "zb-2p",
    "zb-v": "zb-v",
}
_EQUAL = 1e-9


class LeftOut(ValueError):
    """A row that is not compared. The message says why."""


@dataclass(frozen=True, kw_only=True)
class Compared:
    """The best published layout of a model on a machine, and the one that was found; seconds of a step, simulated."""

    file: str
    id: str
    devices: int
    expert: str
    expert_s: float
    found: str
    found_s: float
    gap: float

    @property
    def gain(self) -> float:
        """How much longer the published one takes, as a share."""
        return self.expert_s / self.found_s - 1


def scheme_of(row: Row) -> tuple[Scheme, int]:
    """The row's layout, and the samples of its microbatch. Raises LeftOut where the space does not have it."""
    layout = row.layout
    samples, chunks = layout.micro_batch or 1, layout.virtual_stages or 1
    batch = layout.global_batch
    if batch is None or batch % (layout.dp * samples):
        raise LeftOut("no even microbatches")
    if layout.zero == "hybrid" or layout.shard_devices or layout.offload:
        raise LeftOut("ZeRO within groups, or offloading")
    if layout.ep > 1 or row.model.experts:
        raise LeftOut("experts")
    if layout.dp * layout.tp * layout.cp * layout.pp != row.machine.devices:
        raise LeftOut("not all devices")
    named = _SCHEDULES.get(layout.schedule or "", "")
    scheme = Scheme(
        dp=layout.dp,
        tp=layout.tp,
        pp=layout.pp,
        cp=layout.cp,
        chunks=chunks,
        microbatches=batch // (layout.dp * samples),
        schedule=named or ("interleaved" if chunks > 1 else "1f1b"),
        zero=int(layout.zero or 0) if layout.dp * layout.cp > 1 else 0,
        recompute=layout.recompute or "none",
    )
    return scheme, samples


def compare(rows: Sequence[Row], budget_s: float | None) -> Compared:
    """Rows of one model, machine and batch. Raises LeftOut where none is covered."""
    reasons: list[str] = []
    experts = []
    for row in rows:
        try:
            experts.append((row, *scheme_of(row)))
        except LeftOut as error:
            reasons.append(str(error))
    if not experts:
        raise LeftOut(reasons[0])
    row = experts[0][0]
    most = lcm(*(samples for _, _, samples in experts))
    most *= max(1, _SAMPLES // most)
    made = twin(row.model, micro_batch=most)
    search = ScaleSearch(
        graph=capture(made.module.train(), made.batch),
        counts=made.counts,
        cluster=cluster_of(machines_of(row.machine)),
        global_batch=row.layout.global_batch or 1,
        budget_s=budget_s,
    )
    best = None
    for row, scheme, samples in experts:
        covered = Split(tp=scheme.tp, cp=scheme.cp, samples=samples)
        if covered not in set(search.space.splits()) or scheme not in set(search.space.schemes(covered)):
            reasons.append(f"not in the space: {layout_text(scheme, samples)}")
            continue
        found = search.bounded(scheme, samples)
        step = None if found is None else search.simulated(found)
        if step is None or step.memory_bytes > search.limit_bytes:
            reasons.append("does not fit by our count")
        elif best is None or step.seconds < best[1].seconds:
            best = row, step
    if best is None:
        raise LeftOut(reasons[0])
    searched = search.search()
    if not searched.found:
        raise LeftOut("nothing found")
    first = searched.found[0]
    return Compared(
        file=row.file,
        id=best[0].id,
        devices=row.machine.devices,
        expert=str(best[1]),
        expert_s=best[1].seconds,
        found=str(first),
        found_s=first.seconds,
        gap=searched.gap,
    )


def groups(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """Rows of one model, machine and batch."""
    found: dict[object, list[Row]] = {}
    for row in rows:
        if row.usable and row.kind != "layer time":
            found.setdefault((row.model, row.machine, row.layout.global_batch), []).append(row)
    yield from found.values()


def main() -> int:
    """Prints the table; 1 where --check finds a published layout that is better."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", type=Path, required=True, help="folder of measurements")
    parser.add_argument("--only", default="", help="files whose name holds this")
    parser.add_argument("--most", type=int, help="so many models and machines of each file")
    parser.add_argument("--budget", type=float, help="seconds of each search; without it, its fixed effort")
    parser.add_argument("--json", type=Path, help="write every comparison as JSON")
    parser.add_argument("--check", action="store_true", help="exit with 1 where a published layout is better than the one found")
    given = parser.parse_args()
    tables = [table for table in read_directory(given.tables) if given.only in table.path.name]
    jobs = [rows for table in tables for rows in list(groups(table.rows))[: given.most]]
    compared: list[Compared] = []
    left: Counter[str] = Counter()
    for rows in track(jobs, description="comparing", console=Console(stderr=True)):
        try:
            compared.append(compare(rows, given.budget))
        except (LeftOut, TwinError, ShardwiseError) as error:
            left[str(error).splitlines()[0]] += 1
    shown = Shown("file", "row", "devices", "published", "found", "gain", "gap", box=None)
    for each in compared:
        seconds = f"{each.expert_s:.4g} s", f"{each.found_s:.4g} s"
        shown.add_row(each.file, each.id, str(each.devices), *seconds, f"{each.gain:+.1%}", f"{each.gap:.1%}")
    Console(width=120).print(shown)
    for reason, count in left.items():
        print(f"  {count} not compared: {reason}")
    worse = [each for each in compared if each.gain < -_EQUAL]
    print(f"{len(compared) - len(worse)} of {len(compared)} found layouts are at least as good as the published one")
    for each in worse:
        print(f"  worse by {-each.gain:.2%}: {each.found}\n    published: {each.expert}")
    if given.json:
        given.json.write_text(json.dumps([asdict(each) | {"gain": each.gain} for each in compared], indent=1))
    return int(given.check and (bool(worse) or not compared))


if __name__ == "__main__":
    sys.exit(main())
