"""The pipeline schedules of one stage a rank: for each stage the order of its forwards (F) and backwards (B).

    gpipe, 3 stages, 4 microbatches        1f1b
    0  F0 F1 F2 F3 . . . . B0 B1 B2 B3     0  F0 F1 F2 .  . B0 F3 B1 .  B2 .  B3
    1  .  F0 F1 F2 F3 . . B0 B1 B2 B3      1  .  F0 F1 .  B0 F2 B1 F3 B2 .  B3
    2  .  .  F0 F1 F2 F3 B0 B1 B2 B3       2  .  .  F0 B0 F1 B1 F2 B2 F3 B3

gpipe: Huang et al. 2019 (a stage keeps all microbatches' saved values). 1f1b: Narayanan et al. 2019/2021 (stage s of p keeps at most p −
s). `shardwise.program.tables` has these and more.
"""

from __future__ import annotations

from collections.abc import Callable

from shardwise.program.actions import Kind

__all__ = ["SCHEDULES"]

Table = list[tuple[Kind, int]]


def gpipe(stage: int, stages: int, microbatches: int) -> Table:
    """All forwards, then all backwards."""
    return [(Kind.FORWARD, m) for m in range(microbatches)] + [(Kind.BACKWARD, m) for m in range(microbatches)]


def one_forward_one_backward(stage: int, stages: int, microbatches: int) -> Table:
    """As many forwards as there are stages after this one, then one forward and one backward in turn, then what is left."""
    ahead = min(stages - stage - 1, microbatches)
    table: Table = [(Kind.FORWARD, m) for m in range(ahead)]
    for m in range(ahead, microbatches):
        table += [(Kind.FORWARD, m), (Kind.BACKWARD, m - ahead)]
    return table + [(Kind.BACKWARD, m) for m in range(microbatches - ahead, microbatches)]


SCHEDULES: dict[str, Callable[[int, int, int], Table]] = {"gpipe": gpipe, "1f1b": one_forward_one_backward}
