"""The command line: parses, calls the Python interface, prints. Exit codes: 0 done, 1 verification failed, 2 wrong input, 3 infeasible."""

from __future__ import annotations

import functools
import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

from shardwise.commands.options import (
    DEFAULT_CLUSTER,
    BudgetOption,
    ClusterOption,
    CompileOption,
    GlobalBatchOption,
    JsonOption,
    LayoutOption,
    ModelOption,
    ObjectiveOption,
    PlannedClusterOption,
    PlanOption,
    Precision,
    PrecisionOption,
    PriceOption,
    RandomOption,
    RecomputeOption,
    RunnableOption,
    ScheduleOption,
    SearchedPrecisionOption,
    SequenceOption,
    SlowLinkOption,
    SlowRankOption,
    SlowStageOption,
    WithinOption,
)
from shardwise.commands.shared import DIFFERS, feasible, pinned_layout, reported, required, show
from shardwise.commands.train import train
from shardwise.errors import PlanError, ShardwiseError

if TYPE_CHECKING:
    from shardwise import Plan
    from shardwise.asked import Asked
    from shardwise.outlook import Outlook
    from shardwise.planner.proposal import Proposal
    from shardwise.simulate.simulator import Simulation
    from shardwise.simulate.slow import Slow

__all__ = ["app", "main"]

app = typer.Typer(
    help="Runs an ordinary single-device PyTorch model split over many devices, with the same numbers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def main() -> None:
    """The console script `shardwise`."""
    try:
        app()
    finally:
        gc.freeze()  # all that is left goes with the process: looking through it for cycles takes longer than a second after planning


@app.command()
@reported
def plan(
    model: ModelOption = None,
    cluster: ClusterOption = DEFAULT_CLUSTER,
    layout: LayoutOption = None,
    schedule: ScheduleOption = None,
    global_batch: GlobalBatchOption = None,
    sequence: SequenceOption = None,
    random: RandomOption = None,
    precision: SearchedPrecisionOption = None,
    recompute: RecomputeOption = None,
    out: Annotated[Path, typer.Option("--out", help="Where the plan goes.")] = Path("plan.json"),
    runnable: RunnableOption = False,
    budget: BudgetOption = None,
    objective: ObjectiveOption = "throughput",
    within: WithinOption = None,
    price: PriceOption = None,
    what_if: Annotated[
        list[str] | None,
        typer.Option("--what-if", help="nodes=129, nodes=+1, network=2x, device=h200, global-batch=3072, or usual; may be repeated."),
    ] = None,
    whole: Annotated[
        bool, typer.Option("--whole", help="Lower every layer and say how each operator is split, as training needs it.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Choose how to split a model over a cluster, explain the choice and write it to plan.json.

    A known model on devices of the catalog is planned from a few of its layers: the file proposes a layout among all kinds of parallelism,
    and marks what cannot run yet. Any other plan, or one with --whole, says how every operator is split; train and verify take it.

    [bold]Examples[/bold]

    shardwise plan --model hf:config.json --cluster local:4

    shardwise plan --model train.py:model_and_batch --cluster local:4 --layout tp=2,pp=2 --out tp2pp2.json

    shardwise plan --model gpt3-175b --cluster a100-80g:128x8 --out plan.json

    shardwise plan --model llama3-70b --cluster h100:32x8 --layout tp=8,zero=1 --budget 30

    shardwise plan --model llama3-70b --cluster h100:32x8 --what-if nodes=33 --what-if network=2x,device=h200

    shardwise plan --model llama3-70b --cluster h100:32x8 --objective devices --within 20
    """
    pinned = pinned_layout(layout, schedule=schedule, recompute=recompute)
    wished: Any = {"runnable": runnable, "budget": budget, "objective": objective, "within": within, "price": price}
    chosen: Plan | Proposal
    unlike = False
    if _proposes(model, cluster, whole=whole, chosen=random):
        found = _outlook(required(model), cluster, pinned, global_batch, sequence, precision=precision, **wished)
        from shardwise.whatif import usual_changes, with_what_ifs

        changes = [each for text in what_if or [] for each in (usual_changes(found.cluster) if text == "usual" else [text])]
        chosen, unlike = with_what_ifs(found, changes), bool(found.cluster.unlike)
    else:
        _without_effect(what_if=what_if or None, **wished)
        chosen = _plan(model, cluster, pinned, global_batch, sequence, random, precision)
    _save(chosen, out)
    if as_json:
        typer.echo(out.read_text())
    else:
        typer.echo(f"{chosen}\n\nplan: {out}")
        if unlike:
            typer.echo("the devices are not alike, their parts here are: `shardwise layouts` compares unequal ones, --whole plans them")


app.command()(reported(train))


@app.command()
@reported
def verify(
    model: ModelOption = None,
    cluster: ClusterOption = DEFAULT_CLUSTER,
    layout: LayoutOption = None,
    schedule: ScheduleOption = None,
    global_batch: GlobalBatchOption = None,
    sequence: SequenceOption = None,
    recompute: RecomputeOption = None,
    precision: PrecisionOption = None,
    dtype: Annotated[
        Literal["float64", "float32", "bfloat16", "float16"],
        typer.Option("--dtype", help="float64 is the proof, float32 the practice; bfloat16, float16: that of --precision."),
    ] = "float64",
    compile: CompileOption = False,
    as_json: JsonOption = False,
) -> None:
    """Run one step split and one step whole, and compare the loss, every gradient and the optimizer's step. Exits with 1 if they differ.

    [bold]Examples[/bold]

    shardwise verify --model hf:config.json --cluster local:4 --layout tp=2,pp=2

    shardwise verify --model train.py:model_and_batch --dtype float32 --json
    """
    import torch

    import shardwise as sw
    from shardwise.models import load_model

    module, batch = load_model(required(model), batch_size=global_batch, sequence=sequence)
    pinned = pinned_layout(layout, schedule=schedule, recompute=recompute)
    report = feasible(
        sw.verify(module, batch, cluster=cluster, layout=pinned, dtype=getattr(torch, dtype), precision=precision, compile=compile)
    )
    if as_json:
        names = ("ok", "max_relative_error", "first_difference", "layout")
        typer.echo(json.dumps({name: _plain(getattr(report, name)) for name in names}, indent=2))
    else:
        typer.echo(report)
    if not report.ok:
        raise typer.Exit(DIFFERS)


@app.command()
@reported
def coverage(
    model: ModelOption = None,
    all_layouts: Annotated[bool, typer.Option("--all-layouts", help="Also 3 ranks, 4 on each axis alone, and more mixes.")] = False,
    layout: Annotated[list[str] | None, typer.Option("--layout", help="Only this layout, such as tp=2,pp=2; may be repeated.")] = None,
    global_batch: GlobalBatchOption = None,
    sequence: SequenceOption = None,
    dtype: Annotated[Precision, typer.Option("--dtype", help="float64 is the proof, float32 the practice.")] = Precision.FLOAT64,
    processes: Annotated[bool, typer.Option("--processes", help="Ranks are processes that talk over gloo, not threads: slower.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Verify a model in many layouts and show which work, what no rank shares, and why others do not. Exits with 1 if one differs.

    parameters, flops: the largest share of the repeated blocks that one rank holds and computes, where only tp splits the model.

    [bold]Examples[/bold]

    shardwise coverage --model train.py:model_and_batch

    shardwise coverage --model hf:config.json --all-layouts --json
    """
    import torch

    from shardwise.models import load_model
    from shardwise.verify.coverage import ALL_LAYOUTS, LAYOUTS
    from shardwise.verify.coverage import coverage as cover

    module, batch = load_model(required(model), batch_size=global_batch, sequence=sequence)
    layouts = layout or (ALL_LAYOUTS if all_layouts else LAYOUTS)
    with Console(stderr=True).status("") as status:
        found = cover(
            module,
            batch,
            layouts=layouts,
            dtype=getattr(torch, dtype.value),
            processes=processes,
            progress=lambda text: status.update(f"{text} …"),
        )
    typer.echo(json.dumps(found.as_dict(), indent=2) if as_json else found)
    if not found.ok:
        raise typer.Exit(DIFFERS)


@app.command()
@reported
def simulate(
    model: ModelOption = None,
    plan_file: PlanOption = None,
    cluster: PlannedClusterOption = None,
    layout: LayoutOption = None,
    schedule: ScheduleOption = None,
    global_batch: GlobalBatchOption = None,
    sequence: SequenceOption = None,
    slow_rank: SlowRankOption = None,
    slow_stage: SlowStageOption = None,
    slow_link: SlowLinkOption = None,
    mtbf: Annotated[str | None, typer.Option("--mtbf", help="Mean time between failures of one device: 50000h.")] = None,
    job_mtbf: Annotated[str | None, typer.Option("--job-mtbf", help="The same of the whole job: 3h.")] = None,
    checkpoint: Annotated[str | None, typer.Option("--checkpoint", help="How long training stands still for a checkpoint: 30s.")] = None,
    checkpoint_every: Annotated[
        str | None, typer.Option("--checkpoint-every", help="Training between checkpoints: 15min. Default: what wastes least.")
    ] = None,
    restart: Annotated[str | None, typer.Option("--restart", help="From a failure to training on: 10min. Default: 0.")] = None,
    out: Annotated[Path, typer.Option("--out", help="Where the timeline goes; open it in Perfetto or chrome://tracing.")] = Path(
        "trace.json"
    ),
    as_json: JsonOption = False,
) -> None:
    """Predict a step's time and each rank's memory, without running it; also with something slow, and what failures leave of the time.

    [bold]Examples[/bold]

    shardwise simulate --plan plan.json --out trace.json

    shardwise simulate --model hf:config.json --cluster cluster.toml --layout tp=8

    shardwise simulate --plan plan.json --slow-rank 3=1.3 --slow-link 0-1=0.5

    shardwise simulate --plan plan.json --mtbf 50000h --checkpoint 30s --restart 10min --json

    shardwise simulate --model llama3-70b --cluster h100:32x8 --slow-rank 3=1.3 --slow-link network=0.5
    """
    from shardwise.scenario import Scenario
    from shardwise.simulate.slow import Slow

    times = {"mtbf": mtbf, "job-mtbf": job_mtbf, "checkpoint": checkpoint, "checkpoint-every": checkpoint_every, "restart": restart}
    scenario = Scenario.parse(ranks=slow_rank or (), stages=slow_stage or (), links=slow_link or (), times=times)
    simulated = _simulated(plan_file, model, cluster, pinned_layout(layout, schedule=schedule), global_batch, sequence)
    step = simulated(scenario.slow)
    outcome = scenario.outcome(step, simulated(Slow()) if scenario.slow else step)
    out.parent.mkdir(parents=True, exist_ok=True)
    step.save_trace(out)
    show((outcome.as_json() if as_json else outcome.lines()) | {"trace": str(out)}, as_json)


@app.command()
@reported
def layouts(
    model: Annotated[str, typer.Option("--model", help="A known model, such as gpt3-175b; `python -m shardwise.presets` lists them.")],
    cluster: Annotated[str, typer.Option("--cluster", help='Devices of the catalog, such as h100:128x8; "shardwise cluster" lists them.')],
    global_batch: GlobalBatchOption = None,
    sequence: SequenceOption = None,
    layout: LayoutOption = None,
    precision: SearchedPrecisionOption = None,
    runnable: RunnableOption = False,
    budget: BudgetOption = None,
    objective: ObjectiveOption = "throughput",
    within: WithinOption = None,
    price: PriceOption = None,
    report: Annotated[Path | None, typer.Option("--report", help="Also write a page about them (HTML).")] = None,
    as_json: JsonOption = False,
) -> None:
    """Rank the layouts of a known model on devices that you need not have: time of a step, memory, use of the devices.

    [bold]Examples[/bold]

    shardwise layouts --model gpt3-175b --cluster a100-80g:128x8

    shardwise layouts --model llama3-70b --cluster h100:32x8 --global-batch 512 --runnable

    shardwise layouts --model gpt3-175b --cluster a100-80g:128x8 --report layouts.html
    """
    wished: Any = {"runnable": runnable, "budget": budget, "objective": objective, "within": within, "price": price}
    found = _outlook(model, cluster, layout, global_batch, sequence, precision=precision, unlike=True, **wished)
    if report is not None:
        from shardwise.report.outlook import prospect_of
        from shardwise.report.prospect import write_prospect

        report.parent.mkdir(parents=True, exist_ok=True)
        write_prospect(report, prospect_of(found))
    if as_json:
        typer.echo(json.dumps(found.as_json(), indent=2))
    else:
        precisions = " or ".join(found.search.space.precisions)
        typer.echo(f"{found.study.preset.name} on {found.cluster.name}: {found.search.global_batch} samples a step, {precisions}")
        Console().print(found.table())
        if found.places():
            typer.echo(f"\nThe first, by device:\n{found.places()}")
        else:
            typer.echo(f"nothing left out takes less than {found.searched.lower_s:.3g} s: {found.searched.gap:.1%} may be gained")


@app.command()
@reported
def report(
    plan_file: Annotated[Path, typer.Argument(help="A plan file.", metavar="PLAN")],
    out: Annotated[Path, typer.Option("--out", help="Where the page goes.")] = Path("report.html"),
) -> None:
    """Write a page about a plan, one HTML file: the plan or the cluster drawn, timeline, memory, the layouts considered, the reasons.

    [bold]Examples[/bold]

    shardwise report plan.json --out report.html
    """
    from shardwise.report.files import report_file

    out.parent.mkdir(parents=True, exist_ok=True)
    with Console(stderr=True).status(f"drawing {plan_file} …"):
        report_file(plan_file, out)
    typer.echo(f"report: {out}")


@app.command()
@reported
def compare(
    first: Annotated[Path, typer.Argument(help="A plan file.")],
    second: Annotated[Path, typer.Argument(help="Another one.")],
    as_json: JsonOption = False,
) -> None:
    """Show two plans side by side: what differs, which is faster and where it gains its time.

    [bold]Examples[/bold]

    shardwise compare plan1.json plan2.json

    shardwise compare plan1.json plan2.json --json
    """
    from shardwise.whatif import compare as compared

    found = compared(first, second)
    if as_json:
        typer.echo(json.dumps(found.as_json(), indent=2))
    else:
        Console().print(found.table())
        typer.echo(f"\n{found.verdict}")


@app.command()
@reported
def cluster(
    machines: Annotated[
        str | None,
        typer.Argument(help='h100:2048x8, "1x8 a100-80g + 2x4 rtx4090, 25 GbE" or a .toml file; without it, all names.'),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show a cluster's devices, links, totals and the source of each figure, or list all that can be named.

    [bold]Examples[/bold]

    shardwise cluster h100:2048x8

    shardwise cluster "1x8 a100-80g + 2x4 rtx4090, 25 GbE" --json
    """
    from shardwise.cluster import show, specs

    found = None if machines is None else specs.machines(machines)
    if as_json:
        typer.echo(json.dumps(show.catalog_json() if found is None else show.as_json(found), indent=2))
    else:
        Console().print(show.listing() if found is None else show.show(found))


@app.command()
@reported
def doctor(
    as_json: JsonOption = False,
    measure: Annotated[bool, typer.Option(help="Also measure how fast this machine computes and communicates (once; then cached).")] = True,
) -> None:
    """Show versions, devices, backends and what this machine measured, and say what is wrong. Exits with 1 if something is.

    [bold]Examples[/bold]

    shardwise doctor

    shardwise doctor --no-measure --json
    """
    from shardwise.doctor import examine, table

    findings = examine(measure=measure)
    if as_json:
        typer.echo(json.dumps([finding.model_dump() for finding in findings], indent=2))
    else:
        Console().print(table(findings))
    if any(finding.problem for finding in findings):
        raise typer.Exit(DIFFERS)


@app.command()
@reported
def rules(
    operator: Annotated[
        str | None, typer.Argument(help="aten.linear.default, linear, mylib::op, or how names begin; all where none is given.")
    ] = None,
    shapes: Annotated[
        str | None, typer.Option("--shapes", help='Of its tensors: "4,5,6 9,6 9"; "20,8 4,5:int" where one holds whole numbers.')
    ] = None,
    args: Annotated[str, typer.Option("--args", help='Its other arguments, as in a call: "[8], eps=1e-6".')] = "",
    as_json: JsonOption = False,
) -> None:
    """List the operators that can be split, or show how one of them is: its factors, and what each rank holds of its tensors.

    [bold]Examples[/bold]

    shardwise rules

    shardwise rules aten.linear.default

    shardwise rules layer_norm --shapes "4,5,8 8 8" --args "[8]" --json
    """
    from shardwise.rule_report import known_rules, listing, show_rule, targets_named

    if operator is None:
        known = known_rules()
        typer.echo(json.dumps([each.model_dump() for each in known], indent=2) if as_json else listing(known))
        return
    shown = [show_rule(target, shapes, args) for target in targets_named(operator)]
    if as_json:
        typer.echo(json.dumps([each.model_dump() for each in shown], indent=2))
    else:
        typer.echo("\n\n".join(map(str, shown)))


# ---- shared ------------------------------------------------------------------------------------------------------------------------


def _plan(
    model: str | None,
    cluster: str,
    layout: str | None,
    global_batch: int | None,
    sequence: int | None,
    random: Literal["keyed", "fast"] | None = None,
    precision: Literal["float32", "bf16", "fp16", "any"] | None = None,
) -> Plan:
    import shardwise as sw
    from shardwise.models import load_model

    if precision == "any":
        raise ShardwiseError("--precision any is for a known model (gpt3-175b) on devices of the catalog, without --whole; name one")
    module, batch = load_model(required(model), batch_size=global_batch, sequence=sequence, device="meta")
    return feasible(
        sw.plan(
            module,
            batch,
            cluster=cluster,
            layout=layout,
            global_batch=global_batch,
            random=random or "keyed",
            precision=precision or "float32",
        )
    )


def _simulated(
    plan_file: Path | None, model: str | None, cluster: str | None, layout: str | None, global_batch: int | None, sequence: int | None
) -> Callable[[Slow], Simulation]:
    """What is slow → a step of the plan file, or of the plan for the model."""
    import shardwise as sw
    from shardwise.asked import Asked
    from shardwise.outlook import Study
    from shardwise.planner.proposal import Proposal
    from shardwise.scenario import layout_of, simulate_layout
    from shardwise.whatif import load_plan

    if plan_file is None:
        machines = cluster or DEFAULT_CLUSTER
        if not _proposes(model, machines, whole=False, chosen=None):
            return functools.partial(sw.simulate, _plan(model, machines, layout, global_batch, sequence))
        found = _outlook(required(model), machines, layout, global_batch, sequence)
    else:
        asked = Asked(cluster=cluster, layout=layout, global_batch=global_batch)
        read = load_plan(plan_file)
        if not isinstance(read, Proposal):
            return functools.partial(sw.simulate, _planned(plan_file, model, asked, sequence))
        if any(value is not None for value in (model, cluster, layout, global_batch, sequence)):
            raise PlanError(f"these options have no effect beside --plan {plan_file}, which holds what is simulated: leave them out")
        found = layout_of(Study.of(read.model, read.sequence), read)
    return functools.partial(simulate_layout, found.search, found.found[0])


def _proposes(model: str | None, cluster: str, *, whole: bool, chosen: str | None) -> bool:
    """Whether the plan is one for a known model on devices of the catalog, made from a few of its layers."""
    if whole or chosen or model is None or cluster.startswith("local:"):
        return False
    from shardwise.outlook import covers

    return covers(model, cluster)


def _outlook(
    model: str,
    cluster: str,
    layout: str | None,
    global_batch: int | None,
    sequence: int | None,
    *,
    precision: str | None = None,
    runnable: bool = False,
    budget: float | None = None,
    objective: str = "throughput",
    within: float | None = None,
    price: float | None = None,
    unlike: bool = False,
) -> Outlook:
    from shardwise.cluster.model import Cluster
    from shardwise.outlook import Study, Wish
    from shardwise.planner.space import Pins

    wish = Wish(
        global_batch=global_batch,
        pins=Pins.parse(layout),
        precision=precision,  # type: ignore[arg-type]
        runnable=runnable,
        budget_s=budget,
        objective=objective,  # type: ignore[arg-type]
        within_s=within,
        price_per_hour=price,
    )
    machine = Cluster.parse(cluster)
    with Console(stderr=True).status(f"costing layouts of {model} on {cluster} …"):
        study = Study.of(model, sequence, wish.pins.microbatch)
        return feasible(study.outlook(machine, wish, unlike=unlike))


def _without_effect(**given: Any) -> None:
    """Refuses options of searches among known models, where another plan is made."""
    usual = {"runnable": False, "objective": "throughput"}
    for name, value in given.items():
        if value is not None and value != usual.get(name):
            option = "--" + name.replace("_", "-")
            raise ShardwiseError(
                f"{option} has no effect here: it is for a known model (gpt3-175b) on devices of the catalog, without --whole"
            )


def _planned(path: Path, model: str | None, asked: Asked, sequence: int | None) -> Plan:
    """The plan of a file, which no option contradicts."""
    import shardwise as sw

    given = [name for name, value in (("--model", model), ("--sequence", sequence)) if value is not None]
    if given:
        raise PlanError(f"{given[0]} has no effect beside --plan {path}, which holds what is simulated: leave one of the two out")
    plan = sw.Plan.load(path)
    asked.check(plan, path)
    return plan


def _save(chosen: Plan | Proposal, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    chosen.save(path)


def _plain(value: Any) -> Any:
    """Something that JSON can hold."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    return str(value)
