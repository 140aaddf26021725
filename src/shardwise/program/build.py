"""Assignment, cut, schedule ──▶ every rank's Program

Ranks are numbered along the pipeline, then along dp, then along cp, then along tp: rank = ((pipe · dp + d) · cp + c) · tp + t, so that
tensor-parallel neighbours are nearest to each other, and next those that share a sequence. Of the data ranks ep neighbours divide the
experts (d = outer · ep + e); the mesh has them as an axis of its own, and as many fewer on dp. A rank of the pipeline has one stage, or
several, as the schedule's table places them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import product

import torch

from shardwise.program.actions import Action, Kind
from shardwise.program.lower import Cut, lower_stage
from shardwise.program.program import Program
from shardwise.program.tables import Tables, placed, rank_tables, splits
from shardwise.program.trace import Tracer
from shardwise.program.transfers import order_transfers, rank_actions
from shardwise.sharding.assignment import Assignment
from shardwise.sharding.collectives import group_name
from shardwise.sharding.reshard import Axis

__all__ = ["Places", "build_programs", "lower_ranks", "rank_of"]

Choose = Callable[[str, int, int], str]
Place = tuple[int, int, int]


def rank_of(pipe: int, d: int, t: int, dp: int, tp: int, *, c: int = 0, cp: int = 1) -> int:
    """The global rank of a place on the mesh; pipe: along the pipeline."""
    return ((pipe * dp + d) * cp + c) * tp + t


def build_programs(
    assignment: Assignment,
    cut: Cut,
    schedule: str | Tables,
    choose: Choose,
    *,
    device: torch.device,
    ranks: Iterable[int] | None = None,
    tracer: Tracer | None = None,
) -> dict[int, Program]:
    """The programs of `ranks` (all by default); a rank's transfers are ordered against those of its pipeline neighbours.

    schedule: each pipeline rank's slots, or the name of a schedule with one stage a rank. Without a BACKWARD in it nothing is trained.
    """
    tables = rank_tables(schedule, cut.stages, 1, assignment.mesh["mb"]) if isinstance(schedule, str) else schedule
    mesh = Places.of(assignment, len(tables))
    tracer = tracer or Tracer(device=device)
    chosen = set(range(mesh.ranks) if ranks is None else ranks)
    programs: dict[int, Program] = {}
    for place in mesh.columns():
        if chosen & {mesh.rank(pipe, place) for pipe in range(mesh.pp)}:
            lowering = _Lowering(assignment=assignment, cut=cut, choose=choose, mesh=mesh, tracer=tracer, splits_backward=splits(tables))
            programs |= _column(lowering, tables, place)
    return {rank: program for rank, program in programs.items() if rank in chosen}


def lower_ranks(assignment: Assignment, cut: Cut, ranks: Iterable[int], choose: Choose, *, tracer: Tracer) -> dict[int, Program]:
    """What these ranks compute and hold where each has one stage: programs without actions. No other stage is lowered for it."""
    mesh, placement = Places.of(assignment, cut.stages), tuple(range(cut.stages))
    lowering = _Lowering(assignment=assignment, cut=cut, choose=choose, mesh=mesh, tracer=tracer, splits_backward=False)
    return {rank: lowering.program(*mesh.place_of(rank), placement) for rank in ranks}


@dataclass(frozen=True, kw_only=True)
class Places:
    """The ranks' places: (d, c, t) at each of the pipeline's. dp: all data ranks, of which `ep` neighbours divide experts."""

    dp: int
    cp: int
    tp: int
    pp: int
    ep: int = 1

    @staticmethod
    def of(assignment: Assignment, pp: int) -> Places:
        mesh = assignment.mesh
        ep = mesh.get("ep", 1)
        return Places(dp=mesh["dp"] * ep, cp=mesh["cp"], tp=mesh["tp"], pp=pp, ep=ep)

    @property
    def ranks(self) -> int:
        return self.pp * self.dp * self.cp * self.tp

    def columns(self) -> Iterator[Place]:
        """The places at one of the pipeline's."""
        return product(range(self.dp), range(self.cp), range(self.tp))

    def rank(self, pipe: int, place: Place) -> int:
        d, c, t = place
        return rank_of(pipe, d, t, self.dp, self.tp, c=c, cp=self.cp)

    def place_of(self, rank: int) -> tuple[int, Place]:
        """Along the pipeline, and at that one of its places."""
        pipe, number = divmod(rank, self.dp * self.cp * self.tp)
        return pipe, self.place(number)

    def groups(self, pipe: int, place: Place) -> dict[str, tuple[int, ...]]:
        """Axis → the ranks along it through a place."""
        d, c, t = place
        outer, e = divmod(d, self.ep)
        found = {
            "dp": tuple(self.rank(pipe, (i, c, t)) for i in range(e, self.dp, self.ep)),
            "ep": tuple(self.rank(pipe, (outer * self.ep + i, c, t)) for i in range(self.ep)),
            "cp": tuple(self.rank(pipe, (d, i, t)) for i in range(self.cp)),
            "tp": tuple(self.rank(pipe, (d, c, i)) for i in range(self.tp)),
        }
        return {axis: ranks for axis, ranks in found.items() if axis != "ep" or self.ep > 1}

    def coordinates(self, place: Place) -> dict[str, int]:
        """Axis → where on it a place is."""
        d, c, t = place
        data = {"dp": d // self.ep, "ep": d % self.ep} if self.ep > 1 else {"dp": d}
        return data | {"cp": c, "tp": t}

    def place(self, number: int) -> Place:
        """Of the rank with this number among those at one of the pipeline's."""
        rest, t = divmod(number, self.tp)
        return (*divmod(rest, self.cp), t)


def _column(lowering: _Lowering, tables: Tables, place: Place) -> dict[int, Program]:
    """The programs of the ranks that hold the same part, one at each place of the pipeline: their transfers are ordered together."""
    home, mesh = placed(tables), lowering.mesh
    assert len(home) == lowering.cut.stages, f"the schedule has {len(home)} stages, the cut {lowering.cut.stages}"
    placement = tuple(home[stage] for stage in sorted(home))
    programs = {mesh.rank(pipe, place): lowering.program(pipe, place, placement) for pipe in range(mesh.pp)}
    lists = {
        rank: rank_actions(row, programs[rank].edges, lambda stage: mesh.rank(placement[stage], place))
        for rank, row in zip(programs, tables, strict=True)
    }
    trains = any(slot.kind is Kind.BACKWARD for row in tables for slot in row)
    for rank, actions in order_transfers(lists).items():
        ends = [Action(kind=Kind.REDUCE), Action(kind=Kind.UPDATE)] if trains else []
        programs[rank].actions = [Action(kind=Kind.PRELUDE), *actions, *ends]
    return programs


@dataclass(frozen=True, kw_only=True)
class _Lowering:
    """splits_backward: whether the backward pass is wanted in two parts."""

    assignment: Assignment
    cut: Cut
    choose: Choose
    mesh: Places
    tracer: Tracer
    splits_backward: bool

    def program(self, pipe: int, place: Place, placement: tuple[int, ...]) -> Program:
        """Of the rank at a place, without its actions."""
        coordinates = self.mesh.coordinates(place)
        groups = self.mesh.groups(pipe, place)
        axes = {
            axis: Axis(name=axis, group=group_name(axis, groups[axis]), ranks=ranks, rank=coordinates[axis])
            if axis in groups
            else Axis(name=axis, group="", ranks=ranks, rank=0)
            for axis, ranks in self.assignment.mesh.items()
        }
        program = Program(
            rank=self.mesh.rank(pipe, place),
            coordinates=coordinates | {"pp": pipe},
            mesh=dict(self.assignment.mesh) | {"pp": self.mesh.pp},
            groups=groups,
            stages={},
            placement=placement,
            edges=[],
            choose=self.choose,
        )
        for stage in (number for number, home in enumerate(placement) if home == pipe):
            lowered, edges, loss_axes = lower_stage(
                self.assignment, self.cut, stage, axes, self.tracer, self.choose, splits_backward=self.splits_backward
            )
            program.stages[stage] = lowered
            program.edges += [edge for edge in edges if edge not in program.edges]
            program.loss_axes += loss_axes
        return program
