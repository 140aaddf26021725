"""What a run measured, in the terms of a simulation: so the two can stand side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from shardwise.planner.plan import Plan
from shardwise.program.actions import Action, Kind
from shardwise.runtime.train import RecordedAction, TrainingRun
from shardwise.simulate.simulator import Span

__all__ = ["Measured"]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A run.

    step_time_s: a typical step's; step_times_s: every step's, in order. memory_bytes: peak of each rank.
    timeline: the actions of one step, seconds from its beginning. losses: of every step.
    same_numbers: the largest relative error against one device, None where nobody looked.
    """

    step_time_s: float
    memory_bytes: list[int]
    step_times_s: list[float] = field(default_factory=list)
    timeline: list[Span] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    same_numbers: float | None = None

    @classmethod
    def of(cls, run: TrainingRun, plan: Plan, *, same_numbers: float | None = None) -> Measured:
        """Of a training run of the plan; its last step is the timeline."""
        return cls(
            step_time_s=run.step_time_s,
            memory_bytes=run.memory_bytes,
            step_times_s=run.step_times_s,
            timeline=_timeline(run.actions, plan),
            losses=run.losses,
            same_numbers=same_numbers,
        )


def _timeline(recorded: Sequence[Sequence[RecordedAction]], plan: Plan) -> list[Span]:
    """The ranks' records from one zero.

    Ranks on one machine share a clock. Where the beginnings lie further apart than a step lasts the clocks are of several machines, and
    each rank counts from its own beginning.
    """
    begins = [min(start for *_, start, _ in records) for records in recorded if records]
    if not begins:
        return []
    longest = max(max(end for *_, end in records) - min(start for *_, start, _ in records) for records in recorded if records)
    shared = max(begins) - min(begins) <= longest
    spans: list[Span] = []
    for rank, records in enumerate(recorded):
        zero = min(begins) if shared else min((start for *_, start, _ in records), default=0.0)
        first = plan.placement.index(rank // (plan.dp * plan.cp * plan.tp))
        spans += [_span(record, rank, first, zero) for record in records]
    return spans


def _span(record: RecordedAction, rank: int, first: int, zero_s: float) -> Span:
    """first: the rank's first stage, of which is what it does once for all of them."""
    kind, stage, microbatch, edge, peer, start_s, end_s = record
    action = Action(kind=Kind(kind), stage=stage, microbatch=microbatch, edge=edge, peer=peer)
    return Span(rank=rank, stage=first if stage < 0 else stage, action=action, start_s=start_s - zero_s, end_s=end_s - zero_s)
