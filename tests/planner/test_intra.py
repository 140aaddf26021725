"""The integer program against trying everything, and the splits that people found by hand."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import product

import pytest
import torch
from tests.clusters import made_up
from tests.models import Example, gpt2, llama
from torch import Tensor, nn
from torch.nn import functional as F

import shardwise as sw
from shardwise.capture.export import capture
from shardwise.capture.graph import Graph, Op, Value
from shardwise.planner.apply import analyse, assign
from shardwise.planner.intra import Costs, _Intra, split_tensors
from shardwise.sharding.types import I, Placement, R, Shard


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(self.down(F.gelu(self.up(x))), y)


class Attention(nn.Module):
    """Queries are projected; keys and values are the input itself, which is so read three times."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(4, 4, bias=False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        scores = torch.matmul(self.query(x), x.transpose(1, 2))
        return F.mse_loss(torch.matmul(scores.softmax(-1), x), y)


class Residual(nn.Module):
    """A result read by two operators that may want it in two types."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.first(x)
        return F.mse_loss(h + self.second(h), y)


SMALL: dict[str, Callable[[], Example]] = {
    "mlp": lambda: (TwoLayers(), {"x": torch.randn(4, 4), "y": torch.randn(4, 4)}),
    "attention": lambda: (Attention(), {"x": torch.randn(2, 4, 4), "y": torch.randn(2, 4, 4)}),
    "residual": lambda: (Residual(), {"x": torch.randn(4, 4), "y": torch.randn(4, 4)}),
}


def random_costs(graph: Graph, seed: int, limit_bytes: float | None = None) -> Costs:
    """Operators, collectives and updates whose seconds are of one size, so that no choice is obvious."""
    generator = random.Random(seed)
    seconds = {op: generator.uniform(0.1, 2.0) for op in graph.ops}
    latency = {kind: generator.uniform(0.0, 0.5) for kind in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")}
    rate = generator.uniform(0.0, 0.01)
    return Costs(
        operator=seconds.__getitem__,
        heavy=lambda op: False,
        collective=lambda kind, nbytes, ranks: latency[kind] + rate * nbytes,
        update=lambda nbytes: rate * nbytes,
        state_bytes=lambda value: 4.0 * value.nbytes,
        limit_bytes=limit_bytes,
    )


def cheapest(intra: _Intra, costs: Costs) -> float:
    """The least cost over all choices of all operators; a parameter then takes its own best type. Memory is not limited."""
    best = float("inf")
    places: dict[Value, list[tuple[Op, int]]] = {
        value: [(op, index) for op, index in readers if op in intra.variants] for value, readers in intra.readers.items()
    }
    known: dict[tuple[Value, Placement, Placement], float] = {}

    def moved(value: Value, made: Placement, wanted: set[Placement]) -> float:
        for kind in wanted:
            if (value, made, kind) not in known:
                known[value, made, kind] = intra._reshard_cost(value, made, kind)
        return sum(known[value, made, kind] for kind in wanted)

    for picked in product(*(intra.variants[op] for op in intra.ops)):
        chosen = dict(zip(intra.ops, picked, strict=True))
        total = sum(costs.operator(op) / (intra.ranks if v.choice.mode == "split" else 1) for op, v in chosen.items())
        for value, readers in places.items():
            if total >= best:
                break
            wanted = {chosen[op].inputs[index] for op, index in readers}
            if value.kind == "parameter":
                offered = {variant.inputs[index] for op, index in readers for variant in intra.variants[op]}
                kinds = {R, I} | {each for each in offered if isinstance(each, Shard)}
                total += min(intra._parameter_cost(value, kept) + moved(value, kept, wanted) for kept in kinds)
            elif value.producer in chosen:
                total += moved(value, chosen[value.producer].outputs[value.producer.outputs.index(value)], wanted)
            else:
                total += moved(value, R, wanted)
        best = min(best, total)
    return best


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", SMALL)
def test_no_choice_is_better(name: str, seed: int) -> None:
    graph = capture(*SMALL[name]())
    analysis = analyse(graph)
    costs = random_costs(graph, seed)
    assignment = assign(analysis, 1, 1, 2)
    found = split_tensors(assignment, analysis.batch, analysis.prelude, costs)
    assert found is not None
    for op in analysis.prelude:
        assert assignment.variants[op]["tp"].choice.mode == "R"
    intra = _Intra(assignment=assign(analysis, 1, 1, 2), batch=analysis.batch, prelude=analysis.prelude, costs=costs)
    assert found.objective_s == pytest.approx(cheapest(intra, costs), rel=2e-3)
    assert found.gap <= 1e-3


def test_a_memory_limit_splits_what_is_cheaper_whole() -> None:
    graph = capture(*SMALL["mlp"]())
    analysis = analyse(graph)
    whole = sum(4.0 * value.nbytes for value in graph.parameters.values())

    def kept(limit_bytes: float | None) -> float | None:
        """Bytes of state on a rank; collectives cost so much that nothing is split without need."""
        costs = random_costs(graph, 0, limit_bytes)
        dear = Costs(**{**costs.__dict__, "collective": lambda kind, nbytes, ranks: 1e3})
        assignment = assign(analysis, 1, 1, 2)
        if split_tensors(assignment, analysis.batch, analysis.prelude, dear) is None:
            return None
        types = {value: assignment.sources[value]["tp"] for value in graph.parameters.values()}
        return sum(4.0 * value.nbytes / (2 if isinstance(types[value], Shard) else 1) for value in types)

    free, tight = kept(None), kept(0.6 * whole)
    assert free == whole and tight is not None and tight <= 0.6 * whole
    assert kept(0.4 * whole) is None, "two ranks cannot hold less than half each"


def test_ranks_that_do_not_divide_get_no_empty_part() -> None:
    graph = capture(*SMALL["mlp"]())
    analysis = analyse(graph)
    assignment = assign(analysis, 1, 1, 8)
    assert split_tensors(assignment, analysis.batch, analysis.prelude, random_costs(graph, 0)) is not None
    for value in graph.parameters.values():
        placement = assignment.sources[value]["tp"]
        if isinstance(placement, Shard):
            assert value.shape[placement.dim] >= 8


# -- known splits --------------------------------------------------------------------------------------------------------------------------


def types_of(example: Example, latency_s: float) -> dict[str, str]:
    plan = sw.plan(*example, made_up(2, latency_s=latency_s), "tp=2")
    assert isinstance(plan, sw.Plan)
    return plan.parameters


@pytest.mark.parametrize("latency_s", [2e-6, 5e-2])
def test_llama_is_split_by_columns_then_rows(latency_s: float) -> None:
    """Shoeybi et al., Megatron-LM, 2019, section 3."""
    found = types_of(llama(hidden=256, sequence=64), latency_s)
    layer = "model.layers.*."
    for column in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"):
        assert found[f"{layer}{column}.weight"] == "S(0)", column
    for row in ("self_attn.o_proj", "mlp.down_proj"):
        assert found[f"{layer}{row}.weight"] == "S(1)", row


@pytest.mark.parametrize("latency_s", [2e-6, 5e-2])
def test_gpt2_is_split_by_columns_then_rows_and_its_fused_projection_by_thirds(latency_s: float) -> None:
    """Its weights are stored input by output."""
    found = types_of(gpt2(hidden=256, sequence=64), latency_s)
    layer = "transformer.h.*."
    assert found[f"{layer}attn.c_attn.weight"] == "S(1, blocks=3)" and found[f"{layer}attn.c_attn.bias"] == "S(0, blocks=3)"
    assert found[f"{layer}attn.c_proj.weight"] == "S(0)" and found[f"{layer}mlp.c_proj.weight"] == "S(0)"
    assert found[f"{layer}mlp.c_fc.weight"] == "S(1)" and found[f"{layer}mlp.c_fc.bias"] == "S(0)"
