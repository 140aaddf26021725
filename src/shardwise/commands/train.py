"""`shardwise train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shardwise.commands.config import ConfigOption
from shardwise.commands.options import (
    DEFAULT_CLUSTER,
    CompileOption,
    GlobalBatchOption,
    JsonOption,
    LayoutOption,
    ModelOption,
    PlannedClusterOption,
    PlanOption,
    PrecisionOption,
    RandomOption,
    RecomputeOption,
    ScheduleOption,
    SequenceOption,
)
from shardwise.commands.shared import feasible, pinned_layout, required, show

__all__ = ["train"]


def train(
    model: ModelOption = None,
    config: ConfigOption = None,
    data: Annotated[
        str | None,
        typer.Option("--data", help="Text, or a folder of text, images or recordings; or FILE.py:FUNCTION, which returns a dataset."),
    ] = None,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Optimizer steps.")] = 100,
    learning_rate: Annotated[float, typer.Option("--lr", min=0.0, help="AdamW's learning rate.")] = 1e-3,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the weights and the order of the data.")] = 0,
    cluster: PlannedClusterOption = None,
    layout: LayoutOption = None,
    schedule: ScheduleOption = None,
    global_batch: GlobalBatchOption = None,
    sequence: SequenceOption = None,
    random: RandomOption = None,
    precision: PrecisionOption = None,
    recompute: RecomputeOption = None,
    plan_file: PlanOption = None,
    weights: Annotated[
        Path | None, typer.Option("--weights", help="Begin from these: a .safetensors file, an index of several, or their directory.")
    ] = None,
    evaluate_every: Annotated[
        int, typer.Option("--eval-every", min=0, help="Steps between two evaluations on held-out data; 0: before and after.")
    ] = 0,
    workers: Annotated[int, typer.Option("--workers", min=0, help="Processes of each rank that read data ahead; 0: the rank reads.")] = 0,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Also write TensorBoard's event files.")] = False,
    save: Annotated[
        Path | None, typer.Option("--save", help="A folder for a checkpoint, at the end and when interrupted (Ctrl-C, SIGTERM).")
    ] = None,
    save_every: Annotated[int, typer.Option("--save-every", min=0, help="Steps between two checkpoints; 0: none in between.")] = 0,
    resume: Annotated[Path | None, typer.Option("--resume", help="A checkpoint to go on from, of any layout.")] = None,
    compile: CompileOption = False,
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="For the ranks to meet at; 0 takes a free one.")] = 0,
    out: Annotated[
        Path, typer.Option("--out", help="A directory for plan.json, metrics.jsonl, training.json, report.html and trace.json.")
    ] = Path("out/train"),
    as_json: JsonOption = False,
) -> None:
    """Train a model on text, images, recordings or a dataset of your own, split over local ranks, which this command starts itself.

    Started by torchrun it is one of the ranks instead; then --cluster or --plan must describe all nodes.

    [bold]Examples[/bold]

    shardwise train --model hf:config.json --data book.txt --steps 200 --cluster local:4

    shardwise train --model hf:config.json --plan plan.json

    shardwise train --config run.toml --steps 50

    shardwise train --config run.toml --save out/checkpoint --save-every 100

    shardwise train --config run.toml --save out/checkpoint --resume out/checkpoint

    torchrun --nnodes 2 --nproc-per-node 4 ... -m shardwise train --model hf:config.json --plan plan.json
    """
    from shardwise.training import TrainRequest, run_training

    request = TrainRequest(
        model=required(model),
        data=data,
        steps=steps,
        learning_rate=learning_rate,
        seed=seed,
        cluster=cluster if plan_file else cluster or DEFAULT_CLUSTER,
        layout=pinned_layout(layout, schedule=schedule, recompute=recompute),
        global_batch=global_batch,
        sequence=sequence,
        random=random,
        precision=precision,
        plan_file=plan_file,
        port=port,
        out=out,
        weights=weights,
        evaluate_every=evaluate_every,
        workers=workers,
        tensorboard=tensorboard,
        shown=not as_json,
        compile=compile,
        save=save,
        save_every=save_every,
        resume=resume,
    )
    summary = feasible(run_training(request))
    if summary is not None:  # None on all ranks but the first
        show(summary, as_json)
