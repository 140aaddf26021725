"""A limit on each rank's memory that the system enforces: what does not fit one process trains on four, and who runs out is told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are Linux's"),
]

SCRIPT = """
import resource, sys
import torch
from torch import nn
import shardwise as sw
from tests.clusters import made_up
from shardwise.runtime.launch import launch
from shardwise.runtime.preload import preload

LIMIT, WIDE, DEEP = 1536 << 20, 2816, 16  # 127 million numbers: 2 GB with gradients and AdamW's states

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(*(nn.Linear(WIDE, WIDE, bias=False) for _ in range(DEEP)))
    def forward(self, x):
        return self.net(x).square().mean()

def build():
    torch.manual_seed(0)
    return Net()

def batch():
    return {"x": torch.ones(8, WIDE)}

def adamw(named):
    return torch.optim.AdamW([parameter for _, parameter in named], lr=1e-4)

def rank(plan):
    resource.setrlimit(resource.RLIMIT_DATA, (LIMIT, LIMIT))
    job = sw.parallelize(build, batch(), plan=plan, optimizer=adamw)
    return [job.step(batch()) for _ in range(2)]

def main(ranks, layout):
    with torch.device("meta"):
        model = Net()
    plan = sw.plan(model, batch(), made_up(ranks), layout=layout)
    print(launch(rank, (plan,), ranks=ranks, threads=1)[0])

main(int(sys.argv[1]), sys.argv[2])
"""


def run(tmp_path: Path, ranks: int, layout: str) -> tuple[int, str, str]:
    """In processes of their own, which start with little."""
    (tmp_path / "net.py").write_text(SCRIPT)
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, str(tmp_path / "net.py"), str(ranks), layout],
        capture_output=True,
        text=True,
        cwd=root,
        env={**os.environ, "PYTHONPATH": f"{root / 'src'}:{root}"},
        timeout=280,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def test_what_no_rank_could_hold_trains_on_four(tmp_path: Path) -> None:
    code, output, errors = run(tmp_path, 4, "pp=4")
    assert code == 0, errors
    losses = json.loads(output)
    assert len(losses) == 2 and losses[1] < losses[0]


def test_one_process_runs_out_and_says_what_of(tmp_path: Path) -> None:
    code, _, errors = run(tmp_path, 1, "dp=1")
    assert code == 1
    assert "rank 0 of 1 failed: OutOfMemory: rank 0 of 1 (stage 0) ran out of memory in " in errors
    assert "limited to data of 1.61 GB" in errors
    for kind in ("parameters", "gradients", "optimizer", "together"):
        assert kind in errors
