"""What random numbers cost: by key and place, from torch's generator in our operators ("fast"), and torch's own.

    python benchmarks/random_numbers.py [--check] [--json PATH]

One thread, float32 [4, 512, 1024]; dropout forward and backward, noise drawn. Each time is the least of several runs, which others on the
machine disturb least. --check: exits with 1 when keyed dropout takes more than MOST_TIMES what torch's dropout does.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from shardwise.capture import draws, operators

SHAPE, PROBABILITY, RUNS, MOST_TIMES = (4, 512, 1024), 0.1, 15, 1.25
CPU = torch.device("cpu")
STATE = torch.tensor([987654321987654321, 0])

Draw = Callable[[], object]


def dropouts() -> dict[str, Draw]:
    """Forward and backward."""
    x, gradient = torch.randn(SHAPE, requires_grad=True), torch.randn(SHAPE)

    def fast(x: Tensor) -> Tensor:
        return draws.dropped(x, draws.fast_keep(SHAPE, STATE, PROBABILITY, [3, 0], each=True, device=CPU), PROBABILITY)

    forward: dict[str, Callable[[Tensor], Tensor]] = {
        "keyed": lambda x: operators.keyed_dropout(x, STATE, PROBABILITY, key=3),
        "fast": fast,
        "torch": lambda x: F.dropout(x, PROBABILITY),
    }
    return {name: lambda each=each: torch.autograd.grad(each(x), x, gradient) for name, each in forward.items()}


def noise(distribution: str, *parameters: float) -> dict[str, Draw]:
    """Numbers alone; torch's own in place in fresh memory."""
    drawn = {
        "keyed": lambda: operators.keyed_draw(STATE, SHAPE, distribution, parameters, torch.float32, key=3),
        "fast": lambda: draws.fast_draw(SHAPE, STATE, distribution, parameters, torch.float32, [3, 0], each=True, device=CPU),
    }
    return drawn | {"torch": lambda: getattr(torch.empty(SHAPE), f"{distribution}_")(*parameters)}


def milliseconds(draw: Draw) -> float:
    """The least of several runs."""
    draw()
    found = []
    for _ in range(RUNS):
        start = time.perf_counter()
        draw()
        found.append(time.perf_counter() - start)
    return min(found) * 1e3


def measure() -> dict[str, dict[str, float]]:
    """What is drawn → how → milliseconds."""
    rows = {"dropout": dropouts(), "uniform": noise("uniform", 0.0, 1.0), "normal": noise("normal", 0.0, 1.0)}
    return {row: {name: milliseconds(draw) for name, draw in ways.items()} for row, ways in rows.items()}


def main() -> int:
    """Measure, print, and check if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = measure()
    table = Table("milliseconds", "keyed", "fast", "torch's own")
    for row, times in found.items():
        table.add_row(row, *(f"{times[name]:.1f}" for name in ("keyed", "fast", "torch")))
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
    ratio = found["dropout"]["keyed"] / found["dropout"]["torch"]
    if options.check and ratio > MOST_TIMES:
        print(f"keyed dropout takes {ratio:.2f} times what torch's does, more than {MOST_TIMES}")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
