"""The user's optimizer on shards."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from shardwise.errors import LayoutError
from shardwise.runtime.optimizer import is_elementwise, prefer_fused, refuse_unless_elementwise


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD])
def test_elementwise_optimizers_are_found_and_fused_to_the_same_numbers(kind: type[torch.optim.Optimizer]) -> None:
    assert is_elementwise(lambda parameters: kind(parameters, lr=1e-2))
    plain, fused = (nn.Parameter(torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(3, 4)) for _ in range(2))
    optimizers = kind([plain], lr=1e-2), prefer_fused(kind([fused], lr=1e-2))
    assert optimizers[1].param_groups[0]["fused"]
    for seed in range(3):
        gradient = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        plain.grad, fused.grad = gradient.clone(), gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(fused, plain, rtol=1e-13, atol=1e-15)


def test_what_the_user_chose_is_left_alone() -> None:
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(2))], lr=1e-2, foreach=True)
    assert not prefer_fused(optimizer).param_groups[0]["fused"]


def test_an_optimizer_of_whole_matrices_is_refused_on_shards() -> None:
    with pytest.raises(LayoutError, match=r"Adafactor does not treat each element alone.*tp=1"):
        refuse_unless_elementwise(lambda parameters: torch.optim.Adafactor([p for _, p in parameters], lr=1e-2))
