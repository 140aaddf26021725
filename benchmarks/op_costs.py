"""Predicted against measured time of every ATen call in training steps of small models.

    python benchmarks/op_costs.py [--workload gpt2 llama vit unet] [--json PATH] [--check] [--refresh]

Two ranks of one thread are busy at once, as the prediction assumes. Each call of a step is timed where it stands, by the CPU time
of its thread, which other processes do not lengthen; medians over the steps. The table lists the operators that take most time.
`--check` fails when a workload's total is off by more than 15 %, or the operators that are off by more than 25 % take over a third of it.
The default is the three transformers; `unet`, a tenth of a second of convolutions of many kinds, is predicted less well.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from shardwise.cluster.model import Cluster
from shardwise.cost.compute import op_seconds
from shardwise.cost.optimizer import optimizer_seconds
from shardwise.runtime.launch import launch

RANKS, STEPS, WARM_UP = 2, 5, 3
TOTAL_BOUND, SINGLE_BOUND, PART_BOUND = 0.15, 0.25, 1 / 3
VOCABULARY, SEQUENCE = 8192, 256


@dataclass(frozen=True, kw_only=True)
class Line:
    """One operator on one set of shapes: calls a step, and seconds a step."""

    operator: str
    shapes: str
    calls: int
    measured_s: float
    predicted_s: float

    @property
    def ratio(self) -> float:
        """Predicted ÷ measured."""
        return self.predicted_s / max(self.measured_s, 1e-12)


# --- models ---------------------------------------------------------------------------------------------------------------


def heads(x: Tensor, count: int) -> Tensor:
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


class GPT2Block(nn.Module):
    def __init__(self, width: int, *, causal: bool = True, approximate: str = "tanh") -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.causal, self.approximate, self.width = causal, approximate, width

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (heads(part, self.width // 64) for part in self.qkv(self.norms[0](x)).chunk(3, -1))
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norms[1](x)), approximate=self.approximate))


class LlamaBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ParameterList([nn.Parameter(torch.ones(width)) for _ in range(2)])
        self.q, self.o = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.k, self.v = (nn.Linear(width, width // 2, bias=False) for _ in range(2))
        self.gate, self.up = (nn.Linear(width, 8 * width // 3, bias=False) for _ in range(2))
        self.down, self.width = nn.Linear(8 * width // 3, width, bias=False), width

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x, 0)
        query, key, value = (
            heads(projection(normed), self.width // 64 // part) for projection, part in ((self.q, 1), (self.k, 2), (self.v, 2))
        )
        query, key = self.rotated(query), self.rotated(key)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        x = x + self.o(attended.transpose(1, 2).flatten(2))
        normed = self.norm(x, 1)
        return x + self.down(F.silu(self.gate(normed)) * self.up(normed))

    def norm(self, x: Tensor, place: int) -> Tensor:
        return self.norms[place] * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5))

    def rotated(self, x: Tensor) -> Tensor:
        angles = torch.arange(x.shape[-2]).float()[:, None] * torch.ones(x.shape[-1])
        first, second = x.chunk(2, -1)
        return x * angles.cos() + torch.cat((-second, first), -1) * angles.sin()


class Language(nn.Module):
    def __init__(self, block: Callable[[int], nn.Module], *, layers: int = 2, width: int = 512, batch: int = 8) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.blocks, self.norm = nn.Sequential(*[block(width) for _ in range(layers)]), nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.tokens = torch.randint(0, VOCABULARY, (batch, SEQUENCE))

    def forward(self) -> Tensor:
        logits = self.head(self.norm(self.blocks(self.embedding(self.tokens))))
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), self.tokens[:, 1:].flatten())


class Vision(nn.Module):
    def __init__(self, *, layers: int = 3, width: int = 384, batch: int = 8) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 16, 16)
        self.position = nn.Parameter(torch.randn(1, 197, width))
        self.first = nn.Parameter(torch.randn(1, 1, width))
        self.blocks = nn.Sequential(*[GPT2Block(width, causal=False, approximate="none") for _ in range(layers)])
        self.head = nn.Linear(width, 1000)
        self.images, self.labels = torch.randn(batch, 3, 224, 224), torch.randint(0, 1000, (batch,))

    def forward(self) -> Tensor:
        tokens = self.patches(self.images).flatten(2).transpose(1, 2)
        x = torch.cat((self.first.expand(len(tokens), -1, -1), tokens), 1) + self.position
        return F.cross_entropy(self.head(self.blocks(x)[:, 0]), self.labels)


class UNet(nn.Module):
    def __init__(self, *, width: int = 32, batch: int = 8) -> None:
        super().__init__()
        self.down, self.mid, self.up = self.stage(3, width), self.stage(width, 2 * width), self.stage(2 * width, width)
        self.grow, self.head = nn.ConvTranspose2d(2 * width, width, 2, 2), nn.Conv2d(width, 4, 1)
        self.images, self.labels = torch.randn(batch, 3, 64, 64), torch.randint(0, 4, (batch, 64, 64))

    def stage(self, channels: int, width: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())

    def forward(self) -> Tensor:
        left = self.down(self.images)
        right = self.grow(self.mid(F.max_pool2d(left, 2)))
        return F.cross_entropy(self.head(self.up(torch.cat((left, right), 1))), self.labels)


WORKLOADS: dict[str, Callable[[], nn.Module]] = {
    "gpt2": lambda: Language(GPT2Block),
    "llama": lambda: Language(LlamaBlock),
    "vit": Vision,
    "unet": UNet,
}


# --- measuring ------------------------------------------------------------------------------------------------------------


class Recorder(TorchDispatchMode):
    """Times each ATen call of a step, by its place in the step, and predicts it. What views take is the cost of recording."""

    def __init__(self, cluster: Cluster) -> None:
        super().__init__()
        self.cluster, self.place = cluster, 0
        self.keys: list[tuple[str, str]] = []
        self.predicted: list[float] = []
        self.views: list[int] = []
        self.times: dict[int, list[float]] = defaultdict(list)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        start = time.thread_time()
        result = func(*args, **kwargs)
        self.times[self.place].append(time.thread_time() - start)
        if self.place == len(self.keys):
            self.keys.append((str(func).removeprefix("aten."), described(args)))
            self.views += [self.place] if func.is_view else []
            self.predicted.append(op_seconds(func, args, kwargs, result, self.cluster))
        self.place += 1
        return result


def described(args: Sequence[Any]) -> str:
    return " ".join("×".join(map(str, arg.shape)) for arg in args if isinstance(arg, Tensor))[:60]


def record(workload: str, cluster: Cluster) -> list[Line]:
    """Runs in each rank."""
    torch.manual_seed(0)
    model = WORKLOADS[workload]()
    recorder = Recorder(cluster)
    for step in range(WARM_UP + STEPS):
        model.zero_grad()
        with recorder:
            model().backward()
        recorder.place = 0
        if step + 1 == WARM_UP:
            recorder.times.clear()
    return summed(recorder) + optimizer_lines(model, cluster)


def summed(recorder: Recorder) -> list[Line]:
    places: dict[tuple[str, str], list[int]] = defaultdict(list)
    for place, key in enumerate(recorder.keys):
        places[key].append(place)
    recording_s = statistics.median(statistics.median(recorder.times[place]) for place in recorder.views)
    return [
        Line(
            operator=key[0],
            shapes=key[1],
            calls=len(of_key),
            measured_s=sum(max(0.0, statistics.median(recorder.times[place]) - recording_s) for place in of_key),
            predicted_s=sum(recorder.predicted[place] for place in of_key),
        )
        for key, of_key in places.items()
    ]


def optimizer_lines(model: nn.Module, cluster: Cluster) -> list[Line]:
    parameters, lines = list(model.parameters()), []
    for kind, make in {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}.items():
        optimizer, times = make(parameters, lr=1e-6), []
        for _ in range(WARM_UP + STEPS):
            start = time.thread_time()
            optimizer.step()
            times.append(time.thread_time() - start)
        predicted = sum(optimizer_seconds(parameter.numel(), parameter.dtype, kind, cluster) for parameter in parameters)
        measured = statistics.median(times[WARM_UP:])
        shapes = f"{sum(parameter.numel() for parameter in parameters):,} elements"
        lines.append(Line(operator=kind, shapes=shapes, calls=len(parameters), measured_s=measured, predicted_s=predicted))
    return lines


# --- reporting ------------------------------------------------------------------------------------------------------------


def report(workload: str, lines: list[Line]) -> dict[str, Any]:
    measured, predicted = sum(line.measured_s for line in lines), sum(line.predicted_s for line in lines)
    wrong = sum(line.measured_s for line in lines if abs(line.ratio - 1) > SINGLE_BOUND) / measured
    print(f"\n{workload}: predicted {predicted:.3f} s, measured {measured:.3f} s, ratio {predicted / measured:.3f}; ", end="")
    print(f"{wrong:.0%} of the time in operators that are off by over {SINGLE_BOUND:.0%}")
    print(f"{'operator':44} {'shapes':60} {'calls':>5} {'measured':>10} {'predicted':>10} {'ratio':>6}")
    for line in sorted(lines, key=lambda line: -line.measured_s)[:32]:
        times = f"{line.measured_s * 1e3:8.2f}ms {line.predicted_s * 1e3:8.2f}ms {line.ratio:6.2f}"
        print(f"{line.operator:44} {line.shapes:60} {line.calls:5} {times}")
    return {
        "workload": workload,
        "measured_s": measured,
        "predicted_s": predicted,
        "wrong": wrong,
        "lines": [asdict(line) for line in lines],
    }


def failures(found: dict[str, Any]) -> list[str]:
    error = abs(found["predicted_s"] / found["measured_s"] - 1)
    said = [f"{found['workload']}: total off by {error:.1%}, bound {TOTAL_BOUND:.0%}"] if error > TOTAL_BOUND else []
    if found["wrong"] > PART_BOUND:
        said.append(f"{found['workload']}: {found['wrong']:.0%} of the time badly predicted, bound {PART_BOUND:.0%}")
    return said


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--workload", nargs="+", choices=list(WORKLOADS), default=["gpt2", "llama", "vit"])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--refresh", action="store_true", help="measure the machine anew")
    options = parser.parse_args()
    cluster = Cluster.parse(f"local:{RANKS}", refresh=options.refresh)
    found = [report(name, launch(record, (name, cluster), ranks=RANKS, threads=1)[0]) for name in options.workload]
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
    wrong = [said for one in found for said in failures(one)] if options.check else []
    print(*wrong, sep="\n", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
