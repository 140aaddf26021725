"""What a step takes at least, and what a device must hold at least: bounds that never exceed the simulator's figures.

    of a split that was not lowered     the whole model's own work, divided by as many ranks                      `perfect`
    of a scheme, from its pieces        work of the fullest rank; one microbatch through all stages and back      `scheme_bound`
    of a scheme, from its stages        for each rank: what must come before, its work, what must come after      `profile_bound`

    rank r     ├─ forwards of the stages before ─┤── its own work, all microbatches ──┤─ backwards of the stages before ─┤─ rank 0's end ─┤

The last part holds where the backward pass is not split: a rank's last computation is then a backward, for which the stages before
still wait. Where it is split, weights' parts may fill that time. Bounds of a split suppose that a part of a model's work takes no less than
its share of the whole: kernels do not become faster by becoming smaller.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from shardwise.cluster.model import Cluster
from shardwise.planner.compose import Scheme, divide, recomputed, stage_memory
from shardwise.planner.pieces import Outline, PieceCost, Work
from shardwise.planner.space import Split
from shardwise.program.tables import placement, splits_backward
from shardwise.simulate.profile import Profile

__all__ = ["least_memory", "memory_bound", "perfect", "profile_bound", "scheme_bound"]


def perfect(costs: Sequence[PieceCost], samples: int, split: Split) -> tuple[PieceCost, ...]:
    """The pieces of a split as if all work and all memory were divided evenly and nothing were communicated.

    costs: of the model on one rank, with as many experts as the split leaves it and the largest microbatches, of so many samples.
    """
    ranks = split.tp * split.cp
    part = split.samples / samples / ranks
    middle = max(1, split.cp // 2) * 2 / split.cp if split.cp > 1 else 1.0  # of attention: the rank that is costed, against the average

    def work(each: Work, least: float = 1.0) -> Work:
        return Work(compute_s=each.compute_s * part * least)

    found = []
    for cost in costs:
        light = cost.light.compute_s / max(cost.forward.compute_s, 1e-30)
        least = 1 - light * (1 - middle)
        experts = cost.experts // (split.tp if split.ep == 1 else 1)  # divided over ep ranks they are whole
        found.append(
            replace(
                cost,
                forward=work(cost.forward, least),
                backward_input=work(cost.backward_input, middle),
                backward_weight=work(cost.backward_weight),
                prelude=Work(),
                light=work(cost.light, middle),
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


def scheme_bound(shape: Outline, costs: Sequence[PieceCost], scheme: Scheme) -> float:
    """Seconds that a step takes at least, from its pieces alone."""
    total = path = fullest = 0.0
    for piece, cost in zip(shape.pieces, costs, strict=True):
        again = recomputed(cost, scheme.recompute if piece.count > 1 else "none")
        through = _seconds(cost.forward) + _seconds(cost.backward_input) + _seconds(again)
        each = through + _seconds(cost.backward_weight)
        total += each * piece.count
        path += through * piece.count
        fullest = max(fullest, each * -(-piece.count // scheme.pp))
    return max(scheme.microbatches * max(total / scheme.pp, fullest), path)


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
    parts = divide(shape, costs, scheme)
    return _fullest(lambda stage: stage_memory(shape, costs, parts[stage], scheme, cluster), scheme)


def _fullest(held: Callable[[int], _Held], scheme: Scheme) -> int:
    home = placement(scheme.schedule, scheme.pp, scheme.chunks)
    ends = ([stage for stage, rank in enumerate(home) if rank == each] for each in dict.fromkeys((0, scheme.pp - 1)))
    return max(_rank_bytes([held(stage) for stage in own], scheme, first=own[0] == 0) for own in ends)


def _rank_bytes(stages: Sequence[_Held], scheme: Scheme, *, first: bool) -> int:
    summed = ("parameters", "gradients", "optimizer")
    held = sum(memory[kind] for memory, _ in stages for kind in summed)
    shared = max(sum(nbytes for kind, nbytes in memory.items() if kind not in summed) for memory, _ in stages)
    return held + shared + _in_flight(scheme, first=first) * min(saved for _, saved in stages)


def _in_flight(scheme: Scheme, *, first: bool) -> int:
    """(stage, microbatch) pairs whose saved values the first rank, or the last, holds at once."""
    ranks, chunks, microbatches = scheme.pp, scheme.chunks, scheme.microbatches
    if scheme.schedule == "interleaved":  # whole rounds of microbatches, and of the next one what comes before the first backward
        ahead = min(ranks - 1, max(0, microbatches - ranks))
        return chunks * min(ranks, microbatches) + ahead if first else (chunks - 1) * min(ranks, microbatches) + 1
    if scheme.schedule == "zb-v":
        return min(2 * ranks - 1, microbatches) + 1 if first else 2 * min(ranks, microbatches)
    most = {"gpipe": microbatches, "1f1b": ranks, "zb-h1": ranks, "zb-2p": 2 * ranks - 1}
    return min(most[scheme.schedule], microbatches) if first or scheme.schedule == "gpipe" else 1
