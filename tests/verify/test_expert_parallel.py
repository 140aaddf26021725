"""Experts split over an axis: tokens go to the ranks of their experts and back by all-to-all, whatever the routing."""

from __future__ import annotations

import pytest
import torch
from tests.program.support import only_stage
from torch import Tensor, nn
from torch.nn import functional as F

import shardwise as sw
from shardwise.planner.plan import Plan
from shardwise.program.program import Program
from shardwise.sharding.collectives import COLLECTIVES
from shardwise.verify.one_device import prepare
from shardwise.verify.verify import check_lowered, lowered

SAMPLES, GROUPS, TOKENS, WIDTH, EXPERTS, CAPACITY = 2, 4, 6, 8, 4, 3


class Experts(nn.Module):
    """Top-1 routing with a capacity, in groups of a sample's tokens (Lepikhin et al., GShard, 2020)."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.up = nn.Parameter(torch.randn(EXPERTS, WIDTH, 2 * WIDTH) / 3)
        self.down = nn.Parameter(torch.randn(EXPERTS, 2 * WIDTH, WIDTH) / 3)

    def forward(self, x: Tensor) -> Tensor:
        groups = x.reshape(SAMPLES * GROUPS, TOKENS, WIDTH)
        chances = self.gate(groups).softmax(-1)
        chosen = F.one_hot(chances.argmax(-1), EXPERTS)
        place = (chosen.cumsum(1) - 1) * chosen  # of each token in its expert's queue
        kept = chosen * (place < CAPACITY)
        slots = F.one_hot(place.clamp(max=CAPACITY - 1), CAPACITY) * kept[..., None]
        sent = torch.einsum("gtec,gtm->egcm", slots.to(x.dtype), groups)
        hidden = torch.einsum("egcm,emh->egch", sent, self.up).relu()
        made = torch.einsum("egch,ehm->egcm", hidden, self.down)
        back = torch.einsum("gtec,egcm->gtm", slots * chances[..., None], made)
        return back.reshape(x.shape)


class Layered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.experts, self.last = nn.Linear(WIDTH, WIDTH), Experts(), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        return self.last(hidden + self.experts(hidden)).square().mean()


def all_to_alls(program: Program) -> int:
    stage = only_stage(program)
    graphs = (stage.forward, stage.backward)
    return sum(COLLECTIVES.get(node.target) == "all_to_all" for graph in graphs for node in graph.nodes)  # type: ignore[call-overload]


@pytest.mark.parametrize(("ranks", "unused"), [(2, False), (4, False), (2, True)])
def test_tokens_go_to_their_experts_and_back(ranks: int, unused: bool) -> None:
    torch.manual_seed(0)
    model = Layered()
    if unused:  # all tokens take one expert: the others' ranks join in all the same
        with torch.no_grad():
            model.experts.gate.weight.zero_()
    batch = {"x": torch.randn(SAMPLES, GROUPS * TOKENS, WIDTH)}
    reference = prepare(model, batch)
    plan = sw.plan(model, batch, f"local:{ranks}", f"tp={ranks},microbatches=1")
    assert isinstance(plan, Plan)
    sends, up, down, back = [op.key for op in reference.graph.ops if op.name == "aten.einsum.default"]
    groups = f"g blocks={SAMPLES}"
    operators = plan.operators | {sends: groups, up: "e", down: "e", back: groups}
    parameters = plan.parameters | {"experts.up": "S(0)", "experts.down": "S(0)"}
    edited = plan.model_copy(update={"operators": operators, "parameters": parameters})
    built = lowered(reference, edited)
    report = check_lowered(reference, edited, built, processes=ranks == 4)
    assert report.ok, str(report)
    assert all(all_to_alls(program) >= 4 for program in built.programs.values())  # there and back, forward and backward
    assert report.differences and any("experts.up" in each.name for each in report.differences)
