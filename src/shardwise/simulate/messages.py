"""What a step's messages of gradients and parameters ask an allocator for, as `shardwise.runtime.gradients` and `.parameters` send them.

begun      what is put together to be sent, what is received into, and this rank's part of the sum: beside the backward pass
awaited    the part alone, where it is then summed over copies; at the latest when a third message begins
REDUCE     what is left is awaited, and what could not begin before is sent, one after the other
UPDATE     updated parts are gathered, one message after the other
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from math import prod

from torch import fx

from shardwise.cost.memory import Request
from shardwise.cost.scratch import gathering_bytes, scattering_bytes, summing_bytes
from shardwise.program.actions import Kind
from shardwise.program.gather import packed_sizes
from shardwise.program.program import Program, StageProgram
from shardwise.program.reductions import UNDER_WAY, Reduction, pending, regatherings
from shardwise.sharding.collectives import group_ranks

__all__ = ["Messages", "regathering"]


def regathering(program: Program) -> Iterator[Request]:
    """Each message of updated parts: those cast and put together, the whole, and what it is received into."""
    for number, message in enumerate(regatherings(program)):
        sizes = packed_sizes(message.divisions, [part.local for part in message.parameters])
        rank, itemsize = message.divisions[0].rank, message.dtype.itemsize
        copies = (len(message.parameters) > 1) + any(part.wide != message.dtype for part in message.parameters)
        impl = program.choose("all_gather", message.nbytes, len(sizes))
        received = gathering_bytes(impl, [sum(sizes)], itemsize, 0, sizes, rank)
        asked = {"own": copies * sizes[rank] * itemsize, "received": received, "whole": message.nbytes}
        yield from (((what, number), nbytes) for what, nbytes in asked.items())
        yield from (((what, number), -nbytes) for what, nbytes in asked.items())


@dataclass(kw_only=True)
class Messages:
    """What is asked for messages of gradients, and what is held for them.

    under_way: number among `pending` → what its message needs until it is awaited; parts: this rank's, where they are reduced to parts.
    """

    program: Program
    under_way: dict[int, list[Request]] = field(default_factory=dict)
    parts: dict[int, Request] = field(default_factory=dict)
    begun: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.pending = pending(self.program)

    @property
    def held_bytes(self) -> int:
        """Now."""
        return sum(nbytes for _, nbytes in chain(*self.under_way.values(), self.parts.values()))

    def begin_in(self, stage: StageProgram, kind: Kind, begun: Mapping[int, set[str]]) -> dict[fx.Node, list[Request]]:
        """Begins messages in a graph: node → what is asked for just before it runs."""
        place = {node: number for number, node in enumerate(stage.graphs[kind].nodes)}
        made = stage.gradients(kind)
        last = {message: max((made[name] for name in names if name in made), key=place.__getitem__) for message, names in begun.items()}
        asked: dict[fx.Node, list[Request]] = {}
        for message, node in sorted(last.items(), key=lambda each: place[each[1]]):
            asked.setdefault(node.next, []).extend(self.begin(message))
        return asked

    def reduce(self) -> Iterator[Request]:
        """What is left is sent and awaited."""
        for number, reduction in enumerate(self.pending):
            early = number in self.begun
            if reduction.scatter and not early:
                yield from self.begin(number)
            if number in self.under_way:
                yield from self._await(number)
            if reduction.scatter or not early:
                for group in reduction.groups:
                    summing = self._summing_bytes(group, reduction.summed, reduction.dtype.itemsize)
                    yield from ((("summed", number), change) for change in (summing, -summing))
            if number in self.parts:
                yield _given(self.parts.pop(number))

    def begin(self, number: int) -> list[Request]:
        """Begins a message, before a third awaiting the oldest."""
        asked: list[Request] = []
        while len(self.under_way) >= UNDER_WAY:
            asked += self._await(next(iter(self.under_way)))
        return asked + self._begin(number)

    def _begin(self, number: int) -> list[Request]:
        reduction = self.pending[number]
        self.begun.add(number)
        itemsize = reduction.dtype.itemsize
        if not reduction.scatter:
            summing = self._summing_bytes(reduction.groups[0], reduction.nbytes // itemsize, itemsize, begun=True)
            self.under_way[number] = [(("summed", number), summing)]
            return list(self.under_way[number])
        sizes = packed_sizes(reduction.divisions, [part.local for part in reduction.parameters])
        rank = reduction.divisions[0].rank
        impl = self.program.choose("reduce_scatter", reduction.nbytes, len(sizes))
        packed = ("packed", number), 0 if _in_place(reduction) else reduction.nbytes
        scratch = ("scratch", number), scattering_bytes(impl, [sum(sizes)], itemsize, 0, sizes, rank)
        self.parts[number] = ("part", number), sizes[rank] * itemsize
        copied = scratch[1] and impl != "exchange"  # what was put together to be sent is then not needed any more
        self.under_way[number] = [scratch] if copied else [packed, scratch]
        return [packed, scratch, self.parts[number], *([_given(packed)] if copied else [])]

    def _await(self, number: int) -> list[Request]:
        asked = [_given(each) for each in self.under_way.pop(number)]
        return asked if self.pending[number].groups else [*asked, _given(self.parts.pop(number))]

    def _summing_bytes(self, group: str, count: int, itemsize: int, *, begun: bool = False) -> int:
        ranks = len(group_ranks(group))
        impl = self.program.choose("all_reduce", count * itemsize, ranks)
        return summing_bytes(impl, count, itemsize, ranks, inplace=True, begun=begun)


def _given(request: Request) -> Request:
    who, nbytes = request
    return who, -nbytes


def _in_place(message: Reduction) -> bool:
    """Whether it is sent from where it is: one parameter whose parts are runs of memory."""
    return len(message.parameters) == 1 and prod(message.parameters[0].local[: message.divisions[0].dim]) == 1
