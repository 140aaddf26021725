"""The page in a real browser: all charts are drawn and no script fails."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from tests.report.prospects import prospect

from shardwise.planner.plan import Plan
from shardwise.report import Measured, write_report
from shardwise.report.prospect import write_prospect
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


LOOK = """
window.addEventListener("load", () => setTimeout(() => {
  const seen = {};
  for (const holder of document.querySelectorAll("[data-figure]")) {
    seen[holder.dataset.figure] = holder.data.map((trace, number) => {
      if (!trace.x.length) return "";
      Plotly.Fx.hover(holder, [{ curveNumber: number, pointNumber: 0 }]);
      const said = [...holder.querySelectorAll(".hoverlayer text")].map((each) => each.textContent).join(" ");
      Plotly.Fx.unhover(holder);
      return said;
    });
  }
  const wide = [...document.querySelectorAll(".card, .device, .node, .chip")].filter((each) => each.scrollWidth > each.clientWidth + 1);
  const found = {
    seen: seen,
    resources: performance.getEntriesByType("resource").map((each) => each.name),
    width: document.documentElement.scrollWidth,
    overflowing: wide.map((each) => each.className + ": " + each.textContent.slice(0, 40)),
    titles: [...document.querySelectorAll(".map title, .device[title]")].map((each) => each.title || each.textContent),
  };
  const said = document.createElement("script");
  said.type = "application/json";
  said.id = "found";
  said.textContent = JSON.stringify(found);
  document.body.append(said);
}, 800));
"""


def looked_at(path: Path, profile: Path) -> tuple[dict[str, Any], str]:
    """What one sees who holds the pointer on the first point of every trace, in a window of 1,280 pixels; and what the console says."""
    watched = path.with_name("watched.html")
    watched.write_text(path.read_text().replace("</body>", f"<script>{LOOK}</script></body>"))
    extra = ["--enable-logging=stderr", "--window-size=1280,2000"]
    command = [str(BROWSER), *OPTIONS.replace("5000", "20000").split(), *extra, f"--user-data-dir={profile}", f"file://{watched}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = re.search('<script type="application/json" id="found">(.*?)</script>', done.stdout, re.DOTALL)
    assert found, "the page's scripts did not end"
    assert "data-problem" not in body(done.stdout)
    return json.loads(found[1]), "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


@pytest.mark.parametrize(
    ("cluster", "sizes"),
    [
        ("a100-80g:128x8", {"dp": 16, "tp": 8, "pp": 8, "chunks": 2, "microbatches": 96}),
        ("h100:2048x8", {"dp": 128, "tp": 8, "pp": 16, "microbatches": 16}),
    ],
)
def test_a_layout_for_thousands_in_a_window_of_1280(tmp_path: Path, cluster: str, sizes: dict[str, int]) -> None:
    made = prospect(cluster, **sizes)
    write_prospect(tmp_path / "report.html", made)
    found, console = looked_at(tmp_path / "report.html", tmp_path / "profile")
    assert console == "", "nothing to complain about"
    assert found["resources"] == [], "nothing was loaded"
    assert found["width"] <= 1280 and found["overflowing"] == []
    timeline, memory, layouts = (" | ".join(found["seen"][f"{name}-data"]) for name in ("timeline", "memory", "layouts"))
    assert "forward, microbatch 0" in timeline and "backward, microbatch" in timeline and "takes" in timeline
    assert "optimizer: 9 GB" in memory.replace("\u00a0", " ") or "optimizer: 18 GB" in memory.replace("\u00a0", " ")
    assert "zero=" in layouts and "does not fit" in layouts and "chosen" in layouts and "on the fullest rank" in layouts
    squares = [title for title in found["titles"] if title.startswith("node")]
    assert len(squares) == made.machines.nodes and made.sizes.stage(made.sizes.pp - 1) in squares[-1]
    assert any(title.startswith("rank 0: ") for title in found["titles"])
