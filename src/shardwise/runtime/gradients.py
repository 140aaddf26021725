"""Where a rank's gradients lie, and their reduction during and after the backward pass.

Gradients that are summed over the same groups lie next to each other in one buffer for each message.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from shardwise.program.program import Program
from shardwise.program.reductions import Reduction, reductions
from shardwise.runtime.transport import Transport, group_size

__all__ = ["Gradients"]

Choose = Callable[[str, int, int], str]


class Gradients:
    """Buffers for all gradients of a rank: `of[name]` is a parameter's, in its local shape."""

    def __init__(self, program: Program, transport: Transport, choose: Choose, device: torch.device) -> None:
        self.transport, self.choose = transport, choose
        self.of: dict[str, Tensor] = {}
        self.pending: list[tuple[Reduction, Tensor]] = []
        self.finishing: dict[int, Callable[[], object]] = {}
        for reduction in reductions(program):
            self._place(reduction, device)

    def _place(self, reduction: Reduction, device: torch.device) -> None:
        if not reduction.groups:
            self.of |= {p.name: torch.zeros(p.local, dtype=reduction.dtype, device=device) for p in reduction.parameters}
            return
        flat = torch.zeros(sum(reduction.sizes), dtype=reduction.dtype, device=device)
        self.of |= {p.name: piece.view(p.local) for p, piece in zip(reduction.parameters, flat.split(reduction.sizes), strict=True)}
        self.pending.append((reduction, flat))

    def early(self) -> dict[int, set[str]]:
        """The messages that can be begun during the backward pass: number → the parameters whose gradients it needs.

        Not those between tied stages, whose backward passes end at other times and which number their messages otherwise.
        """
        return {
            number: {parameter.name for parameter in reduction.parameters}
            for number, (reduction, _) in enumerate(self.pending)
            if len(reduction.groups) == 1 and not reduction.groups[0].startswith("tie:")
        }

    def start(self, number: int) -> None:
        """Begins to sum a message, all of whose gradients are there."""
        (name,), flat = self.pending[number][0].groups, self.pending[number][1]
        self.finishing[number] = self.transport.begin_sum(flat, name, self._impl(flat, name), number)

    def reduce(self) -> None:
        """Sums what is pending; what was begun is waited for."""
        for number, (reduction, flat) in enumerate(self.pending):
            if (finish := self.finishing.pop(number, None)) is not None:
                finish()
                continue
            for name in reduction.groups:
                self.transport.sum_in_place(flat, name, self._impl(flat, name))

    def _impl(self, flat: Tensor, group: str) -> str:
        return self.choose("all_reduce", flat.nbytes, group_size(group))
