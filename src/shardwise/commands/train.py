"""`shardwise train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shardwise.commands.options import (
    DEFAULT_CLUSTER,
    GlobalBatchOption,
    JsonOption,
    LayoutOption,
    ModelOption,
    PlannedClusterOption,
    PlanOption,
    RandomOption,
    RecomputeOption,
    ScheduleOption,
    SequenceOption,
)
from shardwise.commands.shared import feasible, pinned_layout, required, show

__all__ = ["train"]


def train(
    model: ModelOption = None,
    data: Annotated[Path | None, typer.Option("--data", help="A text file, read as bytes. Default: Python's own sources.")] = None,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Optimizer steps.")] = 100,
    learning_rate: Annotated[float, typer.Option("--lr", min=0.0, help="AdamW's learning rate.")] = 1e-3,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the weights and the order of the data.")] = 0,
    cluster: PlannedClusterOption = None,
    layout: LayoutOption = None,
    schedule: ScheduleOption = None,
    global_batch: GlobalBatchOption = None,
    sequence: SequenceOption = None,
    random: RandomOption = None,
    recompute: RecomputeOption = None,
    plan_file: PlanOption = None,
    weights: Annotated[
        Path | None, typer.Option("--weights", help="Begin from these: a .safetensors file, an index of several, or their directory.")
    ] = None,
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="For the ranks to meet at; 0 takes a free one.")] = 0,
    out: Annotated[Path, typer.Option("--out", help="A directory for plan.json, training.json, report.html and trace.json.")] = Path(
        "out/train"
    ),
    as_json: JsonOption = False,
) -> None:
    """Train a language model on the bytes of a text, split over local ranks, which this command starts itself.

    Started by torchrun it is one of the ranks instead; then --cluster or --plan must describe all nodes.

    [bold]Examples[/bold]

    shardwise train --model hf:config.json --data book.txt --steps 200 --cluster local:4

    shardwise train --model hf:config.json --plan plan.json

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
        plan_file=plan_file,
        port=port,
        out=out,
        weights=weights,
        shown=not as_json,
    )
    summary = feasible(run_training(request))
    if summary is not None:  # None on all ranks but the first
        show(summary, as_json)
