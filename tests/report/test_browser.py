"""The page in a real browser: all charts are drawn and no script fails."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from shardwise.planner.plan import Plan
from shardwise.report import Measured, write_report
from shardwise.simulate.simulator import Simulation

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
OPTIONS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --virtual-time-budget=5000 --dump-dom"
)

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium here: `apt-get install chromium` lets these tests run")


def opened(path: Path, profile: Path) -> str:
    """The page after its scripts have run."""
    command = [str(BROWSER), *OPTIONS.split(), f"--user-data-dir={profile}", f"file://{path}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


def body(page: str) -> str:
    """The body's tag; the page's script notes there what it drew and what failed."""
    found = re.search("<body[^>]*>", page)
    assert found, "the browser shows no page"
    return found.group()


def test_charts_are_drawn(tmp_path: Path, plan: Plan, simulation: Simulation, measured: Measured) -> None:
    write_report(tmp_path / "report.html", plan, simulation, measured)
    page = opened(tmp_path / "report.html", tmp_path / "profile")
    assert body(page) == '<body data-drawn="3">', "three charts, no problem"
    assert page.count('class="main-svg"') >= 3
    assert page.count('class="point"') >= len(simulation.timeline), "bars of both timelines"


def test_a_broken_chart_is_told(tmp_path: Path, plan: Plan, simulation: Simulation) -> None:
    write_report(tmp_path / "report.html", plan, simulation)
    broken = (tmp_path / "report.html").read_text().replace('id="memory-data">{', 'id="memory-data">{{')
    (tmp_path / "broken.html").write_text(broken)
    page = opened(tmp_path / "broken.html", tmp_path / "profile")
    assert "data-problem" in body(page)
    assert "A chart could not be drawn" in page.split("<main", 1)[0]
