"""Predicts what real clusters measured, and prints how wrong the predictions are.

    python benchmarks/published.py --tables DIR [--out preds.json] [--check]

Every row of the files in DIR (their form: docs/concepts/predictions.md) is predicted with its own layout: a shallow twin of its model is
captured on the meta device, its operators are split as the row says, each piece is lowered and costed on the row's devices, and the step is
simulated. Nothing is measured, and no formula is peculiar to these tables.

For each file: the median absolute percentage error of step time and of memory, how many rows could be expressed, how many of those that ran
out of memory are said to fit, and, where rows differ in layout alone, rank correlation (Kendall's tau-b of all pairs, however near), how
many of the pairs are ranked right whose measurements are more than 3 % apart, and regret (how much slower the layout is that would have
been chosen than the best).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table as Shown

from benchmarks.published_experts import expert_ranks, expert_rates, local_experts, routing_of
from benchmarks.published_frameworks import Holding, holding_of, printed_bytes
from benchmarks.published_machines import machines_of
from benchmarks.published_models import TwinError, twin
from benchmarks.published_rows import Row, Table, read_directory, schedule_of, sweeps
from benchmarks.published_software import Software, software_of, unfitted
from benchmarks.published_stats import kendall_tau, median_absolute_percentage_error, ranked_pairs, regret
from shardwise.capture.export import capture
from shardwise.cluster.model import Cluster, cluster_of
from shardwise.errors import ShardwiseError
from shardwise.planner.compose import Scheme, compose, recomputed
from shardwise.planner.estimator import FULL_MEMORY
from shardwise.planner.pieces import Outline, PieceCost
from shardwise.planner.twins import Twin, TwinLayout
from shardwise.program.tables import splits_backward
from shardwise.program.trace import Tracer
from shardwise.simulate.simulator import simulate_profile

_ROOM = 1.1  # of a device's memory, by which a prediction may exceed it before another recomputation is supposed
_FULL_TOKENS = 8192  # of a microbatch, with which products reach most of their rate
_LAYERS = 4  # of a model of which one layer was timed
_YEAR = 2023  # of a source that names none
_BROKE = "our own error"  # a reason that --check does not let pass
_SEQUENCE_PARALLEL_SINCE = 2023  # and split the sequence beside tensors, where nothing is said
_PRODUCTS = {"fp8": "fp8", "fp4": "fp8", "fp16": "float16", "tf32": "tf32", "fp32": "float32"}
_BOUND, _FILE_BOUND, _EXPRESSED = 0.08, 0.15, 0.90
_MEMORY_BOUND = 0.08
_NOISE = 0.03  # of a step's time: versions of software alone move it by 0.3 to 10 %, and many sources print one step


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """step_s: the prediction; low_s, high_s: over what the row leaves open. memory_bytes: what the row's figure counts; fits: whether a
    plan may take the whole. least_bytes: what it may have run with, predictions not being exact; room_bytes: of a device. reason: why
    there is none."""

    row: Row
    step_s: float | None = None
    low_s: float | None = None
    high_s: float | None = None
    memory_bytes: float | None = None
    fits: bool = True
    least_bytes: float = 0.0
    room_bytes: float = math.inf
    reason: str = ""

    @property
    def runs(self) -> bool:
        """Whether it may have run so."""
        return self.least_bytes <= self.room_bytes

    @property
    def error(self) -> float | None:
        """(predicted − measured) ÷ measured."""
        timed = self.step_s is not None and self.row.step_s and not self.row.out_of_memory
        return self.step_s / self.row.step_s - 1 if timed and self.step_s and self.row.step_s else None


class Predictor:
    """Keeps what rows have in common: twins by model, costs by split.

    fitted: whether constants are used that were read off published steps, or those of data sheets and the literature alone. beside: another
    predictor, for which pieces are costed when they are lowered for this one.
    """

    def __init__(self, *, fitted: bool = True, beside: Predictor | None = None) -> None:
        self.fitted, self.beside = fitted, beside
        self.twins: dict[Any, Twin] = beside.twins if beside else {}
        self.costs: dict[Any, tuple[Outline, tuple[PieceCost, ...]]] = beside.costs if beside else {}
        self.tracer = Tracer(device=torch.device("cpu"))

    def predict(self, row: Row, year: int, words: str = "", last_year: int | None = None) -> Prediction:
        """The row's step. What cannot be expressed says why. year, words: of the source, which say what its software could do; last_year:
        the last that it names, for software of experts, which moves fast."""
        if not row.usable and (row.reason or not (row.out_of_memory or row.memory_bytes)):
            return Prediction(row=row, reason=row.reason or "nothing to compare with")
        software = self._software(row, year, words)
        try:
            found = [self._step(row, year, last_year or year, software, recompute) for recompute in _recomputations(row, software)]
        except (TwinError, ShardwiseError) as error:
            return Prediction(row=row, reason=str(error).splitlines()[0])
        times = [each.step_s for each in found if each.step_s is not None]
        return replace(_chosen(found), low_s=min(times), high_s=max(times))

    def _software(self, row: Row, year: int, words: str) -> Software:
        found = software_of(row, year, words)
        return found if self.fitted else unfitted(found)

    def _step(self, row: Row, year: int, last_year: int, software: Software, recompute: str) -> Prediction:
        cluster = _cluster(row, last_year, software, self.fitted)
        shape, costs = self._pieces(row, year, last_year, software, cluster)
        if row.kind == "layer time":
            return Prediction(row=row, step_s=_block_seconds(shape, costs, recompute))
        scheme = _scheme(row, last_year, software, recompute, holding_of(row, year))
        profile = compose(shape, costs, scheme, cluster, splits_backward=splits_backward(scheme.schedule))
        step = simulate_profile(profile, scheme.mesh)
        step_s = step.period_s if software.validates_later and splits_backward(scheme.schedule) else step.step_time_s
        fullest = max(step.memory, key=lambda memory: sum(memory.values()))
        if row.layout.recompute is None:  # as little as software could have held
            profile = compose(shape, costs, replace(scheme, remade="all"), cluster, splits_backward=splits_backward(scheme.schedule))
            least = max(simulate_profile(profile, scheme.mesh).memory_bytes)
        else:
            least = sum(fullest.values())
        return Prediction(
            row=row,
            step_s=step_s,
            memory_bytes=printed_bytes(row, fullest),
            fits=sum(fullest.values()) <= FULL_MEMORY * cluster.memory_bytes,
            least_bytes=least,
            room_bytes=_ROOM * cluster.memory_bytes,
        )

    def _pieces(self, row: Row, year: int, last_year: int, software: Software, cluster: Cluster) -> tuple[Outline, tuple[PieceCost, ...]]:
        layout, fused = row.layout, software.fused_attention
        model = replace(row.model, layers=_LAYERS) if row.kind == "layer time" else row.model
        ranks, local = expert_ranks(row), local_experts(row)
        key = (model, _micro_batch(row), fused, local)
        if key not in self.twins:
            made = twin(model, micro_batch=_micro_batch(row), fused_attention=fused, local_experts=local)
            self.twins[key] = Twin(graph=capture(made.module.train(), made.batch), counts=made.counts, tracer=self.tracer)
        sequence = layout.sequence_parallel if layout.sequence_parallel is not None else year >= _SEQUENCE_PARALLEL_SINCE
        split = TwinLayout(tp=layout.tp, cp=layout.cp, sequence_parallel=bool(sequence) or ranks > 1, whole_experts=ranks > 1)
        near = cluster.machines.span(1, layout.tp * layout.cp) if cluster.machines else None
        clusters = [cluster]
        if self.beside:
            clusters.append(_cluster(row, last_year, unfitted(software), self.beside.fitted))
        keys = [(key, split, near, each.rates.model_dump_json()) for each in clusters]
        if keys[0] not in self.costs:
            shape, costs = self.twins[key].split_on(split, clusters)
            self.costs |= {each: (shape, found) for each, found in zip(keys, costs, strict=True)}
        return self.costs[keys[0]]


def _chosen(found: Sequence[Prediction]) -> Prediction:
    """The first that may have run, or else what comes nearest to it. Where it is not the first, it recomputes no more blocks than must be:
    the time lies between its own and that of the one before, which could not run, as the memory does."""
    nearest = min(range(len(found)), key=lambda index: found[index].least_bytes)
    place = next((index for index, each in enumerate(found) if each.runs), nearest)
    less, more = found[max(0, place - 1)], found[place]
    if place == 0 or not more.runs or less.least_bytes <= more.least_bytes or None in (less.step_s, more.step_s):
        return more
    assert less.step_s and more.step_s
    share = (less.least_bytes - more.room_bytes) / (less.least_bytes - more.least_bytes)
    memory = None if more.memory_bytes is None else more.memory_bytes + more.room_bytes - more.least_bytes
    return replace(more, step_s=less.step_s + share * (more.step_s - less.step_s), memory_bytes=memory, least_bytes=more.room_bytes)


def _cluster(row: Row, year: int, software: Software, fitted: bool) -> Cluster:
    """The row's machines as its software uses them."""
    cluster = cluster_of(machines_of(row.machine), software.attention, fitted)
    changes = {
        "fuses": cluster.rates.fuses and not software.eager,
        "copies_inner": software.copies_inner,
        "call_s": software.call_s or cluster.rates.call_s,
    }
    cluster = replace(cluster, rates=cluster.rates.model_copy(update=changes | expert_rates(row, year)))
    peaks = cluster.machines.devices[0].peak_flops if cluster.machines else {}
    usual = "float16" if "bfloat16" not in peaks and "float16" in peaks else None  # of devices that know no other 16 bits
    if products := _PRODUCTS.get(row.layout.precision or "", usual):
        cluster = _with_products_in(cluster, products)
    return cluster if software.products == 1 else _slower(cluster, software.products)


def _slower(cluster: Cluster, share: float) -> Cluster:
    """Products at a share of their rate; attention has its own kernels."""
    rates = cluster.rates
    matmul = {
        name: each.model_copy(update={"cubes_flops": each.cubes_flops.times(share), "batched_flops": each.batched_flops.times(share)})
        for name, each in rates.matmul.items()
    }
    return replace(cluster, rates=rates.model_copy(update={"matmul": matmul}))


def _recomputations(row: Row, software: Software) -> Sequence[str]:
    given = row.layout.recompute
    if given is None:
        return (software.recompute, "full")
    return (software.selective if given == "selective" else given,)


def _scheme(row: Row, year: int, software: Software, recompute: str, own: Holding) -> Scheme:
    layout = row.layout
    schedule, chunks = schedule_of(layout)
    return Scheme(
        dp=layout.dp,
        tp=layout.tp,
        pp=layout.pp,
        cp=layout.cp,
        ep=expert_ranks(row),
        routing=routing_of(row, year),
        chunks=chunks,
        microbatches=_microbatches(row),
        schedule=schedule,
        zero=3 if layout.zero == "hybrid" else software.zero if layout.zero is None else int(layout.zero),
        shard=(layout.shard_devices or 0) * (layout.cp if own.over_context else 1),
        recompute=recompute,
        precision="float32" if layout.precision in ("fp32", "tf32") else "bf16",
        remade=own.remade,
        gradient_bytes=own.gradient_bytes,
        copied=own.copied,
        step_bytes=own.step_bytes,
        bucket_bytes=own.bucket_bytes,
        keeps_sent=own.keeps_sent,
        even=True,
        overlap=software.overlap,
        hidden=software.hidden,
        gather_each=software.gather_each,
        part_s=software.part_s,
        waits=software.waits,
        whole_messages=software.whole_messages,
        peer_bytes_per_s=software.peer_bytes_per_s,
    )


def _micro_batch(row: Row) -> int:
    """Samples of a microbatch. Where nothing is said of it: one through a pipeline, else as many as fill the products."""
    layout, length = row.layout, row.model.seq_len or 1
    if layout.micro_batch:
        return layout.micro_batch
    return 1 if layout.pp > 1 else max(1, min((layout.global_batch or layout.dp) // layout.dp, _FULL_TOKENS // length))


def _microbatches(row: Row) -> int:
    layout = row.layout
    return layout.microbatches or max(1, (layout.global_batch or layout.dp) // (layout.dp * _micro_batch(row)))


def _block_seconds(shape: Outline, costs: Sequence[PieceCost], recompute: str) -> float:
    """Of one block, forward and backward."""
    _, block = max(zip(shape.pieces, costs, strict=True), key=lambda each: each[0].count)
    works = [block.forward, recomputed(block, recompute), block.backward_input, block.backward_weight]
    return sum(work.compute_s + work.communicate_s for work in works)


def _with_products_in(cluster: Cluster, dtype: str) -> Cluster:
    """Products with weights in another dtype than the twin's; attention stays in 16 bits."""
    rates = cluster.rates
    matmul = {**rates.matmul, "bfloat16": rates.matmul_of(dtype)}
    sixteen = max(rates.matmul_of(each).cubes_flops.values[-1] for each in ("bfloat16", "float16"))
    slower = min(1.0, sixteen / matmul["bfloat16"].cubes_flops.values[-1])
    attention = {name: each.times(slower) for name, each in rates.attention_flops.items()}
    return replace(cluster, rates=rates.model_copy(update={"matmul": matmul, "attention_flops": attention}))


# -- how wrong -----------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class FileResult:
    """Of one file. error: median absolute percentage error of step time; memory: of memory; zero_shot: of step time with nothing fitted to
    published steps, where that was asked for; overfull: how many of the `out_of_memory` rows
    that ran out of memory are said to fit; tau, regret: over its sweeps; right: so many of the `apart` pairs in them whose measurements
    differ by more than noise are ranked right."""

    file: str
    rows: int
    expressed: int
    error: float | None
    bias: float | None
    memory: float | None
    zero_shot: float | None
    overfull: int
    out_of_memory: int
    tau: float | None
    right: int
    apart: int
    regret: float | None
    reasons: dict[str, int]


def summarise(file: str, predictions: Sequence[Prediction], unfitted_too: Sequence[Prediction] = ()) -> FileResult:
    """The figures of a file. unfitted_too: what is predicted with nothing fitted."""
    timed = [each for each in predictions if each.error is not None]
    sized = [(each.memory_bytes, each.row.memory_bytes) for each in predictions if each.memory_bytes and each.row.memory_bytes]
    burst = [each for each in predictions if each.row.out_of_memory and each.memory_bytes]
    by_row = {each.row.id: each for each in timed}
    ranked = [[by_row[row.id] for row in sweep.rows if row.id in by_row] for sweep in sweeps([each.row for each in timed])]
    ranked = [sweep for sweep in ranked if len(sweep) > 1]
    steps = [([p.step_s or 0 for p in sweep], [p.row.step_s or 0 for p in sweep]) for sweep in ranked]
    taus = [tau for sweep in steps if (tau := kendall_tau(*sweep)) is not None]
    pairs, regrets = [ranked_pairs(*sweep, _NOISE) for sweep in steps], [regret(*sweep) for sweep in steps]
    errors = sorted(each.error for each in timed if each.error is not None)
    return FileResult(
        file=file,
        rows=len(predictions),
        expressed=len([each for each in predictions if each.step_s is not None]),
        error=_median_error(predictions),
        bias=errors[len(errors) // 2] if errors else None,
        memory=median_absolute_percentage_error(*zip(*sized, strict=True)) if sized else None,
        zero_shot=_median_error(unfitted_too),
        overfull=sum(each.fits for each in burst),
        out_of_memory=len(burst),
        tau=sum(taus) / len(taus) if taus else None,
        right=sum(right for right, _ in pairs),
        apart=sum(apart for _, apart in pairs),
        regret=sum(regrets) / len(regrets) if regrets else None,
        reasons=dict(Counter(each.reason for each in predictions if each.reason)),
    )


def _median_error(predictions: Sequence[Prediction]) -> float | None:
    pairs = [(each.step_s, each.row.step_s) for each in predictions if each.error is not None and each.step_s and each.row.step_s]
    return median_absolute_percentage_error(*zip(*pairs, strict=True)) if pairs else None


def _predicted(job: tuple[Path, str, bool]) -> tuple[FileResult, list[Prediction]]:
    folder, name, zero_shot = job
    table = next(table for table in read_directory(folder) if table.path.name == name)
    unfitted_too = Predictor(fitted=False)
    fitted = Predictor(beside=unfitted_too if zero_shot else None)
    predictions = [_tried(fitted, row, table) for row in table.rows]
    others = [_tried(unfitted_too, row, table) for row in table.rows if zero_shot and row.usable]
    return summarise(table.path.stem, predictions, others), predictions


def _tried(predictor: Predictor, row: Row, table: Table) -> Prediction:
    """The prediction; where a row breaks it, that is the reason, and the others go on."""
    try:
        return predictor.predict(row, table.year or _YEAR, table.words, table.last_year)
    except Exception as error:
        return Prediction(row=row, reason=f"{_BROKE}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else row.id}")


def _show(results: Sequence[FileResult]) -> None:
    shown = Shown("file", *(("rows", "expressed", "step time", "bias", "zero-shot", "memory", "overfull", "tau", "pairs", "regret")))
    for each in results:
        figures = (each.error, each.bias, each.zero_shot, each.memory)
        overfull = f"{each.overfull} of {each.out_of_memory}" if each.out_of_memory else ""
        counts, pairs = (str(each.rows), str(each.expressed)), f"{each.right} of {each.apart}" if each.apart else ""
        shown.add_row(each.file, *counts, *map(_percent, figures), overfull, _number(each.tau), pairs, _percent(each.regret))
    Console(width=140).print(shown)
    for each in results:
        for reason, count in each.reasons.items():
            print(f"  {each.file}: {count} not expressed: {reason}")


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def main() -> int:
    """Prints the tables; 1 where --check finds a bound broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", type=Path, required=True, help="folder of measurements")
    parser.add_argument("--out", type=Path, help="write every prediction as JSON")
    parser.add_argument("--only", default="", help="files whose name holds this")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--zero-shot", action="store_true", help="also predict with nothing fitted to published steps")
    parser.add_argument("--check", action="store_true", help="exit with 1 where a bound is broken")
    given = parser.parse_args()
    names = [table.path.name for table in read_directory(given.tables) if given.only in table.path.name]
    with ProcessPoolExecutor(given.jobs, mp_context=get_context("spawn")) as pool:
        jobs = pool.map(_predicted, [(given.tables, name, given.zero_shot) for name in names])
        found = list(track(jobs, total=len(names), description="predicting", console=Console(stderr=True)))
    results = [result for result, _ in found]
    _show(results)
    errors = [each.error for each in results if each.error is not None]
    rows, expressed = sum(each.rows for each in results), sum(each.expressed for each in results)
    mean = sum(errors) / len(errors) if errors else float("nan")
    print(
        f"mean over files of the median error: {_percent(mean)}; worst file {_percent(max(errors, default=None))}; "
        f"{expressed} of {rows} rows expressed ({100 * expressed / max(rows, 1):.0f} %)"
    )
    if blind := [each.zero_shot for each in results if each.zero_shot is not None]:
        print(f"with nothing fitted: {_percent(sum(blind) / len(blind))}; worst file {_percent(max(blind))}")
    if given.out:
        given.out.write_text(json.dumps([_document(each) for _, predictions in found for each in predictions], indent=1))
    sized = [each.memory for each in results if each.memory is not None]
    overfull = sum(each.overfull for each in results)
    print(f"worst file of the median error of memory: {_percent(max(sized, default=None))}; said to fit and did not: {overfull}")
    broken = not errors or mean > _BOUND or max(errors) > _FILE_BOUND or expressed < _EXPRESSED * rows
    broken = broken or overfull > 0 or any(each > _MEMORY_BOUND for each in sized)
    broken = broken or any(reason.startswith(_BROKE) for each in results for reason in each.reasons)
    return int(given.check and broken)


def _document(each: Prediction) -> dict[str, Any]:
    figures = ("step_s", "low_s", "high_s", "memory_bytes", "fits", "reason", "error")
    measured = {"step_s": each.row.step_s, "memory_bytes": each.row.memory_bytes, "out_of_memory": each.row.out_of_memory}
    return {"file": each.row.file, "id": each.row.id, "measured": measured} | {name: getattr(each, name) for name in figures}


if __name__ == "__main__":
    sys.exit(main())
