"""What one rank runs: its stage's graphs and its list of actions. Simulated, run and printed from the same object."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import fx

from shardwise.program.actions import Action
from shardwise.sharding.types import Placement, Shard

__all__ = ["Binding", "Crossing", "Edge", "ParameterPart", "Program", "StageProgram", "code"]

Kind = Literal["parameter", "buffer", "crossing", "edge", "random", "seed", "saved", "loss"]


@dataclass(frozen=True)
class Binding:
    """What a graph's input or output is: a parameter, a prelude value, a value on an edge, …"""

    kind: Kind
    name: str = ""


@dataclass(frozen=True, kw_only=True)
class ParameterPart:
    """What a rank keeps of a parameter or buffer.

    type: axis → placement; shape: of the whole, local: of the part. reduce: axes over which gradients are summed once a step.
    stages: all stages that hold it (tied weights); the gradient is summed over them, too.
    """

    name: str
    type: Mapping[str, Placement]
    shape: tuple[int, ...]
    local: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool = False
    reduce: tuple[str, ...] = ()
    stages: tuple[int, ...] = ()


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

    prelude: once a step, inputs → crossings. forward: once a microbatch, returns outputs and then the saved values.
    backward: once a microbatch, from the saved values and the gradients of what was sent.
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


@dataclass(kw_only=True)
class Program:
    """One rank's program.

    coordinates: place on each mesh axis; groups: axis → ranks along it through this one; loss_axes: axes over which the loss is a sum.
    """

    rank: int
    coordinates: Mapping[str, int]
    mesh: Mapping[str, int]
    groups: Mapping[str, tuple[int, ...]]
    stage: StageProgram
    edges: list[Edge]
    actions: list[Action] = field(default_factory=list)
    loss_axes: tuple[str, ...] = ()

    @property
    def microbatches(self) -> int:
        return self.mesh["mb"]

    @property
    def counts_loss(self) -> bool:
        """Whether this rank's loss is one of the summands of the whole: others on axes that do not split it hold the same."""
        return all(index == 0 for axis, index in self.coordinates.items() if axis not in (*self.loss_axes, "pp"))

    def __str__(self) -> str:
        """The stage's graphs as readable PyTorch, and the actions."""
        parts = [
            f"# rank {self.rank}: stage {self.stage.stage}, {dict(self.coordinates)}",
            "# prelude, once a step",
            code(self.stage.prelude),
        ]
        parts += ["# forward, once a microbatch", code(self.stage.forward), "# backward, once a microbatch", code(self.stage.backward)]
        parts += ["# actions", *(f"#   {action}" for action in self.actions)]
        return "\n".join(parts)


def code(graph: fx.Graph) -> str:
    """A graph as Python."""
    return graph.python_code("self").src
