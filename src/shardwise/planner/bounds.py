"""What a step takes at least, and what a device must hold at least: bounds that never exceed the simulator's figures.

    of a split that was not lowered     the whole model's own work, divided by as many ranks                      `perfect`
    of a scheme, from its pieces        work of the fullest rank; one microbatch through all stages and back      `SchemeBound`
    of a scheme, from its stages        for each rank: what must come before, its work, what must come after      `profile_bound`

    rank r     ├─ forwards of the stages before ─┤── its own work, all microbatches ──┤─ backwards of the stages before ─┤─ rank 0's end ─┤

The last part holds where the backward pass is not split: a rank's last computation is then a backward, for which the stages before
still wait. Where it is split, weights' parts may fill that time. Bounds of a split suppose that a part of a model's work takes no less than
its share of the whole: kernels do not become faster by becoming smaller.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache

from shardwise.cluster.model import Cluster
from shardwise.planner.compose import Scheme, backward_work, divide, forward_work, routed_seconds, stage_memory
from shardwise.planner.pieces import Outline, PieceCost, Work
from shardwise.planner.space import Split
from shardwise.program.tables import placement, splits_backward
from shardwise.simulate.profile import Profile

__all__ = ["SchemeBound", "least_memory", "memory_bound", "perfect", "profile_bound"]


def perfect(costs: Sequence[PieceCost], samples: int, split: Split) -> tuple[PieceCost, ...]:
    """The pieces of a split as if all work and all memory were divided evenly and nothing were communicated.

    costs: of the model on one rank, with as many experts as the split leaves it and the largest microbatches, of so many samples.
    """
    ranks = split.tp * split.cp
    part = split.samples / samples / ranks

    def work(each: Work) -> Work:
        return Work(compute_s=each.compute_s * part)

    found = []
    for cost in costs:
        experts = cost.experts // (split.tp if split.ep == 1 else 1)  # divided over ep ranks they are whole
        found.append(
            replace(
                cost,
                forward=work(cost.forward),
                backward_input=work(cost.backward_input),
                backward_weight=work(cost.backward_weight),
                prelude=Work(),
                light=work(cost.light),
                shared=Work(),
                held=cost.held.share(part),
                routed=int(cost.routed * part),
                sent=0,
                pending=0,
                parameters=(cost.parameters - cost.experts) // split.tp + experts,
                experts=experts,
                frozen=cost.frozen // split.tp,
            )
        )
    return tuple(found)


@dataclass(frozen=True, kw_only=True)
class SchemeBound:
    """What the schemes of one split take at least, from its pieces alone: work, tokens' way to their experts, and the host's launching."""

    shape: Outline
    costs: Sequence[PieceCost]
    cluster: Cluster
    _known: dict[object, list[tuple[int, float, float]]] = field(default_factory=dict, init=False, repr=False)

    def seconds(self, scheme: Scheme) -> float:
        """Of a step."""
        total = path = fullest = 0.0
        for count, each, through in self._pieces(scheme):
            total += each * count
            path += through * count
            fullest = max(fullest, each * -(-count // scheme.pp))
        return max(scheme.microbatches * max(total / scheme.pp, fullest), path)

    def _pieces(self, scheme: Scheme) -> list[tuple[int, float, float]]:
        """(how many, seconds of both passes, of these what the next stage or the one before waits for), of each piece."""
        key = scheme.recompute, scheme.ep, scheme.routing, scheme.hidden, scheme.overlap
        if key not in self._known:
            self._known[key] = [self._piece(cost, piece.count, scheme) for piece, cost in zip(self.shape.pieces, self.costs, strict=True)]
        return self._known[key]

    def _piece(self, cost: PieceCost, count: int, scheme: Scheme) -> tuple[int, float, float]:
        again, routed_s = scheme.recompute if count > 1 else "none", routed_seconds(cost, scheme, self.cluster)
        forward = _seconds(forward_work(cost, scheme, routed_s))
        both, inputs = (_seconds(backward_work(cost, scheme, again, routed_s, apart=apart)[0]) for apart in (False, True))
        return count, forward + both, forward + inputs


def _seconds(work: Work) -> float:
    return work.compute_s + work.communicate_s


def profile_bound(profile: Profile, scheme: Scheme) -> float:
    """Seconds that a step takes at least, from its stages."""
    home = placement(scheme.schedule, scheme.pp, scheme.chunks)
    split = splits_backward(scheme.schedule)
    hops = {edge.target: edge.transfer_s for edge in profile.edges}
    work, ends = [0.0] * scheme.pp, [0.0] * scheme.pp
    starts = [0.0] * scheme.pp
    first: dict[int, int] = {}
    before, after = [0.0], [0.0]  # a stage's forwards and backwards before and after it, with the messages
    for stage, (each, rank) in enumerate(zip(profile.stages, home, strict=True)):
        seconds = {kind: sum(both) for kind, both in each.seconds.items()}
        work[rank] += seconds["forward"] + seconds["backward"] + seconds.get("weight", 0.0)
        ends[rank] += seconds["reduce"] + seconds["update"]
        starts[rank] += seconds["prelude"]
        first.setdefault(rank, stage)
        hop = hops.get(stage + 1, 0.0)
        before.append(before[-1] + seconds["forward"] + hop)
        after.append(after[-1] + seconds["backward"] + hop)
    bound = starts[home[0]] + before[-1] + after[-1] + (0.0 if split else ends[home[0]])  # of one microbatch
    for rank in range(scheme.pp):
        stage = first[rank]
        own = max(starts[rank], starts[home[0]] + before[stage]) + scheme.microbatches * work[rank]
        drained = 0.0 if split or not stage else after[stage] + ends[home[0]]
        bound = max(bound, own + max(ends[rank], drained))
    return bound


_Held = tuple[Mapping[str, int], int]  # of a stage: bytes by kind, bytes that a microbatch keeps


def memory_bound(profile: Profile, scheme: Scheme) -> int:
    """Bytes that the fullest of the first and the last rank holds at least; compare `shardwise.program.tables`' numbers in flight."""
    return _fullest(lambda stage: (profile.stages[stage].memory, profile.stages[stage].saved_bytes), scheme)


def least_memory(shape: Outline, costs: Sequence[PieceCost], scheme: Scheme, cluster: Cluster) -> int:
    """The same from the pieces, of which no profile is made for it. Raises LayoutError where there are more stages than parts."""
    parts = [tuple(each) for each in divide(shape, costs, scheme)]

    @cache
    def held(own: tuple[tuple[int, int], ...]) -> _Held:  # most stages of a rank are alike
        return stage_memory(shape, costs, own, scheme, cluster)

    return _fullest(lambda stage: held(parts[stage]), scheme)


def _fullest(held: Callable[[int], _Held], scheme: Scheme) -> int:
    home = placement(scheme.schedule, scheme.pp, scheme.chunks)
    ends = ([stage for stage, rank in enumerate(home) if rank == each] for each in dict.fromkeys((0, scheme.pp - 1)))
    return max(_rank_bytes([held(stage) for stage in own], scheme, first=own[0] == 0) for own in ends)


def _rank_bytes(stages: Sequence[_Held], scheme: Scheme, *, first: bool) -> int:
    summed = ("parameters", "gradients", "optimizer")
    held = sum(memory[kind] for memory, _ in stages for kind in summed)
    shared = max(sum(nbytes for kind, nbytes in memory.items() if kind not in summed) for memory, _ in stages)
    flying = _in_flight(scheme, first=first)
    return held + shared + sum(count * saved for count, (_, saved) in zip(flying, stages, strict=True))


def _in_flight(scheme: Scheme, *, first: bool) -> list[int]:
    """Of each stage of the first rank, or of the last, the microbatches whose saved values it holds at once."""
    ranks, chunks, microbatches = scheme.pp, scheme.chunks, scheme.microbatches
    every = min(ranks, microbatches)
    if scheme.schedule == "interleaved":  # whole rounds of microbatches, and of the next one what comes before the first backward
        ahead = min(ranks - 1, max(0, microbatches - ranks))
        return [every + ahead, *[every] * (chunks - 1)] if first else [*[every] * (chunks - 1), 1]
    if scheme.schedule == "zb-v":
        return [min(2 * ranks - 1, microbatches), 1] if first else [every, every]
    most = {"gpipe": microbatches, "1f1b": ranks, "zb-h1": ranks, "zb-2p": 2 * ranks - 1}
    return [min(most[scheme.schedule], microbatches) if first or scheme.schedule == "gpipe" else 1]
