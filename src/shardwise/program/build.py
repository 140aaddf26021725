"""Assignment, cut, schedule ──▶ every rank's Program

Ranks are numbered stage by stage, then along dp, then along cp, then along tp: rank = ((stage · dp + d) · cp + c) · tp + t, so that
tensor-parallel neighbours are nearest to each other, and next those that share a sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import product

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

__all__ = ["Places", "build_programs", "rank_of"]

Choose = Callable[[str, int, int], str]
Place = tuple[int, int, int]


def rank_of(stage: int, d: int, t: int, dp: int, tp: int, *, c: int = 0, cp: int = 1) -> int:
    """The global rank of a stage's place on the mesh."""
    return ((stage * dp + d) * cp + c) * tp + t


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
    mesh = Places.of(assignment, cut.stages)
    tracer = tracer or Tracer(device=device)
    chosen = set(range(mesh.ranks) if ranks is None else ranks)
    programs: dict[int, Program] = {}
    for place in mesh.columns():
        if chosen & {mesh.rank(stage, place) for stage in range(cut.stages)}:
            programs |= _column(assignment, cut, schedule_name, choose, mesh, place, tracer)
    return {rank: program for rank, program in programs.items() if rank in chosen}


@dataclass(frozen=True, kw_only=True)
class Places:
    """The ranks' places: (d, c, t) in each of the stages."""

    dp: int
    cp: int
    tp: int
    stages: int

    @staticmethod
    def of(assignment: Assignment, stages: int) -> Places:
        mesh = assignment.mesh
        return Places(dp=mesh["dp"], cp=mesh["cp"], tp=mesh["tp"], stages=stages)

    @property
    def ranks(self) -> int:
        return self.stages * self.dp * self.cp * self.tp

    def columns(self) -> Iterator[Place]:
        """The places of a stage."""
        return product(range(self.dp), range(self.cp), range(self.tp))

    def rank(self, stage: int, place: Place) -> int:
        d, c, t = place
        return rank_of(stage, d, t, self.dp, self.tp, c=c, cp=self.cp)

    def groups(self, stage: int, place: Place) -> dict[str, tuple[int, ...]]:
        """Axis → the ranks along it through a place."""
        d, c, t = place
        return {
            "dp": tuple(self.rank(stage, (i, c, t)) for i in range(self.dp)),
            "cp": tuple(self.rank(stage, (d, i, t)) for i in range(self.cp)),
            "tp": tuple(self.rank(stage, (d, c, i)) for i in range(self.tp)),
        }


def _column(
    assignment: Assignment, cut: Cut, schedule_name: str, choose: Choose, mesh: Places, place: Place, tracer: Tracer
) -> dict[int, Program]:
    """The programs of the ranks that hold the same part, one in each stage."""
    programs: dict[int, Program] = {}
    lists: dict[int, list[Action]] = {}
    coordinates = dict(zip(("dp", "cp", "tp"), place, strict=True))
    for stage in range(mesh.stages):
        rank, groups = mesh.rank(stage, place), mesh.groups(stage, place)
        axes = {
            axis: Axis(name=axis, group=group_name(axis, groups[axis]), ranks=ranks, rank=coordinates[axis])
            if axis in groups
            else Axis(name=axis, group="", ranks=ranks, rank=0)
            for axis, ranks in assignment.mesh.items()
        }
        lowered, edges, loss_axes = lower_stage(assignment, cut, stage, axes, tracer, choose)
        table = schedule(schedule_name, stage, mesh.stages, assignment.mesh["mb"])
        lists[rank] = with_transfers(table, stage, edges, lambda other: mesh.rank(other, place))
        programs[rank] = Program(
            rank=rank,
            coordinates=coordinates | {"pp": stage},
            mesh=dict(assignment.mesh) | {"pp": mesh.stages},
            groups=groups,
            stage=lowered,
            edges=edges,
            loss_axes=loss_axes,
        )
    for rank, actions in order_transfers(lists).items():
        programs[rank].actions = [Action(kind=Kind.PRELUDE), *actions, Action(kind=Kind.REDUCE), Action(kind=Kind.UPDATE)]
    return programs
