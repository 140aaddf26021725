"""Files of metrics."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from shardwise.errors import ShardwiseError
from shardwise.runtime.metrics import Metrics


def test_a_line_of_json_for_each_step(tmp_path: Path) -> None:
    for first in (0, 2):  # a run that goes on adds to the file
        with Metrics(tmp_path / "run") as metrics:
            for step in (first, first + 1):
                metrics.write(step, {"loss": 1 / (step + 1), "held_out_loss": None, "memory_bytes": [1, 2]})
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": step, "loss": 1 / (step + 1), "memory_bytes": [1, 2]} for step in range(4)]


def test_nothing_is_written_without_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with Metrics(None, tensorboard=True) as metrics:
        metrics.write(1, {"loss": 1.0})
    assert list(tmp_path.iterdir()) == []


def test_without_the_package_tensorboard_it_is_said_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ShardwiseError, match=r"pip install tensorboard; metrics\.jsonl has the same numbers"):
        Metrics(tmp_path, tensorboard=True)


def test_what_tensorboard_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Any] = []

    class Writer:
        def __init__(self, log_dir: str) -> None:
            written.append(log_dir)

        def add_scalar(self, name: str, value: float, step: int) -> None:
            written.append((name, value, step))

        def close(self) -> None:
            written.append("closed")

    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    with Metrics(tmp_path, tensorboard=True) as metrics:
        metrics.write(3, {"loss": 0.5, "memory_bytes": [7, 8], "held_out_loss": None})
    assert written == [
        str(tmp_path / "tensorboard"),
        ("loss", 0.5, 3),
        ("memory_bytes/rank 0", 7, 3),
        ("memory_bytes/rank 1", 8, 3),
        "closed",
    ]


def test_real_event_files(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Metrics(tmp_path, tensorboard=True) as metrics:
        metrics.write(1, {"loss": 0.5})
        metrics.write(2, {"loss": 0.25, "memory_bytes": [7, 8]})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 0.5), (2, 0.25)]
    assert [event.value for event in events.Scalars("memory_bytes/rank 1")] == [8]
