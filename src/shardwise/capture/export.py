"""model, example batch ──torch.export──▶ ExportedProgram ──▶ Graph

The model is exported on descriptions of tensors (fake or meta), forward only and in the mode it is in; then each node becomes an `Op`,
inlining regions that switch gradients off, dropping what has no effect, and rewriting the calls listed in `normalize`.
"""

from __future__ import annotations

import operator
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from shardwise.capture.blocks import find_blocks
from shardwise.capture.graph import Graph, Op, Slot, Value, operator_name
from shardwise.capture.normalize import NOISE, RANDOM_STATE, normalize, passes_through
from shardwise.capture.operators import keyed_dropout
from shardwise.errors import BatchError, CaptureError

__all__ = ["capture"]

Loss = Callable[[Any], torch.Tensor]


def capture(
    model: nn.Module, batch: Mapping[str, Any], *, loss: Loss | None = None, batch_dims: Mapping[str, int | None] | None = None
) -> Graph:
    """The model's forward pass as a Graph.

    batch: keyword arguments of `forward`; tensors may be on the meta device.
    loss: makes the scalar loss from the module's output; by default the output itself when scalar, or its `.loss`.
    batch_dims: input → its batch dim (None: the same tensor for every sample); dim 0 where not named.
    Raises CaptureError, naming the module and line, and BatchError when the inputs disagree on the batch size.
    """
    tensors = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}
    dims = _batch_dims(tensors, batch_dims or {})
    exported = _functional(_export(model, batch, loss))
    return _Converter(exported, model, dims).graph()


def _batch_dims(tensors: Mapping[str, torch.Tensor], given: Mapping[str, int | None]) -> dict[str, int]:
    if unknown := set(given) - set(tensors):
        raise BatchError(f"batch_dims names {sorted(unknown)}, which the batch does not hold; it holds {sorted(tensors)}")
    chosen = {name: given.get(name, 0) for name in tensors}
    dims = {name: dim for name, dim in chosen.items() if dim is not None and tensors[name].dim() > dim}
    sizes = {name: tensors[name].shape[dim] for name, dim in dims.items()}
    if len(set(sizes.values())) > 1:
        raise BatchError(
            f"the batch's tensors differ in their number of samples: {sizes}; name their batch dims with batch_dims={{name: dim or None}}"
        )
    return dims


class _LossOnly(nn.Module):
    """Returns the loss alone, so that outputs which are no pytrees need not be exported."""

    def __init__(self, model: nn.Module, loss: Loss | None) -> None:
        super().__init__()
        self.model = model
        self.train(model.training)
        self.loss = loss

    def forward(self, **batch: Any) -> torch.Tensor:
        output = self.model(**batch)
        value = self.loss(output) if self.loss is not None else getattr(output, "loss", output)
        if isinstance(value, dict):
            value = value.get("loss")
        if not isinstance(value, torch.Tensor) or value.numel() != 1:
            found = f"a tensor of shape {list(value.shape)}" if isinstance(value, torch.Tensor) else type(output).__name__
            raise CaptureError(
                f"{type(self.model).__name__} returns {found}, not a scalar loss; put labels into the batch or pass loss=callable "
                "that makes the scalar from the module's output"
            )
        return value.reshape(())


def _export(model: nn.Module, batch: Mapping[str, Any], loss: Loss | None) -> torch.export.ExportedProgram:
    # A tensor passed under two names would be captured as one input: give each name its own.
    device = torch.device("meta") if any(parameter.is_meta for parameter in model.parameters()) else None
    example = {name: torch.empty_like(value, device=device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
    try:
        with _refuse_custom_functions():
            return torch.export.export(_LossOnly(model, loss), (), kwargs=example, strict=False)
    except CaptureError:
        raise
    except Exception as error:
        raise CaptureError(_explain(model, error)) from error


@contextmanager
def _refuse_custom_functions() -> Iterator[None]:
    """Stops at a user's torch.autograd.Function: export would trace through it and silently lose its hand-written backward."""
    original = torch.autograd.Function.__dict__["apply"]

    def apply(cls: type, *args: Any, **kwargs: Any) -> Any:
        if not cls.__module__.startswith("torch."):
            raise CaptureError(
                f"torch.autograd.Function {cls.__module__}.{cls.__qualname__} has a backward of its own, which capturing would lose; "
                "write it with differentiable operators"
            )
        return original.__get__(None, cls)(*args, **kwargs)

    torch.autograd.Function.apply = classmethod(apply)  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.autograd.Function.apply = original  # type: ignore[method-assign]


def _explain(model: nn.Module, error: Exception) -> str:
    """Which module and line stopped the capture, and what to change."""
    names = {type(module): name or type(model).__name__ for name, module in reversed(list(model.named_modules()))}
    where = ""
    tb = error.__traceback__
    for frame, line in traceback.walk_tb(tb):
        owner = frame.f_locals.get("self")
        if type(owner) in names and not frame.f_code.co_filename.startswith(torch.__path__[0]):
            where = f" in {names[type(owner)]} ({frame.f_code.co_filename}:{line})"
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return (
        f"{type(model).__name__} cannot be captured{where}: {type(error).__name__}: {reason}. "
        "Control flow that depends on tensor values must be written with tensor operators (torch.where, masks)"
    )


def _functional(exported: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Without in-place operators: changed buffers become results. High-level operators are kept."""
    mutating = any(
        node.op == "call_function"
        and isinstance(node.target, torch._ops.OpOverload)
        and (node.target._schema.is_mutable or node.target is torch.ops.aten.batch_norm.default)
        for module in exported.graph_module.modules()
        if isinstance(module, torch.fx.GraphModule)
        for node in module.graph.nodes
    )
    return exported.run_decompositions({}) if mutating else exported


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
        tracked = self.grad and any(value.requires_grad for value in inputs)
        name = f"{self.module or 'model'}.{operator_name(target).split('.')[1]}"
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

    def random_key(self) -> int:
        return sum(op.target is keyed_dropout for op in self.converter.ops)


class _Converter:
    """Walks an exported program and builds the Graph."""

    def __init__(self, exported: torch.export.ExportedProgram, model: nn.Module, batch_dims: dict[str, int]) -> None:
        self.exported = exported
        self.batch_dims = batch_dims
        self.ops: list[Op] = []
        self.names: dict[str, int] = {}
        self.parameters, self.buffers, self.inputs = {}, {}, {}  # type: dict[str, Value], dict[str, Value], dict[str, Value]
        self.constants: dict[str, torch.Tensor] = {}
        self.first_names, self.aliases = _ties(model)
        self.frozen = {name for name, parameter in model.named_parameters(remove_duplicate=False) if not parameter.requires_grad}

    def graph(self) -> Graph:
        env: dict[torch.fx.Node, Any] = {}
        placeholders = [node for node in self.exported.graph.nodes if node.op == "placeholder"]
        for node, spec in zip(placeholders, self.exported.graph_signature.input_specs, strict=True):
            env[node] = self._source(node, spec)
        results = self._walk(self.exported.graph_module, env, grad=True)
        loss, updates = self._outputs(results)
        if not loss.requires_grad:
            raise CaptureError("the loss depends on no parameter that requires a gradient; there is nothing to train")
        self._drop_unused({loss, *updates.values()})
        graph = Graph(
            parameters=self.parameters,
            buffers=self.buffers,
            inputs=self.inputs,
            ops=self.ops,
            loss=loss,
            aliases=self.aliases,
            updates=updates,
            batch_dims={name: dim for name, dim in self.batch_dims.items() if name in self.inputs},
            constants=self.constants,
        )
        _assign_keys(graph.ops)
        graph.blocks = find_blocks(graph.ops)
        return graph

    def _source(self, node: torch.fx.Node, spec: Any) -> Any:
        kind = spec.kind.name
        if not isinstance(node.meta["val"], torch.Tensor):
            return spec.arg.value if hasattr(spec.arg, "value") else None
        if kind == "USER_INPUT":
            return self.inputs.setdefault(node.name, _value(node.name, node.meta["val"], "input"))
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
        if operator_name_or_none(target) in NOISE:
            return None
        _check_sizes(node)
        if (same := passes_through(target, args, node.meta["val"])) is not None and (grad or not same.requires_grad):
            return same
        return self._emit(node, target, args, kwargs, grad)

    def _emit(self, node: torch.fx.Node, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], grad: bool) -> Any:
        """Appends the operator (or what `normalize` makes of it) and returns its results as the exported node did."""
        value = node.meta["val"]
        metas = list(value) if isinstance(value, (tuple, list)) else [value]
        builder = _Builder(converter=self, module=_module_path(node), grad=grad)
        outputs = normalize(target, args, kwargs, metas, builder)
        return outputs if isinstance(value, (tuple, list)) else outputs[0]

    def unique(self, name: str) -> str:
        """`name`, numbered when it is taken."""
        count = self.names[name] = self.names.get(name, -1) + 1
        return f"{name}.{count}" if count else name

    def _outputs(self, results: Any) -> tuple[Value, dict[str, Value]]:
        updates: dict[str, Value] = {}
        loss = None
        for spec, value in zip(self.exported.graph_signature.output_specs, results, strict=True):
            if spec.kind.name == "BUFFER_MUTATION":
                name = str(spec.target).removeprefix("model.")
                updates[self.first_names.get(name, name)] = value
            elif spec.kind.name == "USER_OUTPUT":
                loss = value
            else:
                raise CaptureError(f"the forward pass changes {spec.target} ({spec.kind.name}); only buffers may change")
        assert loss is not None
        return loss, updates

    def _drop_unused(self, wanted: set[Value]) -> None:
        used, kept = set(wanted), []
        for op in reversed(self.ops):
            if any(value in used for value in op.outputs):
                kept.append(op)
                used.update(op.inputs)
        self.ops = kept[::-1]
        self.buffers = {name: value for name, value in self.buffers.items() if value in used}
        self.inputs = {name: value for name, value in self.inputs.items() if value in used or name in self.batch_dims}


def operator_name_or_none(target: Any) -> str:
    return str(target) if isinstance(target, torch._ops.OpOverload) else ""


def _differentiable(target: Any, meta: torch.Tensor) -> bool:
    return (meta.dtype.is_floating_point or meta.dtype.is_complex) and operator_name(target) != "aten.detach.default"


def _check_sizes(node: torch.fx.Node) -> None:
    value = node.meta.get("val")
    for item in value if isinstance(value, (tuple, list)) else [value]:
        if not isinstance(item, torch.Tensor) or any(not isinstance(size, int) for size in item.shape):
            raise CaptureError(
                f"{node.target} in {_module_path(node) or 'the model'} makes {item!r}, whose size depends on the data; "
                "use an operator whose result has a fixed shape (masks instead of boolean indexing)"
            )


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
