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


def chain(sizes: list[int], skips: list[tuple[int, int]]) -> Graph:
    """Operators in modules of their own, one after the other, each with a parameter; `skips`: who else reads whose result."""
    x = Value(name="x", shape=(4,), dtype=torch.float32, kind="input")
    parameters, ops, last = {}, [], x
    for number, size in enumerate(sizes):
        weight = Value(name=f"w{number}", shape=(size,), dtype=torch.float32, kind="parameter", requires_grad=True)
        parameters[weight.name] = weight
        read = [last, weight, *(ops[source].outputs[0] for source, target in skips if target == number)]
        out = Value(name=f"h{number}", shape=(size,), dtype=torch.float32, requires_grad=True)
        op = Op(
            target=torch.ops.aten.add.Tensor,
            args=tuple(Slot(index) for index in range(len(read))),
            kwargs={},
            inputs=tuple(read),
            outputs=(out,),
            module=f"block{number}",
            key=f"block{number}:add:0",
        )
        out.producer, last = op, out
        ops.append(op)
    return Graph(parameters=parameters, buffers={}, inputs={"x": x}, ops=ops, loss=last)


def slowest(graph: Graph, seconds: list[float], ends: tuple[int, ...], limit: float | None) -> float | None:
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
    for start, end in pairwise((0, *ends)):
        if limit is not None and sum(graph.parameters[f"w{number}"].nbytes for number in range(start, end)) > limit:
            return None
        worst = max(worst, sum(seconds[start:end]) + crossing(start) + crossing(end))
    return worst


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[int], list[tuple[int, int]], list[float], int, float | None]:
    count = draw(st.integers(4, 9))
    sizes = draw(st.lists(st.integers(1, 20), min_size=count, max_size=count))
    pairs = [(a, b) for a in range(count) for b in range(a + 2, count)]
    skips = draw(st.lists(st.sampled_from(pairs), max_size=3, unique=True))
    seconds = [float(each) for each in draw(st.lists(st.integers(0, 9), min_size=count, max_size=count))]
    limit = draw(st.none() | st.floats(20, 400))
    return sizes, skips, seconds, draw(st.integers(1, 4)), limit


@settings(max_examples=150, deadline=None)
@given(problems())
def test_no_cut_is_better(problem: tuple[list[int], list[tuple[int, int]], list[float], int, float | None]) -> None:
    sizes, skips, seconds, stages, limit = problem
    graph = chain(sizes, skips)
    taken = dict(zip(graph.ops, seconds, strict=True))
    costs = StageCosts(
        seconds=taken.__getitem__,
        transfer=lambda nbytes: nbytes * SECONDS_PER_BYTE,
        state_bytes=lambda value: float(value.nbytes),
        limit_bytes=limit,
    )
    every = [(*ends, len(sizes)) for ends in combinations(range(1, len(sizes)), stages - 1)]
    possible = [found for ends in every if (found := slowest(graph, seconds, ends, limit)) is not None]
    cut = cut_stages(graph, set(), stages, costs)
    if not possible:
        assert cut is None
        return
    assert cut is not None and cut == sorted(cut) and set(cut) == set(range(stages))
    ends = tuple(number for number in range(1, len(cut)) if cut[number] != cut[number - 1])
    assert slowest(graph, seconds, (*ends, len(cut)), limit) == pytest.approx(min(possible))


def test_more_stages_than_parts() -> None:
    costs = StageCosts(seconds=lambda op: 1.0, transfer=lambda nbytes: 0.0, state_bytes=lambda value: 0.0)
    with pytest.raises(LayoutError, match=r"5 stages are more than the 4 parts that the model can be cut into; use 4 or fewer"):
        cut_stages(chain([1, 1, 1, 1], []), set(), 5, costs)
