"""What a stage holds, in few words."""

from __future__ import annotations

import re
from collections.abc import Iterable

__all__ = ["modules_held"]

_BLOCK = re.compile(r"(.*?)(?:^|\.)(\d+)(?=\.)")


def modules_held(names: Iterable[str]) -> list[str]:
    """The modules of the parameters, in order; the repeated blocks of a list as one: `model.layers.0 … 3`."""
    found: dict[str, list[int]] = {}
    for name in names:
        if match := _BLOCK.match(name):
            found.setdefault(match.group(1), []).append(int(match.group(2)))
        else:
            found.setdefault(name.rpartition(".")[0] or name, [])
    return [text for module, numbers in found.items() for text in _runs(module, sorted(set(numbers)))]


def _runs(module: str, numbers: list[int]) -> list[str]:
    """`layers.0 … 2`, `layers.5` for 0, 1, 2, 5."""
    if not numbers:
        return [module]
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    start = f"{module}." if module else ""
    return [f"{start}{run[0]}" + (f" … {run[-1]}" if len(run) > 1 else "") for run in runs]
