"""Every small model on every layout: are the numbers those of one device?

python benchmarks/equality.py                      all models, layouts and precisions; prints a table, exits with 1 if anything differs
python benchmarks/equality.py --models gpt2,unet --layouts tp2,chosen --precisions float64 --json equality.json
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.models import MODELS

import shardwise as sw

LAYOUTS = {
    "tp2": (2, "tp=2"),
    "dp2": (2, "dp=2"),
    "pp2": (2, "pp=2"),
    "tp4": (4, "tp=4"),
    "tp2xpp2": (4, "tp=2,pp=2"),
    "dp2xpp2": (4, "dp=2,pp=2"),
    "dp2xtp2": (4, "dp=2,tp=2"),
    "chosen": (4, ""),
}
PRECISIONS = {"float64": torch.float64, "float32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class Result:
    """One verification; error: the largest relative error, or None with the reason in `note`."""

    model: str
    layout: str
    precision: str
    ok: bool
    error: float | None
    note: str
    seconds: float


def main() -> int:
    arguments = _parse()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    console = Console()
    results = []
    for model in arguments.models:
        for layout in arguments.layouts:
            for precision in arguments.precisions:
                results.append(_verify(model, layout, precision))
                _progress(console, results[-1])
    console.print(_table(results))
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(result) for result in results], indent=1))
    failed = sum(not result.ok for result in results)
    console.print(f"{len(results) - failed} passed, {failed} failed", highlight=False)
    return 1 if failed else 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, known in (("models", list(MODELS)), ("layouts", list(LAYOUTS)), ("precisions", list(PRECISIONS))):
        parser.add_argument(f"--{name}", type=lambda text, known=known: _chosen(text, known), default=known, help=f"of {', '.join(known)}")
    parser.add_argument("--json", type=Path, help="write all results here")
    return parser.parse_args()


def _chosen(text: str, known: list[str]) -> list[str]:
    chosen = text.split(",")
    if unknown := [name for name in chosen if name not in known]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(known)}")
    return chosen


def _verify(model: str, layout: str, precision: str) -> Result:
    module, batch = MODELS[model]()
    ranks, text = LAYOUTS[layout]
    start = time.perf_counter()
    try:
        report = sw.verify(module, batch, cluster=f"local:{ranks}", layout=text or None, dtype=PRECISIONS[precision])
    except sw.ShardwiseError as error:
        return Result(
            model=model, layout=layout, precision=precision, ok=False, error=None, note=str(error), seconds=time.perf_counter() - start
        )
    seconds = time.perf_counter() - start
    if isinstance(report, sw.Infeasible):
        return Result(model=model, layout=layout, precision=precision, ok=False, error=None, note=str(report), seconds=seconds)
    note = report.layout if report.ok else f"{report.layout}: {report.first_difference}"
    return Result(
        model=model, layout=layout, precision=precision, ok=report.ok, error=report.max_relative_error, note=note, seconds=seconds
    )


def _progress(console: Console, result: Result) -> None:
    error = "–" if result.error is None else f"{result.error:.1e}"
    verdict = "ok " if result.ok else "NO "
    console.print(
        f"{verdict} {result.model:<6} {result.layout:<8} {result.precision} {error} {result.seconds:.1f} s  {result.note}",
        highlight=False,
        soft_wrap=True,
    )


def _table(results: list[Result]) -> Table:
    table = Table(title="largest relative error of loss, gradients, their norm and the optimizer's step")
    columns = list(dict.fromkeys((result.layout, result.precision) for result in results))
    table.add_column("model")
    for layout, precision in columns:
        table.add_column(f"{layout}\n{precision}", justify="right")
    for model in dict.fromkeys(result.model for result in results):
        cells = {
            (r.layout, r.precision): ("" if r.ok else "NO ") + ("–" if r.error is None else f"{r.error:.0e}")
            for r in results
            if r.model == model
        }
        table.add_row(model, *(cells[column] for column in columns))
    return table


if __name__ == "__main__":
    sys.exit(main())
