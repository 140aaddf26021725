"""The measure of error: ‖a − b‖ / max(‖b‖, 1e-3 · G), G the norm of all reference gradients.

Gradients that are zero in exact arithmetic (a key projection's bias) are all rounding; the second term keeps them from counting.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "FLOAT32_BOUND",
    "FLOAT64_BOUND",
    "TIMES_REFERENCE",
    "Difference",
    "compare_gradients",
    "gradient_norm",
    "loss_error",
    "relative_error",
]

FLOAT64_BOUND, FLOAT32_BOUND, TIMES_REFERENCE = 1e-10, 1e-5, 4.0  # docs/concepts/numbers.md
_FLOOR = 1e-3


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One compared quantity: its relative error, and the bound that it must keep."""

    name: str
    error: float
    bound: float

    @property
    def ok(self) -> bool:
        return self.error <= self.bound  # false for NaN


def gradient_norm(gradients: Mapping[str, Tensor]) -> float:
    """‖all gradients‖, in float64."""
    squares = [_norm(gradient) ** 2 for gradient in gradients.values()]
    return math.sqrt(sum(squares))


def loss_error(found: float, reference: float) -> float:
    """|found − reference| / |reference|."""
    return abs(found - reference) / max(abs(reference), 1e-300)


def relative_error(found: Tensor, reference: Tensor, scale: float) -> float:
    """‖found − reference‖ / max(‖reference‖, scale)."""
    size = max(_norm(reference), scale, 1e-300)
    return _norm(_wide(found) - _wide(reference)) / size


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(_wide(tensor)))


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def compare_gradients(
    found: Mapping[str, Tensor], reference: Mapping[str, Tensor], bound: float | Mapping[str, float], prefix: str
) -> list[Difference]:
    """Every reference gradient against what was found, in order."""
    floor = _FLOOR * gradient_norm(reference)
    return [
        Difference(
            name=f"{prefix}{name}",
            error=relative_error(found[name], expected, floor),
            bound=bound if isinstance(bound, float) else bound[name],
        )
        for name, expected in reference.items()
    ]
