"""What a rank's training step asks an allocator for, action by action, as `shardwise.runtime.executor` performs it.

    POST, RECV        room for what comes, until its last use in a graph
    SEND              what was made for it is held until something proves that it has arrived, else until the step has ended: gloo tells of
                      no message that it has, before one waits for it
    FORWARD           its values; what it saves stays for BACKWARD, what BACKWARD leaves for WEIGHT, each until its last use there
    BACKWARD, WEIGHT  and messages of gradients as they begin and are awaited (`messages`)
    REDUCE, UPDATE    the other messages

Parameters, gradients, states and what the prelude makes are there all the time and are no part of it.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import fx

from shardwise.cost.memory import Request, bases
from shardwise.program.actions import COMPUTES, Action, Kind, Message
from shardwise.program.program import Program, StageProgram
from shardwise.program.reductions import beginnings
from shardwise.simulate.messages import Messages, regathering
from shardwise.simulate.passes import Passes, arriving, placeholders

__all__ = ["step_requests"]

_NEXT = {Kind.FORWARD: Kind.BACKWARD, Kind.BACKWARD: Kind.WEIGHT}
_Held = tuple[int, int]
"""A block's number and bytes."""


def step_requests(program: Program, passes: Mapping[int, Passes]) -> list[Request]:
    """Numbered blocks, all of which are given back before the step has ended. passes: of the rank's stages."""
    step = _Step(program=program, passes=passes)
    for action in program.actions:
        step.perform(action)
    step.end()
    return step.asked


@dataclass(kw_only=True)
class _Step:
    """values: what is held for edges; left: (part of the pass that takes it, stage, microbatch) → its inputs' blocks; beside: of messages
    of gradients and parameters, and of collectives in graphs."""

    program: Program
    passes: Mapping[int, Passes]
    asked: list[Request] = field(default_factory=list)
    values: dict[Message, _Held] = field(default_factory=dict)
    sent: list[tuple[Message, _Held]] = field(default_factory=list)
    left: dict[tuple[Kind, int, int], dict[Hashable, _Held]] = field(default_factory=dict)
    beside: dict[Hashable, _Held] = field(default_factory=dict)
    known: dict[tuple[Kind, int], list[Request]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.messages, self.begins = Messages(program=self.program), beginnings(self.program)
        self.edges = {edge.name: edge.nbytes for edge in self.program.edges}

    def perform(self, action: Action) -> None:
        """Adds what it asks for."""
        if action.kind in COMPUTES:
            self._compute(action)
        elif action.sends:
            if block := self.values.pop(action.message, None):
                self.sent.append((action.message, block))
        elif action.posts or action.receives:
            if action.message not in self.values:
                self.values[action.message] = self._take(self.edges[action.edge])
            self._give(block for message, block in self.sent if message in action.proves)
            self.sent = [each for each in self.sent if each[0] not in action.proves]
        elif action.kind is Kind.REDUCE:
            self._ask(self.messages.reduce(), {})
        elif action.kind is Kind.UPDATE:
            self._ask(regathering(self.program), {})

    def end(self) -> None:
        """Gives back what is still held."""
        sent = [block for _, block in self.sent]
        left = [block for each in self.left.values() for block in each.values()]
        self._give([*sent, *self.values.values(), *self.beside.values(), *left])

    def _compute(self, action: Action) -> None:
        kind, number, microbatch = action.kind, action.stage, action.microbatch
        stage, passes = self.program.stages[number], self.passes[number]
        graph, backward = stage.graphs[kind], kind is not Kind.FORWARD
        blocks = self.left.pop((kind, number, microbatch), {})
        for edge, taker in arriving(stage, kind).items():
            if block := self.values.pop((edge, microbatch, backward), None):
                blocks[taker] = block
        self._ask(self._requests(action), blocks)
        base = bases(graph, {} if not backward else passes.saved.aliases if kind is Kind.BACKWARD else passes.kept.aliases)
        returned: list[fx.Node | None] = list(graph.output_node().args[0])  # type: ignore[arg-type]
        outputs = {Kind.FORWARD: stage.forward_outputs, Kind.BACKWARD: stage.backward_outputs, Kind.WEIGHT: []}[kind]
        for node, taker in zip(returned[len(outputs) :], _takers(stage, kind), strict=False):
            if node is not None and base[node] in blocks:
                self.left.setdefault((_NEXT[kind], number, microbatch), {})[taker] = blocks.pop(base[node])
        for node, binding in zip(returned, outputs, strict=False):
            if binding.kind == "edge" and (node is None or base[node] in blocks):
                made = self._take(self.edges[binding.name]) if node is None else blocks.pop(base[node])
                self.values[binding.name, microbatch, backward] = made
        self._give(blocks.values())

    def _requests(self, action: Action) -> Sequence[Request]:
        """Of a graph: the same in each microbatch, if it begins no message."""
        kind, number = action.kind, action.stage
        if begun := self.begins.get(action):
            return self.passes[number].requests(kind, self.messages.begin_in(self.program.stages[number], kind, begun))
        if (kind, number) not in self.known:
            self.known[kind, number] = self.passes[number].requests(kind)
        return self.known[kind, number]

    def _ask(self, asked: Iterable[Request], blocks: dict[Hashable, _Held]) -> None:
        """blocks: of a graph's values, those that it begins with; then, those that it ends with."""
        for who, nbytes in asked:
            held = blocks if isinstance(who, fx.Node) else self.beside
            if nbytes > 0:
                held[who] = self._take(nbytes)
            elif who in held:
                self._give([held.pop(who)])

    def _take(self, nbytes: int) -> _Held:
        block = len(self.asked), nbytes
        self.asked.append(block)
        return block

    def _give(self, blocks: Iterable[_Held]) -> None:
        self.asked += [(number, -nbytes) for number, nbytes in blocks]


def _takers(stage: StageProgram, kind: Kind) -> Sequence[fx.Node]:
    """What of the next part of a pass takes what one leaves."""
    if kind is Kind.FORWARD:
        return placeholders(stage.backward)[: stage.saved]
    return placeholders(stage.weight) if kind is Kind.BACKWARD and stage.weight is not None else []
