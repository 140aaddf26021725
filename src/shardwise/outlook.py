"""The best layout of a known model on devices that one need not have, costed from a few of its blocks.

Study     a model, captured once in each precision
  Wish    what is asked for: batch, pins, objective, time to search
    Outlook   what was found on one cluster ──▶ table, Proposal (plan.json)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from rich.table import Table

from shardwise import presets
from shardwise.capture.export import capture
from shardwise.capture.precision import PRECISIONS, Precision, dtype_of
from shardwise.cluster.catalog import catalog
from shardwise.cluster.machine_files import is_machine_file
from shardwise.cluster.model import Cluster, cluster_of
from shardwise.cluster.specs import parse_spec, read_spec
from shardwise.cost.routing import Routing
from shardwise.errors import ClusterError, LayoutError, ModelError
from shardwise.planner.compose import divide
from shardwise.planner.garbage import young_garbage_alone
from shardwise.planner.plan import Infeasible
from shardwise.planner.proposal import Forecast, Proposal, Search
from shardwise.planner.proposal import Parts as PartsText
from shardwise.planner.reasons import alternatives, binds, explain
from shardwise.planner.scale import Found, ScaleSearch, Searched
from shardwise.planner.space import Pins
from shardwise.planner.twins import Twin
from shardwise.planner.uneven import Placed, search_unlike
from shardwise.planner.unfit import why_unfit
from shardwise.presets import Preset

__all__ = ["OBJECTIVES", "Objective", "Outlook", "Study", "Wish", "covers", "resized"]

Objective = Literal["throughput", "latency", "cost", "devices"]
OBJECTIVES = get_args(Objective)

_SAMPLES = 8  # of the captured batch: the largest microbatch that is tried
_EXPERTS = ("num_local_experts", "n_routed_experts", "num_experts")


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What is asked for.

    global_batch: samples of a step, the published ones where None. runnable: only what runs today. budget_s: of searching.
    objective: "throughput", the fastest step on all devices; "latency", on all or fewer; "cost", the cheapest step on all or fewer;
    "devices", the fewest nodes on which a step fits, and takes no longer than within_s.
    price_per_hour: of one device, dollars, the catalog's where None.
    precision: that of the layouts, of `PRECISIONS`, or "any" of these; None for 16 bits, in the format whose products the devices compute
    faster, bf16 where they are alike.
    """

    global_batch: int | None = None
    pins: Pins = field(default_factory=Pins)
    runnable: bool = False
    budget_s: float | None = None
    objective: Objective = "throughput"
    within_s: float | None = None
    price_per_hour: float | None = None
    precision: Precision | Literal["any"] | None = None

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise LayoutError(f"objective {self.objective!r} is unknown; there are {', '.join(OBJECTIVES)}")
        if self.within_s is not None and self.objective != "devices":
            raise LayoutError(
                f"a step within {self.within_s:g} s is asked for, which objective {self.objective!r} does not use; use 'devices'"
            )
        if self.precision not in (None, "any", *PRECISIONS):
            raise LayoutError(f"precision {self.precision!r} is unknown; there are {', '.join(PRECISIONS)}, any")
        for name in ("budget_s", "within_s", "price_per_hour"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise LayoutError(f"{name}={value:g} is not above 0")


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """searched: layouts that fit, fastest first; flops: of a step, forward and backward, without recomputation; peaks: of all devices, in
    each precision, flop/s; price_per_hour: of one device, dollars."""

    study: Study
    search: ScaleSearch
    searched: Searched
    wish: Wish
    flops: float
    peaks: Mapping[Precision, float]
    price_per_hour: float | None

    @property
    def found(self) -> list[Found]:
        """Layouts of equal parts for all devices that fit, fastest first."""
        return self.searched.found

    @cached_property
    def unlike(self) -> list[Found]:
        """Where the devices are not alike and nothing is pinned: layouts that give each kind its part, those of each kind alone, and those
        of equal parts; else none."""
        return search_unlike(self.search, self.searched) if self.cluster.unlike and not self.search.pins.named else []

    @property
    def ranked(self) -> list[Found]:
        """All layouts that are compared, simulated ones first, fastest first."""
        return self.unlike or self.found

    def places(self) -> str:
        """Who does what in the first layout, a line for each kind of device; "" where parts are equal."""
        first = self.ranked[0] if self.ranked else None
        return "\n".join(first.places) if isinstance(first, Placed) else ""

    @property
    def cluster(self) -> Cluster:
        """The devices, fewer than were named where the objective allows that."""
        return self.search.cluster

    def use(self, each: Found) -> float:
        """Share of the devices' peak that the model's own arithmetic takes (model flops utilisation)."""
        return self.flops / (each.seconds * self.peaks[each.scheme.precision])

    def dollars(self, each: Found) -> float | None:
        """Of a step."""
        return None if self.price_per_hour is None else self.price_per_hour * self.cluster.ranks * each.seconds / 3600

    def table(self, shown: int = 10) -> Table:
        """The first layouts. in: their precision, where there are several; batches: microbatches × samples; 1f1b×4: interleaved, 4 stages a
        rank; again: what the backward pass recomputes; peak: share of the devices' that the model's arithmetic takes; parts: on devices
        that are not alike."""
        mixed = len({each.scheme.precision for each in self.ranked[:shown]}) > 1
        axes = ["dp", *(name for name in ("cp", "ep") if any(getattr(each.scheme, name) > 1 for each in self.ranked[:shown])), "tp", "pp"]
        table = Table(
            *(["in"] if mixed else []),
            *axes,
            "batches",
            "order",
            "zero",
            "again",
            "step",
            "peak",
            "parts" if self.unlike else "waits",
            "memory",
            "runs",
            box=None,
        )
        for each in self.ranked[:shown]:
            scheme = each.scheme
            table.add_row(
                *([scheme.precision] if mixed else []),
                *(str(getattr(scheme, name)) for name in axes),
                f"{scheme.microbatches}×{each.samples}",
                scheme.schedule if scheme.schedule != "interleaved" else f"1f1b×{scheme.chunks}",
                str(scheme.zero),
                scheme.recompute,
                f"{each.seconds:.3g} s",
                f"{100 * self.use(each):.0f} %",
                each.words.partition("=")[0] if isinstance(each, Placed) else "" if each.bubble is None else f"{100 * each.bubble:.0f} %",
                f"{each.memory_bytes / 1e9:.3g} GB",
                "yes" if each.runs else "no",
            )
        return table

    def as_json(self) -> dict[str, Any]:
        """For programs: seconds, bytes, shares."""
        return {
            "model": self.study.preset.name,
            "cluster": self.cluster.name,
            "global_batch": self.search.global_batch,
            "gap": self.searched.gap,
            "layouts": [
                {
                    "layout": str(each),
                    "precision": each.scheme.precision,
                    "step_time_s": each.seconds,
                    "model_flops_utilisation": self.use(each),
                    "memory_bytes": each.memory_bytes,
                    "dollars": self.dollars(each),
                    "runs": each.runs,
                    **({"places": list(each.places)} if isinstance(each, Placed) else {}),
                }
                for each in self.ranked
            ],
        }

    def proposal(self) -> Proposal:
        """The best one as a plan file. There must be one."""
        best, search, searched = self.found[0], self.search, self.searched
        scheme = best.scheme
        shape, costs = search.pieces(best.split)
        blocks = [sum(count for piece, count in parts if shape.pieces[piece].count > 1) for parts in divide(shape, costs, scheme)]
        plan = Proposal(
            model=self.study.preset.name,
            cluster=self.cluster.name,
            ranks=self.cluster.ranks,
            global_batch=search.global_batch,
            sequence=self.study.sequence,
            objective=self.wish.objective,
            price_per_hour=self.price_per_hour,
            precision=scheme.precision,
            layout=str(best),
            **{
                name: getattr(scheme, name)
                for name in ("dp", "cp", "attention", "tp", "ep", "pp", "chunks", "microbatches", "schedule", "zero", "recompute")
            },
            microbatch=best.samples,
            stages=blocks,
            runnable=best.runs,
            because=best.lacks,
            predicted=self._forecast(best),
            search=Search(
                lower_bound_s=searched.lower_s,
                gap=searched.gap,
                splits=searched.splits,
                lowered=searched.lowered,
                composed=searched.composed,
                simulated=searched.simulated,
                seconds=searched.seconds,
            ),
            binds=binds(search, searched, self.use(best)),
            others=alternatives(best, searched.found),
            sources=list(_sources(self.cluster)),
        )
        return plan.model_copy(update={"explanation": explain(plan, best, searched)})

    def _forecast(self, best: Found) -> Forecast:
        assert best.parts is not None and best.bubble is not None
        rate = self.search.global_batch / best.seconds
        return Forecast(
            step_time_s=best.seconds,
            parts=PartsText(**asdict(best.parts)),
            bubble=best.bubble,
            communication_s=best.parts.communicate,
            memory_bytes=best.memory_bytes,
            by_kind=best.memory,
            limit_bytes=int(self.search.limit_bytes),
            samples_per_s=rate,
            tokens_per_s=rate * self.study.sequence if self.study.sequence else None,
            peak_share=self.use(best),
            dollars=self.dollars(best),
        )


@dataclass(kw_only=True)
class Study:
    """A known model to be planned on any cluster, captured once in each precision that is asked for; gradients and states are float32.

    samples: of the captured batch.
    """

    preset: Preset
    sequence: int | None
    samples: int
    routing: Routing | None
    twins: dict[Precision, Twin] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, name: str, sequence: int | None = None, microbatch: int | None = None) -> Study:
        """A preset. microbatch: the one that is pinned.

        ModelError for a model that is no preset or whose layers are not all alike.
        """
        preset = presets.describe(name)
        if not _is_one_run(preset):
            raise ModelError(f"{preset.name} has no single run of equal layers, which this needs; use --whole with a smaller cluster")
        return cls(preset=preset, sequence=sequence or preset.sequence, samples=microbatch or _SAMPLES, routing=_routing(preset))

    def twin(self, precision: Precision = "bf16") -> Twin:
        """A few of its layers, in a precision."""
        if precision not in self.twins:
            preset = self.preset
            assert preset.layers is not None and preset.shallow is not None
            layers = min(preset.layers, preset.shallow)
            with young_garbage_alone():  # importing what builds the model, too
                model, batch = presets.build(preset.name, layers=layers, batch_size=self.samples, sequence=self.sequence)
                graph = capture(model.to(_dtype(precision)).train(), batch)
            repeated = preset.layers - preset.first_layers
            counts = (preset.first_layers, repeated) if preset.first_layers > 1 else (repeated,)
            self.twins[precision] = Twin(graph=graph, counts=counts)
        return self.twins[precision]

    def search(self, cluster: Cluster, wish: Wish) -> ScaleSearch:
        """A search that shares what was costed before on such devices."""
        first, *others = _precisions(cluster, wish)
        return ScaleSearch(
            twin=self.twin(first),
            precision=first,
            others={precision: self.twin(precision) for precision in others},
            cluster=cluster,
            global_batch=wish.global_batch or self.preset.batch_size,
            pins=wish.pins,
            only_runnable=wish.runnable,
            routing=self.routing,
            budget_s=wish.budget_s,
        )

    def outlook(self, cluster: Cluster, wish: Wish, *, unlike: bool = False) -> Outlook | Infeasible:
        """What the wish gets on the cluster, or why nothing fits. LayoutError where pins contradict each other.

        unlike: whether it is enough that unequal parts fit; `Outlook.found` may then be empty.
        """
        with young_garbage_alone():
            return self._best(cluster, wish, unlike=unlike)

    def _best(self, cluster: Cluster, wish: Wish, *, unlike: bool) -> Outlook | Infeasible:
        full = self.search(cluster, wish)
        full.space.check()
        best: Outlook | None = None
        for each in self._sizes(cluster, wish, full):
            try:
                found = self._outlook(each, wish)
            except LayoutError:  # pins that only fit other sizes
                continue
            if found.found and _better(found, best, wish):
                best = found
                if wish.objective == "devices":
                    break
        if best is None and unlike:
            uneven = self._outlook(cluster, wish)
            if uneven.unlike:
                return uneven
        if best is None:
            return why_unfit(full, lambda times: resized(cluster, times=times)) if wish.within_s is None else _too_slow(cluster, wish)
        return best

    def _sizes(self, cluster: Cluster, wish: Wish, full: ScaleSearch) -> Iterator[Cluster]:
        """Clusters that the objective allows: whole nodes, all of them first; for the fewest devices, few first."""
        machines = cluster.machines
        if wish.objective == "throughput" or machines is None or machines.nodes == 1:
            yield cluster
            return
        powers = [count for power in range(20) for count in (2**power, 3 * 2**power) if count < machines.nodes]
        counts = [machines.nodes, *sorted(set(powers), reverse=True)]
        for count in sorted(counts) if wish.objective == "devices" else counts:
            yield cluster if count == machines.nodes else resized(cluster, nodes=count) or cluster

    def _outlook(self, cluster: Cluster, wish: Wish) -> Outlook:
        search = self.search(cluster, wish)
        searched = search.search()
        machines = cluster.machines
        peaks: dict[Precision, float] = {
            each: machines.peak_flops(_name(each)) if machines else cluster.ranks * _rate(cluster, each) for each in search.space.precisions
        }
        listed = machines.price_per_hour if machines else None
        price = wish.price_per_hour if wish.price_per_hour is not None else None if listed is None else listed / cluster.ranks
        if price is None and wish.objective == "cost":
            raise ClusterError(f"no price of {cluster.name} is known; give one with --price")
        flops = search.flops() if searched.found or cluster.unlike else 0.0
        return Outlook(
            study=self,
            search=search,
            searched=searched,
            wish=wish,
            flops=flops,
            peaks=peaks,
            price_per_hour=price,
        )


def _precisions(cluster: Cluster, wish: Wish) -> tuple[Precision, ...]:
    """Those that are searched: one 16-bit format takes no more than the other of anything if its products are no slower."""
    if wish.precision is not None and wish.precision != "any":
        return (wish.precision,)
    low: Precision = "fp16" if _rate(cluster, "fp16") > _rate(cluster, "bf16") else "bf16"
    return (low,) if wish.precision is None else (low, "float32")


def _rate(cluster: Cluster, precision: Precision) -> float:
    """Flop/s of a device's large products."""
    return cluster.rates.matmul_of(_name(precision)).cubes_flops.values[-1]


def _dtype(precision: Precision) -> torch.dtype:
    return dtype_of(precision) or torch.float32


def _name(precision: Precision) -> str:
    return str(_dtype(precision)).removeprefix("torch.")


def _routing(preset: Preset) -> Routing | None:
    experts = next((int(preset.values[key]) for key in _EXPERTS if key in preset.values), 0)
    if not experts:
        return None
    chosen, groups, limit = (int(preset.values.get(key, 1)) for key in ("num_experts_per_tok", "n_group", "topk_group"))
    return Routing(experts=experts, chosen=chosen, groups=groups, limit=limit)


def _is_one_run(preset: Preset) -> bool:
    return bool(preset.depth) and preset.period == 1 and len(preset.depth) == 1


def covers(model: str, cluster: str) -> bool:
    """Whether a model is a preset of equal layers, and a cluster of the catalog."""
    if not presets.exists(model) or not _is_one_run(presets.describe(model)):
        return False
    return is_machine_file(Path(cluster)) if cluster.endswith(".toml") else True


def _better(found: Outlook, best: Outlook | None, wish: Wish) -> bool:
    first = found.found[0]
    if wish.objective == "devices":
        return wish.within_s is None or first.seconds <= wish.within_s
    if best is None:
        return True
    if wish.objective == "cost":
        return (found.dollars(first) or 0.0) < (best.dollars(best.found[0]) or 0.0)
    return first.seconds < best.found[0].seconds


def _too_slow(cluster: Cluster, wish: Wish) -> Infeasible:
    return Infeasible(
        reasons=[f"no layout on {cluster.name} or fewer of its nodes has a step within {wish.within_s:g} s"],
        remedy="more or faster devices, or a longer time",
    )


def resized(cluster: Cluster, *, nodes: int | None = None, times: int = 1) -> Cluster | None:
    """The same devices in so many nodes, or in so many times as many; None for a cluster that is not written in one line of one kind."""
    try:
        spec = read_spec(cluster.name)
    except ClusterError:
        return None
    machines = cluster.machines
    if machines is None or len(spec.entries) != 1 or len(machines.groups) != 1:
        return None
    group = machines.groups[0]
    entry = replace(spec.entries[0], nodes=nodes or group.nodes * times, per_node=group.per_node, number=None)
    made = cluster_of(parse_spec(str(replace(spec, entries=(entry,))), catalog()))
    return replace(made, memory_bytes=cluster.memory_bytes, rates=cluster.rates)


def _sources(cluster: Cluster) -> Iterator[str]:
    """Where the cluster's figures come from, those of one source together."""
    machines = cluster.machines
    if machines is None:
        return
    links = dict.fromkeys(level.link for group in machines.groups for level in group.levels)
    for spec in (*machines.devices, *links):
        by_source: dict[str, list[str]] = {}
        for figure in spec.figures():
            by_source.setdefault(spec.source(figure), []).append(figure)
        for source, figures in by_source.items():
            yield f"{spec.name} {', '.join(figures)}: {source}"
