"""Says why a plan is what it is, for people."""

from __future__ import annotations

import textwrap
from collections import Counter, defaultdict
from collections.abc import Callable

from shardwise.capture.blocks import block_pattern
from shardwise.capture.experts import expert_mm
from shardwise.capture.graph import Graph, Op, Value
from shardwise.cluster.model import Cluster
from shardwise.planner.apply import Applied
from shardwise.planner.estimate import reshards
from shardwise.planner.plan import Candidate, Plan
from shardwise.program.recompute import blocks_of
from shardwise.sharding.context import WORDS, share_attention
from shardwise.sharding.experts import BATCHED
from shardwise.sharding.reshard import collective_of
from shardwise.sharding.rules.attention import is_attention
from shardwise.sharding.rules.random import FAST
from shardwise.sharding.signature import Choice
from shardwise.sharding.types import Shard

__all__ = ["explain"]

_COLUMNS = 110


def explain(
    plan: Plan,
    applied: Applied,
    graph: Graph,
    cluster: Cluster,
    obstacle: str,
    seconds: float,
    op_seconds: Callable[[Op], float] | None = None,
) -> list[str]:
    """The plan in lines that fit a terminal. op_seconds: what an operator takes in a step, on the whole batch."""
    parameters = sum(value.numel for value in graph.parameters.values())
    lines = [
        f"{plan.model} on {plan.cluster}: {parameters / 1e6:.3g} M parameters, batch {plan.global_batch}, {len(graph.ops)} operators",
        f"Layout  {plan.layout}",
        *_precision(plan),
        *_random(plan, applied),
        f"  {_mesh(plan)}",
        *_devices(plan, cluster),
        *_divided(plan),
        *_recomputed(plan, graph),
        *_stages(plan, applied, graph),
        *_experts(plan, applied),
        *_context(plan, applied),
        *_tensor(plan, applied, graph),
        *_implementations(plan, cluster),
        "Predicted",
        _step(plan),
        *_disturbed(cluster),
        *_memory(plan, cluster),
        *_found_rules(applied),
        *_kept_whole(plan, applied, op_seconds),
        *_others(plan),
    ]
    if obstacle:
        lines.append(f"One microbatch only: {obstacle}")
    lines.append(f"Planned in {seconds:.1f} s; proven within {plan.gap:.1%} of the best split of the tensors for this layout")
    return [part for line in lines for part in _wrapped(line)]


def _wrapped(line: str) -> list[str]:
    indent = " " * (len(line) - len(line.lstrip()) + 2)
    return textwrap.wrap(line, _COLUMNS, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False) or [""]


def _precision(plan: Plan) -> list[str]:
    if plan.precision == "float32":
        return []
    scaled = "; gradients are scaled, and steps that overflow skipped" if plan.precision == "fp16" else ""
    return [f"Precision  {plan.precision}, updated and summed in float32{scaled}"]


def _random(plan: Plan, applied: Applied) -> list[str]:
    if plan.random == "keyed":
        return []
    drawn = sum(op.target in FAST for op in applied.assignment.signatures)
    what = (
        f"{drawn} operators draw other numbers than one device does" if drawn else "the model has no operator that this would make faster"
    )
    return [f"Random  fast, from torch's own generator on each rank: {what}"]


def _step(plan: Plan) -> str:
    predicted = plan.predicted
    return f"  step {_time(predicted.step_time_s)}, {_time(predicted.communication_s)} communicating, {predicted.bubble:.0%} waiting"


def _disturbed(cluster: Cluster) -> list[str]:
    if not cluster.rates.disturbed:
        return []
    slowed = f"{cluster.rates.contention:.1f} × slowed down by other processes"
    return [f"  from figures of this machine, {slowed}: times may be far off; planning takes them anew later"]


def _mesh(plan: Plan) -> str:
    parts = []
    if plan.dp > 1:
        each = f"in shares of {':'.join(map(str, plan.shares))}" if plan.shares else f"each on 1/{plan.dp} of the batch"
        parts.append(f"{plan.dp} copies, {each} (dp)")
    if plan.ep > 1:
        parts[-1] += f", of which {plan.ep} divide the experts (ep)"
    if plan.cp > 1:
        parts.append(f"{plan.cp} ranks share each sequence (cp)")
    if plan.tp > 1:
        parts.append(f"{plan.tp} ranks share each operator (tp)")
    if plan.pp > 1:
        stages = f"{plan.pp} stages" if plan.chunks == 1 else f"{plan.pp} times {plan.chunks} stages"
        parts.append(f"{stages} with {plan.microbatches} microbatches, {plan.schedule} (pp)")
    return " × ".join(parts) or "one rank does everything"


def _devices(plan: Plan, cluster: Cluster) -> list[str]:
    """Which of unlike devices do what."""
    lines, first = [], 0
    each = plan.dp * plan.cp * plan.tp
    for count, device in cluster.unlike:
        last = min(first + count, plan.ranks) - 1
        if last >= first:
            ranks = f"rank {first}" if first == last else f"ranks {first} to {last}"
            stages = sorted({first // each, last // each})
            what = [f"stage{'s' if len(stages) > 1 else ''} {' to '.join(map(str, stages))}"] if plan.pp > 1 else []
            copies = range(first // (plan.cp * plan.tp), last // (plan.cp * plan.tp) + 1)
            if plan.shares:
                samples = sum(plan.global_batch * plan.shares[copy % plan.dp] // sum(plan.shares) for copy in set(copies))
                what += [f"{samples} of {plan.global_batch} samples"] if plan.pp == 1 else []
            lines.append(f"  {device.name}: {ranks}" + (f", {', '.join(what)}" if what else ""))
        first += count
    return ["Devices", *lines] if lines else []


def _divided(plan: Plan) -> list[str]:
    """What the data ranks divide, and what that costs in messages."""
    if not plan.zero:
        return []
    data = plan.dp * plan.cp
    kinds = ("optimizer states", "gradients", "parameters")[: plan.zero]
    ranks = f"{plan.shard} of the {data} data ranks each, in {data // plan.shard} groups" if plan.shard else f"{data} data ranks"
    how = {
        1: "gradients are reduced to parts once a step, updated parameters gathered",
        2: "gradients are reduced to parts in every microbatch, updated parameters gathered once a step",
        3: "parameters are gathered before use, forward and backward, and gradients reduced to parts, in every microbatch",
    }
    return [f"  {' and '.join([', '.join(kinds[:-1]), kinds[-1]] if len(kinds) > 1 else kinds)} divided over {ranks}: {how[plan.zero]}"]


def _recomputed(plan: Plan, graph: Graph) -> list[str]:
    """What the backward pass computes again."""
    if plan.recompute == "none":
        return []
    blocks = f"{len(set(blocks_of(graph).values()))} blocks"
    if plan.recompute_blocks:
        blocks = f"the first {plan.recompute_blocks} of {blocks if len(plan.stages) == 1 else f'each stage, of {blocks} in all,'}"
    kept = "what it is given" + (" and what its products with weights make" if plan.recompute == "selective" else "")
    return [f"  each of {blocks} keeps {kept}; the backward pass computes the rest again"]


def _stages(plan: Plan, applied: Applied, graph: Graph) -> list[str]:
    if plan.pp == 1 and plan.chunks == 1:
        return []
    lines = ["Stages"]
    for stage, home in enumerate(plan.placement):
        mine = [op for op in graph.ops if applied.cut.stage_of.get(op) == stage]
        held = {value for op in mine for value in op.inputs if value.kind == "parameter"}
        size = sum(value.numel for value in held) / 1e6
        place = f", on rank {home} of the pipeline" if plan.chunks > 1 else ""
        lines.append(f"  {stage}: {mine[0].module or 'model'} … {mine[-1].module or 'model'}, {size:.3g} M parameters{place}")
    return lines


def _tensor(plan: Plan, applied: Applied, graph: Graph) -> list[str]:
    """What the tensor axis splits, one line for all equal blocks."""
    if plan.tp == 1:
        return []
    assignment = applied.assignment
    split = [value for value in graph.parameters.values() if isinstance(assignment.sources[value]["tp"], Shard)]
    share = sum(value.numel for value in split) / max(1, sum(value.numel for value in graph.parameters.values()))
    kinds: dict[str, str] = {}
    for name, value in graph.parameters.items():
        kinds.setdefault(block_pattern(name), repr(assignment.sources[value]["tp"]))
    shown = [f"  {pattern:<52} {kind}" for pattern, kind in kinds.items() if kind.startswith("S")]
    return [
        f"Tensors split over {plan.tp} ranks: {share:.0%} of the parameters",
        *shown[:24],
        f"  each microbatch's forward pass communicates {_talk(applied, 'tp')} over tp",
    ]


def _talk(applied: Applied, axis: str) -> str:
    """The collectives of a forward pass along an axis."""
    moves = Counter(
        collective_of(made, wanted)
        for value, made, wanted, readers in reshards(applied.assignment, axis)
        if collective_of(made, wanted) and value.kind == "result" and value.producer not in applied.cut.prelude
    )
    return ", ".join(f"{count} {kind}s" for kind, count in moves.items()) or "nothing"


def _experts(plan: Plan, applied: Applied) -> list[str]:
    """What the expert axis divides, and how tokens get to their experts."""
    if plan.ep == 1:
        return []
    assignment = applied.assignment
    parameters = assignment.graph.parameters.values()
    split = [value for value in parameters if isinstance(assignment.produced(value)["ep"], Shard)]
    share = sum(value.numel for value in split) / max(1, sum(value.numel for value in parameters))
    chosen = {op: assignment.variants[op]["ep"].choice for op in applied.cut.stage_of}
    experts = sorted({value.shape[assignment.produced(value)["ep"].dim] for value in split})  # type: ignore[union-attr]
    routed = sum(op.target is expert_mm and choice.mode == "route" for op, choice in chosen.items())
    batched = sum(op.target in BATCHED and any(_source(value) in split for value in op.inputs) for op in chosen)
    ways = [f"{routed} products with rows at their experts, as many as there are"] * (routed > 0)
    ways += [f"{batched} batched over experts"] * (batched > 0)
    return [
        f"Experts ({' and '.join(map(str, experts))}) divided over {plan.ep} ranks: {share:.0%} of the parameters; {', '.join(ways)}",
        f"  each microbatch's forward pass communicates {_talk(applied, 'ep')} over ep",
    ]


def _source(value: Value) -> Value:
    """What a value is another view of."""
    while value.producer is not None and len(value.producer.inputs) == 1:
        value = value.producer.inputs[0]
    return value


def _implementations(plan: Plan, cluster: Cluster) -> list[str]:
    """Which implementation of each collective was measured to be fastest, for the groups that the layout has."""
    if cluster.machines is not None or plan.ranks == 1:
        return []
    lines = []
    for name, table in plan.collectives.items():
        kind, ranks = name.split("/")
        firsts = [0.0, *(limit for limit, _ in table)]
        parts = [f"{impl}{f' above {_size(first)}' if first else ''}" for first, (_, impl) in zip(firsts, table, strict=False)]
        lines.append(f"  {kind} of {ranks} ranks: {', '.join(parts)}")
    return ["Messages, the implementation that was fastest here", *lines]


def _context(plan: Plan, applied: Applied) -> list[str]:
    """What the context axis splits, and what it does not."""
    if plan.cp == 1:
        return []
    dims = ", ".join(f"dim {dim} of {name}" for name, dim in plan.sequence_dims.items())
    body = [op for op in applied.cut.stage_of if op.requires_grad]
    whole = Counter(op.name for op in body if applied.assignment.variants[op]["cp"].choice.mode in ("I", "R"))
    lines = [
        f"Sequences split over {plan.cp} ranks: {dims}; {len(body) - whole.total()} of {len(body)} operators work on their part alone",
        f"  each microbatch's forward pass communicates {_talk(applied, 'cp')} over cp",
    ]
    lines += _attention(plan, applied)
    most = ", ".join(f"{name} {count} ×" for name, count in whole.most_common(6))
    return lines + ([f"  done by every rank of cp: {most}"] if whole else [])


def _attention(plan: Plan, applied: Applied) -> list[str]:
    """How the ranks of the context axis do it together, and where they cannot as the plan says."""
    variants = applied.assignment.variants
    along = {op: Choice("split", "q") for op in applied.cut.stage_of if is_attention(op) and variants[op]["cp"].choice.mode == "split"}
    samples = {op: variants[op]["dp"].choice for op in along}
    shared = share_attention(plan.attention, applied.assignment.signatures, along, samples, cp=plan.cp, tp=plan.tp)
    gathered = len(along) - len(shared.choices)
    lines = [f"  attention ({plan.attention}): {WORDS[plan.attention]}, {len(shared.choices)} ×"] if shared.choices else []
    reasons = "; ".join(dict.fromkeys(shared.refused.values()))
    return lines + ([f"  attention: {WORDS['gather']}, {gathered} ×{': ' if reasons else ''}{reasons}"] if gathered else [])


def _found_rules(applied: Applied) -> list[str]:
    """Operators whose rule was found by running them, or declared: by what they are split."""
    ways = {"discovered": "found by execution", "declared": "declared"}
    found: Counter[tuple[str, str]] = Counter()
    for op, sig in applied.assignment.signatures.items():
        if sig.source in ways:
            splits = f"splits {', '.join(sig.splits)}" if sig.splits else "works on sums alone"
            found[op.name, f"{ways[sig.source]}: {sig}, {splits}"] += 1
    lines = [f"  {name}, {count} ×, {how}" for (name, how), count in found.items()]
    return ["Operators without a rule of shardwise's", *lines] if lines else []


def _kept_whole(plan: Plan, applied: Applied, op_seconds: Callable[[Op], float] | None) -> list[str]:
    """Operators that every rank computes whole for want of a rule, and what it costs."""
    ranks = plan.dp * plan.cp * plan.tp
    found: dict[tuple[str, str, str], list[Op]] = defaultdict(list)
    for op, sig in applied.assignment.signatures.items():
        if sig.source == "whole" and op not in applied.cut.prelude:
            found[op.name, block_pattern(op.module), sig.reasons.get("*", "")].append(op)
    if not found or ranks == 1:
        return []
    lines = []
    for (name, module, reason), ops in found.items():
        saved = sum(map(op_seconds, ops)) * (1 - 1 / ranks) if op_seconds else 0.0
        cost = f"; split over {ranks} ranks a step would take {_time(saved)} less" if op_seconds else ""
        lines.append(f"  {name} in {module or 'the model'}, {len(ops)} ×: {reason}{cost}")
    return ["Kept whole on every rank, for want of a rule (shardwise.declare_rule adds one)", *lines]


def _memory(plan: Plan, cluster: Cluster) -> list[str]:
    peak = max(range(len(plan.predicted.memory_bytes)), key=plan.predicted.memory_bytes.__getitem__)
    kinds = ", ".join(f"{name} {_bytes(size)}" for name, size in plan.predicted.by_kind[peak].items() if size)
    have = _bytes(cluster.seen_by([peak]).memory_bytes)
    return [f"  memory at most {_bytes(plan.predicted.memory_bytes[peak])} of {have}, on rank {peak}: {kinds}"]


def _others(plan: Plan) -> list[str]:
    others = [each for each in plan.considered if each.layout != plan.layout]
    if not others:
        return []
    lines = [f"Why not (of {len(plan.considered)} layouts considered)"]
    return lines + [f"  {each.layout:<52} {_loses(each, plan)}" for each in others[:6]]


def _loses(other: Candidate, plan: Plan) -> str:
    if other.note:
        return other.note
    if other.step_time_s is not None:
        slower = other.step_time_s / plan.predicted.step_time_s - 1
        why = f"{slower:+.0%}" if slower > 0 else f"but takes {_bytes(other.memory_bytes or 0)}"  # as fast, and this one is leaner
        return f"simulated {_time(other.step_time_s)}, {why}"
    return f"estimated {_time(other.estimate_s or 0.0)}"


def _time(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def _size(count: float) -> str:
    """Of a message."""
    for unit, size in (("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"


def _bytes(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
