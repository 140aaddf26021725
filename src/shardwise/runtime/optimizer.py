"""The user's optimizer on a rank's parts: whether it may run on shards (it must treat every element alone), and its fastest form."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn

from shardwise.errors import LayoutError

__all__ = ["is_elementwise", "prefer_fused", "refuse_unless_elementwise"]

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
            "use an elementwise optimizer (Adam, AdamW, SGD, …) or a layout with tp=1 and zero=0"
        )


_FUSED = (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD)


def prefer_fused(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Lets torch's own Adam, AdamW and SGD run as one kernel over each parameter where the user left that open (foreach and fused None).

    The numbers are the same to rounding; on a CPU a step takes a third of the time. Must come before the first step.
    """
    if type(optimizer) in _FUSED:
        for group in optimizer.param_groups:
            real = all(parameter.is_floating_point() for parameter in group["params"])
            plain = not group.get("capturable") and not group.get("differentiable")
            if group.get("foreach") is None and group.get("fused") is None and real and plain:
                group["fused"] = True
    return optimizer
