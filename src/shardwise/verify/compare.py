"""The measure of error: ‖a − b‖ / max(‖b‖, 1e-3 · G), G the norm of all reference gradients.

Gradients that are zero in exact arithmetic (a key projection's bias) are all rounding; the second term keeps them from counting.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Difference", "compare_gradients", "gradient_norm", "relative_error"]

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
    squares = [gradient.double().square().sum() for gradient in gradients.values()]
    return float(torch.stack(squares).sum().sqrt()) if squares else 0.0


def relative_error(found: Tensor, reference: Tensor, scale: float) -> float:
    """‖found − reference‖ / max(‖reference‖, scale)."""
    size = max(float(reference.double().norm()), scale, 1e-300)
    return float((found.double() - reference.double()).norm()) / size


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
