"""What a plan's stages take, small enough to be kept in the plan: with it a plan can be simulated without the model."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from pydantic import BaseModel, ConfigDict

from shardwise.cluster.model import Cluster
from shardwise.program.holdings import modules_held
from shardwise.program.program import Edge, Program
from shardwise.simulate.costs import MemoryUse, memory_use, stage_times

__all__ = ["EdgeProfile", "Profile", "StageProfile", "profile_programs"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class StageProfile(_Strict):
    """One rank of a stage (where they differ, the slowest and the fullest).

    seconds: kind of action → (computing, communicating); "backward" is the inputs' part where there is "weight", too, the whole where not.
    memory: bytes by kind at the peak. saved_bytes: what one microbatch keeps from its forward to the end of its backward pass; 0 where
    memory's "saved" counts it for all that are in flight.
    reduces: axes over which gradients are summed. tied: other stages with which a weight is shared, whose gradient is summed over all of
    them. modules: what the stage holds; parameters: how many numbers, over all its ranks.
    """

    seconds: dict[str, tuple[float, float]]
    memory: dict[str, int]
    saved_bytes: int = 0
    reduces: list[str] = []
    tied: list[int] = []
    modules: list[str] = []
    parameters: int = 0


class EdgeProfile(_Strict):
    """A value sent from stage to stage: bytes and seconds of one message."""

    name: str
    source: int
    target: int
    nbytes: int
    transfer_s: float
    requires_grad: bool


class Profile(_Strict):
    """stages: in the order in which data passes them, also where a rank has several.
    cores: that the ranks share, None where each has its own device.
    """

    stages: list[StageProfile]
    edges: list[EdgeProfile]
    cores: int | None


def profile_programs(programs: Mapping[int, Program], cluster: Cluster, optimizer: str) -> Profile:
    """The profile of a plan's programs."""
    by_stage: dict[int, list[Program]] = {}
    for program in programs.values():
        by_stage.setdefault(program.stage.stage, []).append(program)
    edges: dict[str, EdgeProfile] = {}
    for program in programs.values():
        times = stage_times(program, cluster, optimizer)
        for edge in program.edges:
            edges.setdefault(edge.name, _edge(edge, times.transfer_s[edge.name]))
    return Profile(
        stages=[_stage(by_stage[stage], cluster, optimizer) for stage in sorted(by_stage)], edges=list(edges.values()), cores=cluster.cores
    )


def _edge(edge: Edge, transfer_s: float) -> EdgeProfile:
    return EdgeProfile(
        name=edge.name, source=edge.source, target=edge.target, nbytes=edge.nbytes, transfer_s=transfer_s, requires_grad=edge.requires_grad
    )


def _stage(programs: list[Program], cluster: Cluster, optimizer: str) -> StageProfile:
    times = [stage_times(program, cluster, optimizer).of for program in programs]
    seconds = {kind.value: (max(t[kind].compute_s for t in times), max(t[kind].communicate_s for t in times)) for kind in times[0]}
    fullest: MemoryUse = max((memory_use(program, optimizer) for program in programs), key=lambda use: use.total)
    reduces = sorted({axis for program in programs for part in program.stage.parameters for axis in part.reduce})
    held = programs[0].stage.parameters
    tied = {other for part in held if part.requires_grad for other in part.stages} - {programs[0].stage.stage}
    return StageProfile(
        seconds=seconds,
        memory=fullest.by_kind(),
        reduces=reduces,
        tied=sorted(tied),
        modules=modules_held(part.name for part in held),
        parameters=sum(prod(part.shape) for part in held),
    )
