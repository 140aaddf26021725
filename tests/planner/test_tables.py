"""Tables kept whole on one rank each: which rank, and the same numbers as one device."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
from tests.clusters import made_up
from torch import Tensor, nn
from torch.nn import functional as F

import shardwise as sw
from shardwise.capture.export import capture
from shardwise.planner.apply import analyse
from shardwise.planner.tables import table_owners

Batch = dict[str, Tensor]
BatchDims = dict[str, int | None]


class Recommender(nn.Module):
    """Tables of the given numbers of rows, looked up once or in bags, and a linear layer over what they say."""

    def __init__(self, rows: tuple[int, ...], width: int, make: Callable[[int, int], nn.Module]) -> None:
        super().__init__()
        self.tables = nn.ModuleList(make(count, width) for count in rows)
        self.top = nn.Linear(width * len(rows), 1)

    def forward(self, categories: Tensor, clicked: Tensor) -> Tensor:
        found = [table(categories[:, i]) for i, table in enumerate(self.tables)]
        return F.binary_cross_entropy_with_logits(self.top(torch.cat(found, 1)).squeeze(1), clicked)


class BagsOfAnyLength(nn.Module):
    """Two tables whose bags lie behind one another in the indices."""

    starts: Tensor

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.first, self.second = nn.EmbeddingBag(9, 4, mode=mode), nn.EmbeddingBag(7, 4, mode=mode, padding_idx=2)
        self.register_buffer("starts", torch.tensor([0, 3, 3, 8]))

    def forward(self, categories: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(self.first(categories, self.starts) * self.second(categories, self.starts), target)


def clicks(rows: tuple[int, ...], bag: int = 0) -> Batch:
    torch.manual_seed(1)
    shape = (8, bag) if bag else (8,)
    return {"categories": torch.stack([torch.randint(0, count, shape) for count in rows], 1), "clicked": torch.rand(8)}


def with_whole_tables(model: nn.Module, batch: Batch, layout: str, ranks: int, batch_dims: BatchDims | None = None) -> sw.Plan:
    """The plan for the layout, its tables dealt out to the ranks of tp in turn by hand."""
    plan = sw.plan(model, batch, made_up(ranks), layout=layout, batch_dims=batch_dims)
    assert isinstance(plan, sw.Plan)
    graph = capture(model, batch, batch_dims=batch_dims)
    operators, parameters = dict(plan.operators), dict(plan.parameters)
    lookups = [op for op in graph.ops if "embedding" in op.name or "bag_of" in op.name]
    assert lookups
    for number, op in enumerate(lookups):
        owner = (number + 1) % plan.tp
        operators[op.key] = f"v owner={owner}"
        parameters[op.inputs[0].name] = f"S(0, owner={owner})"
    return plan.model_copy(update={"operators": operators, "parameters": parameters})


def bag(mode: str) -> Callable[[int, int], nn.Module]:
    return lambda rows, width: nn.EmbeddingBag(rows, width, mode=mode)


TABLES: dict[str, Callable[[int, int], nn.Module]] = {
    "looked up": lambda rows, width: nn.Embedding(rows, width, padding_idx=0),
    "gradients by frequency": lambda rows, width: nn.Embedding(rows, width, scale_grad_by_freq=True),
    **{f"bags, {mode}": bag(mode) for mode in ("sum", "mean", "max")},
}


@pytest.mark.parametrize("layout", ["tp=2", "tp=3", "dp=2,tp=2"])
@pytest.mark.parametrize("kind", TABLES)
def test_whole_tables_give_the_same_numbers(kind: str, layout: str) -> None:
    rows = (11, 7, 5, 4)
    torch.manual_seed(0)
    model, batch = Recommender(rows, 4, TABLES[kind]), clicks(rows, 3 if "bags" in kind else 0)
    ranks = {"tp=2": 2, "tp=3": 3, "dp=2,tp=2": 4}[layout]
    plan = with_whole_tables(model, batch, layout, ranks)
    report = sw.verify(model, batch, plan=plan, processes=False)
    assert report.ok, str(report)


@pytest.mark.parametrize("mode", ["sum", "max"])
def test_whole_tables_of_bags_that_are_runs(mode: str) -> None:
    torch.manual_seed(0)
    model = BagsOfAnyLength(mode)
    batch = {"categories": torch.randint(0, 7, (11,)), "target": torch.randn(4, 4)}
    dims: BatchDims = {"categories": None, "target": 0}
    plan = with_whole_tables(model, batch, "tp=2", 2, dims)
    report = sw.verify(model, batch, plan=plan, processes=False, batch_dims=dims)
    assert report.ok, str(report)


def test_whole_tables_on_processes() -> None:
    rows = (11, 7, 5, 4)
    torch.manual_seed(0)
    model, batch = Recommender(rows, 4, TABLES["bags, sum"]), clicks(rows, 3)
    report = sw.verify(model, batch, plan=with_whole_tables(model, batch, "tp=2", 2))
    assert report.ok, str(report)


# -- which rank --------------------------------------------------------------------------------------------------------------------------


def owners(rows: tuple[int, ...], ranks: int) -> dict[str, int]:
    model = Recommender(rows, 4, TABLES["looked up"])
    graph = capture(model, clicks(rows))
    found = table_owners(graph, analyse(graph, "keyed").signatures, ranks)
    return {op.inputs[0].name: rank for op, rank in found.items()}


@pytest.mark.parametrize(("rows", "ranks"), [((9, 8, 7, 6, 5), 2), ((9, 8, 7, 6, 5), 3), ((5, 5, 5, 5), 4), ((3, 1, 4, 1, 5, 9, 2, 6), 3)])
def test_tables_are_spread_evenly(rows: tuple[int, ...], ranks: int) -> None:
    placed = owners(rows, ranks)
    assert len(placed) == len(rows)
    held = [sum(rows[int(name.split(".")[1])] for name, rank in placed.items() if rank == each) for each in range(ranks)]
    assert max(held) == held[0], "the first rank is the fullest: what is predicted of it holds for all"
    dealings = product(range(ranks), repeat=len(rows))
    best = min(max(sum(n for n, r in zip(rows, dealt, strict=True) if r == each) for each in range(ranks)) for dealt in dealings)
    assert max(held) <= 4 / 3 * best


def test_a_table_larger_than_an_even_share_is_left_to_be_divided() -> None:
    assert set(owners((100, 8, 7, 6, 5), 2)) == {f"tables.{i}.weight" for i in range(1, 5)}


def test_too_few_tables_are_all_divided() -> None:
    assert owners((9, 8), 3) == {}


def test_a_table_that_is_also_a_head_stays_shared() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.places, self.kinds = nn.Embedding(8, 4), nn.Embedding(8, 4), nn.Embedding(8, 4)

        def forward(self, tokens: Tensor) -> Tensor:
            hidden = self.words(tokens) + self.places(tokens) + self.kinds(tokens)
            return F.cross_entropy(F.linear(hidden, self.words.weight), tokens)

    graph = capture(Tied(), {"tokens": torch.arange(8)})
    found = table_owners(graph, analyse(graph, "keyed").signatures, 2)
    assert sorted(op.inputs[0].name for op in found) == ["kinds.weight", "places.weight"]


# -- chosen ------------------------------------------------------------------------------------------------------------------------------


def test_narrow_tables_are_kept_whole_when_all_is_to_be_split() -> None:
    """Vectors of one number cannot be divided by columns, nor tables of one row by rows."""
    rows = (1,) * 6
    torch.manual_seed(0)
    model, batch = Recommender(rows, 1, TABLES["looked up"]), clicks(rows)
    plan = sw.plan(model, batch, made_up(2), layout="tp=2")
    assert isinstance(plan, sw.Plan)
    kept = [text for name, text in plan.parameters.items() if name.startswith("tables")]
    assert set(kept) == {"S(0, owner=0)", "S(0, owner=1)"}, plan.parameters
    report = sw.verify(model, batch, plan=plan, processes=False)
    assert report.ok, str(report)


@pytest.mark.parametrize(
    ("operator", "parameter", "message"),
    [
        ("v owner=5", "S(0, owner=1)", r"v cannot be on rank 5 alone: its ranks on tp=2 are 0 to 1"),
        ("h owner=1", "S(1)", r"h cannot be on rank 1 alone: only a table's rows can be"),
        ("v owner=1", "S(0, owner=7)", r"cannot be kept as S\(0, owner=7\) on tp=2: its ranks are 0 to 1"),
    ],
)
def test_edits_that_cannot_be(operator: str, parameter: str, message: str) -> None:
    rows = (11, 7)
    model, batch = Recommender(rows, 4, TABLES["looked up"]), clicks(rows)
    plan = with_whole_tables(model, batch, "tp=2", 2)
    names = [key for key, text in plan.operators.items() if "owner" in text][:1]
    edited = plan.model_copy(
        update={
            "operators": plan.operators | dict.fromkeys(names, operator),
            "parameters": plan.parameters | {"tables.0.weight": parameter},
        }
    )
    with pytest.raises(sw.PlanError, match=message):
        sw.verify(model, batch, plan=edited, processes=False)
