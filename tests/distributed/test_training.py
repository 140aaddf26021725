"""Several steps of training on real ranks, in float64: every parameter as on one device, whatever the optimizers, groups and schedules."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tests.clusters import made_up
from torch import Tensor, nn
from torch.nn import functional as F

import shardwise as sw
from shardwise.errors import RankFailed
from shardwise.planner.layout import Layout
from shardwise.runtime.launch import launch
from shardwise.runtime.weights import own_part

pytestmark = pytest.mark.distributed

STEPS = 4
Pairs = Iterable[tuple[str, nn.Parameter]]


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(3 * width, width, bias=False)
        nn.init.normal_(self.norm.bias)  # else gradients of `up` lack a rank, and have no single orthogonal factor

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Net(nn.Module):
    """Frozen: the table, and one norm; or, for `trained="head"`, all but the head."""

    def __init__(self, trained: str = "") -> None:
        super().__init__()
        width = 12
        self.embed, self.layers, self.head = nn.Embedding(30, width), nn.ModuleList(Block(width) for _ in range(3)), nn.Linear(width, 20)
        for name, parameter in self.named_parameters():
            parameter.requires_grad = name.startswith(trained) if trained else not name.startswith(("embed", "layers.0.norm"))

    def forward(self, tokens: Tensor, y: Tensor) -> Tensor:
        hidden = self.embed(tokens)
        for layer in self.layers:
            hidden = layer(hidden)
        return F.cross_entropy(self.head(hidden).flatten(0, 1), y.flatten())


def example(trained: str = "") -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = Net(trained).double()
    return model, {"tokens": torch.randint(30, (8, 5)), "y": torch.randint(20, (8, 5))}


class Orthogonal(torch.optim.Optimizer):
    """Steps along U Vᵀ of the momentum, computed exactly: Muon without its 16-bit iterations."""

    def __init__(self, parameters: Iterable[Any], lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for each in group["params"]:
                if each.grad is not None:
                    momentum = self.state[each].setdefault("momentum", torch.zeros_like(each)).mul_(0.9).add_(each.grad)
                    u, _, v = torch.linalg.svd(momentum, full_matrices=False)
                    each.sub_(u @ v, alpha=group["lr"])


def groups(pairs: Pairs) -> list[dict[str, Any]]:
    """No decay of vectors, and a learning rate of their own; the head's own group."""
    every = list(pairs)
    return [
        {"params": [p for name, p in every if p.ndim > 1 and name != "head.weight"], "weight_decay": 0.3},
        {"params": [p for name, p in every if p.ndim < 2], "weight_decay": 0.0, "lr": 3e-2},
        {"params": [p for name, p in every if name == "head.weight"], "weight_decay": 0.1, "betas": (0.5, 0.6)},
    ]


def matrices(pairs: Pairs, kind: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> list[torch.optim.Optimizer]:
    """One optimizer for the layers' matrices, AdamW for the rest."""
    every = list(pairs)
    chosen = [p for name, p in every if p.ndim == 2 and name.startswith("layers")]
    return [kind(chosen), torch.optim.AdamW([p for name, p in every if p.ndim != 2 or not name.startswith("layers")], lr=1e-2)]


@dataclass(frozen=True)
class Way:
    """How parameters are updated. bound: on the largest relative error of a parameter after all steps."""

    make: Callable[[Pairs], Any]
    schedule: Callable[[torch.optim.Optimizer], Any]
    clip: float | None = None
    bound: float = 1e-10


def steps(rates: Callable[[int], float]) -> Callable[[torch.optim.Optimizer], Any]:
    return lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, rates)


WAYS = {
    "groups, one cycle": Way(
        lambda pairs: torch.optim.AdamW(groups(pairs), lr=1e-2),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=[2e-2, 3e-2, 1e-2], total_steps=STEPS + 1),
        clip=0.1,
    ),
    "momentum, warm-up then decay": Way(
        lambda pairs: torch.optim.SGD(groups(pairs), lr=1e-1, momentum=0.9),
        lambda o: torch.optim.lr_scheduler.SequentialLR(
            o,
            [torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=2), torch.optim.lr_scheduler.ExponentialLR(o, 0.5)],
            milestones=[2],
        ),
    ),
    "adafactor": Way(lambda pairs: torch.optim.Adafactor([p for _, p in pairs], lr=1e-2), steps(lambda step: 1 / (1 + step))),
    "exact muon, adamw": Way(lambda pairs: matrices(pairs, lambda chosen: Orthogonal(chosen, lr=1e-2)), steps(lambda step: 0.5**step)),
    "muon, adamw": Way(
        lambda pairs: matrices(pairs, lambda chosen: torch.optim.Muon(chosen, lr=1e-2)), steps(lambda step: 0.5**step), bound=1e-3
    ),
}
LAYOUTS = [
    "tp=2",
    "tp=3",
    "pp=2,microbatches=2",
    "dp=2,zero=1",
    "dp=2,tp=2,zero=3",
    "dp=2,pp=2,zero=2,microbatches=2",
    "dp=4,zero=3,shard=2,recompute=full",
]


def on_one_device(way: Way, trained: str) -> dict[str, Tensor]:
    model, batch = example(trained)
    made = way.make([(name, p) for name, p in model.named_parameters() if p.requires_grad])
    optimizers = made if isinstance(made, list) else [made]
    schedules = [way.schedule(each) for each in optimizers]
    for _ in range(STEPS):
        model(**batch).backward()
        if way.clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), way.clip)
        for each in (*optimizers, *schedules):
            each.step()
        model.zero_grad()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def errors(plan: sw.Plan, names: list[str], trained: str) -> dict[str, float]:
    """Way → the largest relative error of this rank's parts of parameters."""
    found = {}
    for name in names:
        way, (model, batch) = WAYS[name], example(trained)
        job = sw.parallelize(model, batch, plan=plan, optimizer=way.make, clip_norm=way.clip)
        schedules = [way.schedule(each) for each in job.optimizers]
        for _ in range(STEPS):
            job.step(batch)
            for each in schedules:
                each.step()
        expected = on_one_device(way, trained)
        parts = [(job.state[part.name], own_part(expected[part.name], part, job.program, job.device)) for part in job.program.parameters]
        found[name] = max(((one - other).norm() / other.norm().clamp(min=1e-3)).item() for one, other in parts if other.numel())
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_parameter_is_as_on_one_device(layout: str) -> None:
    plan = sw.plan(*example(), made_up(Layout.parse(layout).ranks), layout=layout)
    assert isinstance(plan, sw.Plan)
    for found in launch(errors, (plan, list(WAYS), ""), ranks=plan.ranks, timeout_s=60.0):
        assert all(error <= WAYS[name].bound for name, error in found.items()), found


@pytest.mark.parametrize("layout", ["pp=3,microbatches=2", "pp=2", "dp=2,zero=3", "tp=2"])
def test_all_but_the_head_may_be_frozen(layout: str) -> None:
    """Stages without anything to train have nothing to send back, and an optimizer all the same."""
    plan = sw.plan(*example("head"), made_up(Layout.parse(layout).ranks), layout=layout)
    assert isinstance(plan, sw.Plan)
    for found in launch(errors, (plan, ["groups, one cycle", "adafactor"], "head"), ranks=plan.ranks, timeout_s=60.0):
        assert all(error <= WAYS[name].bound for name, error in found.items()), found


def with_lbfgs(plan: sw.Plan) -> None:
    sw.parallelize(*example(), plan=plan, optimizer=lambda pairs: torch.optim.LBFGS([p for _, p in pairs]))


class ByAllNorms(torch.optim.SGD):
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        torch.nn.utils.clip_grad_norm_([p for group in self.param_groups for p in group["params"] if p.grad is not None], 1.0)
        super().step()


def with_all_norms(plan: sw.Plan) -> None:
    sw.parallelize(*example(), plan=plan, optimizer=lambda pairs: ByAllNorms([p for _, p in pairs], lr=1.0))


@pytest.mark.parametrize(
    ("rank", "layout", "match"),
    [
        (with_lbfgs, "dp=2", r"LBFGS cannot be used"),
        (with_all_norms, "pp=2", r"depends on the gradients of other parameters.*pass clip_norm"),
        (with_all_norms, "dp=2,zero=1", r"depends on the gradients of other parameters.*Use dp alone"),
    ],
)
def test_what_cannot_give_the_same_numbers_is_refused(rank: Callable[[sw.Plan], None], layout: str, match: str) -> None:
    plan = sw.plan(*example(), made_up(2), layout=layout)
    assert isinstance(plan, sw.Plan)
    with pytest.raises(RankFailed, match=match):
        launch(rank, (plan,), ranks=2, timeout_s=60.0)


def with_both(plan: sw.Plan) -> str:
    job = sw.parallelize(*example(), plan=plan, optimizer=WAYS["exact muon, adamw"].make)
    owned = sum(job.whole.of[name].grad is None and job.whole.of[name].numel() == 0 for name in job.whole.of)
    assert owned == len(job.whole.of), "nothing is kept of what is gathered"
    with pytest.raises(sw.errors.LayoutError, match=r"2 optimizers \(Orthogonal, AdamW\): take one of job.optimizers"):
        _ = job.optimizer
    return ",".join(sorted(job.whole.of))


def test_each_rank_owns_about_as_much() -> None:
    plan = sw.plan(*example(), made_up(2), layout="dp=2,zero=1")
    assert isinstance(plan, sw.Plan)
    owned = [set(text.split(",")) for text in launch(with_both, (plan,), ranks=2, timeout_s=60.0)]
    assert not owned[0] & owned[1] and len(owned[0]) == len(owned[1]) == 3
