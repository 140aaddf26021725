"""How long planning takes, from process start, and how that grows.

    python benchmarks/planning.py [--check] [--json planning.json] [--growth]

Plans GPT-3 175B on 1,024 A100 and Llama 3 405B on 16,384 H100, each in a process of its own, capture and imports included; its peak memory;
how long simulating one such step takes. --growth: how capturing and searching grow with layers, devices and operators, in seconds of a
core (other processes' share of the machine does not count), one after another in one process.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console
from rich.table import Table

_CASES = (("gpt3-175b", "a100-80g:128x8", 10.0), ("llama3-405b", "h100:2048x8", 20.0))  # model, cluster, seconds allowed
_MEMORY_BYTES, _STEP_S = 2 * 2**30, 1.0
_GROWN_S = 20.0  # of a core, capture and search of each case of --growth
_GROWTH = {
    "layers": tuple((model, "a100-80g:128x8") for model in ("gpt3-1.3b", "gpt3-13b", "gpt3-175b", "megatron-1t")),
    "devices": tuple(("llama3-70b", f"h100:{nodes}x8") for nodes in (8, 64, 512, 2048)),
    "operators": tuple((model, "h100:64x8") for model in ("gpt3-13b", "bert-large", "llama3-70b", "mixtral-8x7b")),
}


@dataclass(frozen=True, kw_only=True)
class Planned:
    """seconds: from process start to the plan; memory_bytes: the process' peak; simulate_s: of one step of the plan found."""

    model: str
    cluster: str
    seconds: float
    allowed_s: float
    memory_bytes: int
    simulate_s: float
    layout: str
    step_time_s: float
    gap: float

    @property
    def ok(self) -> bool:
        return self.seconds <= self.allowed_s and self.memory_bytes <= _MEMORY_BYTES and self.simulate_s <= _STEP_S


@dataclass(frozen=True, kw_only=True)
class Grown:
    """Of one model on one cluster: what is looked at as it grows, sizes, and seconds of a core for capturing and for searching."""

    by: str
    model: str
    cluster: str
    layers: int
    devices: int
    operators: int
    capture_s: float
    search_s: float
    simulated: int

    @property
    def ok(self) -> bool:
        return self.capture_s + self.search_s <= _GROWN_S


def plan(model: str, cluster: str, allowed_s: float) -> Planned:
    """In a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "plan.json"
        command = [sys.executable, "-m", "shardwise", "plan", "--model", model, "--cluster", cluster, "--out", str(out)]
        start_s = time.monotonic()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.monotonic() - start_s
        if status:
            raise SystemExit(f"{' '.join(command)} ended with {os.waitstatus_to_exitcode(status)}")
        found = json.loads(out.read_text())
    return Planned(
        model=model,
        cluster=cluster,
        seconds=seconds,
        allowed_s=allowed_s,
        memory_bytes=usage.ru_maxrss * 1024,
        simulate_s=_simulate(model, cluster, found["layout"]),
        layout=found["layout"],
        step_time_s=found["predicted"]["step_time_s"],
        gap=found["search"]["gap"],
    )


def _simulate(model: str, cluster: str, layout: str) -> float:
    """Seconds of simulating one step of a layout, in this process."""
    from shardwise.cluster.model import Cluster
    from shardwise.outlook import Study, Wish
    from shardwise.planner.plan import Infeasible
    from shardwise.planner.space import Pins
    from shardwise.simulate.simulator import simulate_profile

    found = Study.of(model).outlook(Cluster.parse(cluster), Wish(pins=Pins.parse(layout)))
    assert not isinstance(found, Infeasible)
    best = found.found[0]
    profile = found.search.composed(best.scheme, best.samples)
    start_s = time.monotonic()
    simulate_profile(profile, best.scheme.mesh, recorded=False)
    return time.monotonic() - start_s


def grow(by: str, model: str, cluster: str) -> Grown:
    """In this process, imports not counted."""
    from shardwise.cluster.model import Cluster
    from shardwise.outlook import Study, Wish
    from shardwise.planner.plan import Infeasible

    machine = Cluster.parse(cluster)
    start_s = time.process_time()
    study = Study.of(model)
    twin = study.twin()
    captured_s = time.process_time()
    found = study.outlook(machine, Wish())
    end_s = time.process_time()
    return Grown(
        by=by,
        model=model,
        cluster=cluster,
        layers=sum(twin.counts),
        devices=machine.ranks,
        operators=len(twin.graph.ops),
        capture_s=captured_s - start_s,
        search_s=end_s - captured_s,
        simulated=0 if isinstance(found, Infeasible) else found.searched.simulated,
    )


def _show_plans(found: list[Planned]) -> None:
    table = Table("model", "cluster", "seconds", "allowed", "memory", "one step simulated", "step", "gap", box=None)
    for each in found:
        table.add_row(
            each.model,
            each.cluster,
            f"{each.seconds:.1f}",
            f"{each.allowed_s:.0f}",
            f"{each.memory_bytes / 2**30:.2f} GiB",
            f"{each.simulate_s:.2f} s",
            f"{each.step_time_s:.3g} s",
            f"{each.gap:.1%}",
        )
    Console(width=110).print(table)
    for each in found:
        print(f"{each.model}: {each.layout}")


def _show_growth(found: list[Grown]) -> None:
    table = Table("more", "model", "layers", "devices", "operators", "capture", "search", "steps simulated", box=None)
    for each in found:
        sizes = (str(each.layers), f"{each.devices:,}", str(each.operators))
        table.add_row(each.by, each.model, *sizes, f"{each.capture_s:.1f} s", f"{each.search_s:.1f} s", str(each.simulated))
    Console(width=110).print(table)
    print("operators: of the layers that are captured; seconds of a core")


def main() -> int:
    """Prints the tables; 1 where --check finds a bound broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit with 1 where planning takes longer or more memory than it may")
    parser.add_argument("--json", type=Path, help="write the figures as JSON")
    parser.add_argument("--growth", action="store_true", help="also how planning grows with layers, devices and operators")
    given = parser.parse_args()
    planned = [plan(*case) for case in _CASES]
    _show_plans(planned)
    grown: list[Grown] = []
    if given.growth:
        grow("", *_GROWTH["layers"][0])  # imports
        grown = [grow(by, *case) for by, cases in _GROWTH.items() for case in cases]
        _show_growth(grown)
    if given.json:
        document: dict[str, Any] = {"plans": [asdict(each) for each in planned], "growth": [asdict(each) for each in grown]}
        given.json.write_text(json.dumps(document, indent=1))
    held = all(each.ok for each in planned) and all(each.ok for each in grown)
    return int(given.check and not held)


if __name__ == "__main__":
    sys.exit(main())
