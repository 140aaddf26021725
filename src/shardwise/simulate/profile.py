"""What a plan's stages take, small enough to be kept in the plan: with it a plan can be simulated without the model."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from pydantic import BaseModel, ConfigDict

from shardwise.cluster.model import Cluster
from shardwise.cost.collectives import collective_cost
from shardwise.errors import LayoutError
from shardwise.program.actions import Kind
from shardwise.program.holdings import modules_held
from shardwise.program.program import Edge, Program
from shardwise.simulate.costs import MemoryUse, StageTimes, memory_use, stage_times
from shardwise.simulate.traffic import Traffic, graph_traffic, reduction_traffic, traffic_seconds

__all__ = ["EdgeProfile", "Profile", "StageProfile", "on_links", "profile_programs"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class StageProfile(_Strict):
    """One rank of a stage (where they differ, the slowest and the fullest).

    seconds: kind of action → (computing, communicating); "backward" is the inputs' part where there is "weight", too, the whole where not.
    memory: bytes by kind at the peak. saved_bytes: what one microbatch keeps from its forward to the end of its backward pass; 0 where
    memory's "saved" counts it for all that are in flight.
    traffic: kind of action → what its communicating is made of, on devices of the catalog; none where the profile is of pieces.
    reduces: axes over which gradients are summed. modules: what the stage holds; parameters: how many numbers, over all its ranks.
    """

    seconds: dict[str, tuple[float, float]]
    memory: dict[str, int]
    saved_bytes: int = 0
    traffic: dict[str, list[Traffic]] = {}
    reduces: list[str] = []
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
    times = [stage_times(program, cluster, optimizer) for program in programs]
    kinds = times[0].of
    slowest = {kind: max(range(len(programs)), key=lambda index: times[index].of[kind].communicate_s) for kind in kinds}
    fullest: MemoryUse = max((memory_use(program, optimizer) for program in programs), key=lambda use: use.total)
    reduces = sorted({axis for program in programs for part in program.stage.parameters for axis in part.reduce})
    held = programs[0].stage.parameters
    return StageProfile(
        seconds={kind.value: (_longest(times, kind), times[slowest[kind]].of[kind].communicate_s) for kind in kinds},
        memory=fullest.by_kind(),
        traffic={kind.value: found for kind in kinds if cluster.machines and (found := _traffic(programs[slowest[kind]], kind))},
        reduces=reduces,
        modules=modules_held(part.name for part in held),
        parameters=sum(prod(part.shape) for part in held),
    )


def _longest(times: list[StageTimes], kind: Kind) -> float:
    return max(each.of[kind].compute_s for each in times)


def _traffic(program: Program, kind: Kind) -> list[Traffic]:
    """Of one action of a rank."""
    graphs = {Kind.PRELUDE: program.stage.prelude, Kind.FORWARD: program.stage.forward, Kind.BACKWARD: program.stage.backward}
    if kind is Kind.REDUCE:
        return reduction_traffic(program)
    return graph_traffic(graphs[kind]) if kind in graphs else []


# -- other links ---------------------------------------------------------------------------------------------------------------------------


def on_links(profile: Profile, cluster: Cluster, apart: int) -> Profile:
    """The profile with all that is sent costed anew, on a cluster of the same devices. apart: ranks between neighbouring stages.

    Raises LayoutError where the profile has seconds of communicating but does not say of what.
    """
    stages = [_stage_on_links(number, stage, cluster) for number, stage in enumerate(profile.stages)]
    edges = [_edge_on_links(edge, cluster, apart) for edge in profile.edges]
    return profile.model_copy(update={"stages": stages, "edges": edges})


def _stage_on_links(number: int, stage: StageProfile, cluster: Cluster) -> StageProfile:
    seconds = dict(stage.seconds)
    for kind, (compute_s, communicate_s) in stage.seconds.items():
        if communicate_s and kind not in stage.traffic:
            raise LayoutError(
                f"the plan says how long stage {number} communicates ({kind}: {communicate_s:.3g} s) but not what it sends, so that other "
                "links cannot be costed; make the plan again"
            )
        seconds[kind] = compute_s, traffic_seconds(stage.traffic.get(kind, []), cluster)
    return stage.model_copy(update={"seconds": seconds})


def _edge_on_links(edge: EdgeProfile, cluster: Cluster, apart: int) -> EdgeProfile:
    seconds = collective_cost("send_recv", edge.nbytes, 2, cluster, apart).seconds if edge.transfer_s else 0.0
    return edge.model_copy(update={"transfer_s": seconds})
