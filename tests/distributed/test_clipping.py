"""The norm of all gradients, whatever the layout; clipping by it; steps that are not finite."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tests.clusters import made_up
from tests.models import Example, gpt2, mlp, unet

import shardwise as sw
from shardwise.errors import NotFiniteError, RankFailed
from shardwise.planner.layout import Layout
from shardwise.runtime.launch import launch

pytestmark = pytest.mark.distributed

MOST = 0.2
RATE = 0.1
MODELS: dict[str, Callable[[], Example]] = {"gpt2": lambda: gpt2(layers=2, samples=4), "mlp": mlp, "unet": unet}
CASES = [
    ("gpt2", "tp=2"),
    ("gpt2", "pp=2"),
    ("gpt2", "dp=2,microbatches=2"),
    ("gpt2", "dp=2,zero=1"),
    ("gpt2", "dp=2,zero=3,tp=2"),
    ("gpt2", "pp=2,chunks=2,schedule=interleaved,microbatches=2"),
    ("mlp", "dp=4,zero=2,shard=2"),
    ("mlp", "tp=3"),
    ("unet", "dp=2"),
]


def on_one_device(name: str) -> tuple[float, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Norm of the gradients, the parameters after a clipped step of SGD, and before it."""
    torch.manual_seed(0)
    model, batch = MODELS[name]()
    before = {each: parameter.detach().clone() for each, parameter in model.named_parameters()}
    output = model(**batch)
    loss = output if isinstance(output, torch.Tensor) else output["loss"] if isinstance(output, dict) else output.loss
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), MOST)
    torch.optim.SGD(model.parameters(), lr=RATE).step()
    return norm.item(), {each: parameter.detach() for each, parameter in model.named_parameters()}, before


def clipped(name: str, plan: sw.Plan) -> tuple[float, float]:
    """The norm, and Σ ‖parts of the update‖² over this rank ÷ copies."""
    torch.manual_seed(0)
    model, batch = MODELS[name]()
    job = sw.parallelize(model, batch, plan=plan, optimizer=lambda named: torch.optim.SGD([p for _, p in named], lr=RATE), clip_norm=MOST)
    before = {each: parameter.detach().clone() for each, parameter in job.parameters.trained}
    job.step(batch)
    after = dict(job.parameters.trained)
    return job.grad_norm, sum(((after[each] - old) ** 2).sum().item() / job.norm.copies[each] for each, old in before.items())


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_norm_and_clipping_are_those_of_one_device(name: str, layout: str) -> None:
    norm, after, before = on_one_device(name)
    assert norm > MOST, "there is something to clip"
    plan = sw.plan(*MODELS[name](), made_up(Layout.parse(layout).ranks), layout=layout)
    assert isinstance(plan, sw.Plan)
    found = launch(clipped, (name, plan), ranks=plan.ranks, timeout_s=60.0)
    assert [each[0] for each in found] == pytest.approx([norm] * plan.ranks, rel=1e-5)
    moved = sum(((after[each] - before[each]) ** 2).sum().item() for each in before) ** 0.5
    assert moved == pytest.approx(RATE * MOST, rel=1e-4)
    assert sum(each[1] for each in found) ** 0.5 == pytest.approx(moved, rel=1e-4)


def broken(plan: sw.Plan, where: str) -> tuple[str, bool]:
    """The error of a step with something not finite, and whether the parameters are as before."""
    torch.manual_seed(0)
    model, batch = mlp()
    job = sw.parallelize(model, batch, plan=plan, optimizer=lambda named: torch.optim.SGD([p for _, p in named], lr=RATE))
    job.step(batch)
    before = {each: parameter.detach().clone() for each, parameter in job.parameters.trained}
    if where == "gradient":
        job.gradients.reduce = lambda reduce=job.gradients.reduce: (reduce(), poisoned(job))[0]
    else:
        batch = {each: tensor * float("nan") if tensor.is_floating_point() else tensor for each, tensor in batch.items()}
    try:
        job.step(batch)
    except NotFiniteError as error:
        return str(error), all(torch.equal(parameter, before[each]) for each, parameter in job.parameters.trained)
    return "", False


def poisoned(job: sw.runtime.job.Job) -> None:  # type: ignore[name-defined]
    if torch.distributed.get_rank() == 1:
        next(iter(job.norm.parts.values())).view(-1)[0] = float("inf")


@pytest.mark.parametrize("where", ["gradient", "batch"])
def test_a_step_that_is_not_finite_ends_on_all_ranks_before_the_optimizer(where: str) -> None:
    plan = sw.plan(*mlp(), made_up(2), layout="dp=2")
    assert isinstance(plan, sw.Plan)
    for text, unchanged in launch(broken, (plan, where), ranks=2, timeout_s=60.0):
        assert "step 2" in text and "clip_norm" in text and unchanged
        assert where == "batch" or ("rank 1: " in text and "rank 0: " not in text)


def clipped_to_nothing(plan: sw.Plan) -> None:
    sw.parallelize(*mlp(), plan=plan, optimizer=lambda named: torch.optim.SGD([p for _, p in named], lr=RATE), clip_norm=0.0)


def test_a_norm_of_nothing_is_refused() -> None:
    plan = sw.plan(*mlp(), made_up(2), layout="dp=2")
    with pytest.raises(RankFailed, match=r"clipped to a norm of 0.0; give a number above 0"):
        launch(clipped_to_nothing, (plan,), ranks=2, timeout_s=60.0)
