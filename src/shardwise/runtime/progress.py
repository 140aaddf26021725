"""What a run shows while it compiles and trains: a live line on a terminal, plain lines every few seconds elsewhere."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

__all__ = ["CompilingDisplay", "TrainingDisplay"]

_PLAIN_EVERY_S = 5.0
_RANKS = 8  # whose memory is shown one by one


class TrainingDisplay:
    """Step, loss, a step's time against the predicted one, rate, each rank's memory and time left; silent unless `shown` (rank 0 shows).

    per_step: how much is learnt from in a step, and of what: (4096, "tokens"). predicted_s: seconds that a step was said to take.
    """

    def __init__(
        self,
        *,
        steps: int,
        per_step: tuple[int, str] | None,
        shown: bool,
        predicted_s: float | None = None,
        console: Console | None = None,
    ) -> None:
        self._steps, self._per_step, self._predicted_s, self._shown = steps, per_step, predicted_s, shown
        self._console = console or Console()
        self._live = _live(self._console) if shown and self._console.is_terminal else None
        self._memory = self._held_out = ""
        self._started = self._last_line = time.monotonic()

    def __enter__(self) -> TrainingDisplay:
        self._started = self._last_line = time.monotonic()
        if self._live is not None:
            self._live.start()
            self._live.add_task("", total=self._steps, text="loss …", memory="")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()

    def expect(self, steps: int) -> None:
        """Another number of steps in all than was expected."""
        self._steps = steps
        if self._live is not None:
            self._live.update(self._live.task_ids[0], total=steps)

    def memory(self, peak_bytes: Sequence[int]) -> None:
        """What each rank has held at most so far."""
        every = [f"{each / 1e6:.0f}" for each in peak_bytes]
        most = max(range(len(peak_bytes)), key=peak_bytes.__getitem__)
        self._memory = f"memory {' '.join(every)} MB" if len(every) <= _RANKS else f"memory {every[most]} MB at most, rank {most}"

    def held_out(self, loss: float) -> None:
        """The loss on held-out data."""
        self._held_out = f"held out {loss:.3f}"

    def say(self, text: str) -> None:
        """A line of its own."""
        if self._shown:
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def update(self, step: int, loss: float, step_time_s: float) -> None:
        """After step number `step` (the first is 1)."""
        parts = [f"loss {loss:.3f}", self._held_out, self._pace(step_time_s), self._rate(step_time_s)]
        text = "  ".join(part for part in parts if part)
        if self._live is not None:
            self._live.update(self._live.task_ids[0], completed=step, text=text, memory=self._memory)
        elif self._shown and self._is_due(step):
            self._last_line = time.monotonic()
            left_s = (time.monotonic() - self._started) / step * (self._steps - step)
            parts = [f"step {step}/{self._steps}", text, self._memory, f"{left_s:.0f} s left"]
            self._console.print("  ".join(part for part in parts if part), highlight=False, soft_wrap=True)

    def _pace(self, step_time_s: float) -> str:
        return f"{step_time_s:.3g} s" + (f" (predicted {self._predicted_s:.3g} s)" if self._predicted_s is not None else "")

    def _rate(self, step_time_s: float) -> str:
        if self._per_step is None:
            return ""
        count, kind = self._per_step
        return f"{count / step_time_s:,.0f} {kind}/s"

    def _is_due(self, step: int) -> bool:
        return step in (1, self._steps) or time.monotonic() - self._last_line >= _PLAIN_EVERY_S


class CompilingDisplay:
    """What is being compiled, on standard error; silent unless `shown` (rank 0 shows)."""

    def __init__(self, *, shown: bool, console: Console | None = None) -> None:
        self._shown = shown
        self._console = console or Console(stderr=True)
        self._live = self._console.status("compiling") if shown and self._console.is_terminal else None
        self._last_line = time.monotonic()

    def __enter__(self) -> CompilingDisplay:
        self._last_line = time.monotonic()
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()

    def update(self, text: str) -> None:
        """Before `text` is compiled."""
        if self._live is not None:
            self._live.update(f"compiling {text}")
        elif self._shown and time.monotonic() - self._last_line >= _PLAIN_EVERY_S:
            self._last_line = time.monotonic()
            self._console.print(f"compiling {text}", highlight=False)

    def done(self, text: str) -> None:
        """At the end."""
        if self._shown:
            self._console.print(text, highlight=False)


def _live(console: Console) -> Progress:
    return Progress(
        TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
        BarColumn(bar_width=20),
        TextColumn("{task.fields[text]}"),
        TextColumn("{task.fields[memory]}"),
        TimeRemainingColumn(),
        TextColumn("left"),
        console=console,
    )
