"""Assignment, cut, schedule ──▶ every rank's Program

Ranks are numbered stage by stage, then along dp, then along tp: rank = (stage · dp + d) · tp + t, so that tensor-parallel neighbours are
nearest to each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from shardwise.program.actions import Action, Kind
from shardwise.program.lower import Cut, lower_stage
from shardwise.program.program import Program
from shardwise.program.schedules import schedule
from shardwise.program.trace import Tracer
from shardwise.program.transfers import order_transfers, with_transfers
from shardwise.sharding.assignment import Assignment
from shardwise.sharding.collectives import group_name
from shardwise.sharding.reshard import Axis

__all__ = ["build_programs", "rank_of"]

Choose = Callable[[str, int, int], str]


def rank_of(stage: int, d: int, t: int, dp: int, tp: int) -> int:
    """The global rank of a stage's place on the mesh."""
    return (stage * dp + d) * tp + t


def build_programs(
    assignment: Assignment,
    cut: Cut,
    schedule_name: str,
    choose: Choose,
    *,
    device: torch.device,
    ranks: Iterable[int] | None = None,
    tracer: Tracer | None = None,
) -> dict[int, Program]:
    """The programs of `ranks` (all by default); a rank's transfers are ordered against those of its pipeline neighbours."""
    dp, tp = assignment.mesh["dp"], assignment.mesh["tp"]
    tracer = tracer or Tracer(device=device)
    chosen = set(range(cut.stages * dp * tp) if ranks is None else ranks)
    programs: dict[int, Program] = {}
    for d in range(dp):
        for t in range(tp):
            column = [rank_of(stage, d, t, dp, tp) for stage in range(cut.stages)]
            if chosen & set(column):
                programs |= _column(assignment, cut, schedule_name, choose, d, t, tracer)
    return {rank: program for rank, program in programs.items() if rank in chosen}


def _column(assignment: Assignment, cut: Cut, schedule_name: str, choose: Choose, d: int, t: int, tracer: Tracer) -> dict[int, Program]:
    """The programs of the ranks that hold the same part, one in each stage."""
    dp, tp, stages = assignment.mesh["dp"], assignment.mesh["tp"], cut.stages
    programs: dict[int, Program] = {}
    lists: dict[int, list[Action]] = {}
    for stage in range(stages):
        rank = rank_of(stage, d, t, dp, tp)
        groups = {
            "dp": tuple(rank_of(stage, i, t, dp, tp) for i in range(dp)),
            "tp": tuple(rank_of(stage, d, i, dp, tp) for i in range(tp)),
        }
        axes = {
            "dp": Axis(name="dp", group=group_name("dp", groups["dp"]), ranks=dp, rank=d),
            "mb": Axis(name="mb", group="", ranks=assignment.mesh["mb"], rank=0),
            "tp": Axis(name="tp", group=group_name("tp", groups["tp"]), ranks=tp, rank=t),
        }
        lowered, edges, loss_axes = lower_stage(assignment, cut, stage, axes, tracer, choose)
        table = schedule(schedule_name, stage, stages, assignment.mesh["mb"])
        lists[rank] = with_transfers(table, stage, edges, lambda other: rank_of(other, d, t, dp, tp))
        programs[rank] = Program(
            rank=rank,
            coordinates={"dp": d, "tp": t, "pp": stage},
            mesh=dict(assignment.mesh) | {"pp": stages},
            groups=groups,
            stage=lowered,
            edges=edges,
            loss_axes=loss_axes,
        )
    for rank, actions in order_transfers(lists).items():
        programs[rank].actions = [Action(kind=Kind.PRELUDE), *actions, Action(kind=Kind.REDUCE), Action(kind=Kind.UPDATE)]
    return programs
