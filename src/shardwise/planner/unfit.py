"""Nothing fits: what binds, and the cheapest change with which something would."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any, cast

from shardwise.cluster.model import Cluster
from shardwise.errors import LayoutError
from shardwise.planner.bounds import least_memory
from shardwise.planner.compose import Scheme
from shardwise.planner.estimator import FULL_MEMORY
from shardwise.planner.plan import Infeasible
from shardwise.planner.reasons import gb
from shardwise.planner.scale import Found, ScaleSearch
from shardwise.planner.space import Pins, Split
from shardwise.simulate.simulator import peak_memory

__all__ = ["why_unfit"]

_TIMES = (2, 4, 8, 16, 32, 64)  # as many nodes


def why_unfit(search: ScaleSearch, larger: Callable[[int], Cluster | None]) -> Infeasible:
    """larger: a cluster of so many times as many nodes, None where there is none. Nothing is lowered but the leanest split."""
    lean = _leanest(search)
    reasons = ["no layout could be put together"]
    if lean is not None:
        memory = _memory(search, lean)
        kinds = ", ".join(f"{kind} {nbytes / 1e9:,.4g}" for kind, nbytes in sorted(memory.items(), key=lambda each: -each[1]) if nbytes)
        reasons = [
            f"the leanest layout, {lean}, holds {gb(sum(memory.values()))} on its fullest device: {kinds}",
            f"of a device's {gb(search.cluster.memory_bytes)} a layout may take {gb(search.limit_bytes)}",
        ]
    for change, changed in _changes(search, larger):
        if _fits(changed):
            return Infeasible(reasons=reasons, remedy=change)
    needed = gb(sum(_memory(search, lean).values()) / FULL_MEMORY) if lean else "more memory"
    return Infeasible(reasons=reasons, remedy=f"devices of {needed} or more, or fewer tokens in a sample")


def _changes(search: ScaleSearch, larger: Callable[[int], Cluster | None]) -> Iterator[tuple[str, ScaleSearch]]:
    """The cheapest first: what costs time, then what costs devices; each with all else as it is."""
    pins = search.pins
    if search.only_runnable:
        yield "leave out --runnable", _with(search, pins, only_runnable=False)
    eased = {"recompute": ("selective", "full"), "zero": (1, 2, 3)}
    for name, values in eased.items():
        now = getattr(pins, name)
        for value in values[values.index(now) + 1 :] if now in values else values if now is not None else ():
            yield f"{name}={value} instead of {name}={now}", _with(search, replace(pins, **cast(dict[str, Any], {name: value})))
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
    split = _leanest_split(search)
    lean = _leanest(search) if split is not None and search.may_fit(split) else None
    return lean is not None and lean.memory_bytes <= search.limit_bytes and sum(_memory(search, lean).values()) <= search.limit_bytes


def _leanest_split(search: ScaleSearch) -> Split | None:
    return max(search.space.splits(), key=lambda each: (each.tp, -each.samples, -each.cp, each.ep), default=None)


def _leanest(search: ScaleSearch) -> Found | None:
    """Of the split that divides most, by the bound of its memory."""
    split = _leanest_split(search)
    if split is None:
        return None
    try:
        shape, costs = search.pieces(split)
    except LayoutError:  # the model cannot be split so
        return None
    held: dict[Scheme, int] = {}
    for scheme in (each for mesh in search.space.meshes(split) for each in _lean(search, split, mesh)):
        with suppress(LayoutError):  # more stages than parts
            held[scheme] = least_memory(shape, costs, scheme, search.cluster)
    return search.bounded(min(held, key=held.__getitem__), split.samples) if held else None


def _lean(search: ScaleSearch, split: Split, mesh: tuple[int, int]) -> list[Scheme]:
    """Schemes of a mesh that hold little."""
    schemes = list(search.space.schemes(split, mesh))
    usual = [each for each in schemes if each.schedule == "1f1b"] or schemes
    return [each for each in usual if each.zero == max(other.zero for other in usual)]


def _memory(search: ScaleSearch, found: Found) -> dict[str, int]:
    """Bytes by kind of the fullest device. It is as full after the first microbatches as later."""
    scheme = found.scheme
    enough = scheme.pp if scheme.schedule == "1f1b" else scheme.microbatches if scheme.schedule == "gpipe" else 2 * scheme.pp
    few = replace(scheme, microbatches=min(scheme.microbatches, enough))
    uses = peak_memory(search.composed(scheme, found.samples), few.mesh)
    return max(uses, key=lambda use: sum(use.values()))
