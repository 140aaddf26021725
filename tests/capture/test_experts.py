"""Mixtures of experts, however they are written, become products in which each row names its matrix; with the same numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shardwise.capture.experts import expert_mm
from shardwise.capture.export import capture

EXPERTS, HIDDEN, INNER, CHOSEN = 4, 6, 10, 2


def test_each_row_meets_its_own_matrix() -> None:
    x = torch.randn(9, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True)
    expert = torch.tensor([3, 0, -1, 3, 1, 4, 0, 9, 3])  # none of them meets 2; -1, 4 and 9 do not exist
    wanted = torch.stack(
        [x[row] @ weight[number] if 0 <= number < 4 else torch.zeros(5).double() for row, number in enumerate(expert.tolist())]
    )
    found = expert_mm(x, weight, expert)
    assert torch.allclose(found, wanted)
    seed = torch.randn_like(found)
    for one, other in zip(torch.autograd.grad(found, (x, weight), seed), torch.autograd.grad(wanted, (x, weight), seed), strict=True):
        assert torch.allclose(one, other)


class Experts(nn.Module):
    """Two layers for each expert, with biases; the `CHOSEN` best experts of each token are added up by their scores."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.router = nn.Linear(HIDDEN, EXPERTS)
        self.up = nn.Parameter(torch.randn(EXPERTS, 2 * INNER, HIDDEN) / 3)
        self.up_bias = nn.Parameter(torch.randn(EXPERTS, 2 * INNER))
        self.down = nn.Parameter(torch.randn(EXPERTS, INNER, HIDDEN) / 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, HIDDEN)
        scores, chosen = self.router(tokens).softmax(-1).topk(CHOSEN, -1)
        result = getattr(self, self.form)(tokens, scores.reshape(-1), chosen.reshape(-1))
        return (x + result.view(len(tokens), CHOSEN, HIDDEN).sum(1).view(x.shape)).square().mean()

    def inner(self, x: Tensor, bias: Tensor) -> Tensor:
        gate, value = (x + bias).chunk(2, dim=-1)
        return F.silu(gate) * value

    def batched(self, tokens: Tensor, scores: Tensor, chosen: Tensor) -> Tensor:
        rows = tokens.repeat_interleave(CHOSEN, 0)
        inner = self.inner(torch.bmm(self.up[chosen], rows.unsqueeze(-1)).squeeze(-1), self.up_bias[chosen])
        return torch.bmm(inner.unsqueeze(1), self.down[chosen]).squeeze(1) * scores.unsqueeze(-1)

    def grouped(self, tokens: Tensor, scores: Tensor, chosen: Tensor) -> Tensor:
        experts, order = torch.sort(chosen)
        rows, own_scores = tokens[order // CHOSEN], scores[order]
        ends = torch.histc(experts.float(), EXPERTS, 0, EXPERTS - 1).cumsum(0, dtype=torch.int32)
        product = torch.ops.transformers.grouped_mm_fallback
        inner = self.inner(product(rows, self.up.transpose(-2, -1), ends), self.up_bias[experts])
        weighted = product(inner, self.down, ends) * own_scores.unsqueeze(-1)
        back = torch.empty_like(order)
        back[order] = torch.arange(order.shape[0])
        return weighted[back]


@pytest.mark.parametrize("form", ["batched", "grouped"])
def test_the_forms_of_experts_are_one(form: str) -> None:
    pytest.importorskip("transformers.integrations.moe")
    torch.manual_seed(0)
    model, x = Experts(form), torch.randn(3, 5, HIDDEN)
    graph = capture(model, {"x": x})
    names = [op.name for op in graph.ops]
    assert names.count("shardwise.expert_mm") == 2
    assert not {"aten.sort.default", "aten.bmm.default", "aten.histc.default", "aten.index_put.default"} & set(names)
    parameters = dict(model.named_parameters())
    loss = graph.run(parameters, {"x": x})[graph.loss]
    wanted = model(x)
    assert torch.allclose(loss, wanted, rtol=1e-5)
    own = torch.autograd.grad(loss, parameters.values())
    for name, found, expected in zip(parameters, own, torch.autograd.grad(wanted, parameters.values()), strict=True):
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5), name


def test_rows_that_stay_sorted_keep_their_groups() -> None:
    pytest.importorskip("transformers.integrations.moe")

    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, HIDDEN, 2))

        def forward(self, x: Tensor, ends: Tensor) -> Tensor:
            product: Tensor = torch.ops.transformers.grouped_mm_fallback(x, self.weight, ends)
            return product.square().sum()

    model, x, ends = Grouped(), torch.randn(8, HIDDEN), torch.tensor([2, 2, 7])
    graph = capture(model, {"x": x, "ends": ends}, batch_dims={"ends": None})
    assert [op.name for op in graph.ops][:2] == ["shardwise.group_of_row", "shardwise.expert_mm"]
    loss = graph.run(dict(model.named_parameters()), {"x": x, "ends": ends})[graph.loss]
    assert torch.allclose(loss, model(x, ends))
