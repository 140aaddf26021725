"""What a plan's stages take, small enough to be kept in the plan: with it a plan can be simulated without the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from pydantic import BaseModel, ConfigDict

from shardwise.cluster.model import Cluster
from shardwise.cost.collectives import Shares, collective_cost
from shardwise.errors import LayoutError
from shardwise.program.actions import Kind
from shardwise.program.holdings import modules_held
from shardwise.program.program import Edge, Program, StageProgram
from shardwise.simulate.costs import Seconds, passing_traffic, stage_times, transfer_shares
from shardwise.simulate.memory import StageMemory, stage_memory
from shardwise.simulate.traffic import Traffic, gather_traffic, reduction_traffic, traffic_seconds

__all__ = ["EdgeProfile", "Profile", "StageProfile", "computing_ranks", "on_links", "profile_programs"]

_PASSES = (Kind.FORWARD, Kind.BACKWARD, Kind.WEIGHT)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class CopyMemory(_Strict):
    """What the ranks of one copy of a stage hold; fields as of `StageProfile`."""

    memory: dict[str, int]
    saved_bytes: int
    kept_bytes: int


class StageProfile(_Strict):
    """One rank of a stage (where copies differ, of the slowest, and the fullest).

    seconds: kind of action → (computing, communicating); "backward" is the inputs' part where there is "weight", too, the whole where not.
    memory: bytes by kind at the peak, "saved" only where saved_bytes is 0. saved_bytes: what one microbatch keeps from its forward to its
    backward pass; kept_bytes: from there to the weights' part of it, where that is apart.
    traffic: kind of action → what its communicating is made of, on devices of the catalog; none where the profile is of pieces.
    copies: along dp, where they have unlike shares of the batch and hold unlike much.
    reduces: axes over which gradients are summed. tied: other stages with which a weight is shared, whose gradient is summed over all of
    them. modules: what the stage holds; parameters: how many numbers, over all its ranks.
    """

    seconds: dict[str, tuple[float, float]]
    memory: dict[str, int]
    saved_bytes: int = 0
    kept_bytes: int = 0
    traffic: dict[str, list[Traffic]] = {}
    copies: list[CopyMemory] = []
    reduces: list[str] = []
    tied: list[int] = []
    modules: list[str] = []
    parameters: int = 0


class EdgeProfile(_Strict):
    """A value sent from stage to stage: bytes and seconds of one message. busy_s: of a core that the rank has to itself, which its sender
    needs for it, and its receiver again; where ranks share cores."""

    name: str
    source: int
    target: int
    nbytes: int
    transfer_s: float
    busy_s: float = 0.0
    requires_grad: bool


class Profile(_Strict):
    """stages: in the order in which data passes them, also where a rank has several.
    cores: that the ranks share, None where each has its own device; nodes: of equally many ranks, each with its part of the cores.
    """

    stages: list[StageProfile]
    edges: list[EdgeProfile]
    cores: int | None
    nodes: int = 1

    def by_copy(self) -> list[Profile]:
        """With the memory of each copy along dp; the profile itself where they hold alike."""
        if not self.stages[0].copies:
            return [self]
        each = zip(*(stage.copies for stage in self.stages), strict=True)
        return [self.model_copy(update={"stages": [_holding(*pair) for pair in zip(self.stages, copy, strict=True)]}) for copy in each]


def _holding(stage: StageProfile, copy: CopyMemory) -> StageProfile:
    return stage.model_copy(update={**dict(copy), "copies": []})


def profile_programs(programs: Mapping[int, Program], cluster: Cluster, optimizer: str, shares: Sequence[int] = ()) -> Profile:
    """The profile of a plan's programs.

    programs: of one rank of each sort at least. shares: in which proportion the copies along dp divide the batch, where not evenly; those
    with the same share hold alike.
    """
    stages: dict[int, list[_OnRank]] = {}
    edges: dict[str, EdgeProfile] = {}
    for program in programs.values():
        seen = cluster.seen_by(computing_ranks(program))
        times, memory = stage_times(program, seen, optimizer), stage_memory(program, optimizer)
        for number, stage in program.stages.items():
            talk = _traffic(program, number, seen) if cluster.machines else {}
            on_rank = _OnRank(stage=stage, copy=program.coordinates["dp"], times=times[number], memory=memory[number], traffic=talk)
            stages.setdefault(number, []).append(on_rank)
        transfers = transfer_shares(program, seen)
        for edge in program.edges:
            sent = _edge(edge, transfers[edge.name])
            if edge.name not in edges or sent.transfer_s > edges[edge.name].transfer_s:
                edges[edge.name] = sent
    nodes = 1 if cluster.network is None else cluster.ranks // cluster.network.node_ranks
    found = [_stage(stages[number], shares) for number in sorted(stages)]
    return Profile(stages=found, edges=list(edges.values()), cores=cluster.cores, nodes=nodes)


def computing_ranks(program: Program) -> range:
    """The ranks that compute a stage together with this one: those along ep, cp and tp."""
    size = program.mesh.get("ep", 1) * program.mesh["cp"] * program.mesh["tp"]
    first = program.rank // size * size
    return range(first, first + size)


def _edge(edge: Edge, shares: Shares) -> EdgeProfile:
    return EdgeProfile(
        name=edge.name,
        source=edge.source,
        target=edge.target,
        nbytes=edge.nbytes,
        transfer_s=shares.communicate_s,
        busy_s=shares.compute_s,
        requires_grad=edge.requires_grad,
    )


@dataclass(frozen=True, kw_only=True)
class _OnRank:
    """A stage on one of its ranks. copy: the rank's place along dp."""

    stage: StageProgram
    copy: int
    times: dict[Kind, Seconds]
    memory: StageMemory
    traffic: dict[Kind, list[Traffic]]

    @property
    def passes_s(self) -> float:
        """Of a microbatch, both ways."""
        return sum(each.compute_s + each.communicate_s for kind, each in self.times.items() if kind in _PASSES)


def _traffic(program: Program, number: int, cluster: Cluster) -> dict[Kind, list[Traffic]]:
    """Of a stage's actions on a rank; what it does once for all its stages counts with the first."""
    found = {kind: passing_traffic(graph, cluster) for kind, graph in program.stages[number].graphs.items()}
    once = {Kind.REDUCE: reduction_traffic(program), Kind.UPDATE: gather_traffic(program)}
    return found | once if number == next(iter(program.stages)) else found


def _stage(ranks: list[_OnRank], shares: Sequence[int]) -> StageProfile:
    slowest = max(ranks, key=lambda rank: rank.passes_s).copy
    alike = [rank for rank in ranks if rank.copy == slowest]
    times = [rank.times for rank in alike]
    seconds = {kind.value: (max(t[kind].compute_s for t in times), max(t[kind].communicate_s for t in times)) for kind in times[0]}
    by_share = {share: _fullest([rank for rank in ranks if shares[rank.copy] == share]) for share in set(shares)}
    reduces = sorted({axis for rank in ranks for part in rank.stage.parameters for axis in part.reduce})
    held = ranks[0].stage.parameters
    tied = {other for part in held if part.requires_grad for other in part.stages} - {ranks[0].stage.stage}
    busiest = {kind: max(alike, key=lambda rank: rank.times[kind].communicate_s) for kind in times[0]}
    return StageProfile(
        seconds=seconds,
        **dict(_fullest(ranks)),
        copies=[by_share[share] for share in shares],
        traffic={kind.value: found for kind, rank in busiest.items() if (found := rank.traffic.get(kind))},
        reduces=reduces,
        tied=sorted(tied),
        modules=modules_held(part.name for part in held),
        parameters=sum(prod(part.shape) for part in held),
    )


def _fullest(ranks: Iterable[_OnRank]) -> CopyMemory:
    found = max((rank.memory for rank in ranks), key=lambda memory: memory.use.total + memory.saved_bytes)
    return CopyMemory(memory=found.use.by_kind(), saved_bytes=found.saved_bytes, kept_bytes=found.kept_bytes)


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
