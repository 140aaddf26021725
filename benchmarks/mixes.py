"""Verifies random mixes of everything that a layout can say, on random models of the matrix.

    python benchmarks/mixes.py [--models 20] [--layouts 6] [--seed 0] [--only decoders,vit] [--jobs 2] [--check]

A mix is a mesh of data, context, tensor and pipeline ranks (in mixtures also data ranks that divide experts) with a ZeRO stage or unequal
shares of the batch, a way of attention, a policy of recomputation, a schedule and a number of microbatches, in float32, bf16 or fp16. One
step of each is compared in float64 with one device's: loss, every gradient, their norm, the optimizer's step, the next loss. Mixes in 16
bits run in these, too, held to a multiple of one device's own error in them (docs/concepts/numbers.md).
Prints each model's mixes and how many were verified, and how many refused with a reason. With --check it exits with 1 where one differs or
fails, or where fewer than half could run.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import sys
import time
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.matrix import load, models
from shardwise.capture.precision import PRECISIONS, Precision, dtype_of
from shardwise.errors import CaptureError, VerifyError
from shardwise.program.recompute import RECOMPUTE
from shardwise.program.tables import NAMES, least_chunks
from shardwise.sharding.context import ATTENTION
from shardwise.verify.coverage import Row, coverage

MESHES = tuple((dp, cp, tp, pp) for dp in (1, 2, 4) for cp in (1, 2) for tp in (1, 2, 3) for pp in (1, 2, 3) if 2 <= dp * cp * tp * pp <= 8)
SAMPLES = 4
"""That most models have; others have a multiple."""
DEEPER = ("interleaved", "zb-h1", "zb-2p")
"""Schedules that take more stages of a rank than they need."""
LEAST_RUN = 0.5
"""Of the mixes, how many must not be refused."""


@dataclass(frozen=True, kw_only=True)
class Mixed:
    """One model's mixes in one precision, and what became of them. rows: compared in float64; low: in the 16 bits."""

    model: str
    rows: list[Row]
    low: list[Row] = field(default_factory=list)
    precision: Precision = "float32"
    seconds: float


def draw(source: random.Random, *, experts: bool = False) -> str:
    """A layout, as one would write it; experts: also with data ranks that divide experts."""
    dp, cp, tp, pp = source.choice(MESHES)
    mesh = {"dp": dp, "cp": cp, "tp": tp, "pp": pp}
    parts = [f"{name}={size}" for name, size in mesh.items() if size > 1]
    if dp > 1 and (zero := source.randrange(4)):
        parts.append(f"zero={zero}")
        if dp == 4 and source.random() < 0.3:
            parts.append("shard=2")
    if cp > 1:
        parts.append(f"attention={source.choice(ATTENTION)}")
    if experts and dp > 1 and "shard=2" not in parts and source.random() < 0.7:
        parts.append(f"ep={source.choice((2, dp))}")
    elif dp == 2 and source.random() < 0.2:
        parts.append("shares=3:1")
    parts.append(f"recompute={source.choice(RECOMPUTE)}")
    if not parts[-1].endswith("none") and source.random() < 0.3:
        parts.append("recompute_blocks=1")
    each = 1 if "shares=3:1" in parts else SAMPLES // dp
    microbatches = source.choice([count for count in (1, 2, 4) if each % count == 0])
    if pp > 1:
        schedule = source.choice(NAMES)
        chunks = least_chunks(schedule) + (schedule in DEEPER and source.random() < 0.3)
        parts += [f"schedule={schedule}"] + ([f"chunks={chunks}"] if chunks > 1 else [])
    return ",".join([*parts, f"microbatches={microbatches}"])


def examine(family: str, name: str, layouts: tuple[str, ...], precision: Precision = "float32") -> Mixed:
    """Verifies one model in these layouts."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    start = time.perf_counter()
    model, batch = getattr(load(family), name)()
    low = dtype_of(precision)
    try:
        rows = coverage(model, batch, layouts=layouts, precision=precision).rows
        in_low = coverage(model, batch, layouts=layouts, precision=precision, dtype=low).rows if low else []
    except (CaptureError, VerifyError) as error:  # it cannot be captured in 16 bits, or overflows there on one device
        if low is None:
            raise
        rows, in_low = [Row(layout=layout, status="infeasible", why=str(error)) for layout in layouts], []
    return Mixed(model=f"{family}.{name}", rows=rows, low=in_low, precision=precision, seconds=time.perf_counter() - start)


def summary(found: list[Mixed]) -> tuple[str, bool]:
    """One line, and whether all is well."""
    counts = Counter(row.status for each in found for row in each.rows)
    low = Counter(row.status for each in found for row in each.low)
    total, refused = counts.total(), counts["infeasible"]
    worst = max((row.error for each in found for row in each.rows if row.error is not None), default=0.0)
    wrong = total - refused - counts["verified"] + low["differs"] + low["failed"]
    text = f"{counts['verified']} of {total} mixes verified, largest relative error {worst:.1e}; {refused} refused, {wrong} wrong"
    if low:
        text += f"; {low['verified']} of {low.total() - low['infeasible']} in 16 bits as near as one device"
    return text, not wrong and counts["verified"] >= LEAST_RUN * total


def _examined(task: tuple[str, str, tuple[str, ...], Precision]) -> Mixed:
    found = examine(*task)
    print(f"{found.model} {found.precision} {found.seconds:.0f} s", flush=True)
    for compared, rows in (("", found.rows), (f" in {found.precision}", found.low)):
        for row in rows:
            told = f"{row.error:.0e}" if row.error is not None else f"{row.status}: {row.why}"
            print(f"    {row.layout}{compared}: {told if row.status != 'differs' else f'{told} {row.why}'}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=20, help="how many models (default %(default)s)")
    parser.add_argument("--layouts", type=int, default=6, help="how many mixes of each (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (default %(default)s)")
    parser.add_argument("--only", default="", help="names of files or models, separated by commas; a beginning is enough")
    parser.add_argument("--jobs", type=int, default=2, help="models at a time (default %(default)s)")
    parser.add_argument("--check", action="store_true", help="exit with 1 where one differs or fails, or most are refused")
    options = parser.parse_args()
    source = random.Random(options.seed)
    known = models([each for each in options.only.split(",") if each])
    chosen = source.sample(known, min(options.models, len(known)))
    tasks = [
        (
            *each,
            tuple(draw(source, experts=each[0] == "experts") for _ in range(options.layouts)),
            source.choices(PRECISIONS, (3, 1, 1))[0],
        )
        for each in chosen
    ]
    with multiprocessing.get_context("spawn").Pool(options.jobs, maxtasksperchild=8) as pool:
        found = list(pool.imap_unordered(_examined, tasks))
    text, fine = summary(found)
    print(text)
    if options.check and not fine:
        sys.exit(1)


if __name__ == "__main__":
    main()
