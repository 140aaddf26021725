"""What of a model can be split, layout by layout: verified, infeasible, or not, and why."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from shardwise.capture.precision import Precision
from shardwise.cluster.model import Cluster
from shardwise.errors import BatchError, LayoutError, ShardwiseError
from shardwise.planner.apply import analyse, apply_plan
from shardwise.planner.layout import Layout
from shardwise.planner.plan import Infeasible, Plan
from shardwise.planner.search import search
from shardwise.program.trace import Tracer
from shardwise.verify.one_device import Reference, prepare
from shardwise.verify.verify import Lowered, check_lowered, lowered
from shardwise.verify.work_share import block_flops, block_shares

__all__ = ["ALL_LAYOUTS", "LAYOUTS", "Coverage", "Row", "coverage"]

CHOSEN = "chosen on 4"
LAYOUTS = ("tp=2", "pp=2", "dp=2", "tp=2,pp=2", CHOSEN)
ALL_LAYOUTS = (
    *("tp=2", "pp=2", "dp=2", "tp=3", "pp=3", "dp=3", "tp=4", "pp=4", "dp=4"),
    *("tp=2,pp=2", "dp=2,tp=2", "dp=2,pp=2", CHOSEN),
)
Status = Literal["verified", "differs", "infeasible", "failed"]


@dataclass(frozen=True, kw_only=True)
class Row:
    """What became of one layout.

    layout: what was asked for; plan: the whole layout that was verified; error: the largest relative error of all that was compared.
    replicated: operators that every rank of the tensor axis does whole though they multiply matrices or have no rule → how many.
    parameters, flops: the largest share of the repeated blocks that a rank holds and computes (tensor axis alone), else None.
    why: what was wrong.
    """

    layout: str
    status: Status
    plan: str = ""
    error: float | None = None
    replicated: dict[str, int] = field(default_factory=dict)
    parameters: float | None = None
    flops: float | None = None
    why: str = ""
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """Verified, or refused with a reason before anything ran."""
        return self.status in ("verified", "infeasible")


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """The result. kept: submodules that are one operator each → why; without_rule: operators kept whole for want of a rule → how many;
    found: operators whose rule was found by running them."""

    model: str
    dtype: str
    rows: list[Row]
    kept: dict[str, str]
    without_rule: dict[str, int]
    found: list[str]

    @property
    def ok(self) -> bool:
        """Whether nothing differs and nothing failed."""
        return all(row.passed for row in self.rows)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"{self.model}: a training step split and whole, compared in {self.dtype}"]
        lines += [f"  {module} is kept as one operator: {why}" for module, why in list(self.kept.items())[:8]]
        if self.without_rule:
            lines.append(f"  without a rule, done whole by every rank: {_counted(self.without_rule)}")
        if self.found:
            lines.append(f"  rule found by running the operator: {', '.join(self.found)}")
        width = max(13, *(len(row.layout) + 2 for row in self.rows))
        lines.append(f"{'layout':<{width}}{'status':<12}{'error':>9}  {'parameters':>10} {'flops':>6}  not split over tp, or why not")
        return "\n".join(lines + [_line(row, width) for row in self.rows])


def _line(row: Row, width: int) -> str:
    error = f"{row.error:.1e}" if row.error is not None else ""
    parameters, flops = (f"{share:.0%}" if share is not None else "" for share in (row.parameters, row.flops))
    more = row.why or _counted(row.replicated)
    if row.layout == CHOSEN and row.plan:
        more = f"{row.plan}  {more}"
    return f"{row.layout:<{width}}{row.status:<12}{error:>9}  {parameters:>10} {flops:>6}  {more}".rstrip()


def _counted(names: Mapping[str, int]) -> str:
    return ", ".join(f"{name} ×{count}" if count > 1 else name for name, count in names.items())


def coverage(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    layouts: Sequence[str] = LAYOUTS,
    dtype: torch.dtype = torch.float64,
    loss: Callable[[Any], Tensor] | None = None,
    batch_dims: Mapping[str, int | None] | None = None,
    precision: Precision = "float32",
    processes: bool = False,
    progress: Callable[[str], None] = lambda text: None,
) -> Coverage:
    """Tries each layout on local ranks and verifies a step of it as `shardwise.verify` does.

    layouts: what to pin, or "chosen on 4". dtype, precision: as of `verify`. processes: ranks are processes, not threads of this one.
    progress: told what is being done.
    Raises CaptureError and VerifyError for a model that cannot be captured or compared at all.
    """
    progress("capturing, and one device's step")
    reference = prepare(model, batch, loss=loss, batch_dims=batch_dims, precision=precision)
    trial = _Trial(reference=reference, dtype=dtype, processes=processes)
    rows = []
    for layout in layouts:
        progress(layout)
        rows.append(trial.row(layout))
    signatures = trial.signatures
    return Coverage(
        model=reference.name,
        dtype=str(reference.widest if dtype is torch.float64 else dtype).removeprefix("torch."),
        rows=rows,
        kept=reference.graph.kept,
        without_rule=dict(Counter(name for name, source in signatures if source == "whole")),
        found=sorted({name for name, source in signatures if source == "discovered"}),
    )


@dataclass(kw_only=True)
class _Trial:
    """One model's rows."""

    reference: Reference
    dtype: torch.dtype
    processes: bool
    signatures: list[tuple[str, str]] = field(default_factory=list)
    tracer: Tracer = field(default_factory=lambda: Tracer(device=torch.device("cpu")))
    whole_flops: float | None = None
    obstacle: str | None = None

    def row(self, layout: str) -> Row:
        start = time.perf_counter()
        try:
            found = self._plan(layout)
            if isinstance(found, Infeasible):
                return Row(layout=layout, status="infeasible", why=found.reasons[0] if found.reasons else str(found))
            return self._verified(layout, found, start)
        except (LayoutError, BatchError) as error:
            return Row(layout=layout, status="infeasible", why=str(error))
        except Exception as error:  # one that is no ShardwiseError is a bug of ours; the other rows are worth having all the same
            why = str(error) if isinstance(error, ShardwiseError) else f"{type(error).__name__}: {error}"
            return Row(layout=layout, status="failed", why=why, seconds=time.perf_counter() - start)

    def _plan(self, layout: str) -> Plan | Infeasible:
        """A pinned layout is planned in the precision of the proof, so that what was traced for one serves the next."""
        reference = self.reference
        if layout == CHOSEN:
            return search(reference.graph, Cluster.parse("local:4"), Layout(), "adamw", reference.name)
        graph = reference.cast(reference.widest if self.dtype is torch.float64 else self.dtype)
        cluster = Cluster.parse(f"local:{_ranks(layout)}")
        return search(graph, cluster, self._with_microbatches(Layout.parse(layout)), "adamw", reference.name, tracer=self.tracer)

    def _with_microbatches(self, layout: Layout) -> Layout:
        """As many microbatches as stages, where the batch may be cut so: how many is fastest does not matter here."""
        if layout.microbatches:
            return layout
        if self.obstacle is None:
            self.obstacle = analyse(self.reference.graph).obstacle
        stages = layout.pp or 1
        samples = self.reference.graph.global_batch
        if samples < (layout.dp or 1):
            return layout  # refused, with that as the reason
        fits = not self.obstacle and samples % (stages * (layout.dp or 1)) == 0
        return replace(layout, microbatches=stages if fits else 1)

    def _verified(self, layout: str, plan: Plan, start: float) -> Row:
        built = lowered(self.reference, plan, self.dtype, self.tracer)
        parameters, flops = self._shares(built) if plan.tp > 1 and plan.dp == plan.cp == plan.pp == 1 else (None, None)
        report = check_lowered(self.reference, plan, built, processes=self.processes)
        return Row(
            layout=layout,
            status="verified" if report.ok else "differs",
            plan=plan.layout,
            error=report.max_relative_error,
            replicated=self._replicated(plan),
            parameters=parameters,
            flops=flops,
            why="" if report.ok else f"{report.first_difference} is the first that differs",
            seconds=time.perf_counter() - start,
        )

    def _shares(self, built: Lowered) -> tuple[float, float]:
        if self.whole_flops is None:
            self.whole_flops = block_flops(built.graph, self.tracer)
        return block_shares(built.graph, built.programs, self.whole_flops)

    def _replicated(self, plan: Plan) -> dict[str, int]:
        applied = apply_plan(plan, self.reference.graph, same_fingerprint=False)
        assignment = applied.assignment
        if not self.signatures:
            self.signatures.extend((op.name, assignment.signatures[op].source) for op in self.reference.graph.ops)
        if plan.tp == 1:
            return {}
        whole = [
            op.name
            for op in self.reference.graph.ops
            if op not in applied.cut.prelude
            and op.requires_grad
            and assignment.variants[op]["tp"].choice.mode != "split"
            and (assignment.signatures[op].source == "whole" or _multiplies(op.name))
        ]
        return dict(Counter(whole))


def _multiplies(name: str) -> bool:
    return any(part in name for part in ("linear", "mm", "matmul", "einsum", "conv", "attention", "lstm", "gru"))


def _ranks(layout: str) -> int:
    pinned = Layout.parse(layout)
    return pinned.ranks
