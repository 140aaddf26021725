"""`python -m shardwise.presets` lists all presets; with a part of a name, those that have it in theirs."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.table import Table

from shardwise.presets import Preset, describe, names


def table(presets: list[Preset]) -> Table:
    """A row for each preset."""
    shown = Table("name", "parameters", "layers", "batch", "sequence", "source", box=None, pad_edge=False)
    for each in presets:
        numbers = (f"{each.parameters / 1e9:.4g} B", each.layers, each.batch_size, each.sequence)
        shown.add_row(each.name, *("" if number is None else str(number) for number in numbers), each.source)
    return shown


if __name__ == "__main__":
    wanted = sys.argv[1].lower() if len(sys.argv) > 1 else ""
    Console().print(table([describe(name) for name in names() if wanted in name]))
