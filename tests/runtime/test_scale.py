"""The scale of the loss, step by step as torch's own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from shardwise.errors import LayoutError
from shardwise.runtime.scale import LossScale, Scaler


@pytest.mark.parametrize("seed", range(4))
def test_it_goes_as_torchs_grad_scaler(seed: int) -> None:
    rule = LossScale(initial=64.0, growth=4.0, backoff=0.25, interval=3)
    theirs = torch.amp.GradScaler("cpu", init_scale=64.0, growth_factor=4.0, backoff_factor=0.25, growth_interval=3)
    ours = Scaler(rule)
    parameter = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    skipped = 0
    for draw in torch.rand(60, generator=torch.Generator().manual_seed(seed)).tolist():
        overflows = draw < 0.2 and ours.scale > 4  # torch's scale has no least value
        before = parameter.detach().clone()
        theirs.scale(parameter.sum() * (float("inf") if overflows else 1.0)).backward()
        theirs.step(optimizer)
        theirs.update()
        optimizer.zero_grad()
        skipped += torch.equal(before, parameter)
        ours.judge(overflows)
        assert ours.scale == theirs.get_scale()
    assert ours.skipped == skipped > 0


def test_it_does_not_fall_below_one_and_is_exhausted_then() -> None:
    scaler = Scaler(LossScale(initial=2.0))
    seen = []
    for _ in range(3):
        scaler.judge(True)
        seen.append((scaler.scale, scaler.exhausted))
    assert seen == [(1.0, False), (1.0, False), (1.0, True)]
    scaler.judge(False)
    assert not scaler.exhausted and scaler.skipped == 3


@pytest.mark.parametrize("wrong", [{"initial": 0.5}, {"growth": 0.5}, {"backoff": 1.0}, {"interval": 0}])
def test_numbers_that_cannot_scale_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(LayoutError, match="cannot scale losses"):
        LossScale(**wrong)  # type: ignore[arg-type]
