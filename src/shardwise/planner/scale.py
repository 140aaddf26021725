"""The best layout on a cluster of many devices, from a shallow twin of the model: branch and bound.

    splits, the most promising first ──lower──▶ pieces ──every scheme's bound──▶ stages ──their bound──▶ simulator ──▶ best, gap

    a split     tp × cp × ep and the samples of a microbatch: about half a second to lower
    a scheme    of a split: its stages are put together of the same pieces in a millisecond
    a step      simulated, in a tenth of a second and more

What cannot take less than the best step found is left out (`shardwise.planner.bounds`). The search ends when nothing is left, when it has
done so much work, or when its time is over; the smallest bound of what was not looked at says how far from the best the found one can be.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import log

from shardwise.cluster.model import Cluster
from shardwise.cost.collectives import collective_cost
from shardwise.cost.routing import Routing, routing_seconds
from shardwise.errors import LayoutError
from shardwise.planner.bounds import least_memory, memory_bound, perfect, profile_bound, scheme_bound
from shardwise.planner.compose import CONTEXT_BYTES, Scheme, compose, recomputed
from shardwise.planner.estimate import waiting_share
from shardwise.planner.estimator import FULL_MEMORY
from shardwise.planner.lacking import lacking
from shardwise.planner.pieces import Outline, PieceCost
from shardwise.planner.space import Pins, Space, Split, layout_text
from shardwise.planner.twins import Twin, TwinLayout
from shardwise.program.tables import splits_backward
from shardwise.simulate.profile import Profile
from shardwise.simulate.simulator import Simulation, peak_memory, simulate_profile

__all__ = ["Found", "Parts", "ScaleSearch", "Searched"]

_LOWERED, _COMPOSED, _SIMULATED = 5, 60, 16  # splits, schemes of each and steps, where no time is given
_SLOTS = 40_000  # computations of all simulated steps together, where no time is given
_AHEAD, _AT_ONCE = 30, 1  # schemes put together before the best few of them are simulated, to have something to compare with
_HOPELESS = 1.02  # times the best: an estimate is not further off than that
_ALIKE = 0.005  # of a step: estimates that promise about as much
_USUAL_TP = 8
_AGAIN, _GATHERED = 1.15, 1.5  # times what it takes: a step that must compute again, or gather parameters


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
        return Split(tp=self.scheme.tp, cp=self.scheme.cp, ep=self.scheme.ep, samples=self.samples)

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
    """twin: of the model, whose batch is the largest microbatch that is tried; searches that share one share what was lowered.

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
        layout = TwinLayout(tp=split.tp, cp=split.cp, sequence_parallel=True, whole_experts=split.ep > 1)
        return self.twin.over(split.ep).split(layout, self.cluster, self.largest // split.samples)

    def perfect(self, split: Split) -> tuple[Outline, tuple[PieceCost, ...]]:
        """The pieces of a split as if all of the whole model's work and memory were divided evenly.

        Nothing is lowered for it but the whole model, with as few experts as a rank may have: as many rows take the least time so.
        """
        most = self.largest
        shape, whole = self.pieces(Split(samples=most, ep=self.most_ep))
        return shape, perfect([_with_experts(cost, self.most_ep / split.ep) for cost in whole], most, split)

    @cached_property
    def most_ep(self) -> int:
        """Over how many ranks experts are divided at most."""
        return max(split.ep for split in self.space.splits())

    def may_fit(self, split: Split) -> bool:
        """Whether its leanest schemes would fit if all memory were divided evenly; nothing is lowered for it but the whole model."""
        if not self.has_room:
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

    @property
    def has_room(self) -> bool:
        """Whether the devices would hold parameters, gradients and states if nothing else were there and nothing twice."""
        return self.twin.state_bytes(Scheme()) <= self.cluster.ranks * (self.limit_bytes - CONTEXT_BYTES)

    def composed(self, scheme: Scheme, samples: int) -> Profile:
        """What the layout's stages take. Raises LayoutError where there are more stages than parts."""
        shape, costs = self.pieces(Split(tp=scheme.tp, cp=scheme.cp, ep=scheme.ep, samples=samples))
        return compose(shape, costs, scheme, self.cluster, splits_backward=splits_backward(scheme.schedule))

    def bounded(self, scheme: Scheme, samples: int) -> Found | None:
        """A scheme with its bounds; None where the model has too few parts for it."""
        try:
            profile = self.composed(scheme, samples)
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
        shape, costs = self.pieces(Split(samples=self.largest))
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
        usual = sorted(splits, key=lambda each: (each.tp <= _USUAL_TP, -each.samples, -each.cp, -each.ep, each.tp), reverse=True)
        fewest = min(each.samples for each in splits)
        first = next((each for each in usual if each.samples == fewest and self.search.may_fit(each)), None)
        if first is None:  # more samples take no less
            return result
        self._examine(first)
        if not result.lowered:
            first = Split(samples=self.search.largest)
        for bound, split in self._ordered(first, [each for each in splits if each != first]):
            if bound >= result.best_s:
                continue
            if self._spent():
                result.left(bound)
            else:
                self._examine(split)
        for each in self._simulate(self.open, _AT_ONCE, finely=True):
            result.left(each.bound_s)
        result.lower_s = min(result.lower_s, result.best_s)
        result.seconds = time.monotonic() - start_s
        return result

    # -- which splits ------------------------------------------------------------------------------------------------------------------

    def _ordered(self, first: Split, splits: Sequence[Split]) -> list[tuple[float, Split]]:
        """(bound, split), the most promising first. first: one that was lowered, whose kernels are small."""
        search = self.search
        most = Split(samples=search.largest, ep=search.most_ep)
        shape, whole = search.pieces(most)
        each, beside = self._kernels(most, first)
        perfectly = self._computing(most) / most.samples
        found = []
        for split in splits:
            _, costs = search.perfect(split)
            meshes = [self._plain(split, dp, pp) for dp, pp in search.space.meshes(split)]
            bound = min(scheme_bound(shape, costs, scheme) for scheme in meshes)
            slower = (each + beside * split.cp / split.samples) / perfectly
            talk = _talk(search.cluster, split, max(cost.sent for cost in whole) * split.samples / most.samples) * shape.blocks
            talk += _routed(search.routing, search.cluster, shape, costs, split)
            talk += self._expert_s * _experts(shape, costs)
            expected = min(self._expected(shape, costs, scheme, slower, talk) for scheme in meshes)
            found.append((expected, bound, split))
        return [(bound, split) for _, bound, split in sorted(found, key=lambda each: each[0])]

    def _plain(self, split: Split, dp: int, pp: int) -> Scheme:
        microbatches = self.search.global_batch // (dp * split.samples)
        return Scheme(dp=dp, tp=split.tp, pp=pp, cp=split.cp, microbatches=microbatches)

    @cached_property
    def _expert_s(self) -> float:
        """Seconds that a microbatch takes longer for each number of experts that a rank holds, with as many rows: it reads them, adds up
        their gradients, and their products are thinner."""
        samples = self.search.largest
        all_of, fewest = (Split(samples=samples, ep=ep) for ep in (1, self.search.most_ep))
        more = _experts(*self.search.pieces(all_of)) - _experts(*self.search.pieces(fewest))
        return max(0.0, self._computing(all_of) - self._computing(fewest)) / more if more else 0.0

    def _kernels(self, most: Split, first: Split) -> tuple[float, float]:
        """Seconds of computing that a sample takes and that a microbatch takes beside, on one rank, as two splits have it: reading weights
        and adding up their gradients take as long for one sample as for many. Without what experts take that the second holds beside those
        of the first."""
        times = [self._computing(split) for split in (most, first)]
        more = _experts(*self.search.pieces(first)) - _experts(*self.search.pieces(most))
        times[1] = max(0.0, times[1] - self._expert_s * max(0, more))
        share = first.samples / (first.tp * first.cp)
        determinant = most.samples / first.tp - share
        beside = (times[1] * most.samples - times[0] * share) / determinant if determinant > 0 else 0.0
        beside = min(max(0.0, beside), 0.5 * times[0])
        return (times[0] - beside) / most.samples, beside

    def _computing(self, split: Split) -> float:
        shape, costs = self.search.pieces(split)
        works = [cost.forward + cost.backward_input + cost.backward_weight for cost in costs]
        return sum(work.compute_s * piece.count for work, piece in zip(works, shape.pieces, strict=True))

    def _expected(self, shape: Outline, costs: Sequence[PieceCost], scheme: Scheme, slower: float, talk_s: float) -> float:
        """Seconds that a step is expected to take on a mesh: longer where parameters and gradients, or what the microbatches in flight
        keep, too, do not fit, since something must then be computed again, or gathered."""
        numbers = sum(cost.parameters * piece.count for cost, piece in zip(costs, shape.pieces, strict=True))
        saved = sum(cost.held.kept("none", "all") * piece.count for cost, piece in zip(costs, shape.pieces, strict=True))
        held = numbers * 6 / scheme.pp
        crowded = _GATHERED if held > self.search.limit_bytes else _AGAIN if held + saved > self.search.limit_bytes else 1.0
        work = scheme_bound(shape, costs, scheme) * slower + talk_s * scheme.microbatches / scheme.pp
        return crowded * work * (1 + (scheme.pp - 1) / scheme.microbatches / 3)

    def _spent(self) -> bool:
        """Whether the work or the time is used up; never before something was found, or everything was tried once."""
        result = self.result
        if self.search.budget_s is not None:
            return time.monotonic() > self.end_s
        lowered = _LOWERED * (1 if self.search.most_ep == 1 else 2)  # of models with experts there are as many times more
        return bool(result.found) and (result.lowered >= lowered or result.simulated >= _SIMULATED or result.slots >= _SLOTS)

    # -- the schemes of one ------------------------------------------------------------------------------------------------------------

    def _examine(self, split: Split) -> None:
        """Puts schemes together, the most promising first, and simulates those that may be the best."""
        search, result = self.search, self.result
        if not search.may_fit(split):
            return
        try:
            shape, costs = search.pieces(split)
        except LayoutError:
            return
        result.lowered += 1
        bounds = [(scheme_bound(shape, costs, scheme), scheme) for scheme in search.space.schemes(split)]
        waiting: list[Found] = []
        composed = 0
        for bound, scheme in sorted(bounds, key=lambda each: each[0] * _outlook(each[1])):
            if bound >= result.best_s:
                continue
            if self._enough(composed, waiting) and not self._wanted(shape, costs, scheme, waiting):
                result.left(bound)
                continue
            found = search.bounded(scheme, split.samples)
            composed += 1
            if found is not None and self._fits(found):
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

    def _wanted(self, shape: Outline, costs: Sequence[PieceCost], scheme: Scheme, waiting: Sequence[Found]) -> bool:
        """Whether a scheme is put together all the same: it may fit, and nothing did."""
        if waiting or self.result.found:
            return False
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
            step = self.search.simulated(each)
            most -= 1
            result.simulated += 1
            result.slots += _slots(each)
            result.considered[step.scheme, step.samples] = step
            result.found = sorted([*result.found, step], key=lambda found: found.seconds)
        return []

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


def _talk(cluster: Cluster, split: Split, sent_bytes: float) -> float:
    """Seconds that a block is expected to communicate in a microbatch: tp gathers and scatters what the block is given four times each way
    (Korthikanti et al. 2022, section 4.2), cp the keys and values of attention."""
    part = sent_bytes / split.cp
    tensor = 4 * sum(collective_cost(kind, part, split.tp, cluster).seconds for kind in ("all_gather", "reduce_scatter"))
    whole = 2 * sent_bytes / split.tp
    context = 1.5 * sum(collective_cost(kind, whole, split.cp, cluster, split.tp).seconds for kind in ("all_gather", "reduce_scatter"))
    return tensor + context


def _routed(routing: Routing | None, cluster: Cluster, shape: Outline, costs: Sequence[PieceCost], split: Split) -> float:
    """Seconds in which a microbatch's tokens are expected to go to their experts and back, in both passes."""
    if routing is None or split.ep == 1:
        return 0.0
    tokens = [cost.routed / routing.chosen for cost in costs]
    return sum(
        2 * piece.count * routing_seconds(routing, each, cost.row, cost.item, split.ep, cluster)
        for piece, cost, each in zip(shape.pieces, costs, tokens, strict=True)
        if each
    )
