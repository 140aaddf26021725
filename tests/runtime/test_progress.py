"""What a training run shows."""

from __future__ import annotations

import io

from rich.console import Console

from shardwise.runtime.progress import TrainingDisplay


def shown(console: Console, *, steps: int = 3, shown: bool = True, tokens: int | None = 1000) -> None:
    with TrainingDisplay(steps=steps, tokens_per_step=tokens, shown=shown, console=console) as display:
        for step in range(1, steps + 1):
            display.update(step, 5.0 / step, 0.5)


def test_without_a_terminal_first_and_last_step_are_plain_lines() -> None:
    file = io.StringIO()
    shown(Console(file=file, width=120))
    lines = file.getvalue().splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("step 1/3  loss 5.000  2,000 tokens/s  ")
    assert lines[-1].startswith("step 3/3  loss 1.667")


def test_on_a_terminal_there_is_a_live_line() -> None:
    file = io.StringIO()
    shown(Console(file=file, width=120, force_terminal=True))
    assert "step 3/3" in file.getvalue()
    assert "loss 1.667" in file.getvalue()


def test_other_ranks_are_silent() -> None:
    file = io.StringIO()
    shown(Console(file=file), shown=False)
    assert file.getvalue() == ""


def test_without_tokens_there_is_no_rate() -> None:
    file = io.StringIO()
    shown(Console(file=file), tokens=None)
    assert "tokens" not in file.getvalue()
