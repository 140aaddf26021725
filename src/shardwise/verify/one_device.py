"""What one device computes: the model itself, and the captured graph in any precision; the measure for every split of it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from shardwise.capture.batch import map_tensors, named_tensors
from shardwise.capture.calls import plain_checkpoints
from shardwise.capture.export import capture, compute_loss
from shardwise.capture.graph import Graph
from shardwise.capture.normalize import RANDOM_STATE
from shardwise.capture.opaque import InFloat64
from shardwise.capture.precision import LOW, Precision, dtype_of, in_precision
from shardwise.capture.state import state_of
from shardwise.errors import CaptureError, VerifyError
from shardwise.runtime.job import step_key
from shardwise.verify.cast import cast_graph, cast_tensor
from shardwise.verify.compare import (
    FLOAT32_BOUND,
    FLOAT64_BOUND,
    TIMES_REFERENCE,
    Difference,
    compare_gradients,
    gradient_norm,
    loss_error,
    relative_error,
)

__all__ = ["RATE", "Reference", "Step", "adamw_step", "prepare"]

Loss = Callable[[Any], Tensor]
RATE = 1e-3
"""Of the optimizer's step that is compared."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """What a step gave, whole. loss_after: the next step's on the same batch; NaN where nobody asked."""

    loss: float
    gradients: dict[str, Tensor]
    buffers: dict[str, Tensor] = field(default_factory=dict)
    loss_after: float = math.nan


@dataclass(frozen=True, kw_only=True)
class Reference:
    """One device's step.

    graph, state, batch: what was computed; exact: in float64, or in float32 where an operator has no float64 (`widest`).
    masters: the parameters as they are updated, where operators read 16 bits of them; else the state.
    captured: the captured graph's gradients against the model's own, in the model's precision; empty where it draws random numbers.
    """

    name: str
    graph: Graph
    state: dict[str, Tensor]
    masters: dict[str, Tensor]
    batch: dict[str, Tensor]
    seed: int
    exact: Step
    widest: torch.dtype
    captured: list[Difference]
    steps: dict[torch.dtype, Step] = field(default_factory=dict)
    graphs: dict[torch.dtype, Graph] = field(default_factory=dict)

    def cast(self, dtype: torch.dtype) -> Graph:
        """The graph in this precision."""
        if dtype is dtype_of(self.graph.precision):
            return self.graph
        if dtype not in self.graphs:
            self.graphs[dtype] = cast_graph(self.graph, dtype)
        return self.graphs[dtype]

    def step(self, dtype: torch.dtype) -> Step:
        """One device's step in this precision."""
        if dtype is self.widest:
            return self.exact
        if dtype not in self.steps:
            own = dtype is dtype_of(self.graph.precision)
            self.steps[dtype] = _step_and_after(
                self.cast(dtype), self.state, self.batch, None if own else dtype, self.seed, self.masters if own else None
            )
        return self.steps[dtype]


def prepare(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    loss: Loss | None = None,
    batch_dims: Mapping[str, int | None] | None = None,
    seed: int = 0,
    precision: Precision = "float32",
) -> Reference:
    """Captures the model and computes its step on one device, in the precision.

    Raises CaptureError, and VerifyError when the model's forward pass gives other numbers each time under one seed.
    """
    graph = capture(model, batch, loss=loss, batch_dims=batch_dims, precision=precision)
    masters, whole = state_of(model, graph), model
    wide = {name for name, value in graph.parameters.items() if value.dtype not in LOW}
    model, batch = in_precision(model, batch, precision, buffers=any(value.dtype in LOW for value in graph.buffers.values()), kept=wide)
    state = state_of(model, graph)
    eager = _repeatable(model, batch, loss, seed, precision)
    tensors = named_tensors(batch)
    exact, widest = _exact(graph, state, tensors, seed)
    captured = [] if RANDOM_STATE in graph.inputs else _check_capture(eager, graph, state, tensors, exact, seed)
    if not all(each.ok for each in captured) and widest is torch.float64:
        captured = _check_capture_in_float64(model, batch, loss, exact, seed, precision) or captured
    return Reference(
        name=type(whole).__name__,
        graph=graph,
        state=state,
        masters=masters,
        batch=tensors,
        seed=seed,
        exact=exact,
        widest=widest,
        captured=captured,
    )


def _exact(graph: Graph, state: Mapping[str, Tensor], batch: Mapping[str, Tensor], seed: int) -> tuple[Step, torch.dtype]:
    def step(dtype: torch.dtype) -> tuple[Step, torch.dtype]:
        return _step_and_after(cast_graph(graph, dtype), state, batch, dtype, seed), dtype

    try:
        return step(torch.float64)
    except (RuntimeError, NotImplementedError, CaptureError) as error:
        if "Double" not in str(error) and "float64" not in str(error).lower():
            raise
        return step(torch.float32)


def _step(graph: Graph, state: Mapping[str, Tensor], batch: Mapping[str, Tensor], dtype: torch.dtype | None, seed: int) -> Step:
    """The graph's step; dtype=None leaves every tensor as it is."""
    cast = (lambda tensor: tensor) if dtype is None else (lambda tensor: cast_tensor(tensor, dtype))
    local = {
        name: cast(tensor).clone().requires_grad_(name in graph.parameters and graph.parameters[name].requires_grad)
        for name, tensor in state.items()
    }
    inputs = {name: cast(tensor) for name, tensor in batch.items()} | {RANDOM_STATE: torch.tensor([step_key(seed, 1), 0])}
    results = graph.run(local, inputs)
    names = [name for name, value in graph.parameters.items() if value.requires_grad]
    loss = results[graph.loss]
    gradients = torch.autograd.grad(loss, [local[name] for name in names], allow_unused=True)
    whole = {name: torch.zeros_like(local[name]) if g is None else g for name, g in zip(names, gradients, strict=True)}
    return Step(loss=loss.item(), gradients=whole, buffers={name: results[value].detach() for name, value in graph.updates.items()})


def _step_and_after(
    graph: Graph,
    state: Mapping[str, Tensor],
    batch: Mapping[str, Tensor],
    dtype: torch.dtype | None,
    seed: int,
    masters: Mapping[str, Tensor] | None = None,
) -> Step:
    """The graph's step, with the loss of the next one on the same batch. masters: of what parameters are copies."""
    cast = (lambda tensor: tensor) if dtype is None else (lambda tensor: cast_tensor(tensor, dtype))
    step = _step(graph, state, batch, dtype, seed)
    left = {name: cast(tensor) for name, tensor in state.items()} | step.buffers
    start = left if masters is None else masters
    left |= {n: adamw_step(start[n], gradient.to(start[n].dtype)).to(left[n].dtype) for n, gradient in step.gradients.items()}
    inputs = {name: cast(tensor) for name, tensor in batch.items()} | {RANDOM_STATE: torch.tensor([step_key(seed, 2), 0])}
    with torch.no_grad():
        return replace(step, loss_after=graph.run(left, inputs)[graph.loss].item())


def adamw_step(start: Tensor, gradient: Tensor) -> Tensor:
    """A parameter after AdamW's first step."""
    parameter = nn.Parameter(start.clone(memory_format=torch.contiguous_format))
    parameter.grad = gradient.clone(memory_format=torch.contiguous_format)
    torch.optim.AdamW([parameter], lr=RATE).step()
    return parameter.detach()


# -- the model itself ------------------------------------------------------------------------------------------------------------------


def _eager(model: nn.Module, batch: Mapping[str, Any], loss: Loss | None, seed: int, precision: Precision) -> Step:
    """The model's own step. Its buffers and torch's generators are left as they were."""
    kept = {name: tensor.clone() for name, tensor in model.named_buffers()}
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    batch = map_tensors(lambda name, tensor: tensor.detach().clone(), batch)  # it may change them
    with torch.random.fork_rng(), torch.enable_grad(), plain_checkpoints():
        torch.manual_seed(seed)
        value = compute_loss(model, batch, loss, precision)
        gradients = (
            torch.autograd.grad(value, list(parameters.values()), allow_unused=True) if value.requires_grad else [None] * len(parameters)
        )
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name in kept:
                buffer.copy_(kept[name])
    return Step(loss=value.item(), gradients={name: g for name, g in zip(parameters, gradients, strict=True) if g is not None})


def _repeatable(model: nn.Module, batch: Mapping[str, Any], loss: Loss | None, seed: int, precision: Precision) -> Step:
    """The model's own step. Raises VerifyError when it does not run in 16 bits, when its gradients are not finite, and when a second step
    under the same seed differs."""
    try:
        first, second = (_watched(model, lambda: _eager(model, batch, loss, seed, precision)) for _ in range(2))
    except RuntimeError as error:
        if precision == "float32":
            raise
        raise VerifyError(
            f"{type(model).__name__} does not run in {precision} on one device: {error}; widen what this operator reads (`.float()`), or "
            "take another precision"
        ) from error
    step, again = first[0], second[0]
    floor = 1e-3 * gradient_norm(step.gradients)
    same_loss = abs(step.loss - again.loss) <= FLOAT32_BOUND * abs(step.loss) or step.loss != step.loss
    if same_loss and all(relative_error(again.gradients[name], g, floor) <= FLOAT32_BOUND for name, g in step.gradients.items()):
        return step
    if wrong := [name for name, gradient in step.gradients.items() if not gradient.isfinite().all()]:
        raise VerifyError(
            f"{type(model).__name__} has gradients that are not finite on one device in {precision}, of {wrong[0]} first: nothing can be "
            "compared with them. Look at what overflows there (masks of the smallest number, sums), or take another precision"
        )
    names = {module: name or type(model).__name__ for name, module in reversed(list(model.named_modules()))}
    differs = next((names[module] for (module, a), (_, b) in zip(first[1], second[1], strict=False) if a != b), type(model).__name__)
    raise VerifyError(
        f"{type(model).__name__} is not deterministic: under one seed its loss was {step.loss:.9g}, then {again.loss:.9g}; the first "
        f"submodule that gave another result is {differs}. Let it draw random numbers from torch's generator only"
    )


def _watched(model: nn.Module, run: Callable[[], Step]) -> tuple[Step, list[tuple[nn.Module, float]]]:
    """The step, and for each finished call of a submodule a number that its results add up to."""
    seen: list[tuple[nn.Module, float]] = []

    def note(module: nn.Module, args: Any, output: Any) -> None:
        tensors = [leaf for leaf in torch.utils._pytree.tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        seen.append((module, sum(float(tensor.detach().double().sum()) for tensor in tensors)))

    hooks = [module.register_forward_hook(note) for module in model.modules()]
    try:
        return run(), seen
    finally:
        for hook in hooks:
            hook.remove()


def _check_capture(
    eager: Step, graph: Graph, state: Mapping[str, Tensor], batch: Mapping[str, Tensor], exact: Step, seed: int
) -> list[Difference]:
    """The graph against the model itself, in the model's own precision: loss and gradients."""
    captured = _step(graph, state, batch, None, seed)
    floor = 1e-3 * gradient_norm(exact.gradients)
    own = {name: relative_error(captured.gradients[name], gradient, floor) for name, gradient in exact.gradients.items()}
    bound = TIMES_REFERENCE * FLOAT32_BOUND
    bounds = {name: max(bound, TIMES_REFERENCE * own.get(name, 0.0)) for name in eager.gradients}
    return _compared(captured, eager, max(bound, TIMES_REFERENCE * loss_error(captured.loss, exact.loss)), bounds, "captured graph: ")


def _check_capture_in_float64(
    model: nn.Module, batch: Mapping[str, Any], loss: Loss | None, exact: Step, seed: int, precision: Precision
) -> list[Difference] | None:
    """The graph against the model, both in float64, for gradients that are all rounding in float32; None where the model cannot run so."""
    try:
        double = copy.deepcopy(model).double()
        inputs = map_tensors(lambda name, tensor: cast_tensor(tensor, torch.float64), batch)
        with InFloat64():
            eager = _eager(double, inputs, loss, seed, "float32")
    except (RuntimeError, TypeError, ValueError):
        return None
    return _compared(exact, eager, FLOAT64_BOUND, FLOAT64_BOUND, "captured graph, in float64: ")


def _compared(graph: Step, eager: Step, bound: float, bounds: float | Mapping[str, float], prefix: str) -> list[Difference]:
    """The graph's loss and gradients against the model's own."""
    found = {name: graph.gradients.get(name, torch.zeros_like(gradient)) for name, gradient in eager.gradients.items()}
    return [
        Difference(name=f"{prefix}loss", error=loss_error(graph.loss, eager.loss), bound=bound),
        *compare_gradients(found, eager.gradients, bounds, f"{prefix}gradient of "),
    ]
