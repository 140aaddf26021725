"""The training loop on real ranks; `parallelize` is a stand-in here that averages a number over the ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import shardwise
from shardwise.data import ByteText, Corpus, Loader
from shardwise.errors import RankFailed
from shardwise.program.actions import Action, Kind
from shardwise.runtime.executor import Event
from shardwise.runtime.train import Settings, TrainingRun, train

pytestmark = pytest.mark.distributed


class StandInJob:
    def __init__(self, build: Any, batch: dict[str, torch.Tensor], *, plan: Any, optimizer: Any, weights: Any, compile: bool) -> None:
        self.optimizer = optimizer(build().named_parameters())
        self.steps, self.grad_norm = 0, float("nan")
        size = len(next(iter(batch.values())))
        self.batch_slice = slice(0, size)
        self.events = [Event(action=Action(kind=Kind.UPDATE), start_s=1.0, end_s=2.0)]

    def eval(self, batch: dict[str, torch.Tensor], *, local: bool) -> float:
        return 5.0 - self.steps

    def step(self, batch: dict[str, torch.Tensor], *, local: bool) -> float:
        self.steps += 1
        total = batch["input_ids"].float().mean()
        dist.all_reduce(total)
        if self.steps == 3 and batch["input_ids"].shape[0] == 7 and dist.get_rank() == 1:
            raise ValueError("step 3 went wrong")
        return total.item() / dist.get_world_size()


def build() -> torch.nn.Module:
    return torch.nn.Linear(2, 2)


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Corpus:
    monkeypatch.setattr(shardwise, "parallelize", StandInJob, raising=False)
    path = tmp_path / "text.txt"
    path.write_bytes(bytes(range(256)) * 10)
    return ByteText.load(path, sequence=16).corpus


def run(corpus: Corpus, **settings: Any) -> TrainingRun:
    return train(build, plan=None, ranks=2, read=lambda: corpus, settings=Settings(**settings))  # type: ignore[arg-type]


def test_all_ranks_train_and_report(text: Corpus, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    found = run(text, steps=4, batch_size=3, seed=7, evaluate_every=2, out=tmp_path / "out")
    batches = Loader(text.training, 3, seed=7).forever()
    assert found.losses == pytest.approx([next(batches)["input_ids"].float().mean().item() for _ in range(4)])
    assert found.held_out == {0: 5.0, 2: 3.0, 4: 1.0} and (found.held_out_before, found.held_out_after) == (5.0, 1.0)
    assert len(found.memory_bytes) == 2
    assert max(found.memory_bytes) < 40e6, "a model of 6 parameters: only the first collective's buffers and the like"
    assert 0 < found.step_time_s < 1
    assert found.actions == [[("update", -1, -1, "", -1, 1.0, 2.0)]] * 2
    shown = capfd.readouterr().out
    assert shown.count("step 4/4") == 1, "one rank shows, the others are silent"
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
    assert [line.get("held_out_loss") for line in lines] == [5.0, None, 3.0, None, 1.0]
    assert [line["loss"] for line in lines[1:]] == found.losses
    assert [len(line.get("memory_bytes", [])) for line in lines] == [0, 2, 0, 0, 2]
    assert lines[1]["tokens_per_s"] == pytest.approx(48 / lines[1]["step_time_s"])


def test_a_rank_that_fails_in_a_step_is_named(text: Corpus) -> None:
    with pytest.raises(RankFailed, match="rank 1 of 2 failed: ValueError: step 3 went wrong"):
        run(text, steps=4, batch_size=7, shown=False)


def test_without_held_out_data_there_is_no_evaluation(text: Corpus) -> None:
    found = run(Corpus(name="text", training=text.training), steps=2, batch_size=3, shown=False, workers=1)
    assert found.held_out == {} and found.held_out_after is None and len(found.losses) == 2
