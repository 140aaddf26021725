"""Cuts the model into stages: dynamic programming over the places where the computation may be cut.

A cut may lie where the module path changes near the root (between blocks), but not between what reads a buffer and what changes it; the
best cut makes the slowest stage as fast as possible, counting what has to be sent, among those whose states fit the memory of a rank.
Stages may be on unlike devices: each has its own seconds and its own limit.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate

from shardwise.capture.graph import Graph, Op, Value
from shardwise.errors import LayoutError
from shardwise.program.buffers import buffer_spans

__all__ = ["StageCosts", "cut_stages"]


@dataclass(frozen=True, kw_only=True)
class StageCosts:
    """seconds(op, stage): forward and backward of a microbatch; transfer(bytes): seconds of one message; state_bytes(parameter);
    limit_bytes of a rank of each stage, None without limit."""

    seconds: Callable[[Op, int], float]
    transfer: Callable[[float], float]
    state_bytes: Callable[[Value], float]
    limit_bytes: Sequence[float] | None = None


def cut_stages(
    graph: Graph, prelude: set[Op], stages: int, costs: StageCosts, together: Mapping[str, Container[Op]] | None = None
) -> list[int] | None:
    """The stage of each operator outside the prelude, in order; None when no cut keeps the states within the limit.

    together: what it is → operators that must be in one stage. Raises LayoutError when the model has fewer parts than stages.
    """
    body = [op for op in graph.ops if op not in prelude]
    apart = {index: f"buffer {name} must be read where it is changed" for index, name in buffer_spans(graph, body).items()}
    for name, ops in (together or {}).items():
        inside = [index for index, op in enumerate(body) if op in ops]
        apart |= dict.fromkeys(range(inside[0] + 1, inside[-1] + 1), f"{name} must be in one stage")
    places = _places(body, stages, apart)
    if len(places) - 1 < stages:
        parts = len(places) - 1
        why = f" ({next(iter(apart.values()))})" if apart else ""
        raise LayoutError(f"{stages} stages are more than the {parts} parts that the model can be cut into{why}; use {parts} or fewer")
    segments = _Segments(graph, body, places, costs, stages)
    ends = _best(len(places) - 1, stages, segments)
    if ends is None:
        return None
    stage_of: list[int] = []
    for stage, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        stage_of += [stage] * (places[end] - places[start])
    return stage_of


def _places(body: Sequence[Op], stages: int, apart: Container[int]) -> list[int]:
    """Indices in the body where it may be cut, its ends included: where the path of the module changes at the least depth that suffices.

    apart: where it may not be.
    """
    for depth in range(1, 12):
        paths = [".".join(op.module.split(".")[:depth]) for op in body]
        places = [0, *(i for i in range(1, len(body)) if paths[i] != paths[i - 1] and i not in apart), len(body)]
        if len(places) - 1 >= 2 * stages + 2:
            return places
    return [0, *(i for i in range(1, len(body)) if i not in apart), len(body)] if len(body) <= 200 else places


class _Segments:
    """Cost of running places[i] … places[j] as one of the stages."""

    def __init__(self, graph: Graph, body: Sequence[Op], places: Sequence[int], costs: StageCosts, stages: int) -> None:
        self.costs, self.places = costs, places
        sums = [list(accumulate((costs.seconds(op, stage) for op in body), initial=0.0)) for stage in range(stages)]
        self.seconds = [[each[place] for place in places] for each in sums]
        self.crossing = _crossing_bytes(graph, body, places)
        index = {op: i for i, op in enumerate(body)}
        self.parameters = [
            (sorted({index[op] for op, _ in readers if op in index}), value)
            for value, readers in graph.consumers().items()
            if value.kind == "parameter"
        ]

    def cost(self, start: int, end: int, stage: int) -> float:
        sent = self.costs.transfer(self.crossing[start]) + self.costs.transfer(self.crossing[end])
        return self.seconds[stage][end] - self.seconds[stage][start] + sent

    def fits(self, start: int, end: int, stage: int) -> bool:
        if self.costs.limit_bytes is None:
            return True
        low, high = self.places[start], self.places[end]
        held = sum(self.costs.state_bytes(value) for readers, value in self.parameters if any(low <= reader < high for reader in readers))
        return held <= self.costs.limit_bytes[stage]


def _crossing_bytes(graph: Graph, body: Sequence[Op], places: Sequence[int]) -> list[float]:
    """Bytes of all values made before each place and read after it."""
    index = {op: i for i, op in enumerate(body)}
    crossing = [0.0] * len(places)
    for value, readers in graph.consumers().items():
        if value.producer in index:
            made, last = index[value.producer], max((index[op] for op, _ in readers if op in index), default=-1)
            for number, place in enumerate(places):
                if made < place <= last:
                    crossing[number] += value.nbytes
    return crossing


def _best(parts: int, stages: int, segments: _Segments) -> list[int] | None:
    """The end of each stage that makes the slowest one fastest (and then the sum least)."""

    @cache
    def solve(start: int, left: int) -> tuple[float, float, tuple[int, ...]] | None:
        stage = stages - left
        if left == 1:
            seconds = segments.cost(start, parts, stage)
            return (seconds, seconds, (parts,)) if segments.fits(start, parts, stage) else None
        best = None
        for end in range(start + 1, parts - left + 2):
            if segments.fits(start, end, stage) and (rest := solve(end, left - 1)) is not None:
                here = segments.cost(start, end, stage)
                found = (max(here, rest[0]), here + rest[1], (end, *rest[2]))
                if best is None or found[:2] < best[:2]:
                    best = found
        return best

    found = solve(0, stages)
    return None if found is None else list(found[2])
