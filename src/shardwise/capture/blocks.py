"""Finds the repeated blocks of a model: runs of modules in one list (`layers.0`, `layers.1`, …) that make the same operators.

Equal blocks are planned once: the planner ties their choices, and a plan file has one entry for all of them.
"""

from __future__ import annotations

import re
from collections import defaultdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shardwise.capture.graph import Op

__all__ = ["block_pattern", "find_blocks", "list_member"]

_NUMBER = re.compile(r"\.(\d+)(?=[.:]|$)")


def find_blocks(ops: list[Op]) -> list[list[list[Op]]]:
    """For each list of repeated modules the operator sequences of its members, in order; only runs of equal sequences of two or more."""
    members: dict[str, dict[int, list[Op]]] = defaultdict(lambda: defaultdict(list))
    for op in ops:
        if (place := list_member(op.module)) is not None:
            members[place[0]][place[1]].append(op)
    runs: list[list[list[Op]]] = []
    for sequences in members.values():
        run: list[list[Op]] = []
        for number in sorted(sequences):
            if run and _shape(run[-1]) != _shape(sequences[number]):
                runs.append(run)
                run = []
            run.append(sequences[number])
        runs.append(run)
    return [run for run in runs if len(run) > 1]


def block_pattern(key: str) -> str:
    """An operator's or parameter's key with the number of its block replaced by `*`: one pattern for all equal blocks."""
    return _NUMBER.sub(".*", f".{key}", count=1)[1:]


def list_member(module: str) -> tuple[str, int] | None:
    """(`layers.*`, 3) for `layers.3.mlp`: the outermost numbered part of the path."""
    if match := _NUMBER.search(f".{module}"):
        return f".{module}"[1 : match.start()], int(match.group(1))
    return None


def _shape(sequence: list[Op]) -> list[Any]:
    """What must be equal in two blocks: operators, constants (but for a random operator's key), and the kinds and shapes of all tensors."""
    return [
        (
            block_pattern(op.name),
            repr(op.args),
            repr({**op.kwargs, "key": 0}),
            [(v.shape, v.dtype, v.kind, v.requires_grad) for v in (*op.inputs, *op.outputs)],
        )
        for op in sequence
    ]
