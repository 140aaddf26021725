"""Which optimizers may run on shards: those that treat every element alone, found by trying."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn

from shardwise.errors import LayoutError

__all__ = ["is_elementwise", "refuse_unless_elementwise"]

Factory = Callable[[Iterable[tuple[str, nn.Parameter]]], torch.optim.Optimizer]


def is_elementwise(factory: Factory) -> bool:
    """Whether three steps on two halves of a matrix give the same numbers as on the whole, in float64."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(6, 4, dtype=torch.float64, generator=generator)
    gradients = [torch.randn(6, 4, dtype=torch.float64, generator=generator) for _ in range(3)]
    whole = _run(factory, start, gradients)
    for dim, size in ((0, 3), (1, 2)):
        halves = [_run(factory, start.narrow(dim, i * size, size), [g.narrow(dim, i * size, size) for g in gradients]) for i in range(2)]
        if not torch.allclose(torch.cat(halves, dim), whole, rtol=1e-12, atol=1e-14):
            return False
    return True


def _run(factory: Factory, start: torch.Tensor, gradients: list[torch.Tensor]) -> torch.Tensor:
    parameter = nn.Parameter(start.clone())
    optimizer = factory([("probe", parameter)])
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter.detach()


def refuse_unless_elementwise(factory: Factory) -> None:
    """Raises LayoutError for an optimizer that needs whole matrices."""
    name = type(factory([("probe", nn.Parameter(torch.zeros(2, 2)))])).__name__
    if not is_elementwise(factory):
        raise LayoutError(
            f"{name} does not treat each element alone: on the shards of a split parameter it gives other numbers than on the whole; "
            "use an elementwise optimizer (Adam, AdamW, SGD, …) or a layout with tp=1"
        )
