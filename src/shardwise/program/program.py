"""What one rank runs: its stages' graphs and its list of actions. Simulated, run and printed from the same object."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, Literal

import torch
from torch import fx

from shardwise.program.actions import Action, Kind
from shardwise.sharding.division import Division
from shardwise.sharding.types import Placement, Shard

__all__ = ["Binding", "Crossing", "Edge", "ParameterPart", "Program", "StageProgram", "code"]

BindingKind = Literal["parameter", "buffer", "crossing", "edge", "random", "seed", "saved", "loss", "output"]


@dataclass(frozen=True)
class Binding:
    """What a graph's input or output is: a parameter, a prelude value, a value on an edge, …"""

    kind: BindingKind
    name: str = ""


@dataclass(frozen=True, kw_only=True)
class ParameterPart:
    """What a rank keeps of a parameter or buffer.

    type: axis → placement; shape: of the whole, local: of the part. reduce: axes over which gradients are summed once a step.
    stages: all stages that hold it (tied weights); the gradient is summed over them, too.
    division: how the data ranks divide the part, None where each has it whole; zero: what they divide (`shardwise.sharding.division`).
    dtype: as operators read it; master: of gradients, of what the optimizer updates, and of its states, where that is another.
    """

    name: str
    type: Mapping[str, Placement]
    shape: tuple[int, ...]
    local: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool = False
    reduce: tuple[str, ...] = ()
    stages: tuple[int, ...] = ()
    division: Division | None = None
    zero: int = 0
    master: torch.dtype | None = None

    @property
    def wide(self) -> torch.dtype:
        """Of gradients, of what the optimizer updates, and of its states."""
        return self.master or self.dtype

    @property
    def stored_dtype(self) -> torch.dtype:
        """Of what is there all the time: a part that is gathered before it is read is cast on the way."""
        return self.wide if self.division is not None and self.zero == 3 else self.dtype

    @property
    def has_copy(self) -> bool:
        """Whether operators read a copy of what the optimizer updates, cast."""
        return self.requires_grad and self.stored_dtype != self.wide

    @property
    def updated_part(self) -> ParameterPart:
        """What the optimizer updates, as a parameter of its own."""
        return replace(self, dtype=self.wide, master=None, zero=3)

    def _from(self, zero: int) -> tuple[int, ...]:
        return self.local if self.division is None or self.zero < zero else self.division.shape(self.local)

    @property
    def updated(self) -> tuple[int, ...]:
        """Shape of what the optimizer of this rank updates."""
        return self._from(1)

    @property
    def gradient(self) -> tuple[int, ...]:
        """Shape of the gradient that the backward graph makes."""
        return self._from(2)

    @property
    def stored(self) -> tuple[int, ...]:
        """Shape of what is there all the time; operators read `local`."""
        return self._from(3)


@dataclass(frozen=True, kw_only=True)
class Crossing:
    """A value of the prelude that the body reads; `split`: how microbatches divide it (None: all read the whole)."""

    name: str
    split: Shard | None


@dataclass(frozen=True, kw_only=True)
class Edge:
    """A value that goes from one stage to another in every microbatch, and its gradient back."""

    name: str
    source: int
    target: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool

    @property
    def nbytes(self) -> int:
        count = self.dtype.itemsize
        for size in self.shape:
            count *= size
        return count


@dataclass(kw_only=True)
class StageProgram:
    """A stage on one rank.

    prelude: once a step, inputs → crossings. forward: once a microbatch, returns outputs and then the `saved` values.
    backward: once a microbatch, from the saved values and the gradients of what was sent, returns its outputs.
    weight: where the schedule splits the backward pass, the part of it that no gradient on an edge waits for; backward then also returns
    the `kept` values, which are weight's inputs.
    """

    stage: int
    parameters: list[ParameterPart]
    buffers: list[ParameterPart]
    crossings: list[Crossing]
    prelude: fx.Graph
    prelude_inputs: list[Binding]
    forward: fx.Graph
    forward_inputs: list[Binding]
    forward_outputs: list[Binding]
    backward: fx.Graph
    backward_inputs: list[Binding]
    backward_outputs: list[Binding]
    saved: int
    weight: fx.Graph | None = None
    weight_outputs: list[Binding] = field(default_factory=list)
    kept: int = 0

    @property
    def graphs(self) -> dict[Kind, fx.Graph]:
        """By the kind of action that runs them."""
        found = {Kind.PRELUDE: self.prelude, Kind.FORWARD: self.forward, Kind.BACKWARD: self.backward}
        return found if self.weight is None else found | {Kind.WEIGHT: self.weight}

    def gradients(self, kind: Kind) -> dict[str, fx.Node]:
        """Parameter → its gradient, of those that the graph of BACKWARD or WEIGHT makes."""
        outputs = {Kind.BACKWARD: self.backward_outputs, Kind.WEIGHT: self.weight_outputs}[kind]
        returned: Any = self.graphs[kind].output_node().args[0]
        return {b.name: node for b, node in zip(outputs, returned, strict=False) if b.kind == "parameter" and node is not None}


@dataclass(kw_only=True)
class Program:
    """One rank's program.

    coordinates: place on each mesh axis; groups: axis → ranks along it through this one; loss_axes: axes over which the loss is a sum.
    stages: number → stage, of those that this rank has; placement: of every stage, which of the pipeline's ranks has it.
    choose: (kind, bytes of the message, ranks) → the implementation of a collective, for those that are in no graph.
    """

    rank: int
    coordinates: Mapping[str, int]
    mesh: Mapping[str, int]
    groups: Mapping[str, tuple[int, ...]]
    stages: dict[int, StageProgram]
    placement: tuple[int, ...]
    edges: list[Edge]
    choose: Callable[[str, int, int], str]
    actions: list[Action] = field(default_factory=list)
    loss_axes: tuple[str, ...] = ()

    @property
    def microbatches(self) -> int:
        return self.mesh["mb"]

    @property
    def stage_ranks(self) -> int:
        """Ranks at each place of the pipeline."""
        return prod(self.mesh.get(axis, 1) for axis in ("dp", "ep", "cp", "tp"))

    @property
    def counts_loss(self) -> bool:
        """Whether this rank's loss is one of the summands of the whole: others on axes that do not split it hold the same."""
        return all(index == 0 for axis, index in self.coordinates.items() if axis not in (*self.loss_axes, "pp"))

    @property
    def parameters(self) -> list[ParameterPart]:
        """Of all stages; one that several of them read is there once."""
        return _once(part for stage in self.stages.values() for part in stage.parameters)

    @property
    def buffers(self) -> list[ParameterPart]:
        """As `parameters`."""
        return _once(part for stage in self.stages.values() for part in stage.buffers)

    @property
    def local_edges(self) -> set[str]:
        """Those between two stages of this rank."""
        return {edge.name for edge in self.edges if edge.source in self.stages and edge.target in self.stages}

    @property
    def where(self) -> str:
        """`stage 1`, or `stages 0, 3`."""
        return f"stage{'s' if len(self.stages) > 1 else ''} {', '.join(map(str, self.stages))}"

    def writers(self) -> dict[str, list[Action]]:
        """Parameter → the actions that add to its gradient, in their order."""
        makes = {
            (kind, number): each.gradients(kind) for number, each in self.stages.items() for kind in _MAKE_GRADIENTS & set(each.graphs)
        }
        found: dict[str, list[Action]] = {}
        for action in self.actions:
            for name in makes.get((action.kind, action.stage), ()):
                found.setdefault(name, []).append(action)
        return found

    def __str__(self) -> str:
        """The stages' graphs as readable PyTorch, and the actions."""
        parts = [f"# rank {self.rank}: {self.where}, {dict(self.coordinates)}"]
        for number, stage in self.stages.items():
            parts += [f"# stage {number}"] if len(self.stages) > 1 else []
            for kind, graph in stage.graphs.items():
                parts += [f"# {_TITLES[kind]}, once a {'step' if kind is Kind.PRELUDE else 'microbatch'}", code(graph)]
        parts += ["# actions", *(f"#   {action}" for action in self.actions)]
        return "\n".join(parts)


_MAKE_GRADIENTS = {Kind.BACKWARD, Kind.WEIGHT}
_TITLES = {
    Kind.PRELUDE: "prelude",
    Kind.FORWARD: "forward",
    Kind.BACKWARD: "backward",
    Kind.WEIGHT: "the weights' part of backward",
}


def _once(parts: Iterable[ParameterPart]) -> list[ParameterPart]:
    return list({part.name: part for part in parts}.values())


def code(graph: fx.Graph) -> str:
    """A graph as Python."""
    return graph.python_code("self").src
