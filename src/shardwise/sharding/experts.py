"""Splitting experts: the types on the expert axis.

The ranks of the axis have parts of the batch, as those of the data axis do, but each has some of the experts only. Tokens meet their
experts in one of two ways:

    rows       a product in which each row names its matrix (`expert_mm`): rows go to the ranks of their experts, as many as there are, and
               what is done to a row alone between two such products is done there
    batched    a product whose matrices and whose other input have experts as a dim (each expert's capacity of tokens, or all tokens):
               that dim is split, and the reshards around it carry the tokens

All else follows the batch. The experts' matrices are split back to the parameters they are made of.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from shardwise.capture.experts import expert_mm
from shardwise.capture.graph import Graph, Op, Value
from shardwise.errors import LayoutError
from shardwise.sharding.assignment import Assignment, possible, routed_rows, set_choice, split_sizes
from shardwise.sharding.data import places_of, without_split
from shardwise.sharding.sequence import read_as_split
from shardwise.sharding.signature import Call, Choice, Local, Signature, choice_for, variant
from shardwise.sharding.types import Routed, Shard, closed

__all__ = ["BATCHED", "Experts", "experts_of", "local_code", "refuse_experts", "split_experts"]

aten = torch.ops.aten

BATCHED = (aten.bmm.default, aten.baddbmm.default, aten.einsum.default, aten.matmul.default)
_SELECTS = ("topk.default", "argmax.default", "max.dim", "one_hot.default", "sort.default", "sort.stable", "multinomial.default")

# What is done to each row alone, forward and backward, in code that names no number of rows.
_ROWWISE = {
    *("add.Tensor", "sub.Tensor", "mul.Tensor", "div.Tensor", "neg.default", "where.self", "masked_fill.Scalar", "clamp.default"),
    *("silu.default", "gelu.default", "relu.default", "sigmoid.default", "tanh.default", "square.default", "pow.Tensor_Scalar"),
    *("exp.default", "clamp_min.default", "clamp_max.default", "minimum.default", "maximum.default", "to.dtype", "_to_copy.default"),
    *("unsqueeze.default", "squeeze.dim", "split.Tensor", "split_with_sizes.default", "chunk.default", "slice.Tensor", "rsub.Scalar"),
    *("add.Scalar", "sub.Scalar", "mul.Scalar", "div.Scalar"),
}


@dataclass(kw_only=True)
class Experts:
    """What the expert axis does beside splitting the batch.

    rows: operators on rows at their experts → which expert each row has. batched: operators → the factor of the experts.
    made: operators that make experts' matrices of parameters → the factor of the experts; parameters: their dim of the experts.
    counts: module → how many experts it has.
    """

    rows: dict[Op, Value] = field(default_factory=dict)
    batched: dict[Op, str] = field(default_factory=dict)
    made: dict[Op, Choice] = field(default_factory=dict)
    parameters: dict[Value, int] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    @property
    def together(self) -> dict[str, set[Op]]:
        """Which experts → operators between which rows stay with them, so that no stage may begin there."""
        found: dict[str, set[Op]] = {}
        for op, expert in self.rows.items():
            found.setdefault(f"what is done to rows at the experts that {expert.name} names", set()).add(op)
        return found


def experts_of(graph: Graph, signatures: Mapping[Op, Signature], batch: Mapping[Op, Choice]) -> Experts:
    """Where a model has experts. batch: the operators that hold the batch, with the factor that it is in them."""
    return _Finding(graph=graph, signatures=signatures, batch=batch).found()


@dataclass(kw_only=True)
class _Finding:
    graph: Graph
    signatures: Mapping[Op, Signature]
    batch: Mapping[Op, Choice]
    experts: Experts = field(default_factory=Experts)

    def __post_init__(self) -> None:
        self.readers = self.graph.consumers()
        self.weights = set(self.graph.parameters.values())  # parameters, and what is made of them alone
        for op in self.graph.ops:
            if op.inputs and all(value in self.weights for value in op.inputs):
                self.weights.update(op.outputs)

    def found(self) -> Experts:
        by_rows: dict[Value, list[Op]] = {}
        for op in self.graph.ops:
            if op.target is expert_mm and self._by_rows(op):
                by_rows.setdefault(op.inputs[2], []).append(op)
        for expert, products in by_rows.items():
            self._rows(expert, products)
        if any(op.name.removeprefix("aten.") in _SELECTS for op in self.graph.ops):
            for op in self.graph.ops:
                if op.target in BATCHED:
                    self._batched(op)
        return self.experts

    # -- rows ------------------------------------------------------------------------------------------------------------------------------

    def _rows(self, expert: Value, products: list[Op]) -> None:
        """The products of one routing, and what lies between them or goes on from them with nothing but their rows."""
        for op in products:
            self._matrices(op, op.inputs[1], Shard(0))
            self.experts.counts[op.module] = op.inputs[1].shape[0]
        after: set[Op] = set(products)
        for op in self.graph.ops:
            if op not in after and self._by_rows(op) and any(value.producer in after for value in op.inputs):
                after.add(op)
        before: set[Op] = set(products)
        for op in reversed(self.graph.ops):
            if op in after and any(reader in before for value in op.outputs for reader, _ in self.readers[value]):
                before.add(op)
        routed = {op for op in after if op in before}
        looked_up = [reader for reader, index in self.readers[expert] if reader.target is aten.index.Tensor and index == 1]
        looked_up = [op for op in looked_up if op.inputs[0] in self.weights and len(op.inputs) == 2 and self._holds_rows(op)]
        for op in self.graph.ops:
            rows = [value.producer for value in op.inputs if self._is_rows(op, value)]
            if op in after and rows and all(each in routed or each in looked_up for each in rows) and any(each in routed for each in rows):
                routed.add(op)
        routed |= {op for op in looked_up if all(reader in routed for reader, _ in self.readers[op.outputs[0]])}
        self.experts.rows |= dict.fromkeys(routed, expert)

    def _by_rows(self, op: Op) -> bool:
        """Whether it does something to each row alone."""
        known = op.target is expert_mm or op.name.removeprefix("aten.") in _ROWWISE
        return known and self._holds_rows(op) and all(self.readers[value] for value in op.outputs)

    def _holds_rows(self, op: Op) -> bool:
        """Whether the batch is dim 0 alone of all that hold it, and all results do."""
        if op not in self.batch:
            return False
        factor, sig = self.batch[op].factor, self.signatures[op]
        dims = [(place, names) for tensor in (*sig.inputs, *sig.outputs) for place, names in enumerate(tensor) if factor in names]
        return all(each == (0, (factor,)) for each in dims) and all((factor,) in tensor[:1] for tensor in sig.outputs)

    def _is_rows(self, op: Op, value: Value) -> bool:
        return op in self.batch and (self.batch[op].factor,) in self.signatures[op].inputs[op.inputs.index(value)][:1]

    # -- batched ---------------------------------------------------------------------------------------------------------------------------

    def _batched(self, op: Op) -> None:
        """A product of matrices and tokens that both have the experts as their first dim."""
        sig = self.signatures[op]
        for number, value in enumerate(op.inputs):
            others = [each for index, each in enumerate(sig.inputs) if index != number and op.inputs[index] not in self.weights]
            if value not in self.weights or len(value.shape) != 3 or len(others) != 1 or len(sig.inputs[number][0]) != 1:
                continue
            (factor,) = sig.inputs[number][0]
            held = all((factor,) in tensor for tensor in (*others, *sig.outputs))
            if held and factor in sig.splits and sig.sizes[factor] > 1 and factor != self._samples(op):
                self.experts.counts[op.module] = sig.sizes[factor]
                self._spread(op, factor)
                return

    def _samples(self, op: Op) -> str:
        return self.batch[op].factor if op in self.batch else ""

    def _spread(self, op: Op, factor: str) -> None:
        """Splits an operator over experts, the parameters it reads, and what else has them as a dim and needs nothing but that."""
        if op in self.experts.batched or op in self.experts.rows:
            return
        self.experts.batched[op] = factor
        for value, shard in places_of(op, self.signatures[op], Choice("split", factor)):
            if value in self.weights:
                self._matrices(op, value, shard)
            elif value in op.outputs:
                for reader, _ in self.readers[value]:
                    self._go_on(reader, value, shard)
            elif value.producer is not None and not any(self._holds(value.producer, shard)):
                made = self._factor(value.producer, value, shard)
                if made and value.producer.target in (aten.expand.default, aten.repeat.default):
                    self._spread(value.producer, made)

    def _go_on(self, op: Op, value: Value, shard: Shard) -> None:
        factor, sig = self._factor(op, value, shard), self.signatures[op]
        if not factor or not all((factor,) in tensor for tensor in sig.outputs):
            return
        tokens = [each for each in op.inputs if each not in self.weights]
        if all(each.producer in self.experts.batched for each in tokens):
            self._spread(op, factor)

    def _factor(self, op: Op, value: Value, shard: Shard) -> str:
        """The factor that is the split dim of a tensor of the call; "" where it cannot be split there."""
        sig = self.signatures[op]
        tensor = (*sig.inputs, *sig.outputs)[[*op.inputs, *op.outputs].index(value)]
        choice = choice_for(sig, tensor, shard, sig.sizes)
        return choice.factor if choice and choice.blocks == choice.unit == 1 else ""

    def _holds(self, op: Op, shard: Shard) -> Iterator[bool]:
        """Of each input, whether it has the experts too."""
        factor = self._factor(op, op.outputs[0], shard)
        yield from (any(factor in names for names in tensor) for tensor in self.signatures[op].inputs)

    # -- matrices --------------------------------------------------------------------------------------------------------------------------

    def _matrices(self, op: Op, value: Value, shard: Shard) -> None:
        """From the matrices that an operator reads back to parameters."""
        if value.kind == "parameter":
            self.experts.parameters.setdefault(value, shard.dim)
            return
        maker = value.producer
        if maker is None or maker in self.experts.made:
            return
        sig = self.signatures[maker]
        choice = choice_for(sig, sig.outputs[maker.outputs.index(value)], shard, sig.sizes)
        if choice is None or choice.blocks != 1 or choice.unit != 1:
            return
        self.experts.made[maker] = choice
        for each, place in places_of(maker, sig, choice):
            if each in maker.inputs:
                self._matrices(maker, each, place)


def refuse_experts(graph: Graph, experts: Experts, ranks: int) -> None:
    """Raises LayoutError where the model has no experts, or some whose number the ranks do not divide."""
    for module, count in experts.counts.items():
        if count % ranks:
            fits = [str(size) for size in range(2, count + 1) if count % size == 0]
            raise LayoutError(f"ep={ranks} divides experts evenly, but {module or 'the model'} has {count}; use ep={' or '.join(fits)}")
    if experts.counts:
        return
    why = f"ep={ranks} divides experts, but the model has none: no product in it takes tokens to one of several matrices"
    if kept := [name for name in graph.kept if "expert" in name.lower() or "moe" in name.lower()]:
        raise LayoutError(
            f"{why}; {kept[0]} is kept as one operator ({graph.kept[kept[0]]}), so experts in it cannot be told apart. Write them as one "
            'product (of transformers: experts_implementation="grouped_mm"), or use ep=1'
        )
    raise LayoutError(f"{why}; use ep=1, and dp={ranks} or tp={ranks} instead")


def local_code(assignment: Assignment, op: Op) -> Local:
    """What a rank runs of an operator: its rule's, but where that names the number of rows and these are at their experts."""
    if op.target is aten.slice.Tensor and routed_rows(assignment, op):
        return _columns
    return assignment.signatures[op].local


def _columns(call: Call, tensors: Sequence[Tensor]) -> Tensor:
    """x[:, start:stop:step], of a dim behind the rows."""
    size = tensors[0].shape
    dim = call.op.argument(1, "dim", 0) % len(size)
    start, stop, step = slice(*(call.op.argument(2 + n, name) for n, name in enumerate(("start", "end", "step")))).indices(size[dim])
    found: Tensor = _Columns.apply(tensors[0], dim, start, stop, step)
    return found


class _Columns(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, start: int, stop: int, step: int) -> Tensor:
        ctx.dim, ctx.start, ctx.step, ctx.size = dim, start, step, x.shape[dim]
        return aten.slice.Tensor(x, dim, start, stop, step)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """With zeros between and around it."""
        dim, count = ctx.dim, gradient.shape[ctx.dim]
        behind = [0, 0] * (gradient.dim() - 1 - dim)
        if ctx.step > 1:
            gradient = closed(torch.constant_pad_nd(gradient.unsqueeze(dim + 1), [*behind, 0, ctx.step - 1]), dim)
        after = ctx.size - ctx.start - count * ctx.step
        return torch.constant_pad_nd(gradient, [*behind, ctx.start, after]), None, None, None, None


def split_experts(assignment: Assignment, experts: Experts, batch: Mapping[Op, Choice], prelude: set[Op]) -> None:
    """Chooses for every operator on the axis `ep`, when `dp` and `mb` are decided. batch: the factors that hold it."""
    graph, ranks = assignment.graph, assignment.mesh["ep"]
    if experts.counts or not graph.outputs:  # eval mode may do without
        refuse_experts(graph, experts, ranks)
    for value, dim in experts.parameters.items():
        if value.shape[dim] % ranks == 0:
            assignment.sources.setdefault(value, {})["ep"] = Shard(dim)
    for op in graph.ops:
        set_choice(assignment, op, "ep", Choice("R"))
    for op in graph.ops:
        if op not in prelude:
            set_choice(assignment, op, "ep", _choice(assignment, op, experts, batch) or without_split(assignment, op, "ep"))
    readers = graph.consumers()
    for op in reversed(graph.ops):
        can = op in prelude and op in batch and possible(assignment, op, "ep", batch[op])
        if can and read_as_split(assignment, op, "ep", batch[op], readers, prelude):
            set_choice(assignment, op, "ep", batch[op])


def _choice(assignment: Assignment, op: Op, experts: Experts, batch: Mapping[Op, Choice]) -> Choice | None:
    if op in experts.rows:
        return _route(assignment, op, experts.rows[op], batch)
    if op in experts.batched:
        return Choice("split", experts.batched[op])
    if op in experts.made:
        return experts.made[op]
    return batch[op] if op in batch and possible(assignment, op, "ep", batch[op]) else None


def _route(assignment: Assignment, op: Op, expert: Value, batch: Mapping[Op, Choice]) -> Choice:
    """To the experts; their number is the first product's whose rows name them."""
    product = next(each for each, _ in assignment.graph.consumers()[expert] if each.target is expert_mm)
    home = variant(product, assignment.signatures[product], batch[product], split_sizes(assignment, product, "ep"), assignment.mesh["ep"])
    shard = home.inputs[2]
    assert isinstance(shard, Shard), f"the rows of {product.key} do not hold the batch"
    routed = Routed(expert.name, shard, product.inputs[1].shape[0])
    return Choice("route", batch[op].factor, routed=routed, experts="e" if op.target is expert_mm else "")
