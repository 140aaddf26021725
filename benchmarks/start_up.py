"""Does any rank hold more than its share while a large model is set up?

    python benchmarks/start_up.py [--layout tp=4] [--layers 16] [--drawn] [--check] [--json start_up.json]

Writes the weights of a Llama of about 10⁹ parameters (float32) to safetensors files, tensor by tensor; starts 4 ranks, each of which reads
its part (--drawn: draws it instead, as one device would have drawn it), and trains two steps with SGD. No process builds the model, the one
that starts the ranks included, so nothing is hidden in memory that ranks share.

share: bytes of the rank's own parameters and of the buffers of their gradients. start-up: the peak until `parallelize` returned, above
what a rank with all code loaded holds; anonymous: that process's own memory when it was started, for it to be seen that no weights are
there. steady: the peak in the steps after.
Exit codes: 0; with --check also 1 where a rank's start-up takes more than its share + 10 %, or more than its steady peak.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from math import prod
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import shardwise as sw
from shardwise.cluster.described import DescribedLink, DescribedMachine, DescribedRates
from shardwise.cluster.model import Cluster
from shardwise.runtime.launch import launch
from shardwise.runtime.memory import PeakMemory
from shardwise.runtime.preload import preload

RANKS = 4
_MORE = 1.10
_FILE_BYTES = 1 << 30
_CHUNK = 1 << 22


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Bytes of one rank, and seconds until it was set up."""

    rank: int
    share_bytes: int
    start_up_bytes: int
    steady_bytes: int
    anonymous_bytes: int
    seconds: float

    @property
    def ok(self) -> bool:
        return self.start_up_bytes <= _MORE * self.share_bytes and self.start_up_bytes <= self.steady_bytes


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return the exit code."""
    options = _parse(arguments)
    console = Console()
    build = partial(model, options.layers)
    with torch.device("meta"):
        described = build()
    count = sum(parameter.numel() for parameter in described.parameters())
    with tempfile.TemporaryDirectory(dir=options.directory) as folder:
        weights = None if options.drawn else write_weights(described, Path(folder))
        plan = sw.plan(described, batch(), _cluster(), layout=options.layout, optimizer="sgd")
        if not isinstance(plan, sw.Plan):
            console.print(str(plan))
            return 2
        del described
        found = launch(_rank, (build, plan, weights, options.steps), ranks=RANKS, threads=1, timeout_s=600.0)
    _show(console, count, plan.layout, found)
    if options.json:
        rows = [asdict(each) for each in found]
        options.json.write_text(
            json.dumps({"parameters": count, "layout": plan.layout, "drawn": options.drawn, "ranks": rows}, indent=1) + "\n"
        )
    return 1 if options.check and not all(each.ok for each in found) else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Memory of each rank while a large model is set up.")
    parser.add_argument("--layout", default="tp=4", help="of the 4 ranks (default %(default)s)")
    parser.add_argument("--layers", type=int, default=16, help="16 are 10⁹ parameters (default)")
    parser.add_argument("--drawn", action="store_true", help="draw the weights instead of reading them")
    parser.add_argument("--steps", type=int, default=2, help="of training, after the start-up (default %(default)s)")
    parser.add_argument("--directory", type=Path, help="where the weights go meanwhile; default: the system's")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    parser.add_argument("--check", action="store_true", help="exit 1 where a rank takes more than its share + 10 %%")
    return parser.parse_args(arguments)


def model(layers: int) -> nn.Module:
    """16 layers: 1.04 · 10⁹ parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=True,
        use_cache=False,
    )
    return LlamaForCausalLM(config).train()


def batch() -> dict[str, Tensor]:
    """Two short samples for each rank: the weights are what matters here."""
    tokens = torch.randint(0, 32_000, (2 * RANKS, 16), generator=torch.Generator().manual_seed(0))
    return {"input_ids": tokens, "labels": tokens.clone()}


def _cluster() -> Cluster:
    """4 ranks with enough memory, at made-up speed: the layout is given."""
    machine = DescribedMachine(
        ranks=RANKS,
        memory_gb=64,
        backend="gloo",
        rates=DescribedRates(matmul_flops=5e10, memory_bytes_per_s=1e10),
        link=DescribedLink(latency_s=50e-6, bytes_per_s=1e9),
    )
    rates = machine.described_rates()
    return Cluster(name="start-up", ranks=RANKS, backend="gloo", cores=None, memory_bytes=machine.memory_bytes, rates=rates)


def write_weights(described: nn.Module, folder: Path) -> Path:
    """Random values for all parameters, in files of about 1 GiB and an index, with no more than a few MiB in memory."""
    groups: list[dict[str, nn.Parameter]] = [{}]
    for name, parameter in described.named_parameters():
        if sum(each.nbytes for each in groups[-1].values()) + parameter.nbytes > _FILE_BYTES and groups[-1]:
            groups.append({})
        groups[-1][name] = parameter
    where = {}
    for number, group in enumerate(groups):
        file = folder / f"model-{number}.safetensors"
        where |= dict.fromkeys(group, file.name)
        _write(group, file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": where}))
    return index


def _write(group: dict[str, nn.Parameter], path: Path) -> None:
    header, end = {}, 0
    for name, parameter in group.items():
        header[name] = {"dtype": "F32", "shape": list(parameter.shape), "data_offsets": [end, end + parameter.nbytes]}
        end += parameter.nbytes
    text = json.dumps(header).encode()
    generator = torch.Generator().manual_seed(0)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for parameter in group.values():
            for first in range(0, parameter.numel(), _CHUNK):
                size = min(_CHUNK, parameter.numel() - first)
                file.write((0.02 * torch.randn(size, generator=generator)).numpy().tobytes())


def _rank(build: partial[nn.Module], plan: sw.Plan, weights: Path | None, steps: int) -> Measured:
    preload()
    anonymous, memory, began = _anonymous_bytes(), PeakMemory(), time.perf_counter()
    torch.manual_seed(0)
    job = sw.parallelize(
        build,
        batch(),
        plan=plan,
        optimizer=lambda named: torch.optim.SGD([parameter for _, parameter in named], lr=1e-3),
        weights=weights,
    )
    start_up, seconds = memory.peak_bytes(), time.perf_counter() - began
    share = sum((prod(part.stored) + prod(part.gradient)) * part.dtype.itemsize for part in job.program.parameters)
    for _ in range(steps):
        job.step(batch())
    return Measured(
        rank=job.program.rank,
        share_bytes=share,
        start_up_bytes=start_up,
        steady_bytes=memory.peak_bytes(),
        anonymous_bytes=anonymous,
        seconds=seconds,
    )


def _anonymous_bytes() -> int:
    """Memory of this process that no file backs: what it has from the one that started it, too."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")) * 1024


def _show(console: Console, count: int, layout: str, found: Sequence[Measured]) -> None:
    table = Table(title=f"{count / 1e9:.2f} · 10⁹ parameters, {4 * count / 2**20:,.0f} MiB, on {RANKS} ranks, {layout}; MiB")
    for title in ("rank", "share", "start-up", "of the share", "steady", "anonymous before", "seconds"):
        table.add_column(title, justify="right")
    for each in found:
        sizes = [f"{nbytes / 2**20:,.0f}" for nbytes in (each.share_bytes, each.start_up_bytes)]
        rest = [f"{each.steady_bytes / 2**20:,.0f}", f"{each.anonymous_bytes / 2**20:,.0f}", f"{each.seconds:.1f}"]
        table.add_row(str(each.rank), *sizes, f"{each.start_up_bytes / each.share_bytes:.1%}", *rest)
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
