"""Training in 16 bits on real ranks: several steps, every parameter; overflows in fp16."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.clusters import made_up
from torch import Tensor, nn
from torch.nn import functional as F

import shardwise as sw
from shardwise.capture.export import compute_loss
from shardwise.capture.precision import Precision, in_precision
from shardwise.errors import NotFiniteError, RankFailed
from shardwise.planner.layout import Layout
from shardwise.runtime.launch import launch
from shardwise.runtime.scale import LossScale
from shardwise.runtime.weights import own_part

pytestmark = pytest.mark.distributed

STEPS, MICROBATCHES, SAMPLES, CLIP = 4, 4, 16, 0.2
SCALES = {"bf16": 1.0, "fp16": 1024.0}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Net(nn.Module):
    """With sizes that are powers of two: division by them is exact."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(32, 16), nn.LayerNorm(16)
        self.up, self.down, self.head = nn.Linear(16, 64), nn.Linear(64, 16), nn.Linear(16, 32, bias=False)

    def forward(self, tokens: Tensor, y: Tensor) -> Tensor:
        hidden = self.embed(tokens)
        hidden = hidden + self.down(F.gelu(self.up(self.norm(hidden))))
        return F.cross_entropy(self.head(hidden).flatten(0, 1), y.flatten())


def example() -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    return Net(), {"tokens": torch.randint(32, (SAMPLES, 8)), "y": torch.randint(32, (SAMPLES, 8))}


def adamw(pairs: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for _, p in pairs], lr=1e-2)


def momentum(pairs: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for _, p in pairs], lr=0.5, momentum=0.9)


def plain_loop(precision: Precision, scale: float) -> dict[str, Tensor]:
    """A 16-bit copy for each microbatch's passes, its gradients added up in float32, momentum on the float32 parameters."""
    model, batch = example()
    optimizer = momentum(model.named_parameters())
    for _ in range(STEPS):
        for part in range(MICROBATCHES):
            low, inputs = in_precision(model, {name: tensor.chunk(MICROBATCHES)[part] for name, tensor in batch.items()}, precision)
            (compute_loss(low, inputs, None, precision) * (scale / MICROBATCHES)).backward()
            for parameter, copy in zip(model.parameters(), low.parameters(), strict=True):
                assert copy.grad is not None and copy.dtype is not torch.float32
                parameter.grad = copy.grad.float() + (0 if parameter.grad is None else parameter.grad)
        for parameter in model.parameters():
            parameter.grad /= scale  # type: ignore[operator]
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def job_after_training(plan: sw.Plan) -> Any:
    model, batch = example()
    rule = LossScale(initial=SCALES[plan.precision]) if plan.precision == "fp16" else None
    job = sw.parallelize(model, batch, plan=plan, optimizer=momentum, clip_norm=CLIP, loss_scale=rule)
    for _ in range(STEPS):
        job.step(batch)
    assert job.skipped == 0 and job.grad_norm > CLIP
    assert {state.dtype for each in job.optimizers for kept in each.state.values() for state in kept.values()} == {torch.float32}
    return job


def one_rank(plan: sw.Plan) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in job_after_training(plan).parameters.of.items()}


def of_ranks(plan: sw.Plan, expected: dict[str, Tensor]) -> tuple[float, bool]:
    """The largest relative error of what this rank updates, and whether operators read that in 16 bits."""
    job = job_after_training(plan)
    errors, copies = [0.0], []
    for part in job.program.parameters:
        mine, other = job.parameters.of[part.name].detach(), own_part(expected[part.name], part.updated_part, job.program, job.device)
        errors += [((mine - other).norm() / other.norm()).item()] if other.numel() else []
        read = own_part(expected[part.name], part, job.program, job.device)
        wrong = (job.state[part.name].float() - read.float()).abs() > torch.finfo(part.dtype).eps * read.float().abs()
        copies.append(read.dtype is job.state[part.name].dtype and not wrong.any())
    return max(errors), all(copies)


def planned(layout: str, precision: Precision) -> sw.Plan:
    pinned = Layout.parse(layout)
    count = MICROBATCHES // pinned.mesh[0]
    plan = sw.plan(*example(), made_up(pinned.ranks), layout=f"{layout},microbatches={count}", precision=precision)
    assert isinstance(plan, sw.Plan)
    return plan


@pytest.fixture(scope="module")
def on_one_rank() -> dict[str, dict[str, Tensor]]:
    names: tuple[Precision, ...] = ("bf16", "fp16")
    return {name: launch(one_rank, (planned("dp=1", name),), ranks=1, timeout_s=60.0, threads=1)[0] for name in names}


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_one_rank_is_a_plain_loop(precision: Precision, on_one_rank: dict[str, dict[str, Tensor]]) -> None:
    """Its kernels round as often, but not all in the same place: updates differ by 16-bit roundings, parameters by far less."""
    expected, start = plain_loop(precision, SCALES[precision]), dict(example()[0].named_parameters())
    for name, found in on_one_rank[precision].items():
        moved = expected[name] - start[name].detach()
        assert (found - expected[name]).norm() < 4 * torch.finfo(DTYPES[precision]).eps * moved.norm(), name


LAYOUTS = ["dp=2,zero=1", "dp=2,zero=2", "dp=4,zero=3,shard=2", "dp=2,pp=2,zero=3,recompute=full"]
CASES = [*((layout, "bf16") for layout in LAYOUTS), ("dp=2,pp=2", "fp16"), ("dp=2,zero=3", "fp16")]


@pytest.mark.parametrize(("layout", "precision"), CASES)
def test_every_layout_is_as_one_rank(layout: str, precision: Precision, on_one_rank: dict[str, dict[str, Tensor]]) -> None:
    """Where activations are not summed over ranks: each microbatch is computed as on one, and all else is added up in float32."""
    plan = planned(layout, precision)
    for error, copied in launch(of_ranks, (plan, on_one_rank[precision]), ranks=plan.ranks, timeout_s=60.0):
        assert error < 1e-6 and copied


class Small(nn.Module):
    """Its gradients are far larger than its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)).float().pow(2).mean()


def overflowing(plan: sw.Plan, steps: int) -> tuple[list[int], list[float], list[bool], float]:
    torch.manual_seed(0)
    model, batch = Small(), {"x": torch.randn(8, 8)}
    job = sw.parallelize(model, batch, plan=plan, optimizer=adamw, loss_scale=LossScale(initial=2.0**22, interval=3))
    skipped, scales, moved = [], [], []
    for _ in range(steps):
        before = {name: parameter.detach().clone() for name, parameter in job.parameters.of.items()}
        assert job.step(batch) > 0
        skipped.append(job.skipped)
        scales.append(job.loss_scale)
        moved.append(any(not torch.equal(parameter, before[name]) for name, parameter in job.parameters.of.items()))
    return skipped, scales, moved, job.grad_norm


@pytest.mark.parametrize("layout", ["pp=2", "tp=2", "dp=2,zero=3"])
def test_steps_that_overflow_are_skipped_on_all_ranks_alike(layout: str) -> None:
    torch.manual_seed(0)
    plan = sw.plan(Small(), {"x": torch.randn(8, 8)}, made_up(2), layout=layout, precision="fp16")
    assert isinstance(plan, sw.Plan)
    found = launch(overflowing, (plan, 12), ranks=2, timeout_s=60.0, threads=1)
    skipped, scales, moved, norm = found[0]
    assert found[1][:2] == (skipped, scales) and found[1][3] == norm
    assert 0 < skipped[-1] < 12 and skipped[0] == 1 and not moved[0]
    assert [after > before for before, after in zip([0, *skipped], skipped, strict=False)] == [not each for each in moved]
    assert norm < 100, "unscaled"
    assert any(later > earlier for earlier, later in pairwise(scales)), "it grows again"


class Steep(nn.Module):
    """Its gradients do not fit 16 bits."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return (self.second(self.first(x)).float() * 1e6).abs().mean()


def steep(plan: sw.Plan) -> tuple[str, int]:
    torch.manual_seed(0)
    batch = {"x": torch.randn(8, 8)}
    job = sw.parallelize(Steep(), batch, plan=plan, optimizer=adamw, loss_scale=LossScale(initial=4.0))
    try:
        for _ in range(9):
            job.step(batch)
    except NotFiniteError as error:
        return str(error), job.steps
    return "", 0


def test_overflows_without_any_scaling_end_with_the_parameters_name() -> None:
    torch.manual_seed(0)
    plan = sw.plan(Steep(), {"x": torch.randn(8, 8)}, made_up(2), layout="pp=2,schedule=1f1b", precision="fp16")
    assert isinstance(plan, sw.Plan)
    for text, step in launch(steep, (plan,), ranks=2, timeout_s=60.0, threads=1):
        assert f"step {step}: gradients are not finite" in text and "rank 0: first.weight" in text
        assert step == 4, "at the scales 4, 2, 1 and 1"


def with_a_scale(plan: sw.Plan) -> None:
    sw.parallelize(*example(), plan=plan, optimizer=adamw, loss_scale=LossScale())


def test_a_scale_without_fp16_is_refused() -> None:
    plan = sw.plan(*example(), made_up(2), layout="dp=2", precision="bf16")
    assert isinstance(plan, sw.Plan)
    with pytest.raises(RankFailed, match="loss_scale has no effect with precision='bf16'"):
        launch(with_a_scale, (plan,), ranks=2, timeout_s=60.0, threads=1)


def with_a_state(plan: sw.Plan) -> tuple[float, float, Tensor, dict[str, Tensor], bool]:
    """The loss in eval mode at first and after two steps, what is predicted then, the model's whole state, and whether a job that starts
    from the state goes on as the one that it is of."""
    (model, batch), other = example(), example()[0]
    job = sw.parallelize(model, batch, plan=plan, optimizer=adamw)
    first = job.eval(batch)
    for _ in range(2):
        job.step(batch)
    shared: list[Any] = [job.state_dict()]
    dist.broadcast_object_list(shared, 0)
    state = shared[0]
    after, told = job.eval(batch), job.predict(batch)
    again = sw.parallelize(other, batch, plan=plan, optimizer=adamw)
    again.load_state_dict(state)
    same = again.eval(batch) == after and again.loss_scale == job.loss_scale
    for each in (job, again):
        for _ in range(2):
            each.step(batch)
    same &= all(torch.equal(parameter, again.parameters.of[name]) for name, parameter in job.parameters.of.items())
    again.load_state_dict(job.state_dict(sharded=True))
    same &= all(torch.equal(tensor, again.state[name]) for name, tensor in job.state.items())
    return first, after, told, state["model"], same


@pytest.mark.parametrize(
    ("layout", "precision"),
    [("dp=2", "bf16"), ("dp=2,zero=1", "bf16"), ("dp=2,zero=3", "bf16"), ("tp=2", "bf16"), ("pp=2", "fp16"), ("dp=2,zero=2", "fp16")],
)
def test_answers_and_states_of_16_bits(layout: str, precision: Precision) -> None:
    """States are the float32 parameters; answers are those of the model in 16 bits that they are copied to."""
    eps = torch.finfo(DTYPES[precision]).eps
    for first, after, told, state, same in launch(with_a_state, (planned(layout, precision),), ranks=2, timeout_s=60.0, threads=1):
        model, batch = example()
        assert state.keys() == model.state_dict().keys() and {each.dtype for each in state.values()} == {torch.float32}
        model.load_state_dict(state)
        low, inputs = in_precision(model.eval(), batch, precision)
        expected = compute_loss(low, inputs, None, precision).item()
        assert after == pytest.approx(expected, rel=eps) and told.float().item() == pytest.approx(expected, rel=eps)
        assert after < first * (1 - 4 * eps), "the two differ by more than is allowed"
        assert same


MODEL = """
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = torch.nn.Embedding(256, 16), torch.nn.Linear(16, 256)

    def forward(self, input_ids, labels):
        return torch.nn.functional.cross_entropy(self.head(self.embed(input_ids))[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

def model_and_batch():
    ids = torch.zeros(4, 16, dtype=torch.long)
    return Net(), {"input_ids": ids, "labels": ids}
"""


def test_the_command_trains_in_16_bits(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(MODEL)
    (tmp_path / "text.txt").write_text("the numbers are the same " * 200)
    namespace: dict[str, Any] = {}
    exec(MODEL, namespace)
    plan = sw.plan(*namespace["model_and_batch"](), made_up(2), layout="dp=2,zero=1", precision="bf16")
    assert isinstance(plan, sw.Plan)
    plan.save(tmp_path / "plan.json")
    command = [sys.executable, "-m", "shardwise", "train", "--model", "net.py:model_and_batch", "--data", "text.txt", "--steps", "5"]
    command += ["--plan", "plan.json", "--precision", "bf16", "--lr", "0.01", "--out", "out", "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["held_out_loss"] < lines[0]["held_out_loss"]
