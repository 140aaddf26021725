"""Layouts on unlike devices: each stage, or each copy of the model, on devices of one kind, with as much work as these can do.

    stages    a100 │ a100 │ rtx4090 │ rtx4090     blocks by speed and memory; only activations pass between the kinds
    copies    a100: 6 microbatches                samples by speed; gradients are summed over all
              rtx4090: 2 microbatches

Tensor ranks share every operator, and the slower would be waited for in each: they never span kinds, and stay inside a node. Kinds may be
left out: what they add must be worth what it costs to reach them. A stage's costs are those of its own devices and links (a table of
pieces for each kind); what passes between kinds is costed at the slower side's rate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from itertools import combinations, permutations, product
from math import gcd

import numpy as np

from shardwise.capture.precision import Precision
from shardwise.cluster.model import Cluster, cluster_of
from shardwise.cost.links import link_seconds
from shardwise.planner.compose import Scheme, hop_seconds, stage_profile
from shardwise.planner.estimator import FULL_MEMORY
from shardwise.planner.lacking import lacking
from shardwise.planner.pieces import Outline, PieceCost
from shardwise.planner.scale import Found, ScaleSearch, Searched
from shardwise.planner.shares import Table, batch_shares, cut_unlike
from shardwise.planner.twins import TwinLayout
from shardwise.simulate.profile import EdgeProfile, Profile, StageProfile
from shardwise.simulate.simulator import Column, Simulation, simulate_columns

__all__ = ["Kind", "Placed", "Team", "Uneven", "UnevenSearch", "kinds_of", "search_unlike"]

_TENSOR = (1, 2, 4, 8, 16)
_LARGER = (2, 4)  # samples of a microbatch, tried with the size of tp that does best with one
_KEPT = 8  # layouts whose estimates are compared with the others' bounds
_SIMULATED = 8  # layouts, best estimates first
_ORDERED = 3  # kinds: of more, none is left out and their order is the cluster's
_STATES = ("parameters", "gradients", "optimizer")

Costs = Sequence[PieceCost]
Parts = tuple[tuple[int, int], ...]  # (piece, how many of it), in order


@dataclass(frozen=True, kw_only=True, eq=False)
class Kind:
    """The devices of one kind among unlike ones. numbers: of their groups; alone: the cluster that they are by themselves."""

    name: str
    numbers: tuple[int, ...]
    alone: Cluster

    @property
    def ranks(self) -> int:
        """How many."""
        return self.alone.ranks

    @property
    def limit_bytes(self) -> float:
        """Of a device, what a layout may take."""
        return self.alone.memory_bytes * FULL_MEMORY

    def holds(self, tp: int) -> bool:
        """Whether every node is made of whole tensor groups of that size."""
        assert self.alone.machines is not None
        return all(group.per_node % tp == 0 for group in self.alone.machines.groups)


def kinds_of(cluster: Cluster) -> tuple[Kind, ...]:
    """The kinds of devices, in the cluster's order; one where all are alike or none is of the catalog."""
    machines = cluster.machines
    if machines is None or len(machines.kinds) == 1:
        return (Kind(name=cluster.name, numbers=(0,), alone=cluster),)
    return tuple(
        Kind(name=device.name, numbers=numbers, alone=cluster_of(machines.only(numbers)))
        for device, numbers in zip(machines.devices, machines.kinds, strict=True)
    )


@dataclass(frozen=True, kw_only=True)
class Team:
    """Kinds that work together, in the order of their ranks, and the cluster that they are."""

    kinds: tuple[Kind, ...]
    cluster: Cluster

    def send_s(self, nbytes: float, source: int, target: int) -> float:
        """Seconds of a message from rank to rank."""
        assert self.cluster.machines is not None
        return link_seconds("send_recv", nbytes, self.cluster.machines.crossing((source, target)))


@dataclass(frozen=True, kw_only=True)
class Uneven:
    """A layout on unlike devices.

    scheme: dp of all copies, the microbatches of the copy that has most; samples: of the largest microbatch. columns: the copies that do
    alike, for the simulator. places: for people, what each kind does; words: the same in short. lacks: what of it the runtime cannot run
    yet. bound_s: no such layout takes less.
    """

    scheme: Scheme
    samples: int
    columns: tuple[Column, ...] = field(repr=False)
    places: tuple[str, ...]
    words: str
    lacks: tuple[str, ...]
    bound_s: float
    estimate_s: float
    memory_bytes: int

    def simulated(self) -> Simulation:
        """A step."""
        return simulate_columns(self.columns, self.scheme.mesh)


@dataclass(frozen=True, kw_only=True)
class _Ranges:
    """Of each run of units: seconds of a microbatch both ways (infinite where it has none) and of what ends a step, bytes held, bytes kept
    by a microbatch."""

    seconds: Table
    ends: Table
    held: Table
    saved: Table

    def within(self, limit_bytes: float, flying: int, microbatches: int) -> Table:
        """Seconds of a microbatch, with its part of the step's end, where it fits beside so many in flight; else infinite."""
        return np.where(self.held + flying * self.saved <= limit_bytes, self.seconds + self.ends / microbatches, np.inf)


@dataclass(frozen=True, kw_only=True)
class _Try:
    """A layout to build. bound_s: no cut of it takes less. sizes: samples of a microbatch on each of the team's kinds.

    lockstep: every copy has equally many microbatches, as ZeRO-3's gathers want it.
    """

    team: Team
    scheme: Scheme
    sizes: tuple[int, ...]
    bound_s: float
    stages: bool
    lockstep: bool = False


@dataclass(kw_only=True)
class UnevenSearch:
    """pieces: (ranks of tp, samples of a microbatch) → the model's outline and what its pieces cost on each of `kinds`, in their order.

    precision: the pieces'. largest: samples of a microbatch, at most. only_runnable: leaves out what the runtime cannot run yet.
    """

    cluster: Cluster
    kinds: tuple[Kind, ...]
    pieces: Callable[[int, int], tuple[Outline, Sequence[Costs]]]
    global_batch: int
    largest: int
    precision: Precision = "bf16"
    only_runnable: bool = False
    known: dict[tuple[object, ...], _Ranges] = field(default_factory=dict)

    def search(self) -> list[Uneven]:
        """Layouts that fit on two kinds or more, best estimates first."""
        single = self._best(self._tries((1,), _TENSOR))
        sizes = tuple(each.scheme.tp for each in sorted(single, key=lambda each: each.estimate_s)[:1])
        larger = self._best(self._tries((1, *(size for size in _LARGER if size <= self.largest)), sizes))
        return sorted([*single, *larger], key=lambda each: each.estimate_s)

    def _best(self, tries: Iterator[_Try]) -> list[Uneven]:
        """Those that may be among the best few, in the order of their bounds."""
        found: list[Uneven] = []
        for each in sorted(tries, key=lambda each: each.bound_s):
            if len(found) >= _KEPT and each.bound_s > sorted(every.estimate_s for every in found)[_KEPT - 1]:
                break
            made = self._staged(each) if each.stages else self._copied(each)
            found += [made] if made else []
        return found

    # -- what there is to try --------------------------------------------------------------------------------------------------------------

    @cached_property
    def teams(self) -> list[Team]:
        """Two kinds or more, in every order that the machines allow."""
        machines = self.cluster.machines
        assert machines is not None
        free = len(self.kinds) <= _ORDERED and len(machines.groups[0].outside) <= 1
        few = range(2, len(self.kinds) + 1) if len(self.kinds) <= _ORDERED else (len(self.kinds),)
        orders = [
            order for size in few for chosen in combinations(self.kinds, size) for order in (permutations(chosen) if free else [chosen])
        ]
        return [
            Team(kinds=order, cluster=cluster_of(machines.only([number for kind in order for number in kind.numbers]))) for order in orders
        ]

    def _tries(self, samples: Sequence[int], tensor: Sequence[int]) -> Iterator[_Try]:
        for team in self.teams:
            for tp in (size for size in tensor if all(kind.holds(size) for kind in team.kinds)):
                blocks = sum(piece.count for piece in self.pieces(tp, 1)[0].pieces)
                common = gcd(*(kind.ranks // tp for kind in team.kinds))
                for each in (size for size in range(1, common + 1) if common % size == 0):
                    yield from self._stage_tries(team, tp, each, samples[1:] or samples, blocks)
                    if team.kinds == tuple(sorted(team.kinds, key=self.kinds.index)) and each <= blocks:
                        yield from self._copy_tries(team, tp, each, samples)

    def _stage_tries(self, team: Team, tp: int, dp: int, samples: Sequence[int], blocks: int) -> Iterator[_Try]:
        pp = sum(kind.ranks // (dp * tp) for kind in team.kinds)
        for size in (size for size in samples if self.global_batch % (dp * size) == 0 and pp <= blocks):
            for zero, recompute in self._ways((0,) if dp == 1 else (0, 1)):
                count = self.global_batch // dp // size
                scheme = Scheme(dp=dp, tp=tp, pp=pp, microbatches=count, zero=zero, recompute=recompute, precision=self.precision)
                yield from self._worth(team, scheme, (size,) * len(team.kinds), stages=True)

    def _copy_tries(self, team: Team, tp: int, pp: int, samples: Sequence[int]) -> Iterator[_Try]:
        copies = [kind.ranks // (tp * pp) for kind in team.kinds]
        for zero, recompute in self._ways((0, 1, 3) if pp == 1 else (0, 1)):
            for sizes in (each for each in product(samples, repeat=len(team.kinds)) if len(samples) == 1 or max(each) > samples[0]):
                together = sum(number * size for number, size in zip(copies, sizes, strict=True))
                alike = len(set(sizes)) == 1
                scheme = Scheme(dp=sum(copies), tp=tp, pp=pp, zero=zero, recompute=recompute, precision=self.precision)
                if alike and zero < 3 and not self.only_runnable and self.global_batch % sizes[0] == 0 and together <= self.global_batch:
                    yield from self._worth(team, scheme, sizes, stages=False)
                elif self.global_batch % together == 0 and not (self.only_runnable and pp > 1):
                    scheme = replace(scheme, microbatches=self.global_batch // together)
                    yield from self._worth(team, scheme, sizes, stages=False, lockstep=True)

    def _ways(self, zeros: Sequence[int]) -> Iterator[tuple[int, str]]:
        yield from product(zeros, ("none", "full"))

    def _worth(self, team: Team, scheme: Scheme, sizes: tuple[int, ...], *, stages: bool, lockstep: bool = False) -> Iterator[_Try]:
        """With its bound: all devices at work all the time; none where the states alone do not fit."""
        wholes = [self._whole(team, kind, scheme, size, stages=stages) for kind, size in zip(team.kinds, sizes, strict=True)]
        held = [sum(whole.memory[state] for state in _STATES) for whole in wholes]
        roomy = [kind.limit_bytes - whole.memory["runtime"] for kind, whole in zip(team.kinds, wholes, strict=True)]
        ranks = [kind.ranks // (scheme.dp * scheme.tp) if stages else scheme.pp for kind in team.kinds]
        room = [each * number for each, number in zip(roomy, ranks, strict=True)]
        if min(held) > sum(room) if stages else any(need > have for need, have in zip(held, room, strict=True)):
            return
        rates = [kind.ranks / scheme.tp * size / _both_ways(whole) for kind, whole, size in zip(team.kinds, wholes, sizes, strict=True)]
        yield _Try(team=team, scheme=scheme, sizes=sizes, bound_s=self.global_batch / sum(rates), stages=stages, lockstep=lockstep)

    # -- what a stage takes ----------------------------------------------------------------------------------------------------------------

    def _costs(self, kind: Kind, tp: int, samples: int) -> tuple[Outline, Costs]:
        shape, costs = self.pieces(tp, samples)
        return shape, costs[self.kinds.index(kind)]

    def _profile(self, team: Team, kind: Kind, scheme: Scheme, samples: int, parts: Parts, *, stages: bool) -> StageProfile:
        """A stage on the kind: with its data ranks inside it, or one in each copy."""
        shape, costs = self._costs(kind, scheme.tp, samples)
        if stages:
            return stage_profile(shape, costs, parts, scheme, kind.alone)
        return stage_profile(shape, costs, parts, scheme, kind.alone, between=team.cluster, apart=scheme.tp * scheme.pp)

    def _units(self, tp: int) -> list[int]:
        """The piece that each unit is of: blocks one by one."""
        return [index for index, piece in enumerate(self.pieces(tp, 1)[0].pieces) for _ in range(piece.count)]

    def _whole(self, team: Team, kind: Kind, scheme: Scheme, samples: int, *, stages: bool) -> StageProfile:
        return self._profile(team, kind, scheme, samples, _counted(self._units(scheme.tp)), stages=stages)

    def _ranges(self, team: Team, kind: Kind, scheme: Scheme, samples: int, *, stages: bool) -> _Ranges:
        key = (
            kind.name,
            samples,
            replace(scheme, microbatches=min(scheme.microbatches, 2)),
            stages,
            () if stages else tuple(each.name for each in team.kinds),
        )
        if key not in self.known:
            units = self._units(scheme.tp)
            self.known[key] = _every_range(units, lambda parts: self._profile(team, kind, scheme, samples, parts, stages=stages))
        return self.known[key]

    # -- unlike stages ---------------------------------------------------------------------------------------------------------------------

    def _staged(self, each: _Try) -> Uneven | None:
        team, scheme, size = each.team, each.scheme, each.sizes[0]
        width = scheme.dp * scheme.tp
        seats = [kind for kind in team.kinds for _ in range(kind.ranks // width)]
        flying = [min(scheme.pp - stage, scheme.microbatches) for stage in range(scheme.pp)]
        units = self._units(scheme.tp)
        tables = [
            self._ranges(team, kind, scheme, size, stages=True).within(kind.limit_bytes, many, scheme.microbatches)
            for kind, many in zip(seats, flying, strict=True)
        ]
        cuts = cut_unlike(tables, scheme.microbatches)
        if cuts is None:
            return None
        parts = _parted(units, cuts)
        made = [self._profile(team, kind, scheme, size, part, stages=True) for kind, part in zip(seats, parts, strict=True)]
        edges = [self._edge(team, seats, scheme, size, parts[stage][-1][0], stage, first=stage * width) for stage in range(scheme.pp - 1)]
        column = Column(profile=Profile(stages=made, edges=edges, cores=None), copies=scheme.dp, microbatches=scheme.microbatches)
        start_s, each_s = _pace(column.profile)
        memory = [_peak(stage, many) for stage, many in zip(made, flying, strict=True)]
        blocks = [self._blocks(scheme.tp, part) for part in parts]
        return Uneven(
            scheme=scheme,
            samples=size,
            columns=(column,),
            places=(*_stage_places(seats, blocks, memory, width), *self.left_out(team.kinds)),
            words="stages=" + "|".join(f"{kind.name}:{'+'.join(_own(kind, seats, blocks))}" for kind in team.kinds),
            lacks=tuple(lacking(scheme)),
            bound_s=each.bound_s,
            estimate_s=start_s + scheme.microbatches * each_s + max(map(_end_s, made)),
            memory_bytes=max(memory),
        )

    def _edge(self, team: Team, seats: Sequence[Kind], scheme: Scheme, samples: int, piece: int, stage: int, *, first: int) -> EdgeProfile:
        """What a stage that ends with the piece sends on. first: its first rank; the others send beside it, maybe over other links."""
        width = scheme.dp * scheme.tp if stage + 1 < len(seats) else 0
        nbytes = self._costs(seats[stage], scheme.tp, samples)[1][piece].sent

        def send(message: float) -> float:
            return max(team.send_s(message, first + place, first + place + width) for place in {0, max(0, width - 1)})

        seconds = max(hop_seconds(nbytes, scheme.tp, kind.alone, send) for kind in seats[stage : stage + 2])
        return _edge_profile(stage, nbytes, seconds)

    # -- unlike copies ---------------------------------------------------------------------------------------------------------------------

    def _copied(self, each: _Try) -> Uneven | None:
        team, scheme = each.team, each.scheme
        ends = self._common_cut(each)
        if ends is None:
            return None
        profiles = self._copies(each, _parted(self._units(scheme.tp), ends))
        numbers = [kind.ranks // (scheme.tp * scheme.pp) for kind in team.kinds]
        paces = [_pace(profile) for profile in profiles]
        if each.lockstep:
            counts = [[scheme.microbatches] * number for number in numbers]
        else:
            starts = [start_s for (start_s, _), number in zip(paces, numbers, strict=True) for _ in range(number)]
            steps = [each_s for (_, each_s), number in zip(paces, numbers, strict=True) for _ in range(number)]
            shares = iter(batch_shares(starts, steps, self.global_batch // each.sizes[0]))
            counts = [sorted((next(shares) for _ in range(number)), reverse=True) for number in numbers]
        columns = [
            Column(profile=profile, copies=count.count(number), microbatches=number)
            for profile, count in zip(profiles, counts, strict=True)
            for number in dict.fromkeys(count)
        ]
        memory = [
            [_peak(stage, min(scheme.pp - number, count[0])) for number, stage in enumerate(profile.stages)]
            for profile, count in zip(profiles, counts, strict=True)
        ]
        ends_s = max(_end_s(stage) for profile in profiles for stage in profile.stages)
        times = [start_s + count[0] * each_s for (start_s, each_s), count in zip(paces, counts, strict=True)]
        return Uneven(
            scheme=replace(scheme, microbatches=max(count[0] for count in counts)),
            samples=max(each.sizes),
            columns=tuple(columns),
            places=tuple(self._copy_places(each, counts, memory)),
            words="copies=" + "|".join(f"{kind.name}:{_said(c, s)}" for kind, c, s in zip(team.kinds, counts, each.sizes, strict=True)),
            lacks=tuple(_copies_lack(each)),
            bound_s=each.bound_s,
            estimate_s=max(times) + ends_s,
            memory_bytes=max(map(max, memory)),
        )

    def _common_cut(self, each: _Try) -> list[int] | None:
        """Where every copy is cut, so that a stage has the same gradients in all: by the slowest stage, counted in its kind's own time."""
        team, scheme = each.team, each.scheme
        count = max(1, self.global_batch // (scheme.dp * max(each.sizes)))
        ranges = [self._ranges(team, kind, scheme, size, stages=False) for kind, size in zip(team.kinds, each.sizes, strict=True)]
        tables = []
        for stage in range(scheme.pp):
            fits = [own.within(kind.limit_bytes, scheme.pp - stage, count) for kind, own in zip(team.kinds, ranges, strict=True)]
            tables.append(np.max([table / own.seconds[0, -1] for table, own in zip(fits, ranges, strict=True)], axis=0))
        return cut_unlike(tables, count)

    def _copies(self, each: _Try, parts: Sequence[Parts]) -> list[Profile]:
        """Of a copy on each kind; reductions take all of them what they take the slowest."""
        team, scheme = each.team, each.scheme
        made = [
            [self._profile(team, kind, scheme, size, part, stages=False) for part in parts]
            for kind, size in zip(team.kinds, each.sizes, strict=True)
        ]
        reduce_s = [max(stage.seconds["reduce"][1] for stage in column) for column in zip(*made, strict=True)]
        first, profiles = 0, []
        for kind, size, stages in zip(team.kinds, each.sizes, made, strict=True):
            seats = [kind] * scheme.pp
            inner = replace(scheme, dp=1)
            edges = [
                self._edge(team, seats, inner, size, parts[stage][-1][0], stage, first=first + stage * scheme.tp)
                for stage in range(scheme.pp - 1)
            ]
            joined = [_joined(stage, seconds) for stage, seconds in zip(stages, reduce_s, strict=True)]
            profiles.append(Profile(stages=joined, edges=edges, cores=None))
            first += kind.ranks
        return profiles

    def _copy_places(self, each: _Try, counts: Sequence[Sequence[int]], memory: Sequence[Sequence[int]]) -> Iterator[str]:
        for kind, count, size, use in zip(each.team.kinds, counts, each.sizes, memory, strict=True):
            part = sum(count) * size / self.global_batch
            of = f" of {kind.ranks // len(count)} devices" if kind.ranks > len(count) else ""
            many = "copy" if len(count) == 1 else "copies"
            yield (
                f"{kind.ranks} × {kind.name}: {len(count)} {many}{of}, each {_said(count, size)} (microbatches×samples), "
                f"{100 * part:.0f} % of the batch, {max(use) / 1e9:.3g} GB"
            )
        yield from self.left_out(each.team.kinds)

    # -- words -----------------------------------------------------------------------------------------------------------------------------

    def _blocks(self, tp: int, parts: Parts) -> int:
        """Of the model's repeated blocks, how many."""
        pieces = self.pieces(tp, 1)[0].pieces
        return sum(count for index, count in parts if pieces[index].count > 1)

    def left_out(self, kinds: Sequence[Kind]) -> list[str]:
        """A line for each kind that is not among these."""
        return [f"{kind.ranks} × {kind.name}: not used" for kind in self.kinds if kind not in kinds]


def _counted(units: Sequence[int]) -> Parts:
    found: dict[int, int] = {}
    for index in units:
        found[index] = found.get(index, 0) + 1
    return tuple(found.items())


def _parted(units: Sequence[int], ends: Sequence[int]) -> list[Parts]:
    return [_counted(units[start:end]) for start, end in zip([0, *ends], ends, strict=False)]


def _every_range(units: Sequence[int], profile: Callable[[Parts], StageProfile]) -> _Ranges:
    """Runs of equally many of each piece take the same, and are looked at once."""
    size = len(units) + 1
    tables = np.full((4, size, size), np.inf)
    known: dict[Parts, tuple[float, float, int, int]] = {}
    for start in range(size - 1):
        counts: dict[int, int] = {}
        for end in range(start + 1, size):
            index = units[end - 1]
            counts[index] = counts.get(index, 0) + 1
            parts = tuple(counts.items())
            if parts not in known:
                stage = profile(parts)
                known[parts] = _both_ways(stage), _end_s(stage), sum(stage.memory.values()), stage.saved_bytes
            tables[:, start, end] = known[parts]
    seconds, ends, held, saved = tables
    return _Ranges(seconds=seconds, ends=ends, held=held, saved=saved)


def _both_ways(stage: StageProfile) -> float:
    return sum(stage.seconds["forward"]) + sum(stage.seconds["backward"])


def _peak(stage: StageProfile, flying: int) -> int:
    return sum(stage.memory.values()) + flying * stage.saved_bytes


def _end_s(stage: StageProfile) -> float:
    return sum(stage.seconds["reduce"]) + sum(stage.seconds["update"])


def _pace(profile: Profile) -> tuple[float, float]:
    """(fill and drain of the pipeline, seconds of each microbatch), as 1F1B goes.

    A stage has one microbatch more in flight than the next one, so that n stages in a row let n of them on their way to the end of the row
    and back at a time: that way, messages included, divided by n, is what a microbatch takes at least.
    """
    works = [_both_ways(stage) for stage in profile.stages]
    hops = [2 * edge.transfer_s for edge in profile.edges]
    ways = [
        (sum(works[first:last]) + sum(hops[first : last - 1])) / (last - first)
        for first in range(len(works))
        for last in range(first + 1, len(works) + 1)
    ]
    return sum(works) + sum(hops) - max(ways), max(ways)


def _edge_profile(stage: int, nbytes: int, seconds: float) -> EdgeProfile:
    return EdgeProfile(name=f"h→{stage + 1}", source=stage, target=stage + 1, nbytes=nbytes, transfer_s=seconds, requires_grad=True)


def _joined(stage: StageProfile, reduce_s: float) -> StageProfile:
    """The stage with a reduction that waits for all copies."""
    seconds: Mapping[str, tuple[float, float]] = stage.seconds | {"reduce": (0.0, reduce_s)}
    return stage.model_copy(update={"seconds": seconds, "reduces": ["dp"]})


def _copies_lack(each: _Try) -> Iterator[str]:
    """What of unlike copies does not run yet."""
    yield from lacking(each.scheme)
    if not each.lockstep:
        yield "copies with unequally many microbatches"
    if each.scheme.pp > 1:
        yield "copies of several stages, each on a kind of its own"


def _own(kind: Kind, seats: Sequence[Kind], blocks: Sequence[int]) -> list[str]:
    return [str(number) for seat, number in zip(seats, blocks, strict=True) if seat == kind]


def _said(counts: Sequence[int], samples: int) -> str:
    """`6×1`, or `6/5×1` where copies of a kind differ."""
    return "/".join(map(str, dict.fromkeys(counts))) + f"×{samples}"


def _stage_places(seats: Sequence[Kind], blocks: Sequence[int], memory: Sequence[int], width: int) -> Iterator[str]:
    for kind in dict.fromkeys(seats):
        own = [stage for stage, seat in enumerate(seats) if seat == kind]
        which = f"stage {own[0] + 1}" if len(own) == 1 else f"stages {own[0] + 1} to {own[-1] + 1}"
        each = ", ".join(str(blocks[stage]) for stage in own)
        yield (
            f"{kind.ranks} × {kind.name}: {which} of {len(seats)}, {each} of {sum(blocks)} blocks, on {width} devices a stage, "
            f"{max(memory[stage] for stage in own) / 1e9:.3g} GB"
        )


# -- beside layouts of equal parts ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Placed(Found):
    """A layout on unlike devices. places: who does what, a line for each kind; words: the same in short; lacking: as `lacks`."""

    places: tuple[str, ...]
    words: str
    lacking: tuple[str, ...] = ()

    @property
    def lacks(self) -> list[str]:
        """What of it the runtime cannot run yet."""
        return list(self.lacking)

    def __str__(self) -> str:
        return f"{super().__str__()},{self.words}"


def search_unlike(search: ScaleSearch, equal: Searched) -> list[Found]:
    """Layouts of a cluster of unlike devices: uneven ones, those of each kind alone, and equal parts for all, which go at the pace of the
    slowest and fit the smallest. Fastest first: the best few uneven ones are simulated, the others estimated.

    equal: what `search` found. Its pins hold for equal parts alone; it should have none.
    """
    kinds = kinds_of(search.cluster)
    known: dict[tuple[int, int], tuple[Outline, Sequence[Costs]]] = {}

    def pieces(tp: int, samples: int) -> tuple[Outline, Sequence[Costs]]:
        if (tp, samples) not in known:
            parts = search.largest // samples
            clusters = [kind.alone for kind in kinds]
            known[tp, samples] = search.twin.split_on(TwinLayout(tp=tp), clusters, parts, best_on=search.cluster)
        return known[tp, samples]

    uneven = UnevenSearch(
        cluster=search.cluster,
        kinds=kinds,
        pieces=pieces,
        global_batch=search.global_batch,
        largest=search.largest,
        precision=search.precision,
        only_runnable=search.only_runnable,
    )
    together = uneven.search()
    found: list[Found] = [*map(_with_step, together[:_SIMULATED]), *map(_placed, together[_SIMULATED:])]
    slowest = min(kinds, key=lambda kind: kind.alone.rates.matmul_of("bfloat16").cubes_flops.values[-1])
    pace = f"{search.cluster.ranks} devices with equal parts, at the pace of {slowest.name}"
    found += [_equal(each, (pace,), "equal") for each in equal.found]
    for kind in kinds:
        alone = replace(search, cluster=kind.alone).search().found
        found += [_equal(each, (f"{kind.ranks} × {kind.name}: all of it", *uneven.left_out([kind])), f"only={kind.name}") for each in alone]
    return sorted(found, key=lambda each: (each.step_time_s is None, each.seconds))


def _placed(each: Uneven) -> Placed:
    return Placed(
        scheme=each.scheme,
        samples=each.samples,
        bound_s=each.bound_s,
        estimate_s=each.estimate_s,
        memory_bytes=each.memory_bytes,
        places=each.places,
        words=each.words,
        lacking=each.lacks,
    )


def _with_step(each: Uneven) -> Placed:
    step = each.simulated()
    fullest = max(step.memory, key=lambda use: sum(use.values()))
    return replace(_placed(each), step_time_s=step.step_time_s, bubble=step.bubble, memory=fullest, memory_bytes=sum(fullest.values()))


def _equal(each: Found, places: tuple[str, ...], words: str) -> Placed:
    figures = {name.name: getattr(each, name.name) for name in fields(Found)}
    return Placed(**figures, places=places, words=words, lacking=tuple(each.lacks))
