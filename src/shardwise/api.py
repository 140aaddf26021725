"""The public interface: plan, simulate, verify, parallelize."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shardwise.capture.batch import dim_of, map_tensors
from shardwise.capture.deferred import Deferred, defer
from shardwise.capture.export import capture
from shardwise.capture.graph import Graph
from shardwise.capture.precision import Precision, checked_precision
from shardwise.capture.state import tensors_of
from shardwise.checkpoint.safetensors import Checkpoint
from shardwise.cluster.model import Cluster
from shardwise.errors import BatchError, LayoutError, PlanError, ShardwiseWarning, ValuesNeeded
from shardwise.planner.apply import apply_plan
from shardwise.planner.layout import Layout
from shardwise.planner.plan import Infeasible, Plan, Random
from shardwise.planner.search import search

if TYPE_CHECKING:
    from shardwise.runtime.weights import Weights

__all__ = ["parallelize", "plan"]

BatchDims = Mapping[str, int | None]
_SEARCHED = 64  # ranks of the catalog's devices: each layout is lowered stage by stage


def plan(
    model: nn.Module,
    batch: Mapping[str, Any],
    cluster: Cluster | str = "local:4",
    layout: Layout | str | Mapping[str, Any] | None = None,
    global_batch: int | None = None,
    optimizer: str = "adamw",
    *,
    random: Random = "keyed",
    precision: Precision = "float32",
    loss: Callable[[Any], Tensor] | None = None,
    batch_dims: BatchDims | None = None,
    sequence_dims: BatchDims | None = None,
) -> Plan | Infeasible:
    """The fastest way found to split a training step of the model over the cluster, or why none fits.

    model: any module, also on the meta device; its parameters are neither changed nor copied.
    batch: keyword arguments of its forward; tensors have the batch dim first unless batch_dims says otherwise (None: shared by all
    samples). Those in lists, tuples and dicts are named by their paths (`crops.0`).
    layout: what is pinned ("tp=2,pp=2"); the rest is searched. global_batch: samples in a step, the example batch's by default.
    optimizer: "adamw", "adam", "sgd" or "sgd_momentum", for its memory and time. loss: makes the scalar from the module's output.
    random: "keyed", the random numbers are those of one device; "fast", dropout and noise come from torch's generator on each rank.
    precision: "float32" leaves the model's dtypes as they are; "bf16" and "fp16" compute in 16 bits and update in float32
    (docs/concepts/numbers.md).
    sequence_dims: with cp, input → the dim that it splits (None: has no sequence), where it is not that of [batch, sequence] tokens or
    [batch, sequence, features]; the plan remembers it.
    Raises CaptureError, RuleError, LayoutError, BatchError, ClusterError; PlanError for a `random` that is neither; ShardwiseError for an
    optimizer without figures; RankFailed when measuring this machine fails.
    """
    if random not in get_args(Random):
        raise PlanError(f"random={random!r} is not known; choose {' or '.join(map(repr, get_args(Random)))}")
    pinned = Layout.parse(layout)
    machine = Cluster.parse(cluster)
    if machine.machines is not None and machine.ranks > _SEARCHED and not (pinned.dp and pinned.tp and pinned.pp):
        raise LayoutError(
            f"{machine.name} has {machine.ranks} ranks, more than the {_SEARCHED} for which all layouts are searched here; pin dp, tp "
            "and pp, or rank layouts of a known model with `shardwise layouts`"
        )
    graph = capture(
        model,
        _resized(batch, global_batch, batch_dims or {}),
        loss=loss,
        batch_dims=batch_dims,
        precision=checked_precision(precision),
    )
    return search(graph, machine, pinned, optimizer, type(model).__name__, random=random, sequence_dims=sequence_dims)


def parallelize(
    model: nn.Module | Callable[[], nn.Module],
    batch: Mapping[str, Any],
    *,
    plan: Plan,
    optimizer: Any,
    loss: Callable[[Any], Tensor] | None = None,
    batch_dims: BatchDims | None = None,
    seed: int = 0,
    timeout_s: float = 300.0,
    clip_norm: float | None = None,
    check_finite: bool = True,
    weights: str | Path | None = None,
    loss_scale: Any = None,
    compile: bool = False,
) -> Any:
    """This rank's Job of a plan; call it on every rank, under torchrun or in a process group of your own.

    model: a module, or a function without arguments that builds it: then no rank ever holds it whole, and what a rank keeps has the values
    that the function would have drawn (`shardwise.capture.deferred`).
    optimizer: a function of (name, parameter) pairs that returns a torch optimizer, or a list of them. It gets this rank's parts of the
    parameters, whole ones where the optimizer needs them whole and this rank updates them, empty ones for what other ranks update.
    clip_norm: gradients are scaled down to this norm over all parameters, as torch.nn.utils.clip_grad_norm_ does on one device.
    check_finite: a step whose loss or gradients are infinite or not numbers raises NotFiniteError before the optimizer sees them.
    weights: a .safetensors file, an index of several or their directory, from which parameters and buffers are read, of each what this rank
    keeps; the module may then be on the meta device.
    loss_scale: with precision="fp16", how gradients are scaled (`shardwise.runtime.scale.LossScale`), by default as
    torch.amp.GradScaler does. A step whose gradients overflow is skipped on all ranks and counted (`job.skipped`); when that happens again
    although nothing is scaled any more, NotFiniteError names the parameters.
    compile: the stages' graphs, those of `job.eval` and `job.predict` as well, are compiled by torch's inductor, which takes seconds to
    minutes once; `print(job.compiler)` says what was and what was not, and why. The same numbers but for rounding; equal bit by bit from
    run to run.
    The job takes a module's weights over: parameters that it keeps whole go on living in the model, those that it splits are emptied there.
    Raises PlanError when the plan is for another model, batch or number of ranks; CaptureError for values that are not there (meta device);
    WeightsError for files that are damaged or of another model; OutOfMemory; LayoutError for an optimizer that cannot give one device's
    numbers in this layout; ClusterError outside a job, and to compile without a compiler; CheckError when the programs would not fit
    together.
    """
    from shardwise.runtime.group import join_group
    from shardwise.runtime.job import Job
    from shardwise.runtime.memory import give_back_freed_memory
    from shardwise.runtime.source import Source

    join_group(timeout_s)
    given = _resized(batch, plan.global_batch, batch_dims or {})
    captures = partial(capture, batch=given, loss=loss, batch_dims=batch_dims, precision=plan.precision)
    module, graph, deferred = _captured(model, captures)
    start = _weights(module, graph, deferred, weights)
    job = Job(
        graph,
        plan,
        apply_plan(plan, graph),
        start,
        optimizer,
        device=_device(),
        seed=seed,
        timeout_s=timeout_s,
        clip_norm=clip_norm,
        check_finite=check_finite,
        source=Source(module, given, loss, batch_dims, start),
        loss_scale=loss_scale,
        compile=compile,
    )
    if deferred is None:
        _release(module, job)
    give_back_freed_memory()
    return job


def _captured(
    model: nn.Module | Callable[[], nn.Module], captures: Callable[[nn.Module], Graph]
) -> tuple[nn.Module, Graph, Deferred | None]:
    """The module, its graph, and how its values are made where it has none. What cannot be captured without values is built with them."""
    if isinstance(model, nn.Module):
        return model, captures(model), None
    deferred = defer(model)
    try:
        return deferred.model, captures(deferred.model), deferred
    except ValuesNeeded as error:
        warnings.warn(f"each rank builds the model whole before it takes its part: {error}", ShardwiseWarning, stacklevel=3)
    module = model()
    return module, captures(module), None


def _weights(module: nn.Module, graph: Graph, deferred: Deferred | None, path: str | Path | None) -> Weights:
    from shardwise.runtime.weights import DeferredWeights, FileWeights, LiveWeights

    own = DeferredWeights(deferred, graph.constants) if deferred else LiveWeights(tensors_of(module, graph))
    return own if path is None else FileWeights(Checkpoint(Path(path)), graph, module, own)


def _release(model: nn.Module, job: Any) -> None:
    """Empties the model's parameters that this rank does not keep as they are; what no operator reads stays."""
    kept = {tensor.untyped_storage().data_ptr() for tensor in (*job.state.values(), *job.parameters.of.values())}
    read = {value.name for op in job.graph.ops for value in op.inputs}
    for name, parameter in model.named_parameters():
        if name in read and parameter.untyped_storage().data_ptr() not in kept:
            parameter.data = parameter.data.new_empty(0)


def _device() -> torch.device:
    if dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _resized(batch: Mapping[str, Any], samples: int | None, batch_dims: BatchDims) -> dict[str, Any]:
    """The batch with so many samples."""
    if samples is None:
        return dict(batch)
    if samples < 1:
        raise BatchError(f"global_batch={samples} is not 1 or more")

    def resized(name: str, tensor: torch.Tensor) -> torch.Tensor:
        dim = dim_of(name, batch_dims)
        if dim is None or tensor.dim() <= dim or tensor.shape[dim] == samples:
            return tensor  # otherwise the samples that there are, again and again: capturing may have to look at them
        return tensor.index_select(dim, torch.arange(samples, device=tensor.device) % max(tensor.shape[dim], 1))

    return map_tensors(resized, batch)
