"""Why a layout was chosen for many devices: in words, from what the search found."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from shardwise.planner.proposal import Alternative, Parts, Proposal
from shardwise.planner.scale import Found, ScaleSearch, Searched
from shardwise.sharding.context import WORDS

__all__ = ["alternatives", "binds", "explain", "gb", "lost", "seconds"]

_COLUMNS = 96
_OTHERS = 4
_DIMS = ("tp", "pp", "dp", "cp", "attention", "ep", "zero", "recompute", "schedule", "chunks", "precision")
_WORDS = {
    "compute": "computing",
    "recompute": "recomputing",
    "exchange": "exchanging within passes",
    "reduce": "reducing gradients",
    "update": "updating",
    "waiting": "waiting",
}
_SMALL = 0.005  # of a step: a part that is not worth a word


def explain(plan: Proposal, best: Found, searched: Searched) -> list[str]:
    """The proposal in lines that fit a terminal."""
    lines = [
        f"{plan.model} on {plan.cluster}: {plan.ranks:,} devices, {plan.global_batch:,} samples a step, {plan.precision}",
        f"Layout   {plan.layout}",
        f"  {_mesh(plan)}",
        *_step(plan),
        _memory(plan),
        f"Binding  {plan.binds}",
        *_why(best, searched.found),
        *_next(plan),
        *_sure(plan),
        *_runs(plan),
        *(["If"] if plan.what_if else []),
        *(f"  {each.change}: {each.verdict}" for each in plan.what_if),
        *(["Figures from"] if plan.sources else []),
        *(f"  {source}" for source in plan.sources),
    ]
    return [part for line in lines for part in _wrapped(line)]


def alternatives(best: Found, found: Sequence[Found]) -> list[Alternative]:
    """The next best layouts, of which no two are of the same sizes and schedule."""
    seen = {_sizes(best)}
    others: list[Alternative] = []
    for each in found:
        if _sizes(each) in seen or best.parts is None or each.parts is None:
            continue
        seen.add(_sizes(each))
        mine, theirs = asdict(best.parts), asdict(each.parts)
        more = Parts(**{name: theirs[name] - mine[name] for name in mine})
        others.append(
            Alternative(
                layout=str(each),
                precision=each.scheme.precision,
                step_time_s=each.seconds,
                memory_bytes=each.memory_bytes,
                more=more,
                runnable=each.runs,
            )
        )
    return others[:_OTHERS]


def _sizes(each: Found) -> tuple[object, ...]:
    scheme = each.scheme
    return each.split, scheme.dp, scheme.pp, scheme.schedule, scheme.chunks


def binds(search: ScaleSearch, searched: Searched, peak_share: float) -> str:
    """What keeps the step from being faster."""
    best = searched.found[0]
    tight, parts = searched.tight, best.parts
    assert parts is not None
    if tight is not None and tight.estimate_s < best.seconds * 0.99:
        needed, limit = gb(tight.memory_bytes), gb(search.limit_bytes)
        return f"memory: {tight} would take about {seconds(tight.estimate_s)}, but {needed} of {limit} a device"
    shares = {
        "waiting for other pipeline ranks": parts.waiting,
        "communication within the passes (tp, cp, ep, ZeRO)": parts.exchange,
        "reducing gradients over the data ranks": parts.reduce,
        "recomputation": parts.recompute,
    }
    name = max(shares, key=shares.__getitem__)
    if shares[name] > 0.1 * best.seconds:
        return f"{name}, {shares[name] / best.seconds:.0%} of the step"
    return f"the devices' arithmetic: {parts.compute / best.seconds:.0%} of the step computes, at {peak_share:.0%} of the peak"


def lost(more: Parts, whole_s: float) -> str:
    """Where another layout takes longer, or less, than the chosen one."""
    words = [
        f"{'+' if value > 0 else '−'}{seconds(abs(value))} {_WORDS[name]}"
        for name, value in sorted(more.model_dump().items(), key=lambda each: -abs(each[1]))
        if abs(value) > _SMALL * whole_s
    ]
    return ", ".join(words[:3]) or "the same in all parts"


def gb(nbytes: float) -> str:
    """1e9 bytes."""
    return f"{nbytes / 1e9:.3g} GB" if nbytes < 9.995e11 else f"{nbytes / 1e9:,.0f} GB"


def seconds(value: float) -> str:
    """With three digits."""
    return f"{value:.3g} s" if value >= 1 else f"{value * 1e3:.3g} ms"


def _wrapped(line: str) -> list[str]:
    indent = " " * (9 if line[:1] != " " else 4)
    return textwrap.wrap(line, _COLUMNS, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False) or [""]


def _mesh(plan: Proposal) -> str:
    parts = [f"{plan.dp} copies of the model (dp)"] if plan.dp > 1 else []
    parts += [f"{plan.cp} ranks share each sequence (cp): {WORDS[plan.attention]}"] if plan.cp > 1 else []
    parts += [f"{plan.tp} ranks share each operator (tp)"] if plan.tp > 1 else []
    parts += [f"experts on {plan.ep} of the copies (ep)"] if plan.ep > 1 else []
    chunks = f" of {plan.chunks} stages each" if plan.chunks > 1 else ""
    parts += [f"{plan.pp} pipeline ranks{chunks} (pp)"] if plan.pp > 1 else []
    return " × ".join(parts) or "one device"


def _step(plan: Proposal) -> Iterator[str]:
    forecast = plan.predicted
    tokens = "" if forecast.tokens_per_s is None else f", {forecast.tokens_per_s:,.0f} tokens/s"
    dollars = "" if forecast.dollars is None else f", ${forecast.dollars:,.4g} a step"
    use = f", {forecast.peak_share:.0%} of the devices' peak"
    yield f"Step     {seconds(forecast.step_time_s)}: {forecast.samples_per_s:,.3g} samples/s{tokens}{use}{dollars}"
    parts = sorted(forecast.parts.model_dump().items(), key=lambda each: -each[1])
    yield "  " + ", ".join(f"{value / forecast.step_time_s:.1%} {_WORDS[name]}" for name, value in parts if value > 0)


def _memory(plan: Proposal) -> str:
    forecast = plan.predicted
    kinds = sorted(((name, value) for name, value in forecast.by_kind.items() if value), key=lambda each: -each[1])
    listed = ", ".join(f"{name} {value / 1e9:.3g}" for name, value in kinds)
    return f"Memory   {gb(forecast.memory_bytes)} of {gb(forecast.limit_bytes)} on the fullest device: {listed}"


def _why(best: Found, found: Sequence[Found]) -> Iterator[str]:
    """For each choice the best layout that makes another one; choices that meet the same layout together."""
    met: dict[int, list[str]] = {}
    for name in (*_DIMS, "microbatch"):
        unlike = next((place for place, each in enumerate(found) if _value(each, name) != _value(best, name)), None)
        if unlike is not None:
            met.setdefault(unlike, []).append(name)
    if met:
        yield "Why"
    for place, names in sorted(met.items()):
        other = found[place]
        assert best.parts is not None and other.parts is not None
        more = Parts(**{kind: value - getattr(best.parts, kind) for kind, value in asdict(other.parts).items()})
        mine, theirs = (" ".join(f"{name}={_value(each, name)}" for name in names) for each in (best, other))
        yield f"  {mine}: the best with {theirs} takes {other.seconds / best.seconds - 1:.1%} longer ({lost(more, best.seconds)})"


def _value(each: Found, name: str) -> object:
    return each.samples if name == "microbatch" else getattr(each.scheme, name)


def _next(plan: Proposal) -> Iterator[str]:
    if plan.others:
        yield "Next best"
    for each in plan.others:
        longer = each.step_time_s / plan.predicted.step_time_s - 1
        layout = each.layout if each.precision == plan.precision else f"{each.layout} in {each.precision}"
        yield f"  +{longer:.1%}  {layout}, {gb(each.memory_bytes)}: {lost(each.more, plan.predicted.step_time_s)}"


def _sure(plan: Proposal) -> Iterator[str]:
    search = plan.search
    looked = (
        f"{search.lowered} of {search.splits} splits examined, {search.composed:,} layouts put together, {search.simulated} simulated "
        f"in {search.seconds:.1f} s"
    )
    if search.gap == 0:
        yield f"Proven   no layout of the space takes less; {looked}"
    else:
        yield f"Gap      nothing left out takes less than {seconds(search.lower_bound_s)}: at most {search.gap:.1%} may be gained; {looked}"


def _runs(plan: Proposal) -> Iterator[str]:
    if not plan.runnable:
        yield f"Runs     not yet: the runtime lacks {', '.join(plan.because)}; --runnable finds the best layout without"
