"""What was found for a known model on devices of the catalog, as the page wants it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from shardwise.errors import LayoutError
from shardwise.outlook import Outlook
from shardwise.planner.compose import Scheme
from shardwise.planner.scale import Found
from shardwise.report.layouts import Point
from shardwise.report.placement import Sizes
from shardwise.report.prospect import Choice, Prospect
from shardwise.report.units import seconds_text
from shardwise.scenario import simulate_layout
from shardwise.simulate.failures import Failures, goodput
from shardwise.simulate.slow import Slow

__all__ = ["prospect_of"]

_MTBF_H, _CHECKPOINT_S, _RESTART_S = 50_000, 30.0, 600.0
"""Of a device: 419 unexpected interruptions of 16,384 in 54 days (Dubey et al. 2024, "The Llama 3 herd of models", section 3.3.4)."""

_SLOW = 1.3


def prospect_of(outlook: Outlook, chosen: Found | None = None, explanation: Sequence[str] = ()) -> Prospect:
    """The page about one of its layouts, the best where none is named. explanation: of that one, where it is not the best."""
    if chosen is None and not outlook.found:
        raise LayoutError(f"only unequal parts fit {outlook.cluster.name}, which is not drawn; leave the report out")
    search, chosen = outlook.search, chosen or outlook.found[0]
    machines = search.cluster.machines
    if machines is None:
        raise LayoutError(
            f"{search.cluster.name} is not of the catalog; a report of thousands of devices draws those of `shardwise cluster`"
        )
    scheme = chosen.scheme
    simulation = simulate_layout(search, chosen)
    others = [each for each in outlook.found if each != chosen]
    return Prospect(
        model=outlook.study.preset.name,
        machines=machines,
        words=[*_words(scheme, chosen.samples), f"global batch {search.global_batch:,}", scheme.precision],
        sizes=Sizes(dp=scheme.dp, cp=scheme.cp, tp=scheme.tp, pp=scheme.pp, ep=scheme.ep, chunks=scheme.chunks),
        mesh=scheme.mesh,
        profile=search.composed(scheme, chosen.samples),
        simulation=simulation,
        global_batch=search.global_batch,
        limit_bytes=search.limit_bytes,
        use=outlook.use(chosen),
        choices=[_choice(outlook, each) for each in (chosen, *others)],
        points=_points(outlook, chosen),
        tokens=outlook.study.sequence,
        dollars=outlook.dollars(chosen),
        what_if=_what_ifs(outlook, chosen),
        explanation=explanation or (outlook.proposal().explanation if chosen == outlook.found[0] else []),
    )


def _words(scheme: Scheme, samples: int) -> list[str]:
    sizes = [f"{name} {getattr(scheme, name)}" for name in ("dp", "cp", "tp", "ep", "pp") if getattr(scheme, name) > 1]
    words = [*sizes, f"{scheme.microbatches} microbatches of {samples}"]
    words += [scheme.schedule] if scheme.pp > 1 else []
    words += [f"{scheme.chunks} stages a rank"] if scheme.chunks > 1 else []
    words += [f"zero {scheme.zero}"] if scheme.zero else []
    return [*words, f"recompute {scheme.recompute}"]


def _choice(outlook: Outlook, each: Found) -> Choice:
    return Choice(
        layout=str(each),
        seconds=each.seconds,
        memory_bytes=each.memory_bytes,
        use=outlook.use(each),
        bubble=each.bubble,
        runs=each.runs,
    )


def _points(outlook: Outlook, chosen: Found) -> list[Point]:
    """Every layout that was put together; of one that was not simulated the time is an estimate and the memory a lower bound."""
    points = [
        _point(outlook, each)
        for each in outlook.searched.considered.values()
        if (each.scheme, each.samples) != (chosen.scheme, chosen.samples)
    ]
    return [*points, replace(_point(outlook, chosen), kind="chosen")]


def _point(outlook: Outlook, each: Found) -> Point:
    kind = "simulated" if each.step_time_s is not None else "estimated"
    if each.memory_bytes > outlook.search.limit_bytes:
        kind = "does not fit"
    lacks = f"cannot run yet: {', '.join(each.lacks)}" if each.lacks else ""
    return Point(layout=str(each), seconds=each.seconds, memory_bytes=each.memory_bytes, kind=kind, note=lacks)


def _what_ifs(outlook: Outlook, chosen: Found) -> list[tuple[str, str]]:
    """A slow device, a slow network, failures."""
    machines, healthy_s = outlook.search.cluster.machines, chosen.seconds
    changes = [(f"one device computes {_SLOW} times as long", Slow(ranks={0: _SLOW}))]
    if machines is not None and machines.nodes > 1:
        changes.append(("the network between nodes keeps half of its rate", Slow(levels={"network": 0.5})))
    found = []
    for change, slow in changes:
        step_s = simulate_layout(outlook.search, chosen, slow).step_time_s
        found.append((change, f"{seconds_text(step_s)} a step, {step_s / healthy_s - 1:.1%} longer"))
    failures = Failures.of_devices(_MTBF_H * 3600.0, outlook.cluster.ranks, checkpoint_s=_CHECKPOINT_S, restart_s=_RESTART_S)
    left = goodput(failures, healthy_s)
    change = f"a device fails every {_MTBF_H:,} h, a checkpoint takes {_CHECKPOINT_S:.0f} s and a restart {_RESTART_S / 60:.0f} min"
    verdict = f"the job fails every {failures.mtbf_s / 3600:,.3g} h; with a checkpoint every {left.interval_s / 60:,.3g} min, "
    return [*found, (change, f"{verdict}{left.useful:.1%} of the time is useful")]
