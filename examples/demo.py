"""`make demo`: a Llama of about 10 M parameters learns text, byte by byte, split over 4 ranks of this machine.

python examples/demo.py [--data PATH] [--steps N] [--out out/demo]
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

import shardwise as sw
from shardwise.data import ByteText, Corpus
from shardwise.data.text import VOCABULARY
from shardwise.report import Measured, save_traces, write_report
from shardwise.runtime.train import Settings, TrainingRun, train

RANKS = 4
SEQUENCE = 256
GLOBAL_BATCH = 16
LAYERS = 8
SEED = 0
TRAINING_S = 110.0  # how long training may take, by the predicted time of a step
LEAST_STEPS, MOST_STEPS = 20, 300
VERIFY_BATCH, VERIFY_SEQUENCE = 8, 32

console = Console(highlight=False, soft_wrap=True)


def build(layers: int = LAYERS) -> LlamaForCausalLM:
    """The model; ranks build the same one from the same seed."""
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=320,
        intermediate_size=864,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=SEQUENCE,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def main() -> int:
    arguments = parse()
    started = time.monotonic()
    try:
        run(arguments)
    except sw.ShardwiseError as error:
        Console(stderr=True).print(f"error: {error}", style="red", markup=False, highlight=False)
        return 2
    console.print(f"[dim]all of it took {time.monotonic() - started:.0f} s[/dim]")
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a small Llama over 4 local ranks.")
    parser.add_argument("--data", type=Path, help="a text file; by default Python's own standard library")
    parser.add_argument("--steps", type=int, help="optimizer steps; by default as many as take about two minutes")
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="where plan.json, report.html and trace.json go")
    arguments = parser.parse_args()
    if arguments.steps is not None and arguments.steps < 1:
        parser.error(f"--steps {arguments.steps}: at least 1 is needed")
    return arguments


def run(arguments: argparse.Namespace) -> None:
    text = ByteText.load(arguments.data, sequence=SEQUENCE)
    headline(f"1. A plan for {RANKS} ranks on this machine")
    plan = choose_plan(text)
    console.print(str(plan), markup=False)

    headline("2. The same numbers as one device?")
    verified = check_numbers(text, plan)
    console.print(verdict(verified), markup=False)

    steps = arguments.steps or affordable_steps(plan.predicted.step_time_s)
    headline(f"3. Training on {text.name} for {steps} steps")
    result = train(
        build,
        plan=plan,
        ranks=RANKS,
        read=functools.partial(read, arguments.data),
        settings=Settings(steps=steps, batch_size=GLOBAL_BATCH, seed=SEED, most_s=None if arguments.steps else TRAINING_S),
    )

    headline("4. What happened")
    for line in summary(plan, verified, result):
        console.print(line, markup=False)
    for path in write_files(plan, Measured.of(result, plan, same_numbers=verified.max_relative_error), arguments.out):
        console.print(f"  {path}", markup=False)


def headline(title: str) -> None:
    console.print(f"\n[bold]{title}[/bold]")


def read(path: Path | None) -> Corpus:
    """On each rank."""
    return ByteText.load(path, sequence=SEQUENCE).corpus


def choose_plan(text: ByteText) -> sw.Plan:
    with torch.device("meta"):
        model = build()
    plan = sw.plan(model, text.held_out_batch(size=GLOBAL_BATCH), cluster=f"local:{RANKS}")
    if isinstance(plan, sw.Infeasible):
        raise SystemExit(str(plan))
    return plan


def check_numbers(text: ByteText, plan: sw.Plan) -> Any:
    """The chosen layout in float64 on a smaller batch: the same model, so the same operators and the same splits."""
    batch = {name: value[:VERIFY_BATCH, :VERIFY_SEQUENCE] for name, value in text.held_out_batch(size=VERIFY_BATCH).items()}
    return sw.verify(build(), batch, cluster=f"local:{RANKS}", layout=plan.layout, dtype=torch.float64)


def verdict(verified: Any) -> str:
    if verified.ok:
        return f"same numbers as one device: yes, largest relative error {verified.max_relative_error:.1e} (float64, every gradient)"
    return f"same numbers as one device: NO, first difference in {verified.first_difference}"


def affordable_steps(step_time_s: float) -> int:
    return max(LEAST_STEPS, min(MOST_STEPS, int(TRAINING_S / step_time_s)))


def summary(plan: sw.Plan, verified: Any, result: TrainingRun) -> list[str]:
    return [
        f"loss on held-out text: {result.held_out_before:.3f} before, {result.held_out_after:.3f} after",
        verdict(verified),
        f"step time: predicted {plan.predicted.step_time_s:.2f} s, measured {result.step_time_s:.2f} s",
        *memory_lines(plan, result),
        "files:",
    ]


def memory_lines(plan: sw.Plan, result: TrainingRun) -> list[str]:
    pairs = zip(plan.predicted.memory_bytes, result.memory_bytes, strict=True)
    return [
        f"peak memory of rank {rank}: predicted {predicted / 1e6:.0f} MB, measured {measured / 1e6:.0f} MB"
        for rank, (predicted, measured) in enumerate(pairs)
    ]


def write_files(plan: sw.Plan, measured: Measured, out: Path) -> list[Path]:
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / "plan.json", out / "report.html", out / "trace.json", out / "losses.json"]
    simulation = sw.simulate(plan)
    plan.save(paths[0])
    write_report(paths[1], plan, simulation, measured)
    save_traces(paths[2], simulation, measured)
    paths[3].write_text(json.dumps(measured.losses))
    return paths


if __name__ == "__main__":
    sys.exit(main())
