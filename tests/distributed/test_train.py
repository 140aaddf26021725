"""The training loop on real ranks; `parallelize` is a stand-in here that averages a number over the ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import shardwise
from shardwise.errors import RankFailed
from shardwise.program.actions import Action, Kind
from shardwise.runtime.data import ByteText
from shardwise.runtime.executor import Event
from shardwise.runtime.train import Settings, train

pytestmark = pytest.mark.distributed


class StandInJob:
    def __init__(self, build: Any, batch: object, *, plan: Any, optimizer: Any, weights: Any) -> None:
        self.optimizer = optimizer(build().named_parameters())
        self.steps = 0
        self.events = [Event(action=Action(kind=Kind.UPDATE), start_s=1.0, end_s=2.0)]

    def eval(self, batch: dict[str, torch.Tensor]) -> float:
        return 5.0 - self.steps

    def step(self, batch: dict[str, torch.Tensor]) -> float:
        self.steps += 1
        total = batch["input_ids"].float().mean()
        dist.all_reduce(total)
        if self.steps == 3 and batch["input_ids"].shape[0] == 7 and dist.get_rank() == 1:
            raise ValueError("step 3 went wrong")
        return total.item() / dist.get_world_size()


def build() -> torch.nn.Module:
    return torch.nn.Linear(2, 2)


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ByteText:
    monkeypatch.setattr(shardwise, "parallelize", StandInJob, raising=False)
    path = tmp_path / "text.txt"
    path.write_bytes(bytes(range(256)) * 10)
    return ByteText.load(path, sequence=16)


def test_all_ranks_train_and_report(text: ByteText, capfd: pytest.CaptureFixture[str]) -> None:
    run = train(build, plan=None, ranks=2, text=text, settings=Settings(steps=4, batch_size=3))  # type: ignore[arg-type]
    expected = [text.batch(step, size=3)["input_ids"].float().mean().item() for step in range(4)]
    assert run.losses == pytest.approx(expected)
    assert (run.held_out_before, run.held_out_after) == (5.0, 1.0)
    assert len(run.memory_bytes) == 2
    assert max(run.memory_bytes) < 40e6, "a model of 6 parameters: only the first collective's buffers and the like"
    assert 0 < run.step_time_s < 1
    assert run.actions == [[("update", -1, -1, "", -1, 1.0, 2.0)]] * 2
    shown = capfd.readouterr().out
    assert shown.count("step 4/4") == 1, "one rank shows, the others are silent"


def test_a_rank_that_fails_in_a_step_is_named(text: ByteText) -> None:
    with pytest.raises(RankFailed, match="rank 1 of 2 failed: ValueError: step 3 went wrong"):
        train(build, plan=None, ranks=2, text=text, settings=Settings(steps=4, batch_size=7, shown=False))  # type: ignore[arg-type]
