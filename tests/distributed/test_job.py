"""A job on real ranks: eval, predict, its state as one device would have it and back, hooks, batches that ranks read in parts."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.clusters import made_up
from tests.models import Example, gpt2
from torch import Tensor, nn

import shardwise as sw
from shardwise.data import Loader
from shardwise.errors import PlanError, ShardwiseWarning
from shardwise.planner.layout import Layout
from shardwise.runtime.launch import launch

pytestmark = pytest.mark.distributed


class Net(nn.Module):
    """BatchNorm, dropout, a parameter and a buffer that no operator reads."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.drop, self.last = nn.Linear(8, 16, bias=False), nn.BatchNorm1d(16), nn.Dropout(0.3), nn.Linear(16, 4)
        self.unread = nn.Parameter(torch.ones(3))
        self.register_buffer("noted", torch.arange(3.0))

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor | dict[str, Tensor]:
        scores = self.last(self.drop(self.norm(self.first(x)).relu()))
        return {"scores": scores} if y is None else {"loss": nn.functional.cross_entropy(scores, y), "scores": scores}


def net() -> Example:
    torch.manual_seed(0)
    return Net(), {"x": torch.randn(8, 8), "y": torch.randint(0, 4, (8,))}


def adamw(named: Any) -> torch.optim.Optimizer:
    named = dict(named)
    slow = [parameter for name, parameter in named.items() if "bias" in name]
    return torch.optim.AdamW(
        [{"params": [p for p in named.values() if all(p is not q for q in slow)]}, {"params": slow, "lr": 1e-3}], lr=1e-2
    )


def sgd(named: Any) -> torch.optim.Optimizer:
    """Gradients that are rounding alone (of a key's bias) stay as small as they are."""
    return torch.optim.SGD([parameter for _, parameter in named], lr=0.1, momentum=0.9)


def planned(example: Example, layout: str) -> sw.Plan:
    plan = sw.plan(*example, made_up(Layout.parse(layout).ranks), layout)
    assert isinstance(plan, sw.Plan), str(plan)
    return plan


MAKE = {"net": net, "gpt2": lambda: gpt2(layers=2, hidden=32, samples=8, sequence=16)}
OPTIMIZERS = {"net": adamw, "gpt2": sgd}


def trained(make: str, plan: sw.Plan, state: dict[str, Any] | None, steps: int) -> dict[str, Any]:
    model, batch = MAKE[make]()
    job = sw.parallelize(model, batch, plan=plan, optimizer=OPTIMIZERS[make], seed=5)
    seen: list[Any] = []
    job.on_step(seen.append)
    if state is not None:
        job.load_state_dict(state)
    losses = [job.step(batch) for _ in range(steps)]
    assert [step.loss for step in seen] == losses and all(step.time_s > 0 for step in seen)
    found = {"losses": losses, "numbers": [step.number for step in seen], "state": job.state_dict()}
    return found if make == "gpt2" else found | answered(job, batch)


def answered(job: Any, batch: dict[str, Tensor]) -> dict[str, Any]:
    small = {name: value[:3] for name, value in batch.items()}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        evaluated = [job.eval(batch), job.eval(small), job.eval(batch)]
    inputs = {name: value for name, value in batch.items() if name not in ("y", "labels")}
    return {
        "evaluated": evaluated,
        "warned": [str(each.message) for each in caught if each.category is ShardwiseWarning],
        "output": job.predict(inputs),
    }


def run(make: str, layout: str, state: dict[str, Any] | None = None, steps: int = 3) -> list[dict[str, Any]]:
    plan = planned(MAKE[make](), layout)
    return launch(trained, (make, plan, state, steps), ranks=plan.ranks, threads=1)


@pytest.mark.parametrize(
    "layout", ["dp=2,microbatches=1", "tp=2", "pp=2,microbatches=1", "dp=2,zero=1,microbatches=1", "dp=2,zero=3,microbatches=1"]
)
def test_training_evaluating_and_predicting_as_one_device(layout: str) -> None:
    model, batch = net()
    ranks = run("net", layout)
    alone = run("net", "dp=1,tp=1,pp=1,microbatches=1")[0]
    for rank in ranks:
        assert rank["losses"] == pytest.approx(alone["losses"], rel=1e-5) and rank["numbers"] == [1, 2, 3]
    state = ranks[0]["state"]
    assert all(rank["state"] == {} for rank in ranks[1:])
    model.load_state_dict(state["model"])  # every key, no more
    model.eval()
    with torch.no_grad():
        expected = [model(**batch)["loss"].item(), model(**{name: value[:3] for name, value in batch.items()})["loss"].item()]
        scores = model(batch["x"])["scores"]
    for rank in ranks:
        assert rank["evaluated"] == pytest.approx([*expected, expected[0]], rel=1e-5)
        torch.testing.assert_close(rank["output"]["scores"], scores, rtol=1e-4, atol=1e-5)
    assert [len(rank["warned"]) for rank in ranks] == [1, 0], "one rank warns"
    assert "another shape of batch and compiles for it: x [3, 8]" in ranks[0]["warned"][0]
    same_state(state, alone["state"])


def same_state(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one["model"].keys() == other["model"].keys()
    for name, tensor in other["model"].items():
        torch.testing.assert_close(one["model"][name], tensor, rtol=1e-4, atol=1e-5, msg=name)
    assert one["optimizer"]["groups"] == other["optimizer"]["groups"]
    assert one["optimizer"]["state"].keys() == other["optimizer"]["state"].keys()
    for name, kept in other["optimizer"]["state"].items():
        for key, value in kept.items():
            torch.testing.assert_close(one["optimizer"]["state"][name][key], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("tp=2", "dp=2,zero=1,microbatches=1"),
        ("dp=2,zero=3,microbatches=1", "pp=2,microbatches=2"),
    ],
)
def test_training_goes_on_in_another_layout(first: str, second: str) -> None:
    """Tied weights; 2 steps, then 2 more from the whole state, are 4 steps of one device."""
    alone = run("gpt2", "dp=1,tp=1,pp=1,microbatches=1", steps=4)[0]
    state = run("gpt2", first, steps=2)[0]["state"]
    assert state["steps"] == 2 and state["model"]["lm_head.weight"].shape == state["model"]["transformer.wte.weight"].shape
    ranks = run("gpt2", second, state, steps=2)
    assert [rank["losses"] for rank in ranks] == [pytest.approx(alone["losses"][2:], rel=1e-4)] * len(ranks)
    assert ranks[0]["numbers"] == [3, 4]
    same_state(ranks[0]["state"], alone["state"])
    del state["model"]["transformer.h.0.attn.c_attn.weight"]
    with pytest.raises(sw.RankFailed, match=r"PlanError: the state lacks transformer\.h\.0\.attn\.c_attn\.weight"):
        run("gpt2", "tp=2", state)


def compiled(plan: sw.Plan) -> tuple[float, Any, dict[str, Any], list[str]]:
    model, batch = net()
    job = sw.parallelize(model, batch, plan=plan, optimizer=sgd, seed=5, compile=True)
    job.step(batch)
    evaluated, output = job.eval(batch), job.predict({"x": batch["x"]})
    return evaluated, output["scores"], job.state_dict(), [region.where for region in job.compiler.regions if not region.kept]


@pytest.mark.slow
def test_eval_mode_is_compiled_where_training_is() -> None:
    """The same numbers to rounding, and the job says what was compiled."""
    model, batch = net()
    ranks = launch(compiled, (planned((model, batch), "dp=2,microbatches=1"),), ranks=2, threads=1)
    model.load_state_dict(ranks[0][2]["model"])
    model.eval()
    with torch.no_grad():
        whole = model(**batch)
    for evaluated, scores, _, regions in ranks:
        assert evaluated == pytest.approx(whole["loss"].item(), rel=1e-5)
        torch.testing.assert_close(scores, whole["scores"], rtol=1e-4, atol=1e-5)
        assert {where.endswith(" in eval mode") for where in regions} == {True, False}


def in_parts(plan: sw.Plan) -> tuple[list[float], float, list[float], str]:
    """Steps and an evaluation on batches of which each rank reads its own samples; then a rank's own state put back; a refused one."""
    model, example = net()
    generator = torch.Generator().manual_seed(3)
    data = [{"x": torch.randn(8, generator=generator), "y": torch.randint(0, 4, (), generator=generator)} for _ in range(27)]
    job = sw.parallelize(model, example, plan=plan, optimizer=adamw, seed=5)
    loader = Loader(data, 8, part=job.batch_slice, seed=1)
    losses = [job.step(batch, local=True) for batch in loader]
    own = job.state_dict(sharded=True)
    own = own | {"model": {name: tensor.clone() for name, tensor in own["model"].items()}}
    own["optimizer"] = own["optimizer"] | {
        "state": {name: {k: v.clone() for k, v in kept.items()} for name, kept in own["optimizer"]["state"].items()}
    }
    batches = [job.eval(batch, local=True) for batch in Loader(data, 8, part=job.batch_slice, shuffle=False, drop_last=False)]
    first = job.step(example)
    job.load_state_dict(own)
    again = job.step(example)
    try:
        job.load_state_dict(own | {"layout": "tp=64"})
    except PlanError as error:
        return losses, sum(batches), [first, again], str(error)
    raise AssertionError("a state of another layout was taken")


@pytest.mark.filterwarnings("ignore::shardwise.errors.ShardwiseWarning")
def test_each_rank_reads_its_own_samples() -> None:
    (alone,) = launch(in_parts, (planned(net(), "dp=1,tp=1,pp=1,microbatches=1"),), ranks=1)
    for layout in ("dp=2,microbatches=1", "dp=2,pp=2,zero=1,microbatches=1", "shares=3:1,tp=1,pp=1,microbatches=1"):
        plan = planned(net(), layout)
        for losses, evaluated, (first, again), message in launch(in_parts, (plan,), ranks=plan.ranks, threads=1):
            assert losses == pytest.approx(alone[0], rel=1e-5) and evaluated == pytest.approx(alone[1], rel=1e-5)
            assert first == again
            assert "layout='tp=64'" in message and "any layout loads" in message


class Asking(nn.Module):
    """A submodule whose control flow depends on values is kept as one operator: capturing it needs values."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.clipped, self.last = nn.Linear(8, 16), nn.BatchNorm1d(16), Clipped(), nn.Linear(16, 4)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        scores = self.last(self.clipped(self.norm(self.first(x))))
        return scores if y is None else nn.functional.cross_entropy(scores, y)


class Clipped(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        norm = x.norm()
        return x if norm < 8 else x * (8 / norm)


def asking() -> Example:
    torch.manual_seed(0)
    return Asking(), net()[1]


def stated(make: Callable[[], Example], plan: sw.Plan, built_here: bool) -> tuple[float, Tensor, dict[str, Tensor]]:
    model, batch = make()
    job = sw.parallelize((lambda: make()[0]) if built_here else model, batch, plan=plan, optimizer=sgd)
    for _ in range(2):
        job.step(batch)
    output = job.predict({"x": batch["x"]})
    return job.eval(batch), output["scores"] if isinstance(output, dict) else output, job.state_dict().get("model", {})


@pytest.mark.parametrize(("make", "built_here"), [(asking, False), (net, True)], ids=["kept code", "no rank holds the model"])
def test_models_whose_values_are_elsewhere(make: Callable[[], Example], built_here: bool) -> None:
    """Capturing in eval mode, which reads buffers and parameters that the rank has given away or never had."""
    model, batch = make()
    ranks = launch(stated, (make, planned((model, batch), "tp=2"), built_here), ranks=2, threads=1)
    model.load_state_dict(ranks[0][2])
    model.eval()
    with torch.no_grad():
        loss, output = model(**batch), model(batch["x"])
    for found, scores, _ in ranks:
        assert found == pytest.approx((loss["loss"] if isinstance(loss, dict) else loss).item(), rel=1e-5)
        torch.testing.assert_close(scores, output["scores"] if isinstance(output, dict) else output, rtol=1e-4, atol=1e-5)


class Masked(nn.Module):
    """What it does depends on whether all of the batch's samples are valid, which a data rank alone cannot know."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        scores = self.layer(x)
        return scores.square().mean() if valid.all() else scores.abs().mean()


def masked() -> Example:
    torch.manual_seed(0)
    return Masked(), {"x": torch.randn(4, 4), "valid": torch.ones(4, dtype=torch.bool)}


def asked_in_parts(plan: sw.Plan) -> list[str]:
    model, batch = masked()
    job = sw.parallelize(model, batch, plan=plan, optimizer=sgd)
    found = []
    for valid in ([True] * 4, [True, True, True, False], [False, True, True, True]):
        part = {"x": batch["x"][job.batch_slice], "valid": torch.tensor(valid)[job.batch_slice]}
        for run in (job.step, job.eval):
            try:
                found.append(f"{run(part, local=True):.3f}")
            except sw.BatchError as error:
                found.append(str(error))
    return found


def test_the_models_questions_are_asked_of_the_whole_batch() -> None:
    for first, second, *refused in launch(asked_in_parts, (planned(masked(), "dp=2,microbatches=1"),), ranks=2, threads=1):
        assert float(first) > 0 and float(second) > 0
        assert len(refused) == 4 and all("asks for a value of the batch that was 1" in each and "is 0 now" in each for each in refused)
