"""Byte-level text to train on: any file, or the text that every machine has, Python's own standard library.

    |<------------------- training ------------------->|<- held out ->|

A batch is a pure function of (seed, step), so that every rank, and a run that was resumed, sees the same one.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from shardwise.errors import DataError

__all__ = ["VOCABULARY", "ByteText"]

VOCABULARY = 256
_CORPUS_BYTES = 8_000_000
_HELD_OUT_SHARE = 0.05
_SEED_STRIDE = 1_000_003  # a prime above any number of steps that a byte-level run takes
_LEFT_OUT = {"__pycache__", "dist-packages", "idlelib", "lib2to3", "site-packages", "test", "tests", "turtledemo"}


@dataclass(frozen=True, kw_only=True)
class ByteText:
    """Text as bytes (uint8, one dim), its tail held out; sequences have `sequence` bytes."""

    name: str
    training: torch.Tensor
    held_out: torch.Tensor
    sequence: int

    @classmethod
    def load(cls, path: str | Path | None = None, *, sequence: int) -> ByteText:
        """The text in `path`, or the standard library's sources if None. Raises DataError if missing, empty or too short."""
        name = "Python's standard library" if path is None else str(path)
        text = _standard_library() if path is None else _read(Path(path))
        if len(text) < 2 * sequence:
            raise DataError(
                f"{name} has {len(text)} bytes, but sequences of {sequence} bytes need at least {2 * sequence}: "
                "one to train on and one held out. Take a longer text or a shorter sequence."
            )
        tail = max(sequence, int(len(text) * _HELD_OUT_SHARE))
        values = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        return cls(name=name, training=values[:-tail], held_out=values[-tail:], sequence=sequence)

    def batch(self, step: int, *, size: int, seed: int = 0) -> dict[str, torch.Tensor]:
        """`size` random sequences for training: input_ids and labels, int64 [size, sequence]; the model shifts the labels."""
        generator = torch.Generator().manual_seed(seed * _SEED_STRIDE + step)
        starts = torch.randint(0, len(self.training) - self.sequence + 1, (size,), generator=generator)
        return self._cut(self.training, starts)

    def held_out_batch(self, *, size: int) -> dict[str, torch.Tensor]:
        """`size` sequences spread evenly over the held-out text."""
        starts = torch.linspace(0, len(self.held_out) - self.sequence, size).long()
        return self._cut(self.held_out, starts)

    def _cut(self, text: torch.Tensor, starts: torch.Tensor) -> dict[str, torch.Tensor]:
        tokens = text[starts[:, None] + torch.arange(self.sequence)].long()
        return {"input_ids": tokens, "labels": tokens.clone()}


def _read(path: Path) -> bytes:
    if not path.is_file():
        raise DataError(f"there is no data file {path}. Give a text file, or none to train on Python's standard library.")
    text = path.read_bytes()
    if not text:
        raise DataError(f"the data file {path} is empty: it has 0 bytes.")
    return text


def _standard_library() -> bytes:
    """Its .py files in the order of their names, up to a limit."""
    root = Path(os.__file__).parent
    parts: list[bytes] = []
    size = 0
    for path in _sources(root):
        parts.append(path.read_bytes())
        size += len(parts[-1])
        if size >= _CORPUS_BYTES:
            break
    return b"".join(parts)[:_CORPUS_BYTES]


def _sources(root: Path) -> list[Path]:
    found = [path for path in root.rglob("*.py") if not _LEFT_OUT & set(path.relative_to(root).parts) and path.is_file()]
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())
