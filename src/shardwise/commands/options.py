"""Options that several commands have, each written once."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

import typer

__all__ = [
    "DEFAULT_CLUSTER",
    "BudgetOption",
    "ClusterOption",
    "CompileOption",
    "GlobalBatchOption",
    "JsonOption",
    "LayoutOption",
    "ModelOption",
    "ObjectiveOption",
    "PlanOption",
    "PlannedClusterOption",
    "Precision",
    "PrecisionOption",
    "PriceOption",
    "RandomOption",
    "RecomputeOption",
    "RunnableOption",
    "ScheduleOption",
    "SearchedPrecisionOption",
    "SequenceOption",
    "SlowLinkOption",
    "SlowRankOption",
    "SlowStageOption",
    "WithinOption",
]

DEFAULT_CLUSTER = "local:2"

ModelOption = Annotated[
    str | None,
    typer.Option("--model", help="hf:CONFIG.json, or FILE.py:FUNCTION, a function that returns the model and an example batch."),
]
ClusterOption = Annotated[str, typer.Option("--cluster", help="local:N, N ranks on this machine, or a cluster file (.toml).")]
LayoutOption = Annotated[
    str | None,
    typer.Option(
        "--layout",
        help="What to pin, such as tp=2,pp=2,microbatches=4, dp=4,zero=3, dp=4,ep=2 or cp=4,attention=ring. The rest is searched.",
    ),
]
ScheduleOption = Annotated[
    str | None,
    typer.Option("--schedule", help="gpipe, 1f1b, interleaved, zb-h1, zb-2p, zb-v, or a file with a table of your own."),
]
CompileOption = Annotated[
    bool,
    typer.Option("--compile", help="Compile what the ranks run (torch's inductor; needs a C++ compiler): takes seconds to minutes once."),
]
RecomputeOption = Annotated[
    Literal["none", "selective", "full"] | None,
    typer.Option("--recompute", help="What the backward pass computes again, to save memory. Default: none where that fits."),
]
GlobalBatchOption = Annotated[int | None, typer.Option("--global-batch", min=1, help="Examples in a step, over all ranks.")]
SequenceOption = Annotated[int | None, typer.Option("--sequence", min=1, help="Tokens in an example, for hf: language models.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for programs instead of text for people.")]
RandomOption = Annotated[
    Literal["keyed", "fast"] | None,
    typer.Option("--random", help="keyed: one device's random numbers; fast: torch's own on each rank. Default: keyed."),
]
PrecisionOption = Annotated[
    Literal["float32", "bf16", "fp16"] | None,
    typer.Option("--precision", help="float32: the model's own dtypes; bf16, fp16: in 16 bits, updated in float32. Default: float32."),
]
SearchedPrecisionOption = Annotated[
    Literal["float32", "bf16", "fp16", "any"] | None,
    typer.Option(
        "--precision",
        help="float32: the model's own dtypes; bf16, fp16: in 16 bits, updated in float32; any: whichever is best. Default: float32; of "
        "layouts that are proposed the faster 16-bit format.",
    ),
]
PlannedClusterOption = Annotated[
    str | None,
    typer.Option("--cluster", help="local:N, N ranks on this machine, or a cluster file (.toml). Default: local:2, or the plan's."),
]
RunnableOption = Annotated[bool, typer.Option("--runnable", help="Only layouts that can be run today.")]
BudgetOption = Annotated[
    float | None,
    typer.Option("--budget", help="Seconds to search; the best found so far and how much may be left. Default: a fixed effort."),
]
ObjectiveOption = Annotated[
    str,
    typer.Option(
        "--objective", help="throughput on all devices; latency, cost of a step, on all or fewer; devices, the fewest nodes that do."
    ),
]
WithinOption = Annotated[float | None, typer.Option("--within", help="Seconds that a step may take, for --objective devices.")]
PriceOption = Annotated[float | None, typer.Option("--price", help="Dollars for a device and hour, instead of the catalog's list price.")]
PlanOption = Annotated[Path | None, typer.Option("--plan", help="Use this plan.json instead of searching for one.")]
SlowRankOption = Annotated[
    list[str] | None,
    typer.Option("--slow-rank", help="RANK=FACTOR or FIRST-LAST=FACTOR: computes so many times as long; may be repeated."),
]
SlowStageOption = Annotated[
    list[str] | None, typer.Option("--slow-stage", help="STAGE=FACTOR: all its ranks compute so many times as long; may be repeated.")
]
SlowLinkOption = Annotated[
    list[str] | None,
    typer.Option(
        "--slow-link",
        help="NAME=SHARE: keeps this share of its rate; a level of links (network, node), or 0-1 between two stages. May be repeated.",
    ),
]


class Precision(StrEnum):
    """The precision that `verify` compares in."""

    FLOAT64 = "float64"
    FLOAT32 = "float32"
