"""Bytes that a step's messages of gradients and parameters hold beside these, as `shardwise.runtime.gradients` and `.parameters` send them.

begun      what is put together to be sent, what is received into, and this rank's part of the sum: beside the backward pass
awaited    the part alone, where it is then summed over copies; at the latest when a third message begins
REDUCE     what is left is awaited, and what could not begin before is sent, one after the other
UPDATE     updated parts are gathered, one message after the other
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod

from torch import fx

from shardwise.cost.scratch import gathering_bytes, scattering_bytes, summing_bytes
from shardwise.program.actions import COMPUTES, Kind
from shardwise.program.gather import packed_sizes
from shardwise.program.program import Program, StageProgram
from shardwise.program.reductions import UNDER_WAY, Reduction, Regathering, beginnings, pending, regatherings
from shardwise.sharding.collectives import group_ranks
from shardwise.simulate.passes import Passes

__all__ = ["Messages", "reducing_bytes", "regathering_bytes"]


def reducing_bytes(program: Program, passes: Mapping[int, Passes]) -> int:
    """The most that a rank holds beside parameters, gradients and states while messages of gradients are under way: these messages, what
    microbatches in flight keep, and what the graphs hold. passes: of its stages."""
    messages, begins = Messages(program=program), beginnings(program)
    flying = most = 0
    for action in program.actions:
        if action.kind not in COMPUTES:
            continue
        each, begun = passes[action.stage], begins.get(action, {})
        flying += each.saved.nbytes if action.kind is Kind.FORWARD else 0
        if begun or messages.held_bytes:
            beside = flying + messages.held_bytes
            changes = messages.begin_in(each.stage, action.kind, begun)
            most = max(most, beside + each.working_bytes(action.kind, changes))
        if action.kind is not Kind.FORWARD:
            left = each.kept.nbytes if action.kind is Kind.BACKWARD else 0
            flying -= (each.saved if action.kind is Kind.BACKWARD else each.kept).nbytes - left
    return max(most, messages.reduce())


def regathering_bytes(program: Program) -> int:
    """Of the largest message of updated parts: those cast and put together, the whole, and what it is received into."""
    return max((_regathering_bytes(program, message) for message in regatherings(program)), default=0)


def _regathering_bytes(program: Program, message: Regathering) -> int:
    sizes = packed_sizes(message.divisions, [part.local for part in message.parameters])
    rank, itemsize = message.divisions[0].rank, message.dtype.itemsize
    copies = (len(message.parameters) > 1) + any(part.wide != message.dtype for part in message.parameters)
    impl = program.choose("all_gather", message.nbytes, len(sizes))
    return copies * sizes[rank] * itemsize + message.nbytes + gathering_bytes(impl, [sum(sizes)], itemsize, 0, sizes, rank)


@dataclass(kw_only=True)
class Messages:
    """What is held for messages of gradients: number among `pending` → bytes; parts: this rank's, where they are reduced to parts."""

    program: Program
    under_way: dict[int, int] = field(default_factory=dict)
    parts: dict[int, int] = field(default_factory=dict)
    begun: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.pending = pending(self.program)

    @property
    def held_bytes(self) -> int:
        """Now."""
        return sum(self.under_way.values()) + sum(self.parts.values())

    def begin_in(self, stage: StageProgram, kind: Kind, begun: Mapping[int, set[str]]) -> dict[fx.Node, list[int]]:
        """Begins messages in a graph; how that changes what is held, as of `Changes`."""
        place = {node: number for number, node in enumerate(stage.graphs[kind].nodes)}
        made = stage.gradients(kind)
        last = {message: max((made[name] for name in names if name in made), key=place.__getitem__) for message, names in begun.items()}
        changes: dict[fx.Node, list[int]] = {}
        for message, node in sorted(last.items(), key=lambda each: place[each[1]]):
            changes.setdefault(node.next, []).extend(self.begin(message))
        return changes

    def reduce(self) -> int:
        """The most that is held while what is left is sent and awaited."""
        most = self.held_bytes
        for number, reduction in enumerate(self.pending):
            early, held = number in self.begun, self.held_bytes
            if reduction.scatter and not early:
                freed, begun, _ = self.begin(number)
                most = max(most, self.held_bytes, held + freed + begun)
            if number in self.under_way:
                self._await(number)
            if reduction.scatter or not early:
                summing = (self._summing_bytes(group, reduction.summed, reduction.dtype.itemsize) for group in reduction.groups)
                most = max(most, self.held_bytes + max(summing, default=0))
            self.parts.pop(number, None)
        return most

    def begin(self, number: int) -> list[int]:
        """Begins a message, before a third awaiting the oldest; how that changes what is held: by what is freed, what is begun, and what of
        it is freed at once."""
        before = self.held_bytes
        while len(self.under_way) >= UNDER_WAY:
            self._await(next(iter(self.under_way)))
        left = self.held_bytes
        copied = self._begin(number)
        return [left - before, self.held_bytes - left + copied, -copied]

    def _begin(self, number: int) -> int:
        """Returns the bytes of what was put together to be sent and then copied."""
        reduction = self.pending[number]
        self.begun.add(number)
        if not reduction.scatter:
            itemsize = reduction.dtype.itemsize
            self.under_way[number] = self._summing_bytes(reduction.groups[0], reduction.nbytes // itemsize, itemsize, begun=True)
            return 0
        sizes = packed_sizes(reduction.divisions, [part.local for part in reduction.parameters])
        rank, itemsize = reduction.divisions[0].rank, reduction.dtype.itemsize
        impl = self.program.choose("reduce_scatter", reduction.nbytes, len(sizes))
        packed = 0 if _in_place(reduction) else reduction.nbytes
        scratch = scattering_bytes(impl, [sum(sizes)], itemsize, 0, sizes, rank)
        copied = packed if scratch and impl != "exchange" else 0
        self.under_way[number] = packed + scratch - copied
        self.parts[number] = sizes[rank] * itemsize
        return copied

    def _await(self, number: int) -> None:
        self.under_way.pop(number)
        if not self.pending[number].groups:
            self.parts.pop(number)

    def _summing_bytes(self, group: str, count: int, itemsize: int, *, begun: bool = False) -> int:
        ranks = len(group_ranks(group))
        impl = self.program.choose("all_reduce", count * itemsize, ranks)
        return summing_bytes(impl, count, itemsize, ranks, inplace=True, begun=begun)


def _in_place(message: Reduction) -> bool:
    """Whether it is sent from where it is: one parameter whose parts are runs of memory."""
    return len(message.parameters) == 1 and prod(message.parameters[0].local[: message.divisions[0].dim]) == 1
