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
from shardwise.program.reductions import UNDER_WAY, Reduction, reductions
from shardwise.runtime.parameters import own_view
from shardwise.runtime.transport import Transport, group_size

__all__ = ["Gradients"]


class Gradients:
    """Buffers for all gradients of a rank: `of[name]` is a parameter's as the backward pass makes it; `parts[name]`, after `reduce`, what
    this rank's optimizer needs of it."""

    def __init__(self, program: Program, transport: Transport, device: torch.device) -> None:
        self.transport, self.choose = transport, program.choose
        self.of: dict[str, Tensor] = {}
        self.parts: dict[str, Tensor] = {}
        self.pending: list[tuple[Reduction, Tensor]] = []
        self.begun: set[int] = set()  # messages of this step
        self.under_way: dict[int, Callable[[], object]] = {}  # those that are not awaited yet, the oldest first, and what awaits them
        self.scattered: dict[int, Tensor] = {}  # this rank's parts, flat
        for reduction in reductions(program):
            self._place(reduction, device)

    def _place(self, reduction: Reduction, device: torch.device) -> None:
        if reduction.groups or reduction.scatter:  # as `pending`, in its order
            flat = torch.zeros(sum(reduction.sizes), dtype=reduction.dtype, device=device)
            pieces = flat.split(reduction.sizes)
            found = {p.name: piece.view(p.gradient) for p, piece in zip(reduction.parameters, pieces, strict=True)}
            self.pending.append((reduction, flat))
        else:
            found = {p.name: torch.zeros(p.gradient, dtype=reduction.dtype, device=device) for p in reduction.parameters}
        self.of |= found
        self.parts |= {p.name: own_view(found[p.name], p) if reduction.scatter else found[p.name] for p in reduction.parameters}

    def start(self, number: int) -> None:
        """Begins a message, all of whose gradients are there. Two are under way at most: before a third begins the oldest is waited for."""
        while len(self.under_way) >= UNDER_WAY:
            self._await(next(iter(self.under_way)))
        reduction, flat = self.pending[number]
        if reduction.scatter:
            self.under_way[number] = self._begin_scatter(number, reduction)
        else:
            (name,) = reduction.groups
            self.under_way[number] = self.transport.begin_sum(flat, name, self._impl(flat, name))
        self.begun.add(number)

    def _await(self, number: int) -> None:
        self.under_way.pop(number)()
        if not self.pending[number][0].groups:
            self._keep_parts(number)

    def reduce(self) -> None:
        """Sums what is pending; what was begun is waited for."""
        for number, (reduction, _) in enumerate(self.pending):
            early = number in self.begun
            if reduction.scatter and not early:
                self.start(number)
            if number in self.under_way:
                self._await(number)
            if reduction.scatter or not early:
                self._sum(number)
        self.begun.clear()

    def _sum(self, number: int) -> None:
        """Over the message's groups; of parts, these."""
        reduction, flat = self.pending[number]
        mine = self.scattered.get(number, flat)
        for name in reduction.groups:
            self.transport.sum_in_place(mine, name, self._impl(mine, name))
        if number in self.scattered:
            self._keep_parts(number)

    def _begin_scatter(self, number: int, reduction: Reduction) -> Callable[[], object]:
        """Begins to make this rank's parts of the sums, flat."""
        whole = packed(reduction.divisions, [self.of[p.name] for p in reduction.parameters])
        sizes = packed_sizes(reduction.divisions, [p.local for p in reduction.parameters])
        impl = self.choose("reduce_scatter", whole.nbytes, len(sizes))
        self.scattered[number], finish = self.transport.begin_reduce_scatter(whole, reduction.scatter, 0, sizes, impl)
        return finish

    def _keep_parts(self, number: int) -> None:
        """Puts what was reduced to parts where the optimizer finds it."""
        parameters = self.pending[number][0].parameters
        pieces = self.scattered.pop(number).split([self.parts[p.name].numel() for p in parameters])
        for p, piece in zip(parameters, pieces, strict=True):
            self.parts[p.name].copy_(piece.view(p.updated))

    def _impl(self, flat: Tensor, group: str) -> str:
        return self.choose("all_reduce", flat.nbytes, group_size(group))
