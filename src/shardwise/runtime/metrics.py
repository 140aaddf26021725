"""What a training run leaves behind for plots: a line of JSON for each step, and TensorBoard's event files where they are asked for."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from shardwise.errors import ShardwiseError

__all__ = ["Metrics", "require_tensorboard"]


def require_tensorboard() -> Any:
    """torch's SummaryWriter. Raises ShardwiseError, which says what to install, where the package tensorboard is missing."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ShardwiseError(
            "event files need the package tensorboard: pip install tensorboard; metrics.jsonl has the same numbers"
        ) from error
    return SummaryWriter


class Metrics:
    """Writes `metrics.jsonl` into a directory as training goes on, and `tensorboard/` with tensorboard=True; directory=None: nothing.

    A run that goes on where another stopped adds to its files.
    """

    def __init__(self, directory: Path | None, *, tensorboard: bool = False) -> None:
        self._lines: TextIO | None = None
        self._events: Any = None
        if directory is None:
            return
        directory.mkdir(parents=True, exist_ok=True)
        if tensorboard:
            self._events = require_tensorboard()(log_dir=str(directory / "tensorboard"))
        self._lines = (directory / "metrics.jsonl").open("a")

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._lines is not None:
            self._lines.close()
        if self._events is not None:
            self._events.close()

    def write(self, step: int, values: dict[str, float | list[int] | None]) -> None:
        """Of step number `step`; a list has a number for each rank, None is left out."""
        given = {name: value for name, value in values.items() if value is not None}
        if self._lines is not None:
            self._lines.write(json.dumps({"step": step, **given}) + "\n")
            self._lines.flush()
        if self._events is not None:
            for name, value in given.items():
                for rank, one in enumerate(value) if isinstance(value, list) else ((None, value),):
                    self._events.add_scalar(name if rank is None else f"{name}/rank {rank}", one, step)
