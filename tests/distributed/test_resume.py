"""`shardwise train --save` and `--resume`, as a user runs it: what goes on gives the losses of what was not interrupted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from shardwise.checkpoint.folder import read_record
from shardwise.cli import app

pytestmark = pytest.mark.distributed

MODEL = """
import torch
from torch.utils.data import IterableDataset

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.GELU(), torch.nn.Dropout(0.2), torch.nn.Linear(16, 3))

    def forward(self, x, y):
        return torch.nn.functional.cross_entropy(self.layers(x), y)

def model_and_batch():
    return Net(), {"x": torch.randn(8, 6), "y": torch.randint(3, (8,))}

def samples(count=36):
    generator = torch.Generator().manual_seed(1)
    return [{"x": torch.randn(6, generator=generator), "y": torch.randint(3, (), generator=generator)} for _ in range(count)]

def data():
    return samples(), samples(8)

class Stream(IterableDataset):
    def __iter__(self):
        return iter(samples())

def stream():
    return Stream()
"""


@pytest.fixture
def here(tmp_path: Path) -> Path:
    (tmp_path / "net.py").write_text(MODEL)
    return tmp_path


def arguments(here: Path, name: str, *more: str, data: str = "data", layout: str = "dp=2,zero=1,microbatches=1") -> list[str]:
    how = ["--model", f"{here}/net.py:model_and_batch", "--data", f"{here}/net.py:{data}", "--cluster", "local:2", "--layout", layout]
    return ["train", *how, "--out", str(here / name), *more]


def losses(here: Path, name: str, *more: str, **how: str) -> list[float]:
    result = CliRunner().invoke(app, arguments(here, name, *more, **how))
    assert result.exit_code == 0, result.output
    found = json.loads((here / name / "training.json").read_text())
    assert found["first_step"] + len(found["losses"]) - 1 == int(more[more.index("--steps") + 1])
    return list(found["losses"])


@pytest.mark.parametrize(("data", "workers"), [("data", "0"), ("stream", "1")])
def test_three_steps_and_three_more_are_six(here: Path, data: str, workers: str) -> None:
    """36 samples by 8 are 4 batches: an epoch begins on the way."""
    checkpoint = ["--save", str(here / "checkpoint")]
    whole = losses(here, "whole", "--steps", "6", "--workers", workers, data=data)
    first = losses(here, "parts", "--steps", "3", "--workers", workers, *checkpoint, data=data)
    then = losses(here, "parts", "--steps", "6", "--workers", workers, *checkpoint, "--resume", checkpoint[1], data=data)
    assert first + then == whole, "bit by bit"
    assert read_record(here / "checkpoint").steps == 6
    lines = [json.loads(line) for line in (here / "parts" / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines if "loss" in line] == whole
    if data == "data":
        losses(here, "third", "--steps", "3", *checkpoint)
        other = losses(here, "other", "--steps", "6", "--resume", checkpoint[1], layout="tp=2,microbatches=1")
        assert other == pytest.approx(whole[3:], rel=1e-5), "in another layout"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_run_saves_and_says_how_to_go_on(here: Path, number: signal.Signals) -> None:
    checkpoint, metrics = here / "checkpoint", here / "cut" / "metrics.jsonl"
    command = arguments(here, "cut", "--steps", "100000", "--save", str(checkpoint), "--save-every", "2")
    process = subprocess.Popen([sys.executable, "-m", "shardwise", *command], stdout=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 90
    while not (metrics.exists() and metrics.read_text().count("loss") > 6) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # Ctrl-C reaches the ranks, too
    else:
        process.send_signal(number)
    shown, _ = process.communicate(timeout=60)
    steps = read_record(checkpoint).steps
    assert process.returncode in (130, 143, -number), process.returncode
    assert f"interrupted, saved after step {steps} in {checkpoint}; go on with the same options and --resume {checkpoint}" in shown
    assert len([line for line in metrics.read_text().splitlines() if "grad_norm" in line]) == steps, "after the last step that was done"
    then = losses(here, "cut", "--steps", str(steps + 2), "--resume", str(checkpoint))
    assert then == losses(here, "whole", "--steps", str(steps + 2))[-2:]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--steps", "3", "--resume", "saved"], "saved is the state after 3 steps and --steps 3 is how many there shall be in all"),
        (["--steps", "6", "--resume", "saved", "--lr", "0.01"], "was trained with --lr 0.001, now --lr is 0.01"),
        (["--steps", "6", "--resume", "saved", "--weights", "saved"], "leave out --weights"),
        (["--steps", "6", "--resume", "nowhere"], "there is no checkpoint in"),
        (["--steps", "6", "--save-every", "2"], "--save-every 2 has no effect without --save"),
        (["--steps", "6", "--resume", "saved", "--seed", "1"], "taken with seed=0, here seed=1"),
    ],
)
def test_what_contradicts_itself_is_said(here: Path, monkeypatch: pytest.MonkeyPatch, more: list[str], message: str) -> None:
    monkeypatch.chdir(here)
    if "saved" in more:
        losses(here, "first", "--steps", "3", "--save", "saved")
    result = CliRunner().invoke(app, arguments(here, "second", *more))
    assert result.exit_code == 2 and message in result.output + result.stderr
