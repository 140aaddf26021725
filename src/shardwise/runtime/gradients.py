"""Where a rank's gradients lie, and their reduction during and after the backward pass.

Gradients that are summed over the same groups lie next to each other in one buffer for each message. Where data ranks divide the
optimizer's states alone (ZeRO-1), whole gradients are made, and this rank's parts of their sums are put where its optimizer finds them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from shardwise.program.gather import packed, packed_sizes
from shardwise.program.program import Program
from shardwise.program.reductions import Reduction, reductions
from shardwise.runtime.parameters import own_view
from shardwise.runtime.transport import Transport, group_size

__all__ = ["Gradients"]

Choose = Callable[[str, int, int], str]


class Gradients:
    """Buffers for all gradients of a rank: `of[name]` is a parameter's as the backward pass makes it; `parts[name]`, after `reduce`, what
    this rank's optimizer needs of it."""

    def __init__(self, program: Program, transport: Transport, choose: Choose, device: torch.device) -> None:
        self.transport, self.choose = transport, choose
        self.of: dict[str, Tensor] = {}
        self.parts: dict[str, Tensor] = {}
        self.pending: list[tuple[Reduction, Tensor]] = []
        self.finishing: dict[int, Callable[[], object]] = {}
        for reduction in reductions(program):
            self._place(reduction, device)

    def _place(self, reduction: Reduction, device: torch.device) -> None:
        if reduction.groups or reduction.scatter:
            flat = torch.zeros(sum(reduction.sizes), dtype=reduction.dtype, device=device)
            pieces = flat.split(reduction.sizes)
            found = {p.name: piece.view(p.gradient) for p, piece in zip(reduction.parameters, pieces, strict=True)}
            self.pending.append((reduction, flat))
        else:
            found = {p.name: torch.zeros(p.gradient, dtype=reduction.dtype, device=device) for p in reduction.parameters}
        self.of |= found
        self.parts |= {p.name: own_view(found[p.name], p) if reduction.scatter else found[p.name] for p in reduction.parameters}

    def early(self) -> dict[int, set[str]]:
        """The messages that can be begun during the backward pass: number → the parameters whose gradients it needs.

        Not those between tied stages, whose backward passes end at other times and which number their messages otherwise.
        """
        return {
            number: {parameter.name for parameter in reduction.parameters}
            for number, (reduction, _) in enumerate(self.pending)
            if len(reduction.groups) == 1 and not reduction.groups[0].startswith("tie:") and not reduction.scatter
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
            mine = self._scattered(reduction) if reduction.scatter else flat
            for name in reduction.groups:
                self.transport.sum_in_place(mine, name, self._impl(mine, name))
            if reduction.scatter:
                pieces = mine.split([self.parts[p.name].numel() for p in reduction.parameters])
                for p, piece in zip(reduction.parameters, pieces, strict=True):
                    self.parts[p.name].copy_(piece.view(p.updated))

    def _scattered(self, reduction: Reduction) -> Tensor:
        """This rank's parts of the sums, flat."""
        whole = packed(reduction.divisions, [self.of[p.name] for p in reduction.parameters])
        sizes = packed_sizes(reduction.divisions, [p.local for p in reduction.parameters])
        impl = self.choose("reduce_scatter", whole.nbytes, len(sizes))
        return self.transport.reduce_scatter(whole, reduction.scatter, 0, sizes, impl)

    def _impl(self, flat: Tensor, group: str) -> str:
        return self.choose("all_reduce", flat.nbytes, group_size(group))
