"""Batches whose tensors stand in lists, tuples and dicts: named by their paths, split and verified like others."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import pytest
import torch
from tests.clusters import made_up
from torch import Tensor, nn

import shardwise as sw
from shardwise.capture.batch import dim_of, leaf_names, map_tensors, named_tensors
from shardwise.capture.export import capture
from shardwise.errors import BatchError, ShardwiseWarning
from shardwise.runtime.launch import launch


class Views(nn.Module):
    """Some views of each sample, conditions by name, of which one is the same for all, and a parameter that is named as an input is."""

    def __init__(self) -> None:
        super().__init__()
        self.views = nn.ParameterList([nn.Parameter(torch.randn(8))])
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, views: list[Tensor], cond: dict[str, Tensor | float], target: Tensor) -> Tensor:
        assert isinstance(views, list)
        hidden = sum(self.up(view * cond["scale"]).tanh() for view in views) * self.views[0] + cond["time"] @ cond["table"]
        return nn.functional.mse_loss(self.down(hidden), target)


def batch(samples: int = 4, dtype: torch.dtype = torch.float32) -> dict[str, object]:
    generator = torch.Generator().manual_seed(samples)

    def made(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype, generator=generator)

    cond = {"time": made(samples, 5), "table": made(5, 8), "scale": 0.5}
    return {"views": [made(samples, 6), made(samples, 6)], "cond": cond, "target": made(samples, 3)}


SHARED = {"cond.table": None}


def test_names_are_paths() -> None:
    given = {"a": (torch.zeros(1), 2), "b": {"c": [torch.ones(2)]}, "d": None}
    assert leaf_names(given) == ["a.0", "a.1", "b.c.0", "d"]
    assert list(named_tensors(given)) == ["a.0", "b.c.0"]
    named = map_tensors(lambda name, tensor: name, given)
    assert named == {"a": ("a.0", 2), "b": {"c": ["b.c.0"]}, "d": None}
    assert [dim_of(name, {"b": 1, "b.x": None}) for name in ("a.0", "b.c.0", "b.x")] == [0, 1, None]
    flat = named_tensors(given)
    assert named_tensors(flat).keys() == flat.keys()


def test_the_graph_has_an_input_for_each() -> None:
    torch.manual_seed(0)
    model = Views().double()
    given = batch(dtype=torch.float64)
    graph = capture(model, given, batch_dims=SHARED)
    assert set(graph.inputs) == {"views.0", "views.1", "cond.time", "cond.table", "target"}
    assert set(graph.batch_dims) == set(graph.inputs) - {"cond.table"}
    state = {name: each.detach().clone().requires_grad_() for name, each in model.named_parameters()}
    loss = graph.run(state, named_tensors(given))[graph.loss]
    wanted = torch.autograd.grad(model(**given), list(model.parameters()))
    for mine, own in zip(torch.autograd.grad(loss, list(state.values())), wanted, strict=True):
        torch.testing.assert_close(mine, own, rtol=1e-12, atol=1e-13)


def test_a_batch_dim_that_nothing_has_is_refused() -> None:
    with pytest.raises(BatchError, match=r"names \['cond.tables'\].*'cond.table'"):
        capture(Views(), batch(), batch_dims={"cond.tables": None})


@pytest.mark.parametrize("layout", ["dp=2", "tp=2", "pp=2", "dp=2,tp=2"])
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_every_layout_gives_the_same_numbers(layout: str, precision: str) -> None:
    torch.manual_seed(0)
    ranks = 4 if "," in layout else 2
    given = batch()
    report = sw.verify(Views(), given, cluster=made_up(ranks), layout=layout, batch_dims=SHARED, precision=precision, processes=False)
    assert report.ok, report


def trained(plan: sw.Plan) -> tuple[list[float], float, Tensor]:
    """A step on the whole batch, one on what each rank has read, and what is answered then; the loss for what is predicted."""
    torch.manual_seed(0)
    given = batch()
    job = sw.parallelize(Views(), given, plan=plan, optimizer=sgd, batch_dims=SHARED)
    mine = map_tensors(lambda name, tensor: tensor if name == "cond.table" else tensor[job.batch_slice], given)
    losses = [job.step(given), job.step(mine, local=True)]
    evaluated = job.eval(given)
    assert job.eval(mine, local=True) == pytest.approx(evaluated, rel=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ShardwiseWarning)  # rank 0 tells that it compiles for another shape
        assert job.eval(batch(2)) != evaluated
    return losses, evaluated, job.predict(given)


def sgd(named: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
    return torch.optim.SGD([parameter for _, parameter in named], lr=0.1)


@pytest.mark.distributed
def test_a_job_takes_such_batches() -> None:
    torch.manual_seed(0)
    model, given = Views(), batch()
    plan = sw.plan(model, given, made_up(2), "dp=2,microbatches=1", batch_dims=SHARED)
    optimizer = sgd(model.named_parameters())
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        losses.append(loss := model(**given))
        loss.backward()
        optimizer.step()
    for found, evaluated, predicted in launch(trained, (plan,), ranks=2, threads=1):
        assert found == pytest.approx([loss.item() for loss in losses], rel=1e-5)
        assert evaluated == pytest.approx(model(**given).item(), rel=1e-5) == predicted.item()


def test_more_samples_are_planned_for() -> None:
    plan = sw.plan(Views(), batch(), made_up(2), "dp=2", batch_dims=SHARED, global_batch=6)
    assert isinstance(plan, sw.Plan) and plan.global_batch == 6
