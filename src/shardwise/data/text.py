"""Byte-level text to train on: any file, the text files of a folder, or the text that every machine has, Python's own standard library.

    |<------------------- training ------------------->|<- held out ->|

A sample is a run of `sequence` bytes; runs do not overlap. `Loader` gives them an order.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.data import Dataset

from shardwise.data.corpus import Corpus
from shardwise.errors import DataError

__all__ = ["VOCABULARY", "ByteText"]

VOCABULARY = 256
_CORPUS_BYTES = 8_000_000
_HELD_OUT_SHARE = 0.05
_TEXTS = (".md", ".py", ".rst", ".txt")
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
        """The text in `path`, a file or a folder; None: the standard library's sources. DataError if missing, empty or too short."""
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

    @property
    def corpus(self) -> Corpus:
        """Samples of input_ids and labels, int64 [sequence]; the model shifts the labels."""
        return Corpus(
            name=self.name,
            training=Sequences(self.training, self.sequence),
            held_out=Sequences(self.held_out, self.sequence),
            tokens=self.sequence,
        )

    def held_out_batch(self, *, size: int) -> dict[str, torch.Tensor]:
        """`size` sequences spread evenly over the held-out text."""
        starts = torch.linspace(0, len(self.held_out) - self.sequence, size).long()
        return self._cut(self.held_out, starts)

    def _cut(self, text: torch.Tensor, starts: torch.Tensor) -> dict[str, torch.Tensor]:
        tokens = text[starts[:, None] + torch.arange(self.sequence)].long()
        return {"input_ids": tokens, "labels": tokens.clone()}


class Sequences(Dataset[dict[str, torch.Tensor]]):
    """The runs of `sequence` bytes that follow each other in a text (uint8, one dim)."""

    def __init__(self, text: torch.Tensor, sequence: int) -> None:
        self.text, self.sequence = text, sequence

    def __len__(self) -> int:
        return len(self.text) // self.sequence

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = self.text[index * self.sequence : (index + 1) * self.sequence].long()
        return {"input_ids": tokens, "labels": tokens.clone()}


def _read(path: Path) -> bytes:
    if path.is_dir():
        files = sorted(each for each in path.rglob("*") if each.suffix in _TEXTS and each.is_file())
        if not files:
            raise DataError(f"the folder {path} has no text: no file that ends in {', '.join(_TEXTS)}.")
        return b"".join(each.read_bytes() for each in files)
    if not path.is_file():
        raise DataError(
            f"there is no data file {path}. Give a text file or a folder of them, or none to train on Python's standard library."
        )
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
