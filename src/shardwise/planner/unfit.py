"""Nothing fits: what binds, and the cheapest change with which something would."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from shardwise.cluster.model import Cluster
from shardwise.errors import LayoutError
from shardwise.planner.plan import Infeasible
from shardwise.planner.scale import ScaleSearch
from shardwise.planner.space import Pins, layout_text
from shardwise.simulate.simulator import simulate_profile

__all__ = ["why_unfit"]

_AGAIN = ("none", "selective", "full")
_TIMES = (2, 4, 8, 16, 32, 64)  # as many nodes


def why_unfit(search: ScaleSearch, larger: Callable[[int], Cluster | None]) -> Infeasible:
    """larger: a cluster of so many times as many nodes, None where there is none. Nothing is lowered but the leanest split."""
    lean = _leanest(search)
    reasons = ["no layout could be put together"]
    if lean is not None:
        text, memory = lean
        kinds = ", ".join(f"{kind} {nbytes / 1e9:.3g}" for kind, nbytes in sorted(memory.items(), key=lambda each: -each[1]) if nbytes)
        reasons = [
            f"the leanest layout, {text}, holds {sum(memory.values()) / 1e9:.3g} GB on its fullest device: {kinds}",
            f"of a device's {search.cluster.memory_bytes / 1e9:.3g} GB a layout may take {search.limit_bytes / 1e9:.3g} GB",
        ]
    for change, changed in _changes(search, larger):
        if _fits(changed):
            return Infeasible(reasons=reasons, remedy=change)
    needed = sum(lean[1].values()) / 0.92e9 if lean else 0.0
    return Infeasible(reasons=reasons, remedy=f"devices of {needed:.3g} GB or more, or fewer tokens in a sample")


def _changes(search: ScaleSearch, larger: Callable[[int], Cluster | None]) -> Iterator[tuple[str, ScaleSearch]]:
    """The cheapest first: what costs time, then what costs devices. Each is tried with all else as it is, then with the ones before."""
    pins = search.pins
    if search.only_runnable:
        yield "leave out --runnable: ZeRO and recomputation would do", _with(search, pins, only_runnable=False)
    eased = {"recompute": ("selective", "full"), "zero": (1, 2, 3)}
    for name, values in eased.items():
        now = getattr(pins, name)
        for value in values[values.index(now) + 1 :] if now in values else values if now is not None else ():
            yield f"{name}={value} instead of {name}={now}", _with(search, replace(pins, **{name: value}))
    for name in pins.named:
        yield f"leave {name} open instead of {name}={getattr(pins, name)}", _with(search, pins.without([name]))
    if len(pins.named) > 1:
        yield f"leave the layout open instead of {pins}", _with(search, Pins())
    for times in _TIMES:
        cluster = larger(times)
        if cluster is not None:
            yield f"{times} times as many devices: {cluster.name}", _with(search, pins, cluster=cluster)
            if pins.named:
                yield f"{times} times as many devices, {cluster.name}, and an open layout", _with(search, Pins(), cluster=cluster)


def _with(search: ScaleSearch, pins: Pins, *, cluster: Cluster | None = None, only_runnable: bool | None = None) -> ScaleSearch:
    runnable = search.only_runnable if only_runnable is None else only_runnable
    return replace(search, pins=pins, cluster=cluster or search.cluster, only_runnable=runnable)


def _fits(search: ScaleSearch) -> bool:
    return any(sum(memory.values()) <= search.limit_bytes for _, memory in _memories(search))


def _leanest(search: ScaleSearch) -> tuple[str, dict[str, int]] | None:
    return min(_memories(search), key=lambda each: sum(each[1].values()), default=None)


def _memories(search: ScaleSearch) -> Iterator[tuple[str, dict[str, int]]]:
    """(layout, bytes by kind) of the leanest schemes of each mesh of the split that divides most."""
    split = max(search.space.splits(), key=lambda each: (each.tp, -each.samples, -each.cp, each.ep), default=None)
    if split is None:
        return
    for mesh in search.space.meshes(split):
        schemes = list(search.space.schemes(split, mesh))
        zero, order = max((each.zero for each in schemes), default=0), {name: place for place, name in enumerate(("1f1b", "zb-h1"))}
        lean = [each for each in schemes if each.zero == zero]
        for scheme in sorted(lean, key=lambda each: (-_AGAIN.index(each.recompute), order.get(each.schedule, 2), each.chunks))[:1]:
            try:
                profile = search.composed(scheme, split.samples)
            except LayoutError:
                continue
            few = replace(scheme, microbatches=min(scheme.microbatches, 2 * scheme.pp))
            memory = simulate_profile(profile, (few if scheme.schedule != "gpipe" else scheme).mesh).memory
            yield layout_text(scheme, split.samples), max(memory, key=lambda use: sum(use.values()))
