"""What a training run learns from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.utils.data import Dataset

__all__ = ["Corpus"]


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """training, held_out: datasets with a length whose samples are dicts of tensors, the model's keyword arguments without the batch dim.

    held_out: None where there is nothing to evaluate on. tokens: of a sample, None where it is not made of tokens.
    """

    name: str
    training: Dataset[Any]
    held_out: Dataset[Any] | None = None
    tokens: int | None = None
