"""The best layout on a cluster of many devices, from a shallow twin of the model: branch and bound.

    splits, the most promising first ──lower──▶ pieces ──every scheme's bound──▶ stages ──their bound──▶ simulator ──▶ best, gap

    a split     tp × cp × ep, the samples of a microbatch, and a precision: about half a second to lower
    a scheme    of a split: its stages are put together of the same pieces in a millisecond
    a step      simulated, in a tenth of a second and more

What cannot take less than the best step found is left out (`shardwise.planner.bounds`). The search ends when nothing is left, when it has
done so much work, or when its time is over; the smallest bound of what was not looked at says how far from the best the found one can be.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from heapq import heapify, heappop, heappush
from math import log

from shardwise.capture.precision import Precision
from shardwise.cluster.model import Cluster
from shardwise.cost.collectives import collective_cost
from shardwise.cost.routing import Routing
from shardwise.errors import LayoutError
from shardwise.planner.bounds import SchemeBound, least_memory, memory_bound, perfect, profile_bound
from shardwise.planner.compose import CONTEXT_BYTES, Scheme, compose, recomputed
from shardwise.planner.estimate import waiting_share
from shardwise.planner.estimator import FULL_MEMORY
from shardwise.planner.lacking import lacking
from shardwise.planner.pieces import Outline, PieceCost, Work
from shardwise.planner.space import Pins, Space, Split, layout_text
from shardwise.planner.twins import Twin, TwinLayout
from shardwise.program.tables import splits_backward
from shardwise.simulate.profile import Profile
from shardwise.simulate.simulator import Simulation, peak_memory, simulate_profile

__all__ = ["Found", "Parts", "ScaleSearch", "Searched"]

_LOWERED, _COMPOSED, _SIMULATED = 5, 60, 16  # splits, schemes of each and steps, where no time is given
_SLOTS = 40_000  # computations of all simulated steps together, where no time is given
_COMPARED = 4  # steps at least, of other sizes than the best, that are simulated to say what it gains
_AHEAD, _AT_ONCE = 30, 1  # schemes put together before the best few of them are simulated, to have something to compare with
_HOPELESS = 1.02  # times the best: an estimate is not further off than that
_ALIKE = 0.005  # of a step: estimates that promise about as much
_USUAL_TP = 8
_SEEN = 0.5  # of what goes round in attention: the rest is expected to be hidden by its products


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Where a step's time goes: seconds of a pipeline rank, on average; their sum is the step.

    compute: forward and backward passes; recompute: what the backward passes compute again; exchange: communication within them, among tp,
    cp and ep ranks and ZeRO's gathers; reduce: of gradients, as far as nothing hides it; update: of parameters; waiting: for other ranks.
    """

    compute: float
    recompute: float
    exchange: float
    reduce: float
    update: float
    waiting: float

    @property
    def communicate(self) -> float:
        """Exposed communication."""
        return self.exchange + self.reduce


@dataclass(frozen=True, kw_only=True)
class Found:
    """A layout and what it takes. samples: of a microbatch on a data rank; bound_s: its step takes at least that.

    memory_bytes: of the fullest rank; a lower bound until the step is simulated, as memory by kind, parts and bubble are known only then.
    """

    scheme: Scheme
    samples: int
    bound_s: float
    estimate_s: float
    memory_bytes: int
    step_time_s: float | None = None
    bubble: float | None = None
    memory: dict[str, int] = field(default_factory=dict)
    parts: Parts | None = None

    @property
    def seconds(self) -> float:
        """Simulated where it was, else estimated."""
        return self.step_time_s if self.step_time_s is not None else self.estimate_s

    @property
    def lacks(self) -> list[str]:
        """What of it the runtime cannot run yet."""
        return lacking(self.scheme)

    @property
    def runs(self) -> bool:
        """Whether the runtime can run it yet."""
        return not self.lacks

    @property
    def split(self) -> Split:
        """What its pieces were lowered for."""
        return Split.of(self.scheme, self.samples)

    def __str__(self) -> str:
        return layout_text(self.scheme, self.samples)


@dataclass(kw_only=True)
class Searched:
    """What a search found. found: layouts that fit, simulated, fastest first; lower_s: nothing that was left out takes less.

    splits, lowered: how many there are and how many were lowered; composed, simulated: schemes; tight: the fastest bound among layouts
    that do not fit, None where all do. considered: every layout that was put together, by its scheme and samples.
    """

    found: list[Found] = field(default_factory=list)
    lower_s: float = float("inf")
    splits: int = 0
    lowered: int = 0
    composed: int = 0
    simulated: int = 0
    slots: int = 0
    seconds: float = 0.0
    tight: Found | None = None
    considered: dict[tuple[Scheme, int], Found] = field(default_factory=dict)

    @property
    def best_s(self) -> float:
        """The fastest step; infinite where none was found."""
        return self.found[0].seconds if self.found else float("inf")

    @property
    def gap(self) -> float:
        """By what share of its time the best found may be slower than the best there is; 0 where it is proven to be the best."""
        return max(0.0, 1 - self.lower_s / self.best_s) if self.found else 0.0

    def left(self, bound_s: float) -> None:
        """Something is left out that takes at least so long."""
        self.lower_s = min(self.lower_s, bound_s)


@dataclass(kw_only=True)
class ScaleSearch:
    """twin: of the model in a precision, whose batch is the largest microbatch that is tried; searches that share one share what was
    lowered. others: of the same model and batch in other precisions, which are searched, too.

    global_batch: samples of a step; only_runnable: leaves out what the runtime cannot run yet; routing: how tokens get to experts.
    budget_s: how long to search; without it, as long as a fixed amount of work takes.
    """

    twin: Twin
    cluster: Cluster
    global_batch: int
    pins: Pins = field(default_factory=Pins)
    only_runnable: bool = False
    routing: Routing | None = None
    budget_s: float | None = None
    precision: Precision = "bf16"
    others: Mapping[Precision, Twin] = field(default_factory=dict)

    def search(self) -> Searched:
        """The layouts that fit, fastest first. Raises LayoutError where pins contradict each other."""
        self.space.check()
        return _Branching(search=self).run()

    @cached_property
    def space(self) -> Space:
        """What is searched."""
        levels = self.cluster.machines.levels if self.cluster.machines else ()
        return Space(
            ranks=self.cluster.ranks,
            near=levels[0].ranks if levels else self.cluster.ranks,
            blocks=sum(self.twin.counts),
            global_batch=self.global_batch,
            most_samples=self.largest,
            routing=self.routing,
            sequences=bool(self.twin.analysis.sequence_dims),
            shares=self.twin.shares,
            precisions=(self.precision, *self.others),
            pins=self.pins,
            runnable=self.only_runnable,
        )

    @property
    def largest(self) -> int:
        """Samples of the largest microbatch."""
        return self.twin.graph.global_batch

    @property
    def limit_bytes(self) -> float:
        """What a rank may hold."""
        return self.cluster.memory_bytes * FULL_MEMORY

    def pieces(self, split: Split) -> tuple[Outline, tuple[PieceCost, ...]]:
        """The pieces' costs in a split. Raises LayoutError where the model cannot be split so."""
        layout = TwinLayout(tp=split.tp, cp=split.cp, attention=split.attention, whole_experts=split.ep > 1)
        return self.twin_in(split.precision).over(split.ep).split(layout, self.cluster, self.largest // split.samples)

    def twin_in(self, precision: Precision) -> Twin:
        """The one of those that are searched."""
        return self.twin if precision == self.precision else self.others[precision]

    def perfect(self, split: Split) -> tuple[Outline, tuple[PieceCost, ...]]:
        """The pieces of a split as if all of the whole model's work and memory were divided evenly.

        Nothing is lowered for it but the whole model, with as few experts as a rank may have: as many rows take the least time so.
        """
        most = self.largest
        shape, whole = self.pieces(self.undivided(split.precision))
        return shape, perfect([_with_experts(cost, self.most_ep / split.ep) for cost in whole], most, split)

    def undivided(self, precision: Precision) -> Split:
        """The largest microbatch on one rank, with as few experts as a rank may have."""
        return Split(samples=self.largest, ep=self.most_ep, precision=precision)

    @cached_property
    def most_ep(self) -> int:
        """Over how many ranks experts are divided at most."""
        return max(split.ep for split in self.space.splits())

    def may_fit(self, split: Split) -> bool:
        """Whether its leanest schemes would fit if all memory were divided evenly; nothing is lowered for it but the whole model."""
        if not self.has_room(split.precision):
            return False
        shape, costs = self.perfect(split)
        for mesh in self.space.meshes(split):
            schemes = list(self.space.schemes(split, mesh))
            usual = [each for each in schemes if each.schedule == "1f1b"] or schemes
            zeros = sorted({each.zero for each in usual})[-2:]
            for scheme in (each for each in usual if each.zero in zeros):
                with suppress(LayoutError):
                    if least_memory(shape, costs, scheme, self.cluster) <= self.limit_bytes:
                        return True
        return False

    def has_room(self, precision: Precision) -> bool:
        """Whether the devices would hold parameters, gradients and states if nothing else were there and nothing twice."""
        held = self.twin_in(precision).state_bytes(Scheme(precision=precision))
        return held <= self.cluster.ranks * (self.limit_bytes - CONTEXT_BYTES)

    def composed(self, scheme: Scheme, samples: int, pieces: tuple[Outline, tuple[PieceCost, ...]] | None = None) -> Profile:
        """What the layout's stages take. Raises LayoutError where there are more stages than parts. pieces: those that it is put
        together of, its split's where not given."""
        shape, costs = pieces or self.pieces(Split.of(scheme, samples))
        return compose(shape, costs, scheme, self.cluster, splits_backward=splits_backward(scheme.schedule))

    def bounded(self, scheme: Scheme, samples: int, pieces: tuple[Outline, tuple[PieceCost, ...]] | None = None) -> Found | None:
        """A scheme with its bounds; None where the model has too few parts for it. pieces: as of `composed`."""
        try:
            profile = self.composed(scheme, samples, pieces)
        except LayoutError:
            return None
        bound = profile_bound(profile, scheme)
        estimate = bound + _bubble(profile, scheme)
        return Found(scheme=scheme, samples=samples, bound_s=bound, estimate_s=estimate, memory_bytes=memory_bound(profile, scheme))

    def held(self, found: Found) -> Found:
        """With what the fullest rank holds; no step is simulated for it."""
        peaks = peak_memory(self.composed(found.scheme, found.samples), found.scheme.mesh)
        fullest = max(peaks, key=lambda use: sum(use.values()))
        return replace(found, memory_bytes=sum(fullest.values()), memory=fullest)

    def simulated(self, found: Found) -> Found:
        """With the simulator's figures."""
        profile = self.composed(found.scheme, found.samples)
        step = simulate_profile(profile, found.scheme.mesh, recorded=False)
        fullest = max(step.memory, key=lambda use: sum(use.values()))
        return replace(
            found,
            step_time_s=step.step_time_s,
            bubble=step.bubble,
            memory_bytes=sum(fullest.values()),
            memory=fullest,
            parts=self._parts(found, profile, step),
        )

    def flops(self) -> float:
        """Of products, convolutions and attention in a step, forward and backward."""
        shape, costs = self.pieces(Split(samples=self.largest, precision=self.precision))
        each = sum(cost.flops * piece.count for piece, cost in zip(shape.pieces, costs, strict=True))
        return self.global_batch / self.largest * each

    def _parts(self, found: Found, profile: Profile, step: Simulation) -> Parts:
        scheme = found.scheme
        shape, costs = self.pieces(found.split)
        again = [recomputed(cost, scheme.recompute if piece.count > 1 else "none") for piece, cost in zip(shape.pieces, costs, strict=True)]
        times = scheme.microbatches / scheme.pp

        def once(kinds: Sequence[str], which: int) -> float:
            return sum(stage.seconds.get(kind, (0.0, 0.0))[which] for stage in profile.stages for kind in kinds)

        passes = ("forward", "backward", "weight")
        compute, exchange = (once(passes, which) * times + once(["prelude"], which) / scheme.pp for which in (0, 1))
        repeated = [
            sum(getattr(work, kind) * piece.count for work, piece in zip(again, shape.pieces, strict=True)) * times
            for kind in ("compute_s", "communicate_s")
        ]
        reduce, update = sum(once(["reduce"], which) for which in (0, 1)), sum(once(["update"], which) for which in (0, 1))
        known = compute + exchange + (reduce + update) / scheme.pp
        return Parts(
            compute=compute - repeated[0],
            recompute=sum(repeated),
            exchange=exchange - repeated[1],
            reduce=reduce / scheme.pp,
            update=update / scheme.pp,
            waiting=max(0.0, step.step_time_s - known),
        )


def _with_experts(cost: PieceCost, times: float) -> PieceCost:
    """A piece that holds so many times as many experts."""
    experts = round(cost.experts * times)
    return replace(cost, experts=experts, parameters=cost.parameters - cost.experts + experts)


def _bubble(profile: Profile, scheme: Scheme) -> float:
    """What a schedule that splits the backward pass is expected to wait beyond its bound (Qi et al. 2023, table 2; 2024, table 1)."""
    if not splits_backward(scheme.schedule) or scheme.pp == 1:
        return 0.0
    forward, backward, weight = (
        sum(sum(stage.seconds[kind]) for stage in profile.stages) / scheme.pp for kind in ("forward", "backward", "weight")
    )
    last = {"zb-h1": forward + backward - weight, "zb-2p": forward + backward - 2 * weight, "zb-v": forward + backward - 2 * weight}
    return (scheme.pp - 1) * max(0.0, last[scheme.schedule]) * 0.5


@dataclass(frozen=True, kw_only=True)
class _Guess:
    """A split that was not lowered. bound_s: no scheme of it takes less; pieces: as they are expected to be; meshes: (dp, pp) and
    seconds that a step is expected to take on each where memory does not bind, the fastest first."""

    split: Split
    bound_s: float
    pieces: tuple[Outline, tuple[PieceCost, ...]]
    meshes: list[tuple[float, tuple[int, int]]]

    @property
    def expected_s(self) -> float:
        """At best."""
        return self.meshes[0][0]


@dataclass(kw_only=True)
class _Branching:
    """One search. result: so far; end_s: when its time is over; open: schemes that were put together and may be the best."""

    search: ScaleSearch
    result: Searched = field(default_factory=Searched)
    end_s: float = float("inf")
    open: list[Found] = field(default_factory=list)

    def run(self) -> Searched:
        result, start_s = self.result, time.monotonic()
        if self.search.budget_s is not None:
            self.end_s = start_s + self.search.budget_s
        splits = list(self.search.space.splits())
        result.splits = len(splits)
        guesses = [guess for precision in self.search.space.precisions for guess in self._guesses_in(precision, splits)]
        waiting = [(guess.expected_s, False, number) for number, guess in enumerate(guesses)]
        heapify(waiting)
        while waiting:
            _, closely, number = heappop(waiting)
            guess = guesses[number]
            if guess.bound_s >= result.best_s:
                continue
            if self._spent():
                result.left(guess.bound_s)
            elif closely:
                self._examine(guess.split)
            elif (expected_s := self._expected(guess)) < float("inf") or self.search.may_fit(guess.split):
                heappush(waiting, (expected_s, True, number))
        for each in self._simulate(self.open, _AT_ONCE, finely=True):
            result.left(each.bound_s)
        self._compare()
        result.lower_s = min(result.lower_s, result.best_s)
        result.seconds = time.monotonic() - start_s
        return result

    # -- which splits ------------------------------------------------------------------------------------------------------------------

    def _guesses_in(self, precision: Precision, splits: Sequence[Split]) -> list[_Guess]:
        """What is expected of the splits of a precision; none where nothing can fit in it."""
        own = [each for each in splits if each.precision == precision]
        usual = sorted(own, key=lambda each: (each.tp <= _USUAL_TP, -each.samples, -each.cp, -each.ep, each.tp), reverse=True)
        fewest = min(each.samples for each in own)  # more samples take no less
        first = next((each for each in usual if each.samples == fewest and self.search.may_fit(each)), None)
        return [] if first is None else self._guesses(self._lowered(replace(first, ep=self.search.most_ep)), own)

    def _lowered(self, first: Split) -> Split:
        """A split with small kernels that can be lowered."""
        with suppress(LayoutError):
            self.search.pieces(first)
            return first
        return self.search.undivided(first.precision)

    def _guesses(self, first: Split, splits: Sequence[Split]) -> list[_Guess]:
        """What is expected of splits that are not lowered. first: one whose kernels are small, with as few experts as can be."""
        search = self.search
        _, whole = search.pieces(search.undivided(first.precision))
        slower = self._slower(first)
        sent_bytes = max(cost.sent for cost in whole) / search.largest
        found = []
        for split in splits:
            shape, costs = search.perfect(split)
            talk_s = _talk(search.cluster, split, sent_bytes * split.samples)
            likely = tuple(
                _likely(cost, slower(split), talk_s if piece.count > 1 else 0.0, self._expert_s * cost.experts)
                for piece, cost in zip(shape.pieces, costs, strict=True)
            )
            least, expected = (SchemeBound(shape=shape, costs=given, cluster=search.cluster) for given in (costs, likely))
            meshes = [(mesh, search.space.plain(split, *mesh)) for mesh in search.space.meshes(split)]
            promises = sorted((expected.seconds(plain) * (1 + (plain.pp - 1) / plain.microbatches / 3), mesh) for mesh, plain in meshes)
            bound_s = min(least.seconds(plain) for _, plain in meshes)
            found.append(_Guess(split=split, bound_s=bound_s, pieces=(shape, likely), meshes=promises))
        return found

    def _expected(self, guess: _Guess) -> float:
        """Seconds that the best scheme of a split is expected to take; infinite where none of the usual ones fits."""
        search, (shape, costs) = self.search, guess.pieces
        best_s = float("inf")
        bound = SchemeBound(shape=shape, costs=costs, cluster=search.cluster)
        for promise_s, mesh in guess.meshes:
            if promise_s >= best_s:
                break
            schemes = list(search.space.schemes(guess.split, mesh))
            most = max((each.chunks for each in schemes if each.schedule == "interleaved"), default=1)
            usual = [each for each in schemes if (each.schedule, each.chunks) in (("1f1b", 1), ("interleaved", most))] or schemes
            for promise_s, scheme in sorted(((bound.seconds(each) * _outlook(each), each) for each in usual), key=lambda each: each[0]):
                if promise_s >= best_s:
                    break
                if self._may_fit(shape, costs, scheme):
                    found = search.bounded(scheme, guess.split.samples, guess.pieces)
                    best_s = min(best_s, found.estimate_s if found else best_s)
        return best_s

    @cached_property
    def _expert_s(self) -> float:
        """Seconds that a microbatch takes longer for each number of experts that a rank holds, with as many rows: it reads them, adds up
        their gradients, and their products are thinner."""
        samples = self.search.largest
        all_of, fewest = (Split(samples=samples, ep=ep, precision=self.search.precision) for ep in (1, self.search.most_ep))
        more = _experts(*self.search.pieces(all_of)) - _experts(*self.search.pieces(fewest))
        return max(0.0, self._computing(all_of) - self._computing(fewest)) / more if more else 0.0

    def _slower(self, first: Split) -> Callable[[Split], float]:
        """How many times as long kernels take as their share of those of the largest microbatch on one rank, from three splits with as few
        experts as can be: reading weights and adding up their gradients take as long for one sample as for many, and each cut of kernels
        into parts makes them slower by as much. first: the one with small kernels."""
        most = replace(first, tp=1, cp=1, attention="gather", samples=self.search.largest)
        large, thin, small = (self._computing(split) for split in (most, replace(most, samples=first.samples), first))
        times = most.samples - first.samples
        beside = (thin * most.samples - large * first.samples) / times if times else 0.0
        beside = min(max(0.0, beside), 0.5 * large)
        parts = first.tp * first.cp
        cut = max(0.0, small * parts - thin) / (parts - 1) if parts > 1 else 0.0
        each, perfectly = (large - beside) / most.samples, large / most.samples
        return lambda split: (each + (beside + cut * (split.tp - 1)) * split.cp / split.samples) / perfectly

    def _computing(self, split: Split) -> float:
        shape, costs = self.search.pieces(split)
        works = [cost.forward + cost.backward_input + cost.backward_weight for cost in costs]
        return sum(work.compute_s * piece.count for work, piece in zip(works, shape.pieces, strict=True))

    def _spent(self) -> bool:
        """Whether the work or the time is used up; never before something was found, or everything was tried once."""
        result = self.result
        if self.search.budget_s is not None:
            return bool(result.found) and time.monotonic() > self.end_s
        lowered = _LOWERED * (1 if self.search.most_ep == 1 else 2)  # of models with experts there are as many times more
        lowered *= len(self.search.space.precisions)
        return bool(result.found) and (result.lowered >= lowered or result.simulated >= _SIMULATED or result.slots >= _SLOTS)

    # -- the schemes of one ------------------------------------------------------------------------------------------------------------

    def _examine(self, split: Split) -> None:
        """Puts schemes together, the most promising first, and simulates those that may be the best."""
        search, result = self.search, self.result
        try:
            shape, costs = search.pieces(split)
        except LayoutError:
            return
        result.lowered += 1
        least = SchemeBound(shape=shape, costs=costs, cluster=search.cluster)
        bounds = [(least.seconds(scheme), scheme) for scheme in search.space.schemes(split)]
        waiting: list[Found] = []
        composed, simulated = 0, result.simulated
        for bound, scheme in sorted(bounds, key=lambda each: each[0] * _outlook(each[1])):
            if bound >= result.best_s:
                continue
            if self._enough(composed, waiting) and (waiting or result.simulated > simulated or not self._may_fit(shape, costs, scheme)):
                result.left(bound)
                continue
            found = search.bounded(scheme, split.samples)
            composed += 1
            if found is not None and self._fits(found) and (composed <= _COMPOSED or self._fits(search.held(found))):
                waiting.append(found)
            if composed % _AHEAD == 0:
                waiting = self._simulate(waiting, _AT_ONCE)
        result.composed += composed
        self.open += self._simulate(waiting, _AT_ONCE if search.budget_s is None else len(waiting))

    def _enough(self, composed: int, waiting: Sequence[Found]) -> bool:
        """Whether so many schemes of a split, or so much time, are all that is spent on it."""
        if self.search.budget_s is None:
            return composed >= _COMPOSED
        return time.monotonic() > self.end_s and bool(waiting or self.result.found)

    def _may_fit(self, shape: Outline, costs: Sequence[PieceCost], scheme: Scheme) -> bool:
        with suppress(LayoutError):
            return least_memory(shape, costs, scheme, self.search.cluster) <= self.search.limit_bytes
        return False

    def _simulate(self, waiting: Sequence[Found], most: int, *, finely: bool = False) -> list[Found]:
        """Simulates the most promising of those that may be the best; the others that may. finely: by the estimate alone, else of those
        that promise about as much the ones first that are simulated soonest."""
        result = self.result
        ordered = sorted(waiting, key=lambda each: (each.estimate_s if finely else round(log(each.estimate_s) / _ALIKE), _slots(each)))
        for place, each in enumerate(ordered):
            if each.bound_s >= result.best_s:
                continue
            if (
                most == 0
                or (each.estimate_s >= result.best_s * _HOPELESS and self.search.budget_s is None)
                or (result.found and self._late())
            ):
                return [other for other in ordered[place:] if other.bound_s < result.best_s]
            if not self._fits(self.search.held(each)):
                continue
            self._play(each)
            most -= 1
        return []

    def _compare(self) -> None:
        """Simulates the most promising of other sizes until there are a few steps to compare the best with."""
        result, limit = self.result, self.search.limit_bytes
        others = [each for each in result.considered.values() if each.step_time_s is None and each.memory_bytes <= limit]
        seen = {(each.split, each.scheme.dp, each.scheme.pp) for each in result.found}
        for each in sorted(others, key=lambda other: other.estimate_s):
            sizes = each.split, each.scheme.dp, each.scheme.pp
            if not result.found or len(result.found) >= _COMPARED or self._late():
                return
            if sizes not in seen and self._fits(self.search.held(each)):
                seen.add(sizes)
                self._play(each)

    def _play(self, each: Found) -> None:
        result, step = self.result, self.search.simulated(each)
        result.simulated += 1
        result.slots += _slots(each)
        result.considered[step.scheme, step.samples] = step
        result.found = sorted([*result.found, step], key=lambda found: found.seconds)

    def _late(self) -> bool:
        return time.monotonic() > self.end_s

    def _fits(self, found: Found) -> bool:
        self.result.considered[found.scheme, found.samples] = found
        if found.memory_bytes <= self.search.limit_bytes:
            return True
        if self.result.tight is None or found.estimate_s < self.result.tight.estimate_s:
            self.result.tight = found
        return False


def _experts(shape: Outline, costs: Sequence[PieceCost]) -> int:
    """Numbers of all experts that a rank would hold of the whole model."""
    return sum(cost.experts * piece.count for cost, piece in zip(costs, shape.pieces, strict=True))


def _slots(each: Found) -> int:
    return each.scheme.microbatches * each.scheme.stages


def _outlook(scheme: Scheme) -> float:
    """What a scheme is expected to take, against its bound: waiting of its schedule, and ZeRO's communication."""
    waits = (scheme.pp - 1) / scheme.microbatches * waiting_share(scheme.schedule, scheme.chunks)
    return (1 + waits) * (1 + 0.05 * max(0, scheme.zero - 1))


def _likely(cost: PieceCost, slower: float, talk_s: float, beside_s: float) -> PieceCost:
    """A piece whose kernels take so many times as long, which communicates in both passes, and which takes so many seconds beside."""

    def work(each: Work, talk_s: float = 0.0, beside_s: float = 0.0) -> Work:
        return Work(compute_s=each.compute_s * slower + beside_s, communicate_s=talk_s)

    return replace(
        cost,
        forward=work(cost.forward, talk_s / 2, beside_s / 3),
        backward_input=work(cost.backward_input, talk_s / 2, beside_s / 3),
        backward_weight=work(cost.backward_weight, beside_s=beside_s / 3),
        light=work(cost.light, talk_s / 2),
    )


def _talk(cluster: Cluster, split: Split, sent_bytes: float) -> float:
    """Seconds that a block is expected to communicate in a microbatch: tp gathers and scatters what the block is given four times each way
    (Korthikanti et al. 2022, section 4.2), cp exchanges what attention needs."""
    part, kept = sent_bytes / split.cp, sent_bytes / split.tp
    tensor = 4 * sum(collective_cost(kind, part, split.tp, cluster).seconds for kind in ("all_gather", "reduce_scatter"))

    def context(kind: str, nbytes: float) -> float:
        return collective_cost(kind, nbytes, split.cp, cluster, split.tp).seconds

    if split.attention == "gather":
        return tensor + 1.5 * sum(context(kind, 2 * kept) for kind in ("all_gather", "reduce_scatter"))
    if split.attention == "ulysses":  # queries, keys, values and results, and their gradients
        return tensor + 8 * context("all_to_all", kept / split.cp)
    return tensor + _SEEN * 3 * (split.cp - 1) * context("shift", 2 * kept / split.cp)
