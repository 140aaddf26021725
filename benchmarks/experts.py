"""Whether the layout that is found is at least as good as the one that experts published, both by the simulator.

    python benchmarks/experts.py --tables DIR [--only NAME] [--most N | --all] [--budget SECONDS] [--json experts.json] [--check]

For a few models, machines and batches of each file in DIR (their form: docs/concepts/predictions.md), far apart in it, the best of the
published layouts that the search's space covers is simulated, and the space is searched from the same pieces. Gain: how much longer the
published one takes. Layouts that do not fit the devices by our count of memory are not compared; why a row is left out is counted.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from math import lcm
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console
from rich.progress import track
from rich.table import Table as Shown

from benchmarks.published_experts import routing_of
from benchmarks.published_machines import machines_of
from benchmarks.published_models import TwinError, twin
from benchmarks.published_rows import Row, read_directory, schedule_of
from shardwise.capture.export import capture
from shardwise.cluster.model import cluster_of
from shardwise.errors import ShardwiseError
from shardwise.planner.compose import Scheme
from shardwise.planner.scale import Found, ScaleSearch
from shardwise.planner.space import Split, layout_text
from shardwise.planner.twins import Twin

_SAMPLES = 8  # of the largest microbatch that is tried
_MOST = 2  # of each file, unless told otherwise
_EQUAL = 1e-9


class LeftOut(ValueError):
    """A row that is not compared. The message says why."""


@dataclass(frozen=True, kw_only=True)
class Compared:
    """The best published layout of a model on a machine, and the one that was found; seconds of a step, simulated.

    file, id: where it stands; gap: by what share of its time the one found may be slower than the best there is.
    """

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


def scheme_of(row: Row, year: int) -> tuple[Scheme, int]:
    """The row's layout, and the samples of its microbatch. year: of its software. Raises LeftOut where the space does not have it."""
    layout = row.layout
    samples = layout.micro_batch or 1
    schedule, chunks = schedule_of(layout)
    batch = layout.global_batch
    if batch is None or batch % (layout.dp * samples):
        raise LeftOut("no even microbatches")
    replicas = layout.dp * layout.cp
    if layout.zero == "hybrid" or layout.shard_devices not in (None, replicas) or layout.offload:
        raise LeftOut("ZeRO within groups, or offloading")
    if layout.ep > 1 and not row.model.experts:
        raise LeftOut("ep without experts")
    if layout.dp * layout.tp * layout.cp * layout.pp != row.machine.devices:
        raise LeftOut("not all devices")
    scheme = Scheme(
        dp=layout.dp,
        tp=layout.tp,
        pp=layout.pp,
        cp=layout.cp,
        ep=layout.ep,
        routing=routing_of(row, year),
        chunks=chunks,
        microbatches=batch // (layout.dp * samples),
        schedule=schedule,
        zero=int(layout.zero or 0) if replicas > 1 else 0,
        recompute=layout.recompute or "none",
    )
    return scheme, samples


def compare(rows: Sequence[Row], year: int, budget_s: float | None) -> Compared:
    """Rows of one model, machine and batch, of a source of that year. Raises LeftOut where none is covered."""
    reasons: list[str] = []
    experts = []
    for row in rows:
        try:
            experts.append((row, *scheme_of(row, year)))
        except LeftOut as error:
            reasons.append(str(error))
    if not experts:
        raise LeftOut(reasons[0])
    row = experts[0][0]
    most = lcm(*(samples for _, _, samples in experts))
    most *= max(1, _SAMPLES // most)
    made = twin(row.model, micro_batch=most)
    search = ScaleSearch(
        twin=Twin(graph=capture(made.module.train(), made.batch), counts=made.counts),
        cluster=cluster_of(machines_of(row.machine)),
        global_batch=row.layout.global_batch or 1,
        routing=routing_of(row, year),
        budget_s=budget_s,
    )
    best: tuple[Row, Found] | None = None
    for row, scheme, samples in experts:
        try:
            step = published_step(search, row, scheme, samples)
        except LeftOut as error:
            reasons.append(str(error))
            continue
        if best is None or step.seconds < best[1].seconds:
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


def published_step(search: ScaleSearch, row: Row, scheme: Scheme, samples: int) -> Found:
    """The published layout, simulated, recomputing no more than it must where the row does not say what it recomputed, and with the fastest
    way of sharing attention among those that fit. Raises LeftOut where the space does not have it or it does not fit."""
    splits = [split for split in search.space.splits() if split == replace(Split.of(scheme, samples), attention=split.attention)]
    for recompute in (scheme.recompute,) if row.layout.recompute else ("none", "selective", "full"):
        tried = [replace(scheme, recompute=recompute, attention=split.attention) for split in splits]
        tried = [each for each, split in zip(tried, splits, strict=True) if each in set(search.space.schemes(split))]
        if not tried:
            raise LeftOut(f"not in the space: {layout_text(scheme, samples)}")
        bounded = [search.bounded(each, samples) for each in tried]
        steps = [search.simulated(found) for found in bounded if found is not None]
        if not steps:
            raise LeftOut("more stages than the model has parts")
        if fits := [step for step in steps if step.memory_bytes <= search.limit_bytes]:
            return min(fits, key=lambda step: step.seconds)
    raise LeftOut("does not fit by our count")


def groups(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """Rows of one model, machine and batch."""
    found: dict[object, list[Row]] = {}
    for row in rows:
        if row.usable and row.kind != "layer time":
            found.setdefault((row.model, row.machine, row.layout.global_batch), []).append(row)
    yield from found.values()


def spread(groups: Sequence[list[Row]], most: int | None) -> list[list[Row]]:
    """So many of them, evenly apart, the first and the last among them; all if None."""
    if most is None or most >= len(groups):
        return list(groups)
    return [groups[round(number * (len(groups) - 1) / max(1, most - 1))] for number in range(most)]


def _job(given: tuple[list[Row], int, float | None]) -> Compared | str:
    """What came of it, or why it is left out."""
    try:
        return compare(*given)
    except (LeftOut, TwinError, ShardwiseError) as error:
        return str(error).splitlines()[0]


def main() -> int:
    """Prints the table; 1 where --check finds a published layout that is better."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", type=Path, required=True, help="folder of measurements")
    parser.add_argument("--only", default="", help="files whose name holds this")
    parser.add_argument("--most", type=int, default=_MOST, help="so many models and machines of each file")
    parser.add_argument("--all", action="store_true", help="all of them")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--budget", type=float, help="seconds of each search; without it, its fixed effort")
    parser.add_argument("--json", type=Path, help="write every comparison as JSON")
    parser.add_argument("--check", action="store_true", help="exit with 1 where a published layout is better than the one found")
    given = parser.parse_args()
    tables = [table for table in read_directory(given.tables) if given.only in table.path.name]
    most = None if given.all else given.most
    jobs = [
        (rows, table.last_year or table.year or 2023, given.budget) for table in tables for rows in spread(list(groups(table.rows)), most)
    ]
    with ProcessPoolExecutor(given.jobs, mp_context=get_context("spawn")) as pool:
        results = list(track(pool.map(_job, jobs), total=len(jobs), description="comparing", console=Console(stderr=True)))
    compared = [each for each in results if isinstance(each, Compared)]
    left = Counter(each for each in results if isinstance(each, str))
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
