"""Loads the code that a first training step would load lazily, so that memory measured afterwards is the model's."""

from __future__ import annotations

import torch
from torch import nn

from shardwise.capture.export import capture
from shardwise.program.trace import Tracer

__all__ = ["preload"]


class _Smallest(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x * self.weight).sum()


def preload() -> None:
    """Captures, traces and trains a model of one number: torch imports about 150 MB of itself at such first times."""
    model = _Smallest()
    batch = {"x": torch.zeros(1)}
    capture(model, batch)
    tracer = Tracer(device=torch.device("cpu"))
    tracer.forward(lambda tensors: tensors[0] * 2, "preload", [tracer.tensor([1], torch.float32)], [False])
    optimizer = torch.optim.AdamW(model.parameters())
    model(**batch).backward()
    optimizer.step()
