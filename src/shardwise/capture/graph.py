"""The captured model: values, and the operators between them.

    parameters, buffers, batch inputs ──▶ Op ──▶ Value ──▶ Op ──▶ … ──▶ loss

A Graph is one device's forward pass on the example batch's shapes. It holds no tensors, only their descriptions, so a model of any size
can be captured on a laptop. Operators are high-level ATen calls (`linear`, `layer_norm`, `scaled_dot_product_attention` stay whole) and
the few of `shardwise.capture.operators`; all are functional: nothing is changed in place.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from shardwise.capture.precision import Precision

__all__ = ["Check", "Graph", "Op", "Slot", "Value", "call", "operator_name"]

Kind = Literal["parameter", "buffer", "input", "result"]


@dataclass(frozen=True)
class Slot:
    """Stands in an operator's arguments for its tensor input number `index`."""

    index: int

    def __repr__(self) -> str:
        return f"%{self.index}"


@dataclass(eq=False, kw_only=True)
class Value:
    """One tensor of the graph.

    name: unique; a parameter's, buffer's or input's own name, else made from the operator's.
    requires_grad: whether a gradient flows back through it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    kind: Kind = "result"
    requires_grad: bool = False
    producer: Op | None = None

    @property
    def numel(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def __repr__(self) -> str:
        return f"{self.name}:{str(self.dtype).removeprefix('torch.')}{list(self.shape)}"


@dataclass(eq=False, kw_only=True)
class Op:
    """One operator call.

    args, kwargs: as written, with `Slot`s where tensors stand; inputs: those tensors in order.
    module: qualified path of the module that made the call; key: module path + operator + ordinal, stable between captures.
    """

    target: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    module: str
    key: str = ""

    @property
    def name(self) -> str:
        return operator_name(self.target)

    @property
    def requires_grad(self) -> bool:
        return any(value.requires_grad for value in self.outputs)

    def argument(self, index: int, name: str, default: Any = None) -> Any:
        """The constant (or Slot) passed at position `index` or by `name`."""
        return self.args[index] if len(self.args) > index else self.kwargs.get(name, default)

    def __repr__(self) -> str:
        arguments = [*map(repr, self.args), *(f"{k}={v!r}" for k, v in self.kwargs.items())]
        return f"{', '.join(map(repr, self.outputs))} = {self.name}({', '.join(arguments)}) of {list(self.inputs)} in {self.module}"


@dataclass(frozen=True, kw_only=True)
class Check:
    """What a value of the graph, which depends on the batch alone, was on the example batch: the graph is right for batches like that.

    module: whose control flow depends on it.
    """

    value: Value
    expected: float
    module: str


@dataclass(kw_only=True)
class Graph:
    """A model's forward pass.

    parameters, buffers, inputs: by qualified name, tied ones once under their first name.
    aliases: every other name of a tied parameter or buffer → the first.
    updates: buffers that the forward pass changes → the value that replaces them.
    blocks: runs of repeated operators, for each the list of equal operator sequences.
    global_batch: samples in the batch (size of each input's batch dim); batch_dims: input → its batch dim.
    outputs: of a graph captured for inference, what the model returns, and `loss` is the first of them; () of one to train.
    changing: buffers that are changed between runs of the graph, though not by it.
    kept: submodules that are one operator each → why they could not be captured. checks: what a batch must be like.
    precision: that in which it was captured (`shardwise.capture.precision`).
    """

    parameters: dict[str, Value]
    buffers: dict[str, Value]
    inputs: dict[str, Value]
    ops: list[Op]
    loss: Value
    aliases: dict[str, str] = field(default_factory=dict)
    updates: dict[str, Value] = field(default_factory=dict)
    blocks: list[list[list[Op]]] = field(default_factory=list)
    batch_dims: dict[str, int] = field(default_factory=dict)
    constants: dict[str, Any] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)
    outputs: tuple[Value, ...] = ()
    changing: frozenset[str] = frozenset()
    precision: Precision = "float32"

    @property
    def master(self) -> torch.dtype | None:
        """In which parameters that operators read in 16 bits are updated; None where they are updated as they are read."""
        return None if self.precision == "float32" else torch.float32

    @property
    def global_batch(self) -> int:
        return min((self.inputs[name].shape[dim] for name, dim in self.batch_dims.items()), default=1)

    def values(self) -> Iterator[Value]:
        """Every tensor, sources first, then in the order of computation."""
        for group in (self.parameters, self.buffers, self.inputs):
            yield from group.values()
        for op in self.ops:
            yield from op.outputs

    def consumers(self) -> dict[Value, list[tuple[Op, int]]]:
        """For each tensor the operators (and which of their inputs) that read it."""
        readers: dict[Value, list[tuple[Op, int]]] = {value: [] for value in self.values()}
        for op in self.ops:
            for index, value in enumerate(op.inputs):
                readers[value].append((op, index))
        return readers

    def fingerprint(self) -> str:
        """A short hash of operators, shapes and names: equal for equal models, whatever their weights."""
        lines = [f"{value.kind} {value!r}" for value in self.values()]
        lines += [f"{op.key} {op!r}" for op in self.ops]
        return hashlib.sha256(json.dumps(lines).encode()).hexdigest()[:16]

    def run(self, state: Mapping[str, torch.Tensor], batch: Mapping[str, torch.Tensor]) -> dict[Value, torch.Tensor]:
        """Computes the graph on one device; the reference for every split of it.

        state: parameters and buffers by name. Returns the loss, the outputs and the buffers' new values, by graph value.
        """
        tensors: dict[Value, torch.Tensor] = {}
        for group, source in ((self.parameters, state), (self.buffers, state), (self.inputs, batch)):
            tensors |= {value: source[name] for name, value in group.items()}
        last_use = {value: op for op in self.ops for value in (*op.inputs, *op.outputs)}
        keep = {self.loss, *self.outputs, *self.updates.values()}
        for op in self.ops:
            with torch.set_grad_enabled(op.requires_grad):
                results = call(op, [tensors[value] for value in op.inputs])
            tensors.update(zip(op.outputs, results, strict=True))
            for value in (*op.inputs, *op.outputs):
                if last_use[value] is op and value not in keep and value.kind == "result":
                    tensors.pop(value, None)
        return {value: tensors[value] for value in keep}

    def wrong_checks(self, state: Mapping[str, torch.Tensor], batch: Mapping[str, torch.Tensor]) -> list[tuple[Check, float]]:
        """The checks that a (whole) batch does not pass, with what was found."""
        needed, wanted = set[Op](), [check.value for check in self.checks]
        while wanted:
            value = wanted.pop()
            if value.producer is not None and value.producer not in needed:
                needed.add(value.producer)
                wanted.extend(value.producer.inputs)
        tensors = {value: batch[name] for name, value in self.inputs.items() if name in batch}
        tensors |= {value: state[name] for name, value in self.buffers.items() if name in state}
        for op in self.ops:
            if op in needed:
                tensors.update(zip(op.outputs, call(op, [tensors[value] for value in op.inputs]), strict=True))
        found = [(check, float(tensors[check.value])) for check in self.checks]
        return [(check, value) for check, value in found if value != check.expected]


def call(op: Op, tensors: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Runs one operator on tensors put in the place of its slots."""
    args, kwargs = fill((op.args, op.kwargs), tensors)
    result = op.target(*args, **kwargs)
    return tuple(result) if isinstance(result, (tuple, list)) else (result,)


def fill(tree: Any, tensors: list[torch.Tensor]) -> Any:
    """The arguments with every Slot replaced by its tensor."""
    if isinstance(tree, Slot):
        return tensors[tree.index]
    if isinstance(tree, (tuple, list)):
        return type(tree)(fill(item, tensors) for item in tree)
    if isinstance(tree, dict):
        return {name: fill(item, tensors) for name, item in tree.items()}
    return tree


def operator_name(target: Callable[..., Any]) -> str:
    """`aten.linear.default` for an ATen operator, `shardwise.NAME` for one of ours."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    return f"shardwise.{target.__name__}"
