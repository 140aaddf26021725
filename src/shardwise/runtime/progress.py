"""What a training run shows while it runs: a live line on a terminal, plain lines every few seconds elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

__all__ = ["TrainingDisplay"]

_PLAIN_EVERY_S = 5.0


class TrainingDisplay:
    """Step, loss, tokens a second and time left; silent unless `shown` (rank 0 shows)."""

    def __init__(self, *, steps: int, tokens_per_step: int | None, shown: bool, console: Console | None = None) -> None:
        self._steps = steps
        self._tokens = tokens_per_step
        self._shown = shown
        self._console = console or Console()
        self._live = _live(self._console) if shown and self._console.is_terminal else None
        self._started = self._last_line = time.monotonic()

    def __enter__(self) -> TrainingDisplay:
        self._started = self._last_line = time.monotonic()
        if self._live is not None:
            self._live.start()
            self._live.add_task("", total=self._steps, loss="…", rate="")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()

    def expect(self, steps: int) -> None:
        """Another number of steps in all than was expected."""
        self._steps = steps
        if self._live is not None:
            self._live.update(self._live.task_ids[0], total=steps)

    def update(self, step: int, loss: float, step_time_s: float) -> None:
        """After step number `step` (the first is 1)."""
        rate = "" if self._tokens is None else f"{self._tokens / step_time_s:,.0f} tokens/s"
        if self._live is not None:
            self._live.update(self._live.task_ids[0], completed=step, loss=f"{loss:.3f}", rate=rate)
        elif self._shown and self._is_due(step):
            self._last_line = time.monotonic()
            left_s = (time.monotonic() - self._started) / step * (self._steps - step)
            parts = [f"step {step}/{self._steps}", f"loss {loss:.3f}", rate, f"{left_s:.0f} s left"]
            self._console.print("  ".join(part for part in parts if part), highlight=False)

    def _is_due(self, step: int) -> bool:
        return step in (1, self._steps) or time.monotonic() - self._last_line >= _PLAIN_EVERY_S


def _live(console: Console) -> Progress:
    return Progress(
        TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
        BarColumn(),
        TextColumn("loss {task.fields[loss]}"),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        TextColumn("left"),
        console=console,
    )
