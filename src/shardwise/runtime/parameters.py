"""A rank's parameters: what operators read, and what its optimizer updates.

They are one and the same but where data ranks divide the optimizer's states and not the parameters (ZeRO-1, 2): there each rank updates its
part, and the parts are gathered into every rank's whole. And where operators compute in 16 bits: they read a copy of what is updated.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor, nn

from shardwise.program.gather import packed_sizes
from shardwise.program.program import ParameterPart, Program
from shardwise.program.reductions import Regathering, regatherings
from shardwise.runtime.transport import Transport

__all__ = ["Parameters", "own_view"]


class Parameters:
    """`of[name]`: what this rank updates of a parameter, with its gradient.

    state: name → what operators read, as `own_part` gives it; masters: of those that operators read a copy of, what is updated, as
    `own_master` gives it.
    """

    def __init__(
        self,
        program: Program,
        state: dict[str, Tensor],
        masters: Mapping[str, Tensor],
        gradients: dict[str, Tensor],
        transport: Transport,
    ) -> None:
        self.state, self.transport, self.choose = state, transport, program.choose
        self.messages = regatherings(program)
        sent = {part.name for message in self.messages for part in message.parameters}
        self.copied = [part.name for part in program.parameters if part.has_copy and part.name not in sent]
        self.of: dict[str, nn.Parameter] = {}
        for part in program.parameters:
            updated = masters[part.name] if part.has_copy else state[part.name]
            if not part.has_copy and part.updated != part.stored:
                updated = own_view(updated, part)
            parameter = nn.Parameter(updated, requires_grad=part.requires_grad)
            if part.requires_grad:
                parameter.grad = gradients[part.name]
            self.of[part.name] = parameter

    @property
    def trained(self) -> list[tuple[str, nn.Parameter]]:
        """For an optimizer."""
        return [(name, parameter) for name, parameter in self.of.items() if parameter.requires_grad]

    @torch.no_grad()
    def gather(self) -> None:
        """Puts all ranks' updated parts into what operators read."""
        for name in self.copied:
            self.state[name].copy_(self.of[name])
        for message in self.messages:
            self._gather(message)

    def _gather(self, message: Regathering) -> None:
        divisions, parts = message.divisions, message.parameters
        sizes = packed_sizes(divisions, [part.local for part in parts])
        own = [self.of[part.name].detach().reshape(-1).to(message.dtype) for part in parts]
        mine = own[0] if len(own) == 1 else torch.cat(own)
        flat = self.transport.all_gather(mine, message.group, 0, sizes, self.choose("all_gather", message.nbytes, len(sizes)))
        pieces = iter(
            flat.split([prod(d.shape(p.local, rank)) for rank in range(len(sizes)) for d, p in zip(divisions, parts, strict=True)])
        )
        for rank in range(len(sizes)):
            for division, part in zip(divisions, parts, strict=True):
                division.take(self.state[part.name], rank).copy_(next(pieces).view(division.shape(part.local, rank)))


def own_view(whole: Tensor, part: ParameterPart) -> Tensor:
    """This rank's part of a tensor that it has whole: the same memory where that is one run of it, else a copy."""
    assert part.division is not None
    mine = part.division.take(whole)
    return mine if mine.is_contiguous() else mine.contiguous()
