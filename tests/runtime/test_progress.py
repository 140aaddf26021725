"""What a training run shows."""

from __future__ import annotations

import io

from rich.console import Console

from shardwise.runtime.progress import TrainingDisplay


def shown(
    console: Console, *, steps: int = 3, shown: bool = True, per_step: tuple[int, str] | None = (1000, "tokens"), ranks: int = 2
) -> None:
    with TrainingDisplay(steps=steps, per_step=per_step, shown=shown, predicted_s=0.45, console=console) as display:
        display.held_out(7.25)
        for step in range(1, steps + 1):
            display.memory([step * 10**6] * (ranks - 1) + [step * 2 * 10**6])
            display.update(step, 5.0 / step, 0.5)


def test_without_a_terminal_first_and_last_step_are_plain_lines() -> None:
    file = io.StringIO()
    shown(Console(file=file, width=40))
    lines = file.getvalue().splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("step 1/3  loss 5.000  held out 7.250  0.5 s (predicted 0.45 s)  2,000 tokens/s  memory 1 2 MB  ")
    assert lines[-1].startswith("step 3/3  loss 1.667") and lines[-1].endswith("0 s left")


def test_on_a_terminal_there_is_a_live_line() -> None:
    file = io.StringIO()
    shown(Console(file=file, width=160, force_terminal=True))
    for text in ("step 3/3", "loss 1.667", "predicted 0.45 s", "2,000 tokens/s", "memory 3 6 MB"):
        assert text in file.getvalue()


def test_of_many_ranks_the_fullest_is_shown() -> None:
    file = io.StringIO()
    shown(Console(file=file), ranks=64)
    assert "memory 6 MB at most, rank 63" in file.getvalue()


def test_other_ranks_are_silent() -> None:
    file = io.StringIO()
    shown(Console(file=file), shown=False)
    assert file.getvalue() == ""


def test_without_tokens_there_is_no_rate() -> None:
    file = io.StringIO()
    shown(Console(file=file), per_step=None)
    assert "/s" not in file.getvalue()
    shown(Console(file=file), per_step=(8, "samples"))
    assert "16 samples/s" in file.getvalue()
