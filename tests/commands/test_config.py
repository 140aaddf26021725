"""Options from a file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from shardwise.cli import app
from shardwise.training import TrainRequest

FILE = """\
# a run
model = "net.py:model_and_batch"
steps = 200
lr = 3e-4
global-batch = 16
eval_every = 20
tensorboard = true
out = "out/one"

[layout]
tp = 2
shares = [3, 1]
"""


@pytest.fixture
def requested(monkeypatch: pytest.MonkeyPatch) -> list[TrainRequest]:
    found: list[TrainRequest] = []
    monkeypatch.setattr("shardwise.training.run_training", lambda request: found.append(request))
    return found


def train(tmp_path: Path, text: str, *arguments: str) -> Any:
    path = tmp_path / "run.toml"
    path.write_text(text)
    return CliRunner().invoke(app, ["train", "--config", str(path), *arguments])


def test_a_files_options_are_the_commands(tmp_path: Path, requested: list[TrainRequest]) -> None:
    result = train(tmp_path, FILE)
    assert result.exit_code == 0, result.output
    (request,) = requested
    assert (request.model, request.steps, request.learning_rate, request.global_batch) == ("net.py:model_and_batch", 200, 3e-4, 16)
    assert (request.evaluate_every, request.tensorboard, request.out, request.layout) == (20, True, Path("out/one"), "tp=2,shares=3:1")
    assert request.seed == 0 and request.cluster == "local:2", "what the file leaves out is as ever"


def test_the_command_line_wins(tmp_path: Path, requested: list[TrainRequest]) -> None:
    assert train(tmp_path, FILE, "--steps", "5", "--layout", "pp=2", "--out", "elsewhere").exit_code == 0
    (request,) = requested
    assert (request.steps, request.layout, request.out, request.global_batch) == (5, "pp=2", Path("elsewhere"), 16)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (FILE.replace("steps", "step"), "line 3: 'step' is no option of train; the nearest are steps"),
        (FILE + "\n[optimizer]\nlr = 1\n", "line 14: 'optimizer' is no option of train"),
        (FILE.replace("200", '"many"'), "line 3: steps = 'many'"),
        (FILE.replace("200", "2.5"), r"line 3: steps = 2\.5"),
        (FILE.replace("200", "true"), "line 3: steps = true; it takes a value"),
        (FILE.replace("200", "0"), "line 3: steps = 0"),
        (FILE.replace("true", "1"), "line 7: tensorboard = 1; it takes true or false"),
        (FILE.replace("eval_every", "global_batch"), "given twice"),
        (FILE.replace("lr = 3e-4", "lr ="), r"run\.toml is not TOML: .*line 4"),
        ('config = "other.toml"', "'config' is no option"),
        ("[model]\nname = 1", "line 1: 'model' is a table"),
    ],
)
def test_a_wrong_file_is_named_with_the_line(tmp_path: Path, requested: list[TrainRequest], text: str, message: str) -> None:
    result = train(tmp_path, text)
    assert result.exit_code == 2 and not requested
    assert re.search(message, result.stderr), result.stderr


def test_a_missing_file_is_named(requested: list[TrainRequest]) -> None:
    result = CliRunner().invoke(app, ["train", "--config", "nowhere.toml"])
    assert result.exit_code == 2 and "there is no configuration file nowhere.toml" in result.stderr


def test_the_example_file_is_read(requested: list[TrainRequest]) -> None:
    example = Path(__file__).parents[2] / "examples" / "run.toml"
    result = CliRunner().invoke(app, ["train", "--config", str(example), "--steps", "20"])
    assert result.exit_code == 0, result.output
    (request,) = requested
    assert (request.steps, request.evaluate_every, request.layout, request.model) == (20, 20, "tp=2", "hf:examples/llama.json")
    assert (example.parent / "llama.json").is_file()
