"""Proves a whole training step equal to one device's: loss, every gradient, their norm, changed buffers and the optimizer's step.

    model ──capture──▶ graph ──▶ one device ─────────────▶ loss, gradients, buffers ─┐
                         │                                                           ├─▶ compare ──▶ Report
                         └──plan──▶ ranks ────────────────▶ the same ────────────────┘

The captured graph itself is checked against the model first, in the model's own precision.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shardwise.capture.graph import Graph
from shardwise.capture.normalize import RANDOM_STATE
from shardwise.capture.precision import LOW, Precision, checked_precision, dtype_of
from shardwise.cluster.model import Cluster
from shardwise.errors import PlanError, VerifyError
from shardwise.planner.apply import apply_plan
from shardwise.planner.layout import Layout
from shardwise.planner.plan import Infeasible, Plan
from shardwise.planner.preflight import preflight
from shardwise.planner.search import search
from shardwise.program.program import Program
from shardwise.program.trace import Tracer
from shardwise.sharding.division import Division
from shardwise.sharding.types import Shard, join
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
from shardwise.verify.one_device import Reference, Step, prepare
from shardwise.verify.ranks import Part, Work, on_processes, on_threads

__all__ = ["Lowered", "Report", "check_lowered", "check_plan", "lowered", "verify"]


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
    sequence_dims: Mapping[str, int | None] | None = None,
    seed: int = 0,
    processes: bool = True,
    precision: Precision | None = None,
    compile: bool = False,
) -> Report | Infeasible:
    """Runs one step split over local ranks and one step whole, and compares.

    dtype: float64 is the proof (bound 1e-10); float32 is held to max(1e-5, 4 × one device's own float32 error), as is a model with an
    operator that has no float64; torch.bfloat16 or torch.float16, where the plan computes in that, to twice its epsilon or 4 × one device's
    own error in it. precision: as of `plan`; a given plan has its own. plan: verify this one; else one is made for `layout`
    on `cluster`, as by `plan` (sequence_dims, too).
    processes: every rank is a process that talks over torch.distributed; False: a thread of this process, which starts faster.
    compile: what the ranks run is compiled, as by `parallelize`.
    Raises what capture and planning raise, VerifyError for a model that is not deterministic or a plan with random="fast", and RankFailed.
    """
    if plan is not None and sequence_dims is not None:
        raise PlanError("the plan says already what cp splits: leave sequence_dims out")
    if plan is not None and precision not in (None, plan.precision):
        raise PlanError(f"the plan computes in {plan.precision}: leave precision={precision!r} out")
    chosen = plan.precision if plan is not None else checked_precision(precision or "float32")
    if dtype in LOW and dtype is not dtype_of(chosen):
        raise PlanError(f"dtype={dtype} compares steps in it, but the plan computes in {chosen}; pass precision, or another dtype")
    reference = prepare(model, batch, loss=loss, batch_dims=batch_dims, seed=seed, precision=chosen)
    if plan is None:
        pinned = Layout.parse(layout)
        found = search(reference.graph, Cluster.parse(cluster), pinned, "adamw", reference.name, sequence_dims=sequence_dims)
        if isinstance(found, Infeasible):
            return found
        plan = found
    apply_plan(plan, reference.graph)  # a plan for another model is refused here
    return check_plan(reference, plan, dtype=dtype, processes=processes, compile=compile)


def check_plan(
    reference: Reference, plan: Plan, *, dtype: torch.dtype = torch.float64, processes: bool = True, compile: bool = False
) -> Report:
    """Runs one step of the plan on ranks and compares it with one device's; arguments as of `verify`."""
    if plan.random == "fast" and RANDOM_STATE in reference.graph.inputs:
        raise VerifyError(
            f"the plan of {plan.model} says random='fast': its random numbers are meant to differ from one device's. Verify it with "
            "random='keyed'; all else is computed alike"
        )
    return check_lowered(reference, plan, lowered(reference, plan, dtype), processes=processes, compile=compile)


@dataclass(frozen=True, kw_only=True)
class Lowered:
    """A plan's programs for the reference's graph in one precision."""

    dtype: torch.dtype
    graph: Graph
    programs: Mapping[int, Program]


def lowered(reference: Reference, plan: Plan, dtype: torch.dtype = torch.float64, tracer: Tracer | None = None) -> Lowered:
    """All ranks' programs, checked against each other. Raises what `preflight` does."""
    dtype = reference.widest if dtype is torch.float64 else dtype
    graph = reference.cast(dtype)
    return Lowered(dtype=dtype, graph=graph, programs=preflight(plan, graph, same_fingerprint=False, tracer=tracer))


def check_lowered(reference: Reference, plan: Plan, built: Lowered, *, processes: bool = True, compile: bool = False) -> Report:
    """As `check_plan`."""
    dtype = built.dtype
    whole = reference.step(dtype)
    state = reference.masters if dtype in LOW else reference.state
    work = Work.of(built.graph, plan, state, reference.batch, dtype, reference.seed, whole.gradients, compile=compile)
    parts = on_processes(work) if processes else on_threads(work, built.programs)
    return Report(
        layout=plan.layout,
        dtype=dtype,
        loss=parts[0].loss,
        reference_loss=reference.exact.loss,
        differences=_compare(parts, reference.exact, whole, dtype),
        captured=reference.captured,
        plan=plan,
    )


def _compare(split: list[Part], exact: Step, reference: Step, dtype: torch.dtype) -> list[Difference]:
    floor = 1e-3 * gradient_norm(exact.gradients)
    own = {name: relative_error(reference.gradients[name], gradient, floor) for name, gradient in exact.gradients.items()}
    own_loss, own_after = loss_error(reference.loss, exact.loss), loss_error(reference.loss_after, exact.loss_after)

    def bound(error: float) -> float:
        if dtype is torch.float64:
            return FLOAT64_BOUND
        return max(2 * torch.finfo(dtype).eps if dtype in LOW else FLOAT32_BOUND, TIMES_REFERENCE * error)

    found = [Difference(name="loss", error=loss_error(split[0].loss, exact.loss), bound=bound(own_loss))]
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
    least = 1e-3 * gradient_norm({name: buffer for name, buffer in exact.buffers.items() if buffer.is_floating_point()})
    for name, buffer in exact.buffers.items():
        scale = least if buffer.is_floating_point() else 1e-30
        own_buffer = relative_error(reference.buffers[name], buffer, scale)
        for part in split:
            if name in part.buffers:
                found.append(
                    Difference(name=f"buffer {name}", error=relative_error(part.buffers[name], buffer, scale), bound=bound(own_buffer))
                )
    updated = FLOAT64_BOUND if dtype is torch.float64 else FLOAT32_BOUND
    found.append(Difference(name="the optimizer's step", error=max(part.update_error for part in split), bound=updated))
    found.append(Difference(name="loss after the step", error=loss_error(split[0].loss_after, exact.loss_after), bound=bound(own_after)))
    return found


def _whole(name: str, split: list[Part]) -> tuple[Tensor, float]:
    """The whole gradient from the ranks' parts, and the largest difference between copies that should be equal."""
    holders = [part for part in split if name in part.parts]
    kept = holders[0].parts[name].type
    axes = [axis for axis, placement in kept.items() if isinstance(placement, Shard) and axis != "mb"]
    copies: dict[tuple[tuple[int, ...], int], list[Tensor]] = {}  # (place on the axes, among those that divide its part) → copies
    divisions: dict[tuple[int, ...], Division | None] = {}
    for part in holders:
        division, place = part.parts[name].division, tuple(part.coordinates[axis] for axis in axes)
        copies.setdefault((place, division.rank if division else 0), []).append(part.gradients[name])
        divisions[place] = division
    spread = max(float((each - same[0]).abs().max()) if each.numel() else 0.0 for same in copies.values() for each in same)
    parts = {place: _joined({at: same for (where, at), same in copies.items() if where == place}, divisions[place]) for place in divisions}
    for axis in reversed(axes):  # an inner axis divides what the outer ones leave
        rows: dict[tuple[int, ...], list[Tensor]] = {}
        for place in sorted(parts):
            rows.setdefault(place[:-1], []).append(parts[place])
        parts = {place: join(found, kept[axis]) for place, found in rows.items()}  # type: ignore[arg-type]
    return parts[()], spread


def _joined(pieces: Mapping[int, list[Tensor]], division: Division | None) -> Tensor:
    """What the data ranks hold of a gradient together."""
    parts = [pieces[rank][0] for rank in sorted(pieces)]
    return parts[0] if division is None else torch.cat(parts, division.dim)
