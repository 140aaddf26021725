"""`shardwise doctor`."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console
from typer.testing import CliRunner

from shardwise import doctor
from shardwise.cli import app


def test_it_finds_what_this_machine_has() -> None:
    found = {(finding.group, finding.name): finding for finding in doctor.examine(measure=False)}
    assert found["versions", "torch"].problem is None
    assert found["backends", "gloo"].value == "yes"
    assert int(found["machine", "cores"].value) >= 1


def test_an_old_torch_is_a_problem() -> None:
    assert doctor._too_old("2.9.1+cpu") == "2.9.1+cpu is older than 2.13: pip install torch==2.13.0"
    assert doctor._too_old("2.13.0a0") is None
    assert doctor._too_old("3.0.0") is None


def test_a_missing_package_is_a_problem_only_when_it_is_needed() -> None:
    assert doctor._package("nothing-of-this-name", required=True).problem == "missing: pip install nothing-of-this-name"
    assert doctor._package("nothing-of-this-name", required=False).problem is None


def test_a_missing_compiler_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert "install g++" in (doctor._tools()[0].problem or "")


def test_a_missing_backend_is_a_problem_only_when_it_is_needed() -> None:
    assert "without gloo" in (doctor._backend("gloo", present=False, needed=True).problem or "")
    assert doctor._backend("nccl", present=False, needed=False).problem is None


def test_problems_are_in_the_table() -> None:
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(doctor.table([doctor.Finding(group="tools", name="C++ compiler", value="none", problem="install g++")]))
    assert "install g++" in console.export_text()


def test_the_command_prints_json() -> None:
    result = CliRunner().invoke(app, ["doctor", "--no-measure", "--json"])
    findings = json.loads(result.stdout)
    assert {"group", "name", "value", "problem"} == set(findings[0])
    assert result.exit_code == int(any(finding["problem"] for finding in findings))
