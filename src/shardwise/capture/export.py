"""model, example batch ──torch.export──▶ ExportedProgram ──▶ Graph

The model is exported on descriptions of tensors (fake or meta), forward only and in the mode it is in; then each node becomes an `Op`,
inlining regions that switch gradients off, dropping what has no effect, and rewriting the calls listed in `normalize`. What cannot be
followed is kept as one operator (`keep`): when exporting fails, the innermost submodule where it failed, and exporting begins again.
"""

from __future__ import annotations

import io
import logging
import operator
import traceback
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from shardwise.capture.batch import dim_of, leaf_names, map_tensors, named_tensors
from shardwise.capture.blocks import find_blocks
from shardwise.capture.calls import TakesGradients, followable
from shardwise.capture.functional import functional
from shardwise.capture.graph import Check, Graph, Op, Slot, Value, fill, operator_name
from shardwise.capture.keep import Treatment, keeping
from shardwise.capture.masks import without_masks
from shardwise.capture.normalize import NOISE, RANDOM_STATE, is_random, normalize, passes_through
from shardwise.capture.opaque import EXPECT, OPERATOR, Opaque, Result, opaque_of
from shardwise.capture.operators import strided
from shardwise.capture.precision import Precision, in_precision, losses_in_float32, mixes
from shardwise.capture.record import TENSOR, Recording, record
from shardwise.errors import BatchError, CaptureError, ValuesNeeded

__all__ = ["Structure", "capture", "capture_inference", "compute_loss", "loss_of"]

Loss = Callable[[Any], torch.Tensor]


def capture(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    loss: Loss | None = None,
    batch_dims: Mapping[str, int | None] | None = None,
    precision: Precision = "float32",
) -> Graph:
    """The model's forward pass as a Graph.

    batch: keyword arguments of `forward`, with tensors named by their paths (batch.py); they may be on the meta device.
    loss: makes the scalar loss from the module's output; by default the output itself when scalar, or its `.loss`.
    batch_dims: input → its batch dim (None: the same tensor for every sample); dim 0 where not named.
    precision: "float32" leaves the model as it is; "bf16", "fp16": a copy of it that computes in 16 bits (`in_precision`).
    Raises CaptureError, naming the module and line, and BatchError when the inputs disagree on the batch size.
    """
    return _in_precision(
        model, batch, precision, lambda low, inputs: _captured(low, inputs, _LossOnly(low, loss, precision), batch_dims, trains=True)
    )


def _in_precision(
    model: nn.Module, batch: Mapping[str, Any], precision: Precision, captured: Callable[[nn.Module, dict[str, Any]], Graph]
) -> Graph:
    """What is captured of the model and batch as they compute in the precision; buffers in 16 bits only where an operator needs that."""
    kept: set[str] = set()  # parameters that the forward pass casts: they are captured again as it leaves them
    for buffers in (False, True):
        try:
            while True:
                low, inputs = in_precision(model, batch, precision, buffers=buffers, kept=kept)
                given = _dtypes(low)
                graph = captured(low, inputs)
                changed = {name for name, _ in _dtypes(low) - given}
                if changed <= kept:
                    break
                kept |= changed
        except RuntimeError as error:
            if precision == "float32":
                raise
            refused, mixing = _NotFollowed.from_traceback(low, error), None
            continue
        graph.precision = precision
        mixing = next((op for op in graph.ops if mixes(op.name, (value.dtype for value in op.inputs))), None)
        if mixing is None or precision == "float32":
            return graph
    if mixing is None:
        raise CaptureError(f"precision={precision!r}: the model does not run in it ({refused.place}): {refused}; {_CAST}")
    kinds = " and ".join(sorted({str(v.dtype).removeprefix("torch.") for v in mixing.inputs if v.dtype.is_floating_point}))
    raise CaptureError(f"precision={precision!r}: {mixing.name} in {mixing.module or 'the model'} is given {kinds}; {_CAST}")


def _dtypes(model: nn.Module) -> set[tuple[str, torch.dtype]]:
    """Each parameter's name, as often as it has one, with its dtype."""
    return {(name, parameter.dtype) for name, parameter in model.named_parameters(remove_duplicate=False)}


_CAST = "cast there what is float32 on purpose (`.to(x.dtype)`), or use precision='float32'"


def capture_inference(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    wanted: Callable[[Any], Any] | None = None,
    batch_dims: Mapping[str, int | None] | None = None,
    changing: Collection[str] = (),
    fill: Callable[[], None] | None = None,
    precision: Precision = "float32",
) -> tuple[Graph, Structure]:
    """The forward pass in the mode that the model is in, without gradients, as a Graph with `outputs`, and how they form its output.

    wanted: makes what is wanted of the module's output; all of it by default.
    changing: names of buffers that training changes between runs. Buffers that this forward pass would change are left as they are.
    fill: called once if the values of parameters are needed, which they need not have before. precision: as of `capture`.
    Raises as `capture`, and CaptureError for an output without tensors.
    """
    structures: list[Structure] = []

    def captured(low: nn.Module, inputs: dict[str, Any]) -> Graph:
        wrapped = _Outputs(low, wanted, precision)
        structures.append(wrapped.structure)
        filled = fill if fill is None or low is model else partial(_fill_copy, fill, model, low)
        return _captured(low, inputs, wrapped, batch_dims, trains=False, changing=changing, fill=filled)

    graph = _in_precision(model, batch, precision, captured)
    return graph, structures[-1]


@torch.no_grad()
def _fill_copy(fill: Callable[[], None], model: nn.Module, low: nn.Module) -> None:
    """Fills the model, and its copy in a smaller precision from it."""
    fill()
    for whole, copy in zip((*model.parameters(), *model.buffers()), (*low.parameters(), *low.buffers()), strict=True):
        copy.copy_(whole)


def _captured(
    model: nn.Module,
    batch: Mapping[str, Any],
    wrapped: nn.Module,
    batch_dims: Mapping[str, int | None] | None,
    *,
    trains: bool,
    changing: Collection[str] = (),
    fill: Callable[[], None] | None = None,
) -> Graph:
    """The graph of `wrapped`, which returns what is wanted of the model's output."""
    tensors = named_tensors(batch)
    _refuse_sparse({**dict(model.named_parameters()), **dict(model.named_buffers()), **tensors})
    dims = _batch_dims(tensors, batch_dims or {})
    names = {module: name or type(model).__name__ for name, module in reversed(list(model.named_modules()))}
    treatment = Treatment()
    while True:
        if treatment.needs_recording and fill is not None:
            fill()
            fill = None
        recording = _record(model, batch, wrapped, treatment) if treatment.needs_recording else Recording()
        try:
            with keeping(treatment, recording, names) as held:
                exported = _functional(_export(model, batch, wrapped), model)
                graph = _Converter(exported, model, batch, dims, changing).graph(trains=trains)
            _refuse_wrong_checks(graph, model, tensors)
        except _NotFollowed as error:
            _treat_more(treatment, recording, error, model, names)
            continue
        del held  # from here on the graph's operators hold the code
        graph.kept = {names[module]: why for module, why in treatment.whole.items()}
        graph.kept |= {f"{names[module]} (its end)": why for module, why in treatment.tails.items()}
        return graph


def _refuse_wrong_checks(graph: Graph, model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """The example batch must be one that the graph is right for."""
    state = {**dict(model.named_buffers()), **graph.constants}
    if any(tensor.is_meta for tensor in (*state.values(), *tensors.values())):
        return
    for check, found in graph.wrong_checks(state, tensors):
        where = check.module or "the model"
        raise _NotFollowed(
            f"{where}: pad_packed_sequence makes as many steps as the longest sample has, {found:g} of {check.expected:g} on this batch; "
            "pass total_length to it, or cut the padding that no sample needs",
            _around(model, check.module),
        )


def _treat_more(treatment: Treatment, recording: Recording, error: _NotFollowed, model: nn.Module, names: Mapping[nn.Module, str]) -> None:
    """What to do about code that could not be followed: answer its questions, keep the end of the innermost submodule, or all of it.

    Raises CaptureError when nothing is left to do.
    """
    if error.is_question and not treatment.answering:
        treatment.answering = True
        return
    treatment.gradients = treatment.gradients or error.takes_gradients
    for stuck in error.inside:
        alike = [module for module in names if type(module) is type(stuck) and (module is stuck or module is not model)]
        untried = stuck not in treatment.tails and stuck not in treatment.whole
        if untried and not error.takes_gradients and next(stuck.children(), None) is not None:
            treatment.tails |= dict.fromkeys(alike, str(error))
            return
        if stuck not in treatment.whole and stuck is not model:
            treatment.whole |= dict.fromkeys(alike, str(error))
            for module in alike:
                treatment.tails.pop(module, None)
            return
    raise CaptureError(error.explain(model, names)) from error.__cause__


def _record(model: nn.Module, batch: Mapping[str, Any], wrapped: nn.Module, treatment: Treatment) -> Recording:
    """What must be known of a run on the example batch."""
    tensors = [*model.parameters(), *model.buffers(), *named_tensors(batch).values()]
    if any(tensor.is_meta for tensor in tensors):
        why = next(iter((*treatment.whole.values(), *treatment.tails.values())), "its control flow depends on values")
        raise ValuesNeeded(
            f"{type(model).__name__} cannot be captured from shapes alone: {why}. Build the model and the batch on cpu instead of meta: "
            "a run on real tensors tells what is missing"
        )
    own = map_tensors(lambda name, tensor: tensor.clone(), batch)  # it may change them
    return record(model, lambda: wrapped(**own), list(treatment.whole), list(treatment.tails), gradients=treatment.gradients)


def _refuse_sparse(values: Mapping[str, torch.Tensor]) -> None:
    for name, value in values.items():
        if value.layout is not torch.strided:
            raise CaptureError(
                f"{name} is a tensor of layout {value.layout}, which cannot be split or sent; keep indices and values as dense tensors, "
                "and write products with it as sums: out.index_add(0, rows, values[:, None] * x[columns])"
            )


def _batch_dims(tensors: Mapping[str, torch.Tensor], given: Mapping[str, int | None]) -> dict[str, int]:
    if unknown := {name for name in given if not any(f"{each}.".startswith(f"{name}.") for each in tensors)}:
        raise BatchError(f"batch_dims names {sorted(unknown)}, which the batch does not hold; it holds {sorted(tensors)}")
    chosen = {name: dim_of(name, given) for name in tensors}
    dims = {name: dim for name, dim in chosen.items() if dim is not None and tensors[name].dim() > dim}
    sizes = {name: tensors[name].shape[dim] for name, dim in dims.items()}
    if len(set(sizes.values())) > 1:
        raise BatchError(
            f"the batch's tensors differ in their number of samples: {sizes}; name their batch dims with batch_dims={{name: dim or None}}"
        )
    return dims


class _LossOnly(nn.Module):
    """Returns the loss alone, so that outputs which are no pytrees need not be exported."""

    def __init__(self, model: nn.Module, loss: Loss | None, precision: Precision) -> None:
        super().__init__()
        self.model = model
        self.train(model.training)
        self.loss, self.precision = loss, precision

    def forward(self, **batch: Any) -> torch.Tensor:
        with followable():
            return compute_loss(self.model, batch, self.loss, self.precision)


def compute_loss(model: nn.Module, batch: Mapping[str, Any], loss: Loss | None, precision: Precision = "float32") -> torch.Tensor:
    """The scalar loss of a batch; in 16 bits functional losses, and the loss itself, are float32."""
    with losses_in_float32(precision):
        value = loss_of(model(**batch), loss, model)
    return value if precision == "float32" else value.float()


@dataclass(kw_only=True)
class Structure:
    """How tensors form a module's output. leaves: TENSOR where one of them stands."""

    spec: Any = None
    leaves: list[Any] = field(default_factory=list)

    def filled(self, tensors: Iterable[torch.Tensor]) -> Any:
        """The output of these tensors."""
        given = iter(tensors)
        return pytree.tree_unflatten([next(given) if leaf is TENSOR else leaf for leaf in self.leaves], self.spec)


class _Outputs(nn.Module):
    """Returns all tensors of the output in a list, and notes how they form it; with `wanted`, what that makes of it."""

    def __init__(self, model: nn.Module, wanted: Callable[[Any], Any] | None, precision: Precision) -> None:
        super().__init__()
        self.model = model
        self.train(model.training)
        self.wanted, self.precision = wanted, precision
        self.structure = Structure()

    def forward(self, **batch: Any) -> list[torch.Tensor]:
        with losses_in_float32(self.precision):
            output = self.model(**batch)
            output = output if self.wanted is None else self.wanted(output)
        leaves, spec = pytree.tree_flatten(output)
        self.structure.spec, self.structure.leaves = spec, [TENSOR if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        if not tensors:
            raise CaptureError(
                f"{type(self.model).__name__} returns a {type(output).__name__} in which no tensor is found; return tensors, or lists or "
                "dicts of them"
            )
        return tensors


def loss_of(output: Any, loss: Loss | None, model: nn.Module) -> torch.Tensor:
    """The scalar loss in a module's output. Raises CaptureError, which says how to give one, when there is none."""
    value = loss(output) if loss is not None else getattr(output, "loss", output)
    if isinstance(value, dict):
        value = value.get("loss")
    if not isinstance(value, torch.Tensor) or value.numel() != 1:
        found = f"a tensor of shape {list(value.shape)}" if isinstance(value, torch.Tensor) else type(output).__name__
        raise CaptureError(
            f"{type(model).__name__} returns {found}, not a scalar loss; put labels into the batch or pass loss=callable "
            "that makes the scalar from the module's output"
        )
    return value.reshape(())


def _export(model: nn.Module, batch: Mapping[str, Any], wrapped: nn.Module) -> torch.export.ExportedProgram:
    # A tensor passed under two names would be captured as one input: give each name its own.
    device = torch.device("meta") if any(parameter.is_meta for parameter in model.parameters()) else None
    example = map_tensors(lambda name, tensor: _described(tensor, device), batch)
    try:
        with _quiet():
            return torch.export.export(wrapped, (), kwargs=example, strict=False)
    except CaptureError:
        raise
    except Exception as error:
        raise _NotFollowed.from_traceback(model, error) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's own account of a failed export, which it prints: the reason is in the exception."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _described(tensor: torch.Tensor, device: torch.device | None) -> torch.Tensor:
    """A tensor of the same shape and strides."""
    return torch.empty_like(tensor, device=device)


_MOVE = (
    "Move that code into a submodule, which is then kept whole as one operator, or write control flow that depends on values with tensor "
    "operators (torch.where, masks)"
)
_WRAP = "Move that code, with the layers that it differentiates, into a submodule, which is then kept whole as one operator"


class _NotFollowed(Exception):
    """Exporting could not follow the code.

    inside: the submodules whose code that was, innermost first; place: file and line; is_question: the code asked for a tensor's value;
    takes_gradients: the code takes gradients, through all that its submodules do.
    """

    def __init__(
        self, reason: str, inside: list[nn.Module], place: str = "", *, is_question: bool = False, takes_gradients: bool = False
    ) -> None:
        super().__init__(reason)
        self.inside, self.place, self.is_question, self.takes_gradients = inside, place, is_question, takes_gradients

    @staticmethod
    def from_traceback(model: nn.Module, error: Exception) -> _NotFollowed:
        members = set(model.modules())
        inside: list[nn.Module] = []
        place = ""
        for frame, line in traceback.walk_tb(error.__traceback__):
            owner = frame.f_locals.get("self")
            if isinstance(owner, nn.Module) and owner in members:
                if frame.f_code.co_name == "_call_impl":
                    inside.append(owner)
                if not frame.f_code.co_filename.startswith(torch.__path__[0]):
                    place = f"{frame.f_code.co_filename}:{line}"
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if "fake tensor in the exported program constant" in reason:
            reason = "it reads a tensor that an earlier line kept in an attribute, or sets .data"
        kind = type(error).__name__
        return _NotFollowed(
            reason if isinstance(error, TakesGradients) else f"{kind}: {reason}",
            list(dict.fromkeys(inside[::-1])),
            place,
            is_question="DataDependent" in kind,
            takes_gradients=isinstance(error, TakesGradients),
        )

    def explain(self, model: nn.Module, names: Mapping[nn.Module, str]) -> str:
        """Which module and line stopped the capture, and what to change."""
        where = f" in {names[self.inside[0]]}" if self.inside else ""
        return (
            f"{type(model).__name__} cannot be captured{where}{f' ({self.place})' if self.place else ''}: {self}. "
            f"{_WRAP if self.takes_gradients else _MOVE}"
        )


def _value(name: str, meta: torch.Tensor, kind: Any = "result", requires_grad: bool = False) -> Value:
    return Value(name=name, shape=tuple(int(size) for size in meta.shape), dtype=meta.dtype, kind=kind, requires_grad=requires_grad)


@dataclass(frozen=True, kw_only=True)
class _Builder:
    """Appends operators called in one module to the converter's list."""

    converter: _Converter
    module: str
    grad: bool

    def add(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], metas: list[torch.Tensor]) -> tuple[Value, ...]:
        inputs: list[Value] = []
        slotted_args, slotted_kwargs = _slots((args, kwargs), inputs)  # devices become "cpu": where it runs is the program's matter
        if is_random(target):  # no keyed form of it is known: every rank draws all of it, from one seed
            target = _drawn(target, slotted_args, slotted_kwargs, metas, self.random_key())
            inputs.append(self.random_state())
            slotted_args, slotted_kwargs = tuple(Slot(index) for index in range(len(inputs))), {}
        tracked = self.grad and any(value.requires_grad for value in inputs)
        name = f"{self.module or 'model'}.{operator_name(target).split('.')[1].split('[')[0]}"
        outputs = tuple(
            _value(self.converter.unique(name), meta, requires_grad=tracked and _differentiable(target, meta)) for meta in metas
        )
        op = Op(target=target, args=slotted_args, kwargs=slotted_kwargs, inputs=tuple(inputs), outputs=outputs, module=self.module)
        for value in outputs:
            value.producer = op
        self.converter.ops.append(op)
        return outputs

    def random_state(self) -> Value:
        return self.converter.inputs.setdefault(RANDOM_STATE, Value(name=RANDOM_STATE, shape=(2,), dtype=torch.int64, kind="input"))

    def update(self, buffer: Value, new: Value) -> None:
        self.converter.changed[buffer.name] = new

    def random_key(self) -> int:
        return sum(any(value.name == RANDOM_STATE for value in op.inputs) for op in self.converter.ops)


def _drawn(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], metas: list[torch.Tensor], number: int) -> Opaque:
    """A random operator as code that is seeded before it runs."""
    results = tuple(Result(shape=tuple(meta.shape), dtype=meta.dtype) for meta in metas)

    def code(tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        filled_args, filled_kwargs = fill((args, kwargs), list(tensors))
        made = target(*filled_args, **filled_kwargs)
        return made if isinstance(made, (tuple, list)) else (made,)

    name = f"{target}{[repr(each) for each in (*args, *kwargs.values()) if not isinstance(each, Slot)]}"
    return Opaque(name=name, version=torch.__version__, code=code, results=results, random=True, number=number)


def _check(model: nn.Module, node: torch.fx.Node) -> None:
    """Every result is a tensor whose size is known, of an operator that can be called again."""
    where = _module_path(node)
    value = node.meta.get("val")
    reason = ""
    if not isinstance(node.target, torch._ops.OpOverload):
        reason = f"{getattr(node.target, '__name__', node.target)} is no operator on tensors"
    for item in value if isinstance(value, (tuple, list)) else [value]:
        if not isinstance(item, torch.Tensor) or any(not isinstance(size, int) for size in item.shape):
            reason = f"{node.target} makes {item!r}, whose size or value depends on the data (masks instead of boolean indexing would not)"
    if reason:
        question = node.target in (torch.ops.aten.item.default, torch.ops.aten._local_scalar_dense.default)
        raise _NotFollowed(f"{where or 'the model'}: {reason}", _around(model, where), is_question=question)


def _around(model: nn.Module, path: str) -> list[nn.Module]:
    """The submodule of a path and those that it is in, innermost first."""
    parts = path.split("@")[0].split(".") if path else []
    found = [model]
    for part in parts:
        if not isinstance(inner := getattr(found[-1], part, None), nn.Module):
            break
        found.append(inner)
    return found[::-1]


def _functional(exported: torch.export.ExportedProgram, model: nn.Module) -> torch.export.ExportedProgram:
    """The program without in-place operators. Raises _NotFollowed where torch fails at it since a size depends on the data."""
    try:
        with _quiet():
            return functional(exported)
    except Exception:
        for node in exported.graph.nodes:
            if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.returns:
                _check(model, node)
        raise


class _Converter:
    """Walks an exported program and builds the Graph."""

    def __init__(
        self,
        exported: torch.export.ExportedProgram,
        model: nn.Module,
        batch: Mapping[str, Any],
        batch_dims: dict[str, int],
        changing: Collection[str],
    ) -> None:
        self.exported = exported
        self.model = model
        self.batch = leaf_names(batch)
        self.batch_dims = batch_dims
        self.changing = frozenset(changing)
        self.ops: list[Op] = []
        self.names: dict[str, int] = {}
        self.parameters, self.buffers, self.inputs = {}, {}, {}  # type: dict[str, Value], dict[str, Value], dict[str, Value]
        self.constants: dict[str, torch.Tensor] = {}
        self.checks: list[Check] = []
        self.changed: dict[str, Value] = {}
        self.first_names, self.aliases = _ties(model)
        self.frozen = {name for name, parameter in model.named_parameters(remove_duplicate=False) if not parameter.requires_grad}

    def graph(self, *, trains: bool) -> Graph:
        env: dict[torch.fx.Node, Any] = {}
        placeholders = [node for node in self.exported.graph.nodes if node.op == "placeholder"]
        specs = self.exported.graph_signature.input_specs
        given = iter(self.batch)  # names in an exported program are in lower case
        for node, spec in zip(placeholders, specs, strict=True):
            env[node] = self._source(node, spec, next(given) if spec.kind.name == "USER_INPUT" else "")
        results = self._walk(self.exported.graph_module, env, grad=True)
        outputs, updates = self._outputs(results)
        updates = {**self.changed, **updates} if trains else {}
        if trains and not outputs[0].requires_grad:
            raise CaptureError("the loss depends on no parameter that requires a gradient; there is nothing to train")
        updates = {name: self._made(value) for name, value in updates.items()}
        outputs = outputs if trains else [self._made(value) for value in outputs]
        with torch._C.DisableTorchFunction():  # its questions are none of the model's
            self.ops = without_masks(self.ops, self.constants)
        self._drop_unused({*outputs, *updates.values(), *(check.value for check in self.checks)}, set(updates))
        graph = Graph(
            parameters=self.parameters,
            buffers=self.buffers,
            inputs=self.inputs,
            ops=self.ops,
            loss=outputs[0],
            outputs=() if trains else tuple(outputs),
            changing=self.changing,
            aliases=self.aliases,
            updates=updates,
            batch_dims={name: dim for name, dim in self.batch_dims.items() if name in self.inputs},
            constants=self.constants,
            checks=self.checks,
        )
        _forget_gradients(graph, trains=trains)
        self._refuse_early_answers(graph)
        _assign_keys(graph.ops)
        graph.blocks = find_blocks(graph.ops)
        return graph

    def _source(self, node: torch.fx.Node, spec: Any, given: str) -> Any:
        kind = spec.kind.name
        if not isinstance(node.meta["val"], torch.Tensor):
            return spec.arg.value if hasattr(spec.arg, "value") else None
        if kind == "USER_INPUT":
            return self.inputs.setdefault(given, _value(given, node.meta["val"], "input"))
        if kind in ("PARAMETER", "BUFFER"):
            name = spec.target.removeprefix("model.")
            name = self.first_names.get(name, name)
            group = self.parameters if kind == "PARAMETER" else self.buffers
            if name not in group:
                group[name] = _value(name, node.meta["val"], "parameter" if kind == "PARAMETER" else "buffer")
                group[name].requires_grad = kind == "PARAMETER" and name not in self.frozen
            return group[name]
        if kind == "CONSTANT_TENSOR":
            name = f"constant.{spec.target}"
            self.constants[name] = self.exported.constants[spec.target]
            self.buffers[name] = _value(name, node.meta["val"], "buffer")
            return self.buffers[name]
        raise CaptureError(f"the exported program has an input of kind {kind} ({node.name}), which is not understood")

    def _walk(self, module: torch.fx.GraphModule, env: dict[torch.fx.Node, Any], grad: bool) -> Any:
        for node in module.graph.nodes:
            if node.op == "get_attr":
                env[node] = self._attribute(module, node)
            elif node.op == "call_function":
                env[node] = self._call(node, env, grad)
            elif node.op == "output":
                return torch.fx.node.map_arg(node.args[0], env.__getitem__)
        raise AssertionError("an exported graph has no output")

    def _attribute(self, module: torch.fx.GraphModule, node: torch.fx.Node) -> Any:
        value = module
        for part in str(node.target).split("."):
            value = getattr(value, part)
        if isinstance(value, torch.Tensor):
            name = f"constant.{node.target}"
            self.constants[name] = value
            return self.buffers.setdefault(name, _value(name, value, "buffer"))
        return value

    def _call(self, node: torch.fx.Node, env: dict[torch.fx.Node, Any], grad: bool) -> Any:
        arguments: Any = torch.fx.node.map_arg((node.args, node.kwargs), env.__getitem__)
        args, kwargs = arguments
        target = node.target
        if target is operator.getitem:
            return args[0][args[1]]
        if getattr(target, "__name__", "") == "wrap_with_set_grad_enabled":
            body = args[1]
            inner = dict(zip([n for n in body.graph.nodes if n.op == "placeholder"], args[2:], strict=True))
            return self._walk(body, inner, grad and args[0])
        if getattr(target, "__name__", "") == "wrap_with_autocast" and not args[2]:
            body = args[4]
            inner = dict(zip([n for n in body.graph.nodes if n.op == "placeholder"], args[5:], strict=True))
            return self._walk(body, inner, grad)
        if target is EXPECT:
            self.checks.append(Check(value=args[0], expected=args[1], module=_module_path(node)))
            return None
        if operator_name_or_none(target) in NOISE:
            return None
        _check(self.model, node)
        if target is OPERATOR:
            return self._opaque(node, args, grad)
        if (same := passes_through(target, args, node.meta["val"])) is not None and (grad or not same.requires_grad):
            return same
        return self._emit(node, target, args, kwargs, grad)

    def _emit(self, node: torch.fx.Node, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], grad: bool) -> Any:
        """Appends the operator (or what `normalize` makes of it) and returns its results as the exported node did."""
        value = node.meta["val"]
        metas = list(value) if isinstance(value, (tuple, list)) else [value]
        builder = _Builder(converter=self, module=_module_path(node), grad=grad)
        if target is torch.ops.aten.as_strided.default:
            return self._strided(node, args, builder)
        outputs = normalize(target, args, kwargs, metas, builder)
        return outputs if isinstance(value, (tuple, list)) else outputs[0]

    def _strided(self, node: torch.fx.Node, args: tuple[Any, ...], builder: _Builder) -> Value:
        """A view of memory as one of the tensor whose memory that is, its dims in the order of the memory."""
        source = node.args[0]
        assert isinstance(source, torch.fx.Node), "as_strided reads a tensor"
        meta: torch.Tensor = source.meta["val"]
        order = sorted(range(meta.dim()), key=lambda dim: (-meta.stride()[dim], dim))
        turned = meta.permute(order)
        reach = sum((size - 1) * stride for size, stride in zip(args[1], args[2], strict=True)) + (args[3] or 0 if len(args) > 3 else 0)
        if meta.storage_offset() or not turned.is_contiguous() or reach >= meta.numel():
            where = _module_path(node)
            raise _NotFollowed(f"{where or 'the model'}: as_strided reads memory beside its tensor's", _around(self.model, where))
        value = args[0]
        if order != list(range(meta.dim())):
            (value,) = builder.add(torch.ops.aten.permute.default, (value, order), {}, [turned])
        offset = args[3] if len(args) > 3 and args[3] is not None else 0
        return builder.add(strided, (value, list(args[1]), list(args[2]), offset), {}, [node.meta["val"]])[0]

    def _made(self, value: Value) -> Value:
        """The value as an operator's result."""
        if value.producer is not None:
            return value
        meta = torch.empty(value.shape, dtype=value.dtype, device="meta")
        return _Builder(converter=self, module="", grad=False).add(torch.ops.aten.clone.default, (value,), {}, [meta])[0]

    def _refuse_early_answers(self, graph: Graph) -> None:
        """Answers that depend on parameters may change from step to step: the code that asks must be kept."""
        known = {value for value in graph.inputs.values() if value.name != RANDOM_STATE}
        known |= {value for name, value in graph.buffers.items() if name not in graph.updates and name not in graph.changing}
        for op in graph.ops:
            if not op.requires_grad and all(value in known for value in op.inputs):
                known.update(op.outputs)
        for check in graph.checks:
            if check.value not in known:
                where = check.module or "the model"
                raise _NotFollowed(f"{where}: its control flow depends on values that training changes", _around(self.model, check.module))

    def _opaque(self, node: torch.fx.Node, args: tuple[Any, ...], grad: bool) -> tuple[Value, ...]:
        """Code kept whole: an operator of its tensors, and of the random state if it draws random numbers."""
        builder = _Builder(converter=self, module=_module_path(node), grad=grad)
        kept: Opaque = opaque_of(args[1])
        inputs = tuple(args[0])
        if kept.random:
            number = builder.random_key()
            inputs, kept = (*inputs, builder.random_state()), replace(kept, number=number, name=f"{kept.name}, draw {number}")
        return builder.add(kept, inputs, {}, list(node.meta["val"]))

    def unique(self, name: str) -> str:
        """`name`, numbered when it is taken."""
        count = self.names[name] = self.names.get(name, -1) + 1
        return f"{name}.{count}" if count else name

    def _outputs(self, results: Any) -> tuple[list[Value], dict[str, Value]]:
        updates: dict[str, Value] = {}
        outputs: list[Value] = []
        for spec, value in zip(self.exported.graph_signature.output_specs, results, strict=True):
            if spec.kind.name == "BUFFER_MUTATION":
                name = str(spec.target).removeprefix("model.")
                updates[self.first_names.get(name, name)] = value
            elif spec.kind.name == "USER_OUTPUT":
                outputs.append(value)
            elif spec.kind.name != "USER_INPUT_MUTATION":  # a batch is used once
                raise CaptureError(
                    f"the forward pass changes {str(spec.target).removeprefix('model.')} in place ({spec.kind.name}), and only buffers may "
                    "change there; compute with a changed copy of it (`self.weight * self.mask`)"
                )
        assert outputs
        return outputs, updates

    def _drop_unused(self, wanted: set[Value], changed: set[str]) -> None:
        used, kept = set(wanted), []
        for op in reversed(self.ops):
            if any(value in used for value in op.outputs):
                kept.append(op)
                used.update(op.inputs)
        self.ops = kept[::-1]
        self.buffers = {name: value for name, value in self.buffers.items() if value in used or name in changed}
        self.inputs = {name: value for name, value in self.inputs.items() if value in used or name in self.batch_dims}


def operator_name_or_none(target: Any) -> str:
    return str(target) if isinstance(target, torch._ops.OpOverload) else ""


def _forget_gradients(graph: Graph, *, trains: bool) -> None:
    """No gradient flows into what the loss does not depend on differentiably: such parameters are like frozen ones."""
    reaching = {graph.loss} if trains else set()
    for op in reversed(graph.ops):
        if any(value in reaching for value in op.outputs):
            reaching.update(value for value in op.inputs if value.requires_grad and op.requires_grad)
        for value in op.outputs:
            value.requires_grad = value.requires_grad and value in reaching
    for value in graph.parameters.values():
        value.requires_grad = value.requires_grad and value in reaching


def _differentiable(target: Any, meta: torch.Tensor) -> bool:
    return (meta.dtype.is_floating_point or meta.dtype.is_complex) and operator_name(target) != "aten.detach.default"


def _slots(tree: Any, inputs: list[Value]) -> Any:
    """The arguments with every Value moved to `inputs` and a Slot left in its place, and every device the same."""
    if isinstance(tree, Value):
        inputs.append(tree)
        return Slot(len(inputs) - 1)
    if isinstance(tree, (tuple, list)):
        return (
            type(tree)(_slots(item, inputs) for item in tree)
            if type(tree) in (tuple, list)
            else tuple(_slots(item, inputs) for item in tree)
        )
    if isinstance(tree, dict):
        return {name: _slots(item, inputs) for name, item in tree.items()}
    return torch.device("cpu") if isinstance(tree, torch.device) else tree


def _module_path(node: torch.fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    path = list(stack.values())[-1][0] if stack else ""
    return path.removeprefix("model").removeprefix(".") if path.startswith("model") else path


def _ties(model: nn.Module) -> tuple[dict[str, str], dict[str, str]]:
    """Every name of a parameter or buffer → the first name of the same tensor; and the names that are not first."""
    first: dict[int, str] = {}
    names: dict[str, str] = {}
    for kind in (model.named_parameters, model.named_buffers):
        for name, tensor in kind(remove_duplicate=False):
            names[name] = first.setdefault(id(tensor), name)
    return names, {name: canonical for name, canonical in names.items() if name != canonical}


def _assign_keys(ops: list[Op]) -> None:
    counts: dict[str, int] = {}
    for op in ops:
        base = f"{op.module}:{op.name}"
        ordinal = counts[base] = counts.get(base, -1) + 1
        op.key = f"{base}:{ordinal}"
