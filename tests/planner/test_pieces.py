"""A deep model's stages from the pieces of a shallow twin, against the Programs of the deep model itself."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from math import inf, prod

import pytest
import torch
from tests.clusters import made_up
from tests.models import Example, gpt2, llama

import shardwise as sw
from shardwise.capture.export import capture
from shardwise.capture.graph import Graph
from shardwise.cluster.model import Cluster
from shardwise.cost.collectives import collective_cost
from shardwise.planner.apply import Analysis, analyse, assign
from shardwise.planner.compose import Scheme, compose, divide
from shardwise.planner.intra import Costs, split_tensors
from shardwise.planner.pieces import Outline, PieceCost, outline, piece_costs
from shardwise.planner.twins import costed_place
from shardwise.program.actions import Kind
from shardwise.program.build import build_programs, rank_of
from shardwise.program.lower import Cut
from shardwise.program.trace import Tracer
from shardwise.sharding.assignment import Assignment
from shardwise.sharding.context import ATTENTION, Attention
from shardwise.simulate.costs import stage_times
from shardwise.simulate.memory import memory_use

DEEP, THIN = 6, 3
MODELS: dict[str, Callable[[int], Example]] = {"gpt2": lambda layers: gpt2(layers=layers), "llama": lambda layers: llama(layers=layers)}
CLUSTER = made_up(8)


def assigned(example: Example, tp: int, cp: int = 1, attention: Attention = "gather") -> tuple[Graph, Analysis, Assignment]:
    model, batch = example
    graph = capture(model, batch)
    analysis = analyse(graph, "fast")
    assignment = assign(analysis, 1, 1, tp, cp, attention=attention)
    costs = Costs(
        operator=lambda op: 1e-6 * sum(value.nbytes for value in op.outputs),
        heavy=lambda op: "linear" in op.name or "addmm" in op.name,
        collective=lambda kind, message, ranks: 1e-9 * message,
        update=lambda nbytes: 1e-12 * nbytes,
        state_bytes=lambda value: 4.0 * value.nbytes,
        prefer_split=100.0,
    )
    split_tensors(assignment, analysis.batch, analysis.prelude, costs)
    return graph, analysis, assignment


def pieces(name: str, tp: int, cp: int = 1, attention: Attention = "gather") -> tuple[Outline, tuple[PieceCost, ...]]:
    graph, analysis, assignment = assigned(MODELS[name](THIN), tp, cp, attention)
    shape = outline(graph, analysis.prelude, (DEEP,))
    return shape, piece_costs(shape, assignment, analysis.prelude, CLUSTER, Tracer(device=torch.device("cpu")), costed_place(attention, cp))


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_the_outline_names_every_part(name: str, tp: int) -> None:
    shape, costs = pieces(name, tp)
    assert [piece.count for piece in shape.pieces] == [1, DEEP, 1]
    assert shape.blocks == DEEP
    whole = sum(prod(value.shape) for value in capture(*MODELS[name](DEEP)).parameters.values())
    held = sum(cost.parameters * piece.count for piece, cost in zip(shape.pieces, costs, strict=True))
    if tp == 1 and name == "llama":  # GPT-2's tied table is held by the first and the last piece
        assert held == whole
    assert held >= whole / tp


@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_stages_take_what_their_programs_take(name: str, tp: int, stages: int) -> None:
    """Computing, communicating and parameters of each stage: those of the deep model, lowered whole."""
    compare(name, stages, tp)


@pytest.mark.parametrize("cp", [2, 4])
@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("name", MODELS)
def test_attention_over_ranks_takes_what_their_programs_take(name: str, attention: Attention, cp: int) -> None:
    """The slowest of the ranks that share sequences, in each way of doing so."""
    compare(name, 2, 2, cp, attention)


def compare(name: str, stages: int, tp: int, cp: int = 1, attention: Attention = "gather") -> None:
    shape, costs = pieces(name, tp, cp, attention)
    scheme = Scheme(tp=tp, cp=cp, attention=attention, pp=stages, even=True)
    parts = divide(shape, costs, scheme)
    profile = compose(shape, costs, scheme, CLUSTER)
    graph, analysis, assignment = assigned(MODELS[name](DEEP), tp, cp, attention)
    deep = outline(graph, analysis.prelude)
    ends, place = [], 0
    for stage in parts:
        place += sum(count for _, count in stage)
        ends.append(place)
    stage_of = {op: next(i for i, end in enumerate(ends) if part < end) for op, part in deep.stage_of.items()}
    cut = Cut(stage_of=stage_of, prelude=frozenset(analysis.prelude))
    alike = [[rank_of(stage, 0, 0, 1, tp, c=place, cp=cp) for place in range(cp)] for stage in range(stages)]
    ranks = [rank for group in alike for rank in group]
    programs = build_programs(assignment, cut, "1f1b", lambda *_: "native", device=torch.device("cpu"), ranks=ranks)
    for number, group in enumerate(alike):
        times = [stage_times(programs[rank], CLUSTER, "adamw")[number] for rank in group]
        for kind in (Kind.FORWARD, Kind.BACKWARD):
            found, exact = profile.stages[number].seconds[kind.value], max((each[kind] for each in times), key=lambda each: each.compute_s)
            assert found[0] == pytest.approx(exact.compute_s, rel=0.03), (number, kind)
            assert found[1] == pytest.approx(exact.communicate_s, rel=0.1, abs=1e-6), (number, kind)  # sums may travel with either side
        saved = max(memory_use(programs[rank], "adamw").saved for rank in group)
        assert profile.stages[number].saved_bytes == pytest.approx(saved, rel=0.05), number


def test_recomputation_trades_memory_for_a_second_forward_pass() -> None:
    shape, costs = pieces("llama", 1)
    plain, again = (compose(shape, costs, Scheme(recompute=kind), CLUSTER).stages[0] for kind in ("none", "full"))
    block = costs[1]
    assert again.seconds["forward"] == plain.seconds["forward"]
    assert again.seconds["backward"][0] - plain.seconds["backward"][0] == pytest.approx(DEEP * block.forward.compute_s)
    assert again.saved_bytes < plain.saved_bytes / 3
    assert again.memory["transient"] >= block.held.working["none"] + block.held.saved["none"] * 0.9, "a block is there again"


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_zero_divides_what_it_says(zero: int) -> None:
    """Rajbhandari et al. 2020, figure 1: stage 1 divides states, 2 also gradients, 3 also parameters."""
    shape, costs = pieces("llama", 1)
    whole = compose(shape, costs, Scheme(dp=4), CLUSTER).stages[0].memory
    divided = compose(shape, costs, Scheme(dp=4, zero=zero), CLUSTER).stages[0].memory
    for least, kind in ((1, "optimizer"), (2, "gradients"), (3, "parameters")):
        assert divided[kind] == pytest.approx(whole[kind] / (4 if zero >= least else 1), rel=1e-3), kind


def test_stages_of_equal_time_are_as_short_as_can_be() -> None:
    """Against trying every division."""
    shape, costs = pieces("gpt2", 1)
    seconds = [cost.forward.compute_s + cost.backward_input.compute_s + cost.backward_weight.compute_s for cost in costs]
    units = [seconds[0], *[seconds[1]] * DEEP, seconds[2]]
    for stages in (2, 3, 4):
        parts = divide(shape, costs, Scheme(pp=stages))
        longest = max(sum(seconds[index] * count for index, count in stage) for stage in parts)
        cuts = combinations(range(1, len(units)), stages - 1)
        best = min(max(sum(units[a:b]) for a, b in zip((0, *cut), (*cut, len(units)), strict=True)) for cut in cuts)
        assert longest == pytest.approx(best, rel=1e-6)


def test_more_stages_than_parts_are_refused() -> None:
    shape, costs = pieces("gpt2", 1)
    with pytest.raises(sw.LayoutError, match=r"more stages than the 8 parts"):
        divide(shape, costs, Scheme(pp=9))


def test_more_counts_than_runs_are_refused() -> None:
    graph, analysis, _ = assigned(gpt2(layers=2), 1)
    with pytest.raises(sw.PlanError, match="2 numbers of blocks are given, but the model has 1 runs"):
        outline(graph, analysis.prelude, (3, 4))


def test_a_slow_library_bounds_messages_between_nodes_alone() -> None:
    shape, costs = pieces("llama", 1)
    nodes = Cluster.parse("a100-80g:2x8")
    rate = 1e6

    def seconds(dp: int, peer_bytes_per_s: float) -> float:
        """Stages `dp` ranks apart."""
        return compose(shape, costs, Scheme(dp=dp, pp=2, peer_bytes_per_s=peer_bytes_per_s), nodes).edges[0].transfer_s

    assert seconds(8, rate) == pytest.approx(costs[1].sent / rate) and seconds(8, rate) > seconds(8, inf) > 0
    assert seconds(4, rate) == seconds(4, inf), "inside a node"


def test_gathering_matrix_by_matrix_waits_for_the_host_to_place_each_rank_s_part() -> None:
    shape, costs = pieces("llama", 1)
    assert costs[1].matrices == 7, "queries, keys, values, output; gate, up, down"
    together, each, placed = (
        compose(shape, costs, Scheme(dp=8, zero=3, overlap=0.0, **how), CLUSTER).stages[0].seconds
        for how in ({}, {"gather_each": True}, {"gather_each": True, "part_s": 1e-3})
    )
    matrices = sum(max(1, cost.matrices) * piece.count for piece, cost in zip(shape.pieces, costs, strict=True))
    for kind, collectives in (("forward", 1), ("backward", 2)):
        assert together[kind][1] < each[kind][1]
        assert placed[kind][1] - each[kind][1] == pytest.approx(collectives * matrices * 8 * 1e-3)


def test_a_rank_that_waits_for_what_it_sends_starts_again_from_rest() -> None:
    shape, costs = pieces("llama", 1)
    nodes = Cluster.parse("a100-80g:2x8")
    free, waiting = (compose(shape, costs, Scheme(dp=8, pp=2, waits=waits), nodes) for waits in (False, True))
    send = collective_cost("send_recv", costs[1].sent, 2, nodes, 8).seconds
    assert free.edges[0].transfer_s == pytest.approx(send) and waiting.edges[0].transfer_s == 0
    for stage, kind in ((0, "forward"), (1, "backward")):
        longer = waiting.stages[stage].seconds[kind][1] - free.stages[stage].seconds[kind][1]
        assert longer == pytest.approx(send + 100e-6)
