"""What `shardwise train` does: plan, start the ranks (or be one, under torchrun), train, and write down what happened."""

from __future__ import annotations

import functools
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from shardwise.asked import Asked
from shardwise.capture.batch import named_tensors
from shardwise.capture.export import capture
from shardwise.capture.precision import Precision
from shardwise.checkpoint.folder import read_record
from shardwise.cluster.machine import available_memory_bytes
from shardwise.data.text import VOCABULARY
from shardwise.environment import rank_environment
from shardwise.errors import ModelError, ShardwiseError
from shardwise.models import Batch, load_model
from shardwise.planner.plan import Random, simulate
from shardwise.planner.preflight import preflight
from shardwise.report import Measured, save_traces, write_report
from shardwise.runtime.group import process_group
from shardwise.runtime.metrics import require_tensorboard
from shardwise.runtime.train import WAIT_S, Settings, TrainingRun, train, train_rank
from shardwise.training_data import read_corpus

if TYPE_CHECKING:
    from shardwise import Infeasible, Plan
    from shardwise.data import Corpus

__all__ = ["TrainRequest", "run_training"]


@dataclass(frozen=True, kw_only=True)
class TrainRequest:
    """The command's options, None where they were not given; shown: whether progress is displayed; compile: as of `parallelize`."""

    model: str
    data: str | None
    steps: int
    learning_rate: float
    seed: int
    cluster: str | None
    layout: str | None
    global_batch: int | None
    sequence: int | None
    random: Random | None
    precision: Precision | None
    plan_file: Path | None
    port: int
    out: Path
    weights: Path | None = None
    evaluate_every: int = 0
    workers: int = 0
    tensorboard: bool = False
    shown: bool = True
    compile: bool = False
    save: Path | None = None
    save_every: int = 0
    resume: Path | None = None


def run_training(request: TrainRequest) -> dict[str, Any] | Infeasible | None:
    """Train; the summary to print, None on all ranks but the first when torchrun started this process."""
    if request.tensorboard:
        require_tensorboard()
    _check_checkpoint(request)
    return _as_parent(request) if rank_environment() is None else _as_rank(request)


def _as_parent(request: TrainRequest) -> dict[str, Any] | Infeasible:
    import shardwise as sw

    model, batch = _model_on_meta(request)
    settings, read = _settings(request, batch), _reader(request, batch)
    read()  # what is wrong with the data is said before ranks start
    plan = _plan(request, model, batch)
    if isinstance(plan, sw.Infeasible):
        return plan
    preflight(plan, capture(model, batch, precision=plan.precision), limit_bytes=available_memory_bytes() // plan.ranks)
    run = train(_builder(request), plan=plan, ranks=plan.ranks, read=read, settings=settings, port=request.port)
    return _written(request, plan, run)


def _as_rank(request: TrainRequest) -> dict[str, Any] | Infeasible | None:
    import shardwise as sw

    with process_group(timeout_s=WAIT_S) as place:
        model, batch = _model_on_meta(request)
        settings, read = _settings(request, batch), _reader(request, batch)
        plan = _plan_of_rank_0(request, model, batch)
        if isinstance(plan, sw.Infeasible):
            return plan
        results: list[Any] = [None] * place.ranks
        dist.all_gather_object(results, train_rank(_builder(request), plan, read, settings))
    return _written(request, plan, TrainingRun.of(results)) if place.rank == 0 else None


def _plan(request: TrainRequest, model: nn.Module, batch: Batch) -> Plan | Infeasible:
    import shardwise as sw

    if request.plan_file is not None:
        plan = sw.Plan.load(request.plan_file)
        _asked(request).check(plan, request.plan_file)
        return plan
    assert request.cluster is not None, "without a plan the command names a cluster"
    return sw.plan(
        model,
        batch,
        cluster=request.cluster,
        layout=request.layout,
        global_batch=request.global_batch,
        random=request.random or "keyed",
        precision=request.precision or "float32",
    )


def _asked(request: TrainRequest) -> Asked:
    return Asked(
        cluster=request.cluster,
        layout=request.layout,
        global_batch=request.global_batch,
        random=request.random,
        precision=request.precision,
    )


def _plan_of_rank_0(request: TrainRequest, model: nn.Module, batch: Batch) -> Plan | Infeasible:
    """One rank plans, so that all run the same plan even where their machines measured differently."""
    import shardwise as sw

    held: list[Any] = [_plan(request, model, batch) if dist.get_rank() == 0 else None]
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "plan.json"
        if isinstance(held[0], sw.Plan):
            held[0].save(path)
            held = [path.read_text()]
        dist.broadcast_object_list(held, src=0)
        if not isinstance(held[0], str):
            return held[0]
        path.write_text(held[0])
        return sw.Plan.load(path)


def _model_on_meta(request: TrainRequest) -> tuple[nn.Module, Batch]:
    model, batch = load_model(request.model, batch_size=request.global_batch, sequence=request.sequence, device="meta")
    if request.data is None or ":" not in request.data:
        _check_vocabulary(model, request.model, batch)
    return model, batch


def _reader(request: TrainRequest, batch: Batch) -> functools.partial[Corpus]:
    """Called on each rank. The batch says what the model reads."""
    return functools.partial(
        read_corpus, request.data, {name: (value.dtype, tuple(value.shape)) for name, value in named_tensors(batch).items()}
    )


def _settings(request: TrainRequest, batch: Batch) -> Settings:
    return Settings(
        steps=request.steps,
        batch_size=request.global_batch or next(iter(named_tensors(batch).values())).shape[0],
        learning_rate=request.learning_rate,
        seed=request.seed,
        shown=request.shown,
        weights=request.weights,
        evaluate_every=request.evaluate_every,
        workers=request.workers,
        out=request.out,
        tensorboard=request.tensorboard,
        compile=request.compile,
        save=request.save,
        save_every=request.save_every,
        resume=request.resume,
    )


def _check_checkpoint(request: TrainRequest) -> None:
    """What contradicts itself is said before ranks start."""
    if request.save_every and request.save is None:
        raise ShardwiseError(f"--save-every {request.save_every} has no effect without --save FOLDER")
    if request.resume is None:
        return
    if request.weights is not None:
        raise ShardwiseError("--resume goes on with the checkpoint's own parameters: leave out --weights, or --resume to begin with others")
    record = read_record(request.resume)
    if record.steps >= request.steps:
        raise ShardwiseError(
            f"{request.resume} is the state after {record.steps} steps and --steps {request.steps} is how many there shall be in all: "
            "nothing is left to do; give more"
        )
    rates = {group["lr"] for group in record.groups}
    if rates != {request.learning_rate}:
        raise ShardwiseError(
            f"{request.resume} was trained with --lr {', '.join(map(str, rates))}, now --lr is {request.learning_rate}; give the same, or "
            "begin from its parameters alone with --weights"
        )


def _builder(request: TrainRequest) -> functools.partial[nn.Module]:
    return functools.partial(_build, request.model, request.global_batch, request.sequence, request.seed)


def _build(spec: str, batch_size: int | None, sequence: int | None, seed: int) -> nn.Module:
    """On each rank; a module-level function, so that a spawned rank finds it."""
    return load_model(spec, batch_size=batch_size, sequence=sequence, seed=seed)[0]


def _check_vocabulary(model: nn.Module, spec: str, batch: Batch) -> None:
    """Text is read as bytes."""
    if set(batch) != {"input_ids", "labels"}:
        return
    tables = [module.num_embeddings for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    if tables and max(tables) < VOCABULARY:
        raise ModelError(f"{spec} has a vocabulary of {max(tables)}, but bytes need {VOCABULARY}. Set vocab_size to {VOCABULARY} or more.")


def _written(request: TrainRequest, plan: Plan, run: TrainingRun) -> dict[str, Any]:
    request.out.mkdir(parents=True, exist_ok=True)
    plan_path, run_path = request.out / "plan.json", request.out / "training.json"
    report_path, trace_path = request.out / "report.html", request.out / "trace.json"
    plan.save(plan_path)
    simulation, measured = simulate(plan), Measured.of(run, plan)
    write_report(report_path, plan, simulation, measured)
    save_traces(trace_path, simulation, measured)
    found = {
        "first_step": run.first_step,
        "losses": run.losses,
        "step_times_s": run.step_times_s,
        "memory_bytes": run.memory_bytes,
        "held_out": run.held_out,
    }
    run_path.write_text(json.dumps(found, indent=1))
    return {
        "steps": run.first_step - 1 + len(run.losses),
        "loss_first": run.losses[0],
        "loss_last": run.losses[-1],
        "held_out_loss_before": run.held_out_before,
        "held_out_loss_after": run.held_out_after,
        "step_time_s": run.step_time_s,
        "memory_bytes": run.memory_bytes,
        "plan": str(plan_path),
        "training": str(run_path),
        "metrics": str(request.out / "metrics.jsonl"),
        "report": str(report_path),
        "trace": str(trace_path),
        **({} if request.save is None else {"checkpoint": str(request.save)}),
    }
