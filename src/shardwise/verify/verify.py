"""Proves a whole training step equal to one device's: loss, every gradient, their norm, changed buffers and the optimizer's step.

    model ──capture──▶ graph ──▶ one device ─────────────▶ loss, gradients, buffers ─┐
                         │                                                           ├─▶ compare ──▶ Report
                         └──plan──▶ real ranks of its own ─▶ the same ───────────────┘
The captured graph itself is checked against the model first, in the model's own precision.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from shardwise.capture.export import capture
from shardwise.capture.graph import Graph
from shardwise.capture.normalize import RANDOM_STATE
from shardwise.cluster.model import Cluster
from shardwise.planner.apply import apply_plan
from shardwise.planner.layout import Layout
from shardwise.planner.plan import Infeasible, Plan
from shardwise.planner.preflight import preflight
from shardwise.planner.search import search
from shardwise.program.program import ParameterPart
from shardwise.runtime.job import Job, local_part, step_key
from shardwise.runtime.launch import launch
from shardwise.runtime.optimizer import prefer_fused
from shardwise.sharding.types import Shard, join
from shardwise.verify.cast import cast_graph, cast_tensor
from shardwise.verify.compare import Difference, compare_gradients, gradient_norm, relative_error

__all__ = ["Report", "verify"]

_FLOAT64_BOUND, _FLOAT32_BOUND, _TIMES_REFERENCE = 1e-10, 1e-5, 4.0  # docs/concepts/numbers.md
_WAIT_S = 120.0


@dataclass(frozen=True, kw_only=True)
class Report:
    """The result of a verification.

    differences: everything that was compared, in the order of the model; layout: what was verified; plan: its plan.
    captured: the captured graph's gradients against the model's own, in the model's precision.
    """

    layout: str
    dtype: torch.dtype
    loss: float
    reference_loss: float
    differences: list[Difference]
    captured: list[Difference]
    plan: Plan

    @property
    def ok(self) -> bool:
        """Whether everything keeps its bound."""
        return all(each.ok for each in (*self.captured, *self.differences))

    @property
    def max_relative_error(self) -> float:
        """The largest error of all."""
        return max((each.error for each in self.differences), key=lambda error: (error != error, error), default=0.0)

    @property
    def first_difference(self) -> str | None:
        """The first quantity that does not keep its bound."""
        return next((each.name for each in (*self.captured, *self.differences) if not each.ok), None)

    def __str__(self) -> str:
        verdict = "yes" if self.ok else "NO"
        kind = str(self.dtype).removeprefix("torch.")
        lines = [
            f"{self.plan.model}, {self.layout}, {kind}: same numbers as one device: {verdict}",
            f"largest relative error {self.max_relative_error:.1e} over {len(self.differences)} quantities",
            f"loss {self.loss:.10g}, one device {self.reference_loss:.10g}",
        ]
        if self.captured:
            worst_captured = max(each.error for each in self.captured)
            lines.append(f"captured graph against the model itself: largest relative error {worst_captured:.1e}")
        worst = (
            sorted((*self.captured, *self.differences), key=lambda each: -each.error / max(each.bound, 1e-300))[:5] if not self.ok else []
        )
        lines += [f"  {each.name}: {each.error:.2e}, allowed {each.bound:.0e}" for each in worst]
        return "\n".join(lines)


@dataclass(frozen=True, kw_only=True)
class _Step:
    """What a step gave, whole."""

    loss: float
    gradients: dict[str, Tensor]
    buffers: dict[str, Tensor] = field(default_factory=dict)


def verify(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    cluster: Cluster | str = "local:4",
    layout: Layout | str | Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float64,
    plan: Plan | None = None,
    loss: Callable[[Any], Tensor] | None = None,
    batch_dims: Mapping[str, int | None] | None = None,
    seed: int = 0,
) -> Report | Infeasible:
    """Runs one step split over real local ranks and one step whole, and compares.

    dtype: float64 is the proof (bound 1e-10); float32 is held to max(1e-5, 4 × one device's own float32 error).
    plan: verify this one; else one is made for `layout` on `cluster`. Raises what capture and planning raise, and RankFailed.
    """
    graph = capture(model, batch, loss=loss, batch_dims=batch_dims)
    if plan is None:
        found = search(graph, Cluster.parse(cluster), Layout.parse(layout), "adamw", type(model).__name__)
        if isinstance(found, Infeasible):
            return found
        plan = found
    apply_plan(plan, graph)
    preflight(plan, cast_graph(graph, dtype), same_fingerprint=False)
    state = {**_state(model), **graph.constants}
    tensors = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}
    checks = _check_capture(model, batch, loss, graph, state, tensors, seed)
    exact = _one_device(cast_graph(graph, torch.float64), state, tensors, torch.float64, seed)
    reference = exact if dtype is torch.float64 else _one_device(cast_graph(graph, dtype), state, tensors, dtype, seed)
    split = launch(
        _rank, (cast_graph(graph, dtype), plan, state, tensors, dtype, seed, reference.gradients), ranks=plan.ranks, timeout_s=_WAIT_S
    )
    differences = _compare(split, exact, reference, dtype)
    return Report(
        layout=plan.layout, dtype=dtype, loss=split[0].loss, reference_loss=exact.loss, differences=differences, captured=checks, plan=plan
    )


def _state(model: nn.Module) -> dict[str, Tensor]:
    named = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}
    return {name: tensor.detach() for name, tensor in named.items()}


def _check_capture(
    model: nn.Module,
    batch: Mapping[str, Any],
    loss: Any,
    graph: Graph,
    state: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    seed: int,
) -> list[Difference]:
    """The graph against the model itself, where the model draws no random numbers."""
    if RANDOM_STATE in graph.inputs:
        return []
    kept = {name: tensor.clone() for name, tensor in model.named_buffers()}
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad and name in graph.parameters}
    output = model(**batch)
    value: Any = loss(output) if loss else getattr(output, "loss", output)
    value = value.get("loss") if isinstance(value, dict) else value
    gradients = torch.autograd.grad(value.reshape(()), list(parameters.values()), allow_unused=True)
    for name, buffer in model.named_buffers():
        buffer.copy_(kept[name])
    eager = {name: g for name, g in zip(parameters, gradients, strict=True) if g is not None}
    captured = _one_device(graph, state, tensors, None, seed)
    bound = _TIMES_REFERENCE * _FLOAT32_BOUND if value.dtype != torch.float64 else _FLOAT64_BOUND
    return compare_gradients(captured.gradients, eager, bound, "captured graph: gradient of ")


def _one_device(graph: Graph, state: Mapping[str, Tensor], batch: Mapping[str, Tensor], dtype: torch.dtype | None, seed: int) -> _Step:
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
    return _Step(loss=loss.item(), gradients=whole, buffers={name: results[value].detach() for name, value in graph.updates.items()})


@dataclass(frozen=True, kw_only=True)
class _Part:
    """One rank's share of a step."""

    loss: float
    coordinates: dict[str, int]
    mesh: dict[str, int]
    parts: dict[str, ParameterPart]
    gradients: dict[str, Tensor]
    buffers: dict[str, Tensor]
    update_error: float


def _rank(
    graph: Graph,
    plan: Plan,
    state: Mapping[str, Tensor],
    batch: Mapping[str, Tensor],
    dtype: torch.dtype,
    seed: int,
    reference: Mapping[str, Tensor],
) -> _Part:
    """A rank's step; then an optimizer step on the reference's gradients, compared with one device's."""
    cast = {name: cast_tensor(tensor, dtype) for name, tensor in state.items()}
    applied = apply_plan(plan, graph, same_fingerprint=False)
    job = Job(graph, plan, applied, cast, lambda p: torch.optim.SGD(p, lr=0.0), device=torch.device("cpu"), seed=seed, timeout_s=_WAIT_S)
    loss = job.step({name: cast_tensor(tensor, dtype) for name, tensor in batch.items()})
    stage = job.program.stage
    return _Part(
        loss=loss,
        coordinates=dict(job.program.coordinates),
        mesh=dict(job.program.mesh),
        parts={part.name: part for part in stage.parameters if part.requires_grad},
        gradients={name: g.clone() for name, g in job.gradient().items()},
        buffers={binding.name: job.state[binding.name] for binding in stage.forward_outputs if binding.kind == "buffer"},
        update_error=_update_error(job, cast, reference),
    )


def _update_error(job: Job, state: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> float:
    """AdamW on this rank's parts of the reference's gradients against AdamW on the whole."""
    worst = 0.0
    for part in job.program.stage.parameters:
        if part.requires_grad:
            whole = _adamw(state[part.name], reference[part.name], lambda optimizer: optimizer)
            mine = _adamw(
                local_part(state[part.name], part, job.program), local_part(reference[part.name], part, job.program), prefer_fused
            )
            worst = max(worst, relative_error(mine, local_part(whole, part, job.program), 1e-30))
    return worst


def _adamw(start: Tensor, gradient: Tensor, prepare: Callable[[torch.optim.Optimizer], torch.optim.Optimizer]) -> Tensor:
    parameter = nn.Parameter(start.clone(memory_format=torch.contiguous_format))
    parameter.grad = gradient.clone(memory_format=torch.contiguous_format)
    prepare(torch.optim.AdamW([parameter], lr=1e-3)).step()
    return parameter.detach()


def _compare(split: list[_Part], exact: _Step, reference: _Step, dtype: torch.dtype) -> list[Difference]:
    floor = 1e-3 * gradient_norm(exact.gradients)
    own = {name: relative_error(reference.gradients[name], gradient, floor) for name, gradient in exact.gradients.items()}
    own_loss = abs(reference.loss - exact.loss) / max(abs(exact.loss), 1e-300)

    def bound(error: float) -> float:
        return _FLOAT64_BOUND if dtype is torch.float64 else max(_FLOAT32_BOUND, _TIMES_REFERENCE * error)

    found = [Difference(name="loss", error=abs(split[0].loss - exact.loss) / max(abs(exact.loss), 1e-300), bound=bound(own_loss))]
    found += [Difference(name=f"loss on rank {rank}", error=abs(part.loss - split[0].loss), bound=0.0) for rank, part in enumerate(split)]
    whole = {name: _whole(name, split) for name in exact.gradients}
    found += compare_gradients(
        {n: g for n, (g, _) in whole.items()}, exact.gradients, {n: bound(e) for n, e in own.items()}, "gradient of "
    )
    found += [Difference(name=f"copies of the gradient of {name}", error=spread, bound=0.0) for name, (_, spread) in whole.items()]
    norm, expected = gradient_norm({n: g for n, (g, _) in whole.items()}), gradient_norm(exact.gradients)
    found.append(
        Difference(name="gradient norm", error=abs(norm - expected) / max(expected, 1e-300), bound=bound(max(own.values(), default=0.0)))
    )
    for name, buffer in exact.buffers.items():
        for part in split:
            if name in part.buffers:
                found.append(Difference(name=f"buffer {name}", error=relative_error(part.buffers[name], buffer, 1e-30), bound=bound(1e-6)))
    found.append(Difference(name="the optimizer's step", error=max(part.update_error for part in split), bound=bound(0.0)))
    return found


def _whole(name: str, split: list[_Part]) -> tuple[Tensor, float]:
    """The whole gradient from the ranks' parts, and the largest difference between copies that should be equal."""
    holders = [part for part in split if name in part.parts]
    kept = holders[0].parts[name].type
    axis = next((axis for axis, placement in kept.items() if isinstance(placement, Shard) and axis != "mb"), None)
    copies: dict[int, list[Tensor]] = {}
    for part in holders:
        copies.setdefault(part.coordinates[axis] if axis else 0, []).append(part.gradients[name])
    spread = max(float((each - same[0]).abs().max()) if each.numel() else 0.0 for same in copies.values() for each in same)
    parts = [copies[place][0] for place in sorted(copies)]
    return (join(parts, kept[axis]) if axis else parts[0]), spread  # type: ignore[arg-type]
