"""Cuts the model into stages: dynamic programming over the places where the computation may be cut.

A cut may lie where the module path changes near the root (between blocks), but not between what reads a buffer and what changes it; the
best cut makes the slowest stage as fast as possible, counting what has to be sent, among those whose states fit the memory of a rank.
Stages may be on unlike devices: each has its own seconds and its own limit.
"""

from __future__ import annotations

from bisect import bisect, bisect_left
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, pairwise
from math import inf
from statistics import fmean

from shardwise.capture.graph import Graph, Op, Value
from shardwise.errors import LayoutError
from shardwise.program.buffers import buffer_spans

__all__ = ["StageCosts", "cut_stages"]

_DEEPEST = 12  # of the paths of modules that are looked at
_PARTS = 8  # that a stage is made of at least, as far as modules divide


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
    seconds = [[costs.seconds(op, stage) for op in body] for stage in range(stages)]
    places = _places(body, [fmean(each) for each in zip(*seconds, strict=True)], stages, apart)
    if len(places) - 1 < stages:
        parts = len(places) - 1
        why = f" ({next(iter(apart.values()))})" if apart else ""
        raise LayoutError(f"{stages} stages are more than the {parts} parts that the model can be cut into{why}; use {parts} or fewer")
    segments = _Segments(graph, body, places, costs, seconds)
    ends = _best(len(places) - 1, stages, segments)
    if ends is None:
        return None
    stage_of: list[int] = []
    for stage, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        stage_of += [stage] * (places[end] - places[start])
    return stage_of


def _places(body: Sequence[Op], seconds: Sequence[float], stages: int, apart: Container[int]) -> list[int]:
    """Indices in the body where it may be cut, its ends included: where the path of the module changes, at the least depth that gives some
    parts for each stage, and deeper in parts that take more of the `seconds` than a fraction of a stage.

    apart: where it may not be.
    """
    for depth in range(1, _DEEPEST):
        places = [*_changes(body, 0, len(body), depth, apart), len(body)]
        if len(places) - 1 >= 2 * stages + 2:
            most_s = sum(seconds) / stages / _PARTS
            return [*_divided(body, places, depth + 1, [0.0, *accumulate(seconds)], most_s, apart), len(body)]
    return [0, *(i for i in range(1, len(body)) if i not in apart), len(body)] if len(body) <= 200 else places


def _changes(body: Sequence[Op], start: int, end: int, depth: int, apart: Container[int]) -> list[int]:
    """The start, and where the path of the module changes before the end, looked at to a depth."""
    paths = [".".join(op.module.split(".")[:depth]) for op in body[start:end]]
    return [start, *(start + i for i in range(1, end - start) if paths[i] != paths[i - 1] and start + i not in apart)]


def _divided(
    body: Sequence[Op], places: Sequence[int], depth: int, until_s: Sequence[float], most_s: float, apart: Container[int]
) -> Iterator[int]:
    """Where the parts between the places start, those of them cut deeper that take longer than `most_s`. until_s: before each operator."""
    for start, end in pairwise(places):
        if depth < _DEEPEST and until_s[end] - until_s[start] > most_s:
            finer = [*_changes(body, start, end, depth, apart), end]
            yield from _divided(body, finer, depth + 1, until_s, most_s, apart)
        else:
            yield start


class _Segments:
    """Cost of running places[i] … places[j] as one of the stages."""

    def __init__(
        self, graph: Graph, body: Sequence[Op], places: Sequence[int], costs: StageCosts, seconds: Sequence[Sequence[float]]
    ) -> None:
        sums = [list(accumulate(each, initial=0.0)) for each in seconds]
        self.seconds = [[each[place] for place in places] for each in sums]
        self.sent_s = [costs.transfer(nbytes) for nbytes in _crossing_bytes(graph, body, places)]
        self.limit_bytes = [inf] * len(seconds) if costs.limit_bytes is None else costs.limit_bytes
        self.held_bytes = _held_bytes(graph, body, places, costs.state_bytes)

    def computing_s(self, start: int, end: int, stage: int) -> float:
        return self.seconds[stage][end] - self.seconds[stage][start]

    def cost(self, start: int, end: int, stage: int) -> float:
        return self.computing_s(start, end, stage) + self.sent_s[start] + self.sent_s[end]

    def fits(self, start: int, end: int, stage: int) -> bool:
        return self.held_bytes[start][end] <= self.limit_bytes[stage]


def _held_bytes(graph: Graph, body: Sequence[Op], places: Sequence[int], state_bytes: Callable[[Value], float]) -> list[list[float]]:
    """[start][end] → bytes of the states of all parameters that are read between two places."""
    index = {op: i for i, op in enumerate(body)}
    parameters = [
        (sorted({bisect(places, index[op]) - 1 for op, _ in readers if op in index}), state_bytes(value))
        for value, readers in graph.consumers().items()
        if value.kind == "parameter"
    ]
    found = []
    for start in range(len(places)):
        new = [0.0] * (len(places) + 1)  # by the part that reads it first, of those from the start on
        for parts, nbytes in parameters:
            after = bisect_left(parts, start)
            if after < len(parts):
                new[parts[after] + 1] += nbytes
        found.append(list(accumulate(new[: len(places)])))
    return found


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
            if not segments.fits(start, end, stage) or (best is not None and segments.computing_s(start, end, stage) > best[0]):
                break  # further ones hold more and take longer
            if (rest := solve(end, left - 1)) is not None:
                here = segments.cost(start, end, stage)
                found = (max(here, rest[0]), here + rest[1], (end, *rest[2]))
                if best is None or found[:2] < best[:2]:
                    best = found
        return best

    found = solve(0, stages)
    return None if found is None else list(found[2])
