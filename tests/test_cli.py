"""The command line: parsing, printing and exit codes. The Python interface behind it is a stand-in here."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

import shardwise
from shardwise.cli import app
from shardwise.errors import LayoutError
from shardwise.simulate.simulator import Simulation

COMMANDS = ("plan", "train", "verify", "coverage", "simulate", "layouts", "compare", "cluster", "doctor", "rules")
MODEL = """
import torch

def model():
    return torch.nn.Linear(2, 1), {"input": torch.zeros(4, 2)}
"""


class StandInPlan:
    ranks = 2

    def save(self, path: Path) -> None:
        Path(path).write_text('{"format_version": 1}')

    def __str__(self) -> str:
        return "tp=2: because"

    @classmethod
    def load(cls, path: Path) -> StandInPlan:
        return cls()


class StandInInfeasible:
    def __str__(self) -> str:
        return "it needs 9 GB on each rank and there are 4"


class Interface:
    """Records the calls and gives what it was told to."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.results: dict[str, Any] = {}

    def function(self, name: str) -> Any:
        def call(*args: object, **kwargs: Any) -> Any:
            self.calls.append((name, kwargs))
            result = self.results[name]
            if isinstance(result, Exception):
                raise result
            return result

        return call


@pytest.fixture
def interface(monkeypatch: pytest.MonkeyPatch) -> Interface:
    stand_in = Interface()
    for name in ("plan", "verify", "simulate"):
        monkeypatch.setattr(shardwise, name, stand_in.function(name), raising=False)
    monkeypatch.setattr(shardwise, "Plan", StandInPlan, raising=False)
    monkeypatch.setattr("shardwise.whatif.load_plan", StandInPlan.load)
    monkeypatch.setattr("shardwise.asked.Asked.check", lambda *_: None)  # a stand-in contradicts nothing
    monkeypatch.setattr(shardwise, "Infeasible", StandInInfeasible, raising=False)
    stand_in.results["plan"] = StandInPlan()
    return stand_in


@pytest.fixture
def model(tmp_path: Path) -> str:
    path = tmp_path / "cli_model.py"
    path.write_text(MODEL)
    return f"{path}:model"


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def test_help_names_all_commands() -> None:
    result = run("--help")
    assert result.exit_code == 0
    assert all(command in result.output for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_examples(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert "Examples" in result.output
    assert f"shardwise {command}" in result.output


def test_a_plan_is_explained_and_saved(interface: Interface, model: str, tmp_path: Path) -> None:
    out = tmp_path / "new" / "plan.json"
    result = run("plan", "--model", model, "--cluster", "local:4", "--layout", "tp=2", "--global-batch", "8", "--out", str(out))
    assert result.exit_code == 0, result.output
    assert "tp=2: because" in result.output
    assert json.loads(out.read_text()) == {"format_version": 1}
    assert interface.calls == [
        ("plan", {"cluster": "local:4", "layout": "tp=2", "global_batch": 8, "random": "keyed", "precision": "float32"})
    ]


def test_a_schedule_joins_the_layout(interface: Interface, model: str, tmp_path: Path) -> None:
    out = ("--out", str(tmp_path / "plan.json"))
    assert run("plan", "--model", model, "--layout", "pp=2", "--schedule", "zb-v", *out).exit_code == 0
    assert run("plan", "--model", model, "--schedule", "own.txt", *out).exit_code == 0
    assert [options["layout"] for _, options in interface.calls] == ["pp=2,schedule=zb-v", "schedule=own.txt"]


def test_a_plan_as_json_is_nothing_but_json(interface: Interface, model: str, tmp_path: Path) -> None:
    result = run("plan", "--model", model, "--out", str(tmp_path / "plan.json"), "--json")
    assert json.loads(result.stdout) == {"format_version": 1}


def test_wrong_input_is_one_message_and_exit_2(interface: Interface, model: str) -> None:
    interface.results["plan"] = LayoutError("tp=8 needs 8 ranks, but local:4 has 4. Use tp=4 or fewer.")
    result = run("plan", "--model", model)
    assert result.exit_code == 2
    assert result.stderr == "error: tp=8 needs 8 ranks, but local:4 has 4. Use tp=4 or fewer.\n"
    assert result.stdout == ""


@pytest.mark.parametrize("command", ["plan", "verify", "simulate"])
def test_infeasible_prints_its_reasons_and_exits_3(interface: Interface, model: str, command: str) -> None:
    interface.results["plan"] = interface.results["verify"] = StandInInfeasible()
    result = run(command, "--model", model)
    assert result.exit_code == 3
    assert "it needs 9 GB on each rank and there are 4" in result.stderr


@pytest.mark.parametrize("command", ["plan", "train", "verify", "simulate"])
def test_a_missing_model_is_named(interface: Interface, command: str) -> None:
    result = run(command)
    assert result.exit_code == 2
    assert "--model hf:CONFIG.json" in result.stderr


@pytest.mark.parametrize("command", ["plan", "train", "verify", "simulate"])
def test_a_wrong_model_is_named(interface: Interface, command: str) -> None:
    result = run(command, "--model", "nowhere.py:f")
    assert result.exit_code == 2
    assert "there is no file nowhere.py" in result.stderr


def verification(*, ok: bool) -> SimpleNamespace:
    return SimpleNamespace(ok=ok, max_relative_error=1e-15, first_difference=None if ok else "lm_head.weight", layout="tp=2")


def test_verify_reports_as_json(interface: Interface, model: str) -> None:
    interface.results["verify"] = verification(ok=True)
    result = run("verify", "--model", model, "--json", "--dtype", "float32")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == {"ok": True, "max_relative_error": 1e-15, "first_difference": None, "layout": "tp=2"}
    assert str(interface.calls[0][1]["dtype"]) == "torch.float32"


def test_verify_exits_1_on_a_difference(interface: Interface, model: str) -> None:
    interface.results["verify"] = verification(ok=False)
    result = run("verify", "--model", model)
    assert result.exit_code == 1
    assert "lm_head.weight" in result.stdout


def test_verify_refuses_other_precisions(interface: Interface, model: str) -> None:
    result = run("verify", "--model", model, "--dtype", "int8")
    assert result.exit_code == 2
    assert "int8" in result.stderr


def simulated(seconds: float = 0.5) -> Simulation:
    memory = [{"parameters": 1}, {"parameters": 2}]
    return Simulation(step_time_s=seconds, timeline=[], memory=memory, bubble=0.25, communication_s=0.125)


def test_simulate_takes_a_plan(interface: Interface, tmp_path: Path) -> None:
    interface.results["simulate"] = simulated()
    trace = tmp_path / "new" / "trace.json"
    result = run("simulate", "--plan", "plan.json", "--out", str(trace), "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == {
        "step_time_s": 0.5,
        "healthy_step_time_s": 0.5,
        "bubble": 0.25,
        "communication_s": 0.125,
        "memory_bytes": [1, 2],
        "trace": str(trace),
    }
    assert "traceEvents" in json.loads(trace.read_text())
    assert [name for name, _ in interface.calls] == ["simulate"]


def test_simulate_with_something_slow_compares(interface: Interface, tmp_path: Path) -> None:
    interface.results["simulate"] = simulated()
    slow = ("--slow-rank", "1=1.3", "--slow-rank", "0=2", "--slow-stage", "0=1.5", "--slow-link", "network=0.5")
    failing = ("--mtbf", "50000h", "--checkpoint", "30s", "--restart", "10min")
    result = run("simulate", "--plan", "plan.json", "--out", str(tmp_path / "t.json"), *slow, *failing, "--json")
    assert result.exit_code == 0, result.output
    assert [name for name, _ in interface.calls] == ["simulate"] * 2, "with what is slow and without"
    assert json.loads(result.stdout)["failures"]["job_mtbf_s"] == 25000 * 3600, "two devices"
    text = run("simulate", "--plan", "plan.json", "--out", str(tmp_path / "t.json"), *failing)
    assert "a failure" in text.stdout and "every 1,042 d" in text.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--slow-rank", "1"), "slow rank '1' is no NAME=NUMBER; write 3=1.3"),
        (("--slow-link", "network=2"), "a slow link keeps a share of its rate"),
        (("--mtbf", "soon", "--checkpoint", "30s"), "--mtbf 'soon' is no duration"),
        (("--checkpoint", "30s"), "has no effect without --mtbf"),
    ],
)
def test_simulate_says_what_is_wrong(interface: Interface, words: tuple[str, ...], said: str) -> None:
    result = run("simulate", "--plan", "plan.json", *words)
    assert result.exit_code == 2
    assert said in result.stderr


def test_train_says_what_data_it_reads(interface: Interface, model: str) -> None:
    result = run("train", "--model", model)
    assert result.exit_code == 2
    assert "the model's batch is input; data are read for input_ids and labels (text)" in result.stderr


TEXT_MODEL = """
import torch

def model():
    tokens = torch.zeros(4, 8, dtype=torch.int64)
    return torch.nn.Embedding({vocabulary}, 2), {{"input_ids": tokens, "labels": tokens}}
"""


def test_train_refuses_a_vocabulary_without_room_for_bytes(interface: Interface, tmp_path: Path) -> None:
    path = tmp_path / "cli_small.py"
    path.write_text(TEXT_MODEL.format(vocabulary=100))
    result = run("train", "--model", f"{path}:model")
    assert result.exit_code == 2
    assert "has a vocabulary of 100, but bytes need 256" in result.stderr


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "there is no data file"), (b"", "is empty"), (b"abc", "has 3 bytes, but sequences of 8 bytes need at least 16")],
)
def test_train_refuses_bad_data_before_planning(interface: Interface, tmp_path: Path, content: bytes | None, message: str) -> None:
    path, data = tmp_path / "cli_text.py", tmp_path / "data.txt"
    path.write_text(TEXT_MODEL.format(vocabulary=256))
    if content is not None:
        data.write_bytes(content)
    result = run("train", "--model", f"{path}:model", "--data", str(data))
    assert result.exit_code == 2
    assert message in result.stderr
    assert interface.calls == []


def test_an_unknown_option_exits_2() -> None:
    assert run("plan", "--modle", "x").exit_code == 2
