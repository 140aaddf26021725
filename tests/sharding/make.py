"""Random tensors for sample calls, the same in every run."""

from __future__ import annotations

import torch
from torch import Tensor

_generator = torch.Generator()


def seed() -> None:
    """Starts over."""
    _generator.manual_seed(0)


def x(*shape: int) -> Tensor:
    """Normal numbers in float64."""
    return torch.randn(shape, dtype=torch.float64, generator=_generator)


def positive(*shape: int) -> Tensor:
    return x(*shape).abs() + 0.5


def unit(*shape: int) -> Tensor:
    """Between 0.1 and 0.9."""
    return torch.rand(shape, dtype=torch.float64, generator=_generator) * 0.8 + 0.1


def complex_numbers(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.complex128, generator=_generator)


def ints(high: int, *shape: int) -> Tensor:
    return torch.randint(0, high, shape, generator=_generator)


def bools(*shape: int) -> Tensor:
    """The first is true, the last (of several) false."""
    found = torch.rand(shape, generator=_generator) > 0.4
    found.view(-1)[-1] = False
    found.view(-1)[0] = True
    return found


def distinct(high: int, *shape: int) -> Tensor:
    """Whole numbers below `high`, none twice along the last dim."""
    return torch.rand((*shape[:-1], high), generator=_generator).argsort(-1)[..., : shape[-1]]
