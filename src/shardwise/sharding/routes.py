"""Rows on their way to the ranks of their experts and back.

    which expert each row has ──▶ a route: the rows' order by rank, how many go to and come from each rank
    rows at home              ──▶ in that order, to their ranks; there they stand by the rank from which they come, then in its order
    rows at their experts     ──▶ back, and in the order of home

Every rank does the same collectives whatever the routing: first the numbers of rows, then rows, of which some ranks may have none. The
gradients of rows travel the other way on the same route.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shardwise.sharding.collectives import all_to_all, exchange_rows
from shardwise.sharding.reshard import Axis

__all__ = ["Journey", "Route"]

Choose = Callable[[str, int, int], str]


@dataclass(frozen=True, kw_only=True)
class Route:
    """Makes a route of `expert`, int [rows]: (order, its inverse, both int64 [rows]; rows to, rows from each rank, both int64 [ranks]).

    experts: of all ranks. A row whose expert does not exist goes to the first or the last rank.
    """

    axis: Axis
    experts: int
    choose: Choose

    def __call__(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        (expert,), ranks = tensors, self.axis.ranks
        rank = (expert.to(torch.int64) // (self.experts // ranks)).clamp(0, ranks - 1)
        order = torch.argsort(rank, stable=True)
        send = (rank[:, None] == torch.arange(ranks, device=rank.device)).sum(0)
        impl = self.choose("all_to_all", send.nbytes, ranks)
        receive = all_to_all(send[None], self.axis.group, 1, [1] * ranks, 0, [1] * ranks, self.axis.rank, impl)
        return order, torch.argsort(order), send, receive.squeeze(1)


@dataclass(frozen=True, kw_only=True)
class Journey:
    """Takes rows along a route: tensors are the rows, then the route's. there: to the experts, or back.

    rows: how many a rank has at home, and at its experts were all asked for equally.
    """

    axis: Axis
    there: bool
    rows: int
    choose: Choose

    def __call__(self, tensors: Sequence[Tensor]) -> Tensor:
        """Differentiable in the rows."""
        found: Tensor = _Journey.apply(self, *tensors)
        return found

    def go(self, x: Tensor, route: Sequence[Tensor], *, there: bool) -> Tensor:
        """One way."""
        order, inverse, send, receive = route
        impl = self.choose("all_to_all", x.nbytes, self.axis.ranks)
        if there:
            return exchange_rows(x.index_select(0, order), self.axis.group, send, receive, self.rows, impl)
        return exchange_rows(x.contiguous(), self.axis.group, receive, send, self.rows, impl).index_select(0, inverse)


class _Journey(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, journey: Journey, x: Tensor, *route: Tensor) -> Tensor:
        ctx.journey = journey
        ctx.save_for_backward(*route)
        return journey.go(x, route, there=journey.there)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        journey: Journey = ctx.journey
        back = journey.go(gradient, ctx.saved_tensors, there=not journey.there)
        return None, back, *(None for _ in ctx.saved_tensors)
