"""Verifies every model of examples/models in five layouts, and writes the table that the README shows.

    python benchmarks/matrix.py                          all models, two at a time; prints the table
    python benchmarks/matrix.py --only decoders,vit      files or models whose name begins so
    python benchmarks/matrix.py --write                  also writes the table into README.md
    python benchmarks/matrix.py --check                  exits with 1 unless every model passes, and within --limit minutes

Each layout's step is run on ranks that are threads of one process, in float64; of every eighth model one layout is verified again on
processes that talk over gloo. An error is the largest relative error of loss, gradients and their norm (docs/concepts/numbers.md).
"""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import json
import multiprocessing
import sys
import time
import traceback
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent
MODELS = ROOT / "examples" / "models"
LAYOUTS = ("tp=2", "pp=2", "dp=2", "tp=2,pp=2", "chosen on 4")
ON_PROCESSES = 8  # every so many models one on real ranks
BEGIN, END = "<!-- matrix: python benchmarks/matrix.py --write -->", "<!-- end of matrix -->"
TRANSFORMERS = ("decoders", "encoders", "seq2seq")  # families in which tensor parallelism must really split the work
MOST_PARAMETERS, MOST_FLOPS = 0.55, 0.60


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One model's result. cells: layout → largest error, or "no" with the reason in `why`; shares: of parameters and flops at tp=2."""

    family: str
    name: str
    cells: dict[str, str]
    shares: tuple[float, float] | None
    notes: list[str]
    why: list[str]
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether every layout was verified."""
        return not self.why

    @property
    def splits(self) -> bool:
        """Whether a rank at tp=2 has little enough of the blocks (where no part of them is kept as one operator)."""
        return (
            self.shares is None
            or any(note.endswith(" whole") for note in self.notes)
            or (self.shares[0] <= MOST_PARAMETERS and self.shares[1] <= MOST_FLOPS)
        )


def load(family: str) -> ModuleType:
    """One file of examples/models."""
    spec = importlib.util.spec_from_file_location(f"models_{family}", MODELS / f"{family}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def models(only: list[str]) -> list[tuple[str, str]]:
    """(file, function) of every model: the public functions of each file, in their order there."""
    found = []
    for path in sorted(MODELS.glob("[a-z]*.py")):
        module = load(path.stem)
        functions = [
            name
            for name, each in vars(module).items()
            if inspect.isfunction(each) and each.__module__ == module.__name__ and not name.startswith("_")
        ]
        found += [(path.stem, name) for name in functions]
    return [each for each in found if not only or any(part.startswith(prefix) for prefix in only for part in each)]


def examine(family: str, name: str, layouts: tuple[str, ...] = LAYOUTS, *, processes: bool = False) -> Entry:
    """Verifies one model in these layouts."""
    import torch

    from shardwise.verify.coverage import coverage

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    start = time.perf_counter()
    try:
        model, batch = getattr(load(family), name)()
        found = coverage(model, batch, layouts=layouts, processes=processes)
        rows = found.rows
    except Exception as error:
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        if not type(error).__module__.startswith("shardwise"):
            traceback.print_exc()
        return Entry(
            family=family,
            name=name,
            cells=dict.fromkeys(layouts, "no"),
            shares=None,
            notes=[],
            why=[why],
            seconds=time.perf_counter() - start,
        )
    shares = next(((row.parameters, row.flops) for row in rows if row.layout == "tp=2" and row.parameters is not None), None)
    notes = [f"{each} whole" for each in found.kept] + [f"no rule: {each}" for each in found.without_rule]
    return Entry(
        family=family,
        name=name,
        cells={row.layout: f"{row.error:.0e}" if row.status == "verified" else "no" for row in rows},
        shares=shares,  # type: ignore[arg-type]
        notes=notes,
        why=[f"{row.layout}: {row.status}: {row.why}" for row in rows if row.status != "verified"],
        seconds=time.perf_counter() - start,
    )


def table(entries: list[Entry]) -> str:
    """Markdown."""
    lines = ["| model | tp2 | pp2 | dp2 | tp2×pp2 | chosen on 4 | at tp2 a rank has | kept whole |", "| --- |" + " --- |" * 7]
    family = ""
    for entry in entries:
        if entry.family != family:
            family = entry.family
            lines.append(f"| **{family}** |" + " |" * 7)
        share = "" if entry.shares is None else f"{entry.shares[0]:.0%} / {entry.shares[1]:.0%}"
        cells = " | ".join(entry.cells.get(layout, "no") for layout in LAYOUTS)
        lines.append(f"| {entry.name} | {cells} | {share} | {', '.join(entry.notes[:3])} |")
    return "\n".join(lines)


def summary(entries: list[Entry], real: list[Entry], seconds: float) -> str:
    """One line."""
    errors = [float(cell) for entry in entries for cell in entry.cells.values() if cell != "no"]
    passed = sum(entry.ok for entry in entries)
    return (
        f"{passed} of {len(entries)} models verified in all of {', '.join(LAYOUTS)}, largest relative error "
        f"{max(errors, default=0.0):.1e}; "
        f"{sum(entry.ok for entry in real)} of {len(real)} of them again on processes over gloo; {seconds / 60:.1f} minutes on 2 cores"
    )


def run(chosen: list[tuple[str, str]], jobs: int) -> list[Entry]:
    """All entries, each in a process that ends after a few, so that one model's memory is not the next one's."""
    tasks = [(index, *each) for index, each in enumerate(chosen)]
    entries: dict[int, Entry] = {}
    with multiprocessing.get_context("spawn").Pool(jobs, maxtasksperchild=16) as pool:
        for index, entry in pool.imap_unordered(_numbered, tasks):
            entries[index] = entry
            state = "ok" if entry.ok else "NO"
            print(f"{len(entries):3}/{len(chosen)} {state} {entry.family}.{entry.name} {entry.seconds:.0f} s", flush=True)
            for why in entry.why:
                print(f"        {why}", flush=True)
    return [entries[index] for index in sorted(entries)]


def _numbered(task: tuple[int, str, str]) -> tuple[int, Entry]:
    return task[0], examine(*task[1:])


def run_on_processes(chosen: list[tuple[str, str]]) -> list[Entry]:
    """Every so many models once more, in one layout, on ranks that are processes."""
    entries = []
    for number, each in enumerate(chosen[::ON_PROCESSES]):
        entry = examine(*each, (LAYOUTS[number % 4],), processes=True)
        print(
            f"on processes, {next(iter(entry.cells))}: {'ok' if entry.ok else 'NO'} {entry.family}.{entry.name} {entry.seconds:.0f} s",
            flush=True,
        )
        for why in entry.why:
            print(f"        {why}", flush=True)
        entries.append(entry)
    return entries


def write(entries: list[Entry], real: list[Entry], seconds: float) -> None:
    """The table between its marks in README.md."""
    readme = ROOT / "README.md"
    text = readme.read_text()
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    body = f"{summary(entries, real, seconds)}\n\n<details><summary>All models</summary>\n\n{table(entries)}\n\n</details>"
    readme.write_text(f"{before}{BEGIN}\n{body}\n{END}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="names of files or models, separated by commas; a beginning is enough")
    parser.add_argument("--jobs", type=int, default=2, help="models at a time")
    parser.add_argument("--write", action="store_true", help="write the table into README.md")
    parser.add_argument("--json", type=Path, help="write the entries here")
    parser.add_argument("--check", action="store_true", help="exit with 1 unless all pass")
    parser.add_argument("--limit", type=float, default=30.0, help="minutes that --check allows")
    options = parser.parse_args()
    start = time.perf_counter()
    from shardwise.cluster.model import Cluster

    for ranks in (2, 4):
        Cluster.parse(f"local:{ranks}")  # measures this machine while it is quiet, where that was not done before
    chosen = models([each for each in options.only.split(",") if each])
    entries = run(chosen, options.jobs)
    real = run_on_processes(chosen)
    seconds = time.perf_counter() - start
    print(table(entries))
    print(summary(entries, real, seconds))
    wide = [entry for entry in entries if entry.family in TRANSFORMERS and not entry.splits]
    for entry in wide:
        print(f"{entry.family}.{entry.name} at tp=2: a rank has {entry.shares} of the blocks, more than {(MOST_PARAMETERS, MOST_FLOPS)}")
    if options.json:
        options.json.write_text(json.dumps([asdict(entry) for entry in entries], indent=2))
    if options.write:
        write(entries, real, seconds)
    if options.check and (wide or seconds > options.limit * 60 or any(not entry.ok for entry in (*entries, *real))):
        sys.exit(1)


if __name__ == "__main__":
    main()
