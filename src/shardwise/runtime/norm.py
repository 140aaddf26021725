"""The norm of all gradients of a step, over all ranks: gradients are clipped by it, and a step whose loss or gradients are not finite ends
before the optimizer has seen them.

    each rank   Σ ‖part‖² ÷ how many ranks hold that part     ──all-reduce──▶     norm², the same on every rank

How many hold a part is counted once, so that no layout has a rule of its own: copies = elements on all ranks ÷ elements of the parameter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shardwise.errors import LayoutError, NotFiniteError
from shardwise.runtime.scale import Scaler

__all__ = ["GradientNorm"]

_EPSILON = 1e-6  # torch.nn.utils.clip_grad_norm_'s
_NAMED = 3  # parameters that an error names


class GradientNorm:
    """Measures this rank's parts of gradients against all others'.

    parts: name → gradient, as `reduce` leaves it; sizes: all trained parameters of the model, by elements of the whole. Every rank has one.
    most: gradients are scaled down to this norm, None where they are not clipped.
    """

    def __init__(self, parts: Mapping[str, Tensor], sizes: Mapping[str, int], most: float | None, device: torch.device) -> None:
        if most is not None and not most > 0:
            raise LayoutError(f"gradients cannot be clipped to a norm of {most}; give a number above 0")
        self.parts, self.most, self.device = dict(parts), most, device
        names = sorted(sizes)
        held = torch.tensor([float(parts[name].numel()) if name in parts else 0.0 for name in names], dtype=torch.float64, device=device)
        dist.all_reduce(held)
        self.copies = {name: count / max(sizes[name], 1) for name, count in zip(names, held.tolist(), strict=True)}

    @torch.no_grad()
    def apply(self, loss: float, step: int, scaler: Scaler | None = None) -> tuple[float, float | None]:
        """The sum of all ranks' losses, and the norm of the gradients, which are unscaled and clipped; None where they have overflowed in
        fp16, which the scaler then knows.

        Raises NotFiniteError on every rank, naming ranks and parameters, where one of both is infinite or not a number otherwise.
        """
        if scaler is not None:
            for gradient in self.parts.values():
                gradient.mul_(1 / scaler.scale)
        found = torch.tensor([loss, self._squared()], dtype=torch.float64, device=self.device)
        dist.all_reduce(found)
        total, squared = found.tolist()
        if not math.isfinite(total) or not math.isfinite(squared):
            where = self._where()
            if where and math.isfinite(total) and scaler is not None and not self._last_straw(scaler):
                return total, None
            squared = self._explained(total, where, step)
        if scaler is not None:
            scaler.judge(False)
        norm = math.sqrt(squared)
        if self.most is not None and (scale := self.most / (norm + _EPSILON)) < 1:
            for gradient in self.parts.values():
                gradient.mul_(scale)
        return total, norm

    def _last_straw(self, scaler: Scaler) -> bool:
        """Whether one more step that overflows is one too many."""
        scaler.judge(True)
        return scaler.exhausted

    def _squared(self, dtype: torch.dtype | None = None) -> float:
        """Σ ‖part‖² ÷ copies."""
        norms = {name: torch.linalg.vector_norm(gradient, dtype=dtype) for name, gradient in self.parts.items()}
        return sum(norm.item() ** 2 / self.copies[name] for name, norm in norms.items() if self.parts[name].numel())

    def _where(self) -> list[str]:
        """Which ranks have gradients that are not finite, and of what."""
        mine = sorted(name for name, gradient in self.parts.items() if not gradient.isfinite().all())
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, mine)
        return [f"rank {rank}: {_listed(names)}" for rank, names in enumerate(found) if names]

    def _explained(self, loss: float, where: list[str], step: int) -> float:
        """Says where what is not finite is. The square of the norm where only that was too large for a gradient's dtype."""
        if where:
            raise NotFiniteError(f"step {step}: gradients are not finite, the parameters are as before it; {'; '.join(where)}. {_WAY_OUT}")
        if not math.isfinite(loss):
            raise NotFiniteError(f"step {step}: the loss is {loss}, the parameters are as before it. {_WAY_OUT}")
        squared = torch.tensor([self._squared(torch.float64)], dtype=torch.float64, device=self.device)
        dist.all_reduce(squared)
        return squared.item()


_WAY_OUT = "Look at the batch of this step, lower the learning rate, clip gradients (clip_norm=1.0), or pass check_finite=False"


def _listed(names: list[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")
