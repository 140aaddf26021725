"""Stage cuts against all possible cuts."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwise.capture.graph import Graph, Op, Slot, Value
from shardwise.errors import LayoutError
from shardwise.planner.stages import StageCosts, cut_stages

SECONDS_PER_BYTE = 0.01


def chain(
    sizes: list[int], skips: list[tuple[int, int]], touched: tuple[int, int] | None = None, modules: list[str] | None = None
) -> Graph:
    """Operators in modules of their own, one after the other, each with a parameter; `skips`: who else reads whose result.

    touched: which operator reads a buffer and which one makes its new value. modules: of the operators, else each is in one near the root.
    """
    state = Value(name="state", shape=(1,), dtype=torch.float32, kind="buffer")
    x = Value(name="x", shape=(4,), dtype=torch.float32, kind="input")
    parameters, ops, last = {}, [], x
    for number, size in enumerate(sizes):
        weight = Value(name=f"w{number}", shape=(size,), dtype=torch.float32, kind="parameter", requires_grad=True)
        parameters[weight.name] = weight
        read = [last, weight, *(ops[source].outputs[0] for source, target in skips if target == number)]
        read += [state] if touched is not None and touched[0] == number else []
        out = Value(name=f"h{number}", shape=(size,), dtype=torch.float32, requires_grad=True)
        op = Op(
            target=torch.ops.aten.add.Tensor,
            args=tuple(Slot(index) for index in range(len(read))),
            kwargs={},
            inputs=tuple(read),
            outputs=(out,),
            module=modules[number] if modules else f"block{number}",
            key=f"block{number}:add:0",
        )
        out.producer, last = op, out
        ops.append(op)
    updates = {} if touched is None else {"state": ops[touched[1]].outputs[0]}
    return Graph(parameters=parameters, buffers={"state": state}, inputs={"x": x}, ops=ops, loss=last, updates=updates)


def slowest(graph: Graph, seconds: list[float], ends: tuple[int, ...], limit: list[float] | None, speeds: list[float]) -> float | None:
    """Seconds of the slowest stage of a cut, by hand; None where its parameters do not fit."""
    readers = graph.consumers()
    index = {op: number for number, op in enumerate(graph.ops)}

    def crossing(place: int) -> float:
        total = 0
        for number, op in enumerate(graph.ops[:place]):
            if any(index[reader] >= place for reader, _ in readers[op.outputs[0]]):
                total += graph.ops[number].outputs[0].nbytes
        return total * SECONDS_PER_BYTE if 0 < place < len(graph.ops) else 0.0

    worst = 0.0
    for stage, (start, end) in enumerate(pairwise((0, *ends))):
        if limit is not None and sum(graph.parameters[f"w{number}"].nbytes for number in range(start, end)) > limit[stage]:
            return None
        worst = max(worst, sum(seconds[start:end]) / speeds[stage] + crossing(start) + crossing(end))
    return worst


Problem = tuple[list[int], list[tuple[int, int]], tuple[int, int] | None, list[float], list[float], list[float] | None]


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Sizes of the operators, who reads whose result, who a buffer, their seconds, and of each stage its speed and its limit."""
    count = draw(st.integers(4, 9))
    sizes = draw(st.lists(st.integers(1, 20), min_size=count, max_size=count))
    pairs = [(a, b) for a in range(count) for b in range(a + 2, count)]
    skips = draw(st.lists(st.sampled_from(pairs), max_size=3, unique=True))
    touched = draw(st.none() | st.tuples(st.integers(0, count - 1), st.integers(0, count - 1)))
    seconds = [float(each) for each in draw(st.lists(st.integers(0, 9), min_size=count, max_size=count))]
    stages = draw(st.integers(1, 4))
    speeds = draw(st.lists(st.sampled_from([1.0, 1.0, 0.5, 3.0]), min_size=stages, max_size=stages))
    limit = draw(st.none() | st.lists(st.floats(20, 400), min_size=stages, max_size=stages))
    return sizes, skips, touched, seconds, speeds, limit


@settings(max_examples=150, deadline=None)
@given(problems())
def test_no_cut_is_better(problem: Problem) -> None:
    sizes, skips, touched, seconds, speeds, limit = problem
    graph, stages = chain(sizes, skips, touched), len(speeds)
    taken = dict(zip(graph.ops, seconds, strict=True))
    costs = StageCosts(
        seconds=lambda op, stage: taken[op] / speeds[stage],
        transfer=lambda nbytes: nbytes * SECONDS_PER_BYTE,
        state_bytes=lambda value: float(value.nbytes),
        limit_bytes=limit,
    )
    allowed = [place for place in range(1, len(sizes)) if touched is None or not min(touched) < place <= max(touched)]
    if len(allowed) + 1 < stages:
        why = r" \(buffer state must be read where it is changed\)" if touched is not None and touched[0] != touched[1] else ""
        with pytest.raises(LayoutError, match=rf"than the {len(allowed) + 1} parts that the model can be cut into{why}; use"):
            cut_stages(graph, set(), stages, costs)
        return
    every = [(*ends, len(sizes)) for ends in combinations(allowed, stages - 1)]
    possible = [found for ends in every if (found := slowest(graph, seconds, ends, limit, speeds)) is not None]
    cut = cut_stages(graph, set(), stages, costs)
    if not possible:
        assert cut is None
        return
    assert cut is not None and cut == sorted(cut) and set(cut) == set(range(stages))
    ends = tuple(number for number in range(1, len(cut)) if cut[number] != cut[number - 1])
    assert slowest(graph, seconds, (*ends, len(cut)), limit, speeds) == pytest.approx(min(possible))


def test_more_stages_than_parts() -> None:
    costs = StageCosts(seconds=lambda op, stage: 1.0, transfer=lambda nbytes: 0.0, state_bytes=lambda value: 0.0)
    with pytest.raises(LayoutError, match=r"5 stages are more than the 4 parts that the model can be cut into; use 4 or fewer"):
        cut_stages(chain([1, 1, 1, 1], []), set(), 5, costs)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 3), st.integers(0, 60)), min_size=6, max_size=9), st.integers(2, 4))
def test_what_is_heavy_is_cut_inside(shape: list[tuple[int, int]], stages: int) -> None:
    """Of modules near the root some are deep, as a list of blocks is, and take nearly all of the time: these are cut where they can be."""
    modules = [f"root{number}" + ".list" * depth + f".{block}" for number, (depth, count) in enumerate(shape) for block in range(1 + count)]
    graph = chain([1] * len(modules), [], modules=modules)
    costs = StageCosts(seconds=lambda op, stage: 1.0, transfer=lambda nbytes: 0.0, state_bytes=lambda value: 0.0)
    cut = cut_stages(graph, set(), stages, costs)
    assert cut is not None
    fair = len(modules) / stages
    assert max(cut.count(stage) for stage in range(stages)) <= fair + max(1.0, fair / 8)
