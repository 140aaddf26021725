"""What a training run learns from."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import Any

from torch.utils.data import Dataset

from shardwise.data.draws import own_draws
from shardwise.data.loader import has_numbers

__all__ = ["Corpus", "first_samples"]


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """training, held_out: datasets whose samples are dicts of tensors, the model's keyword arguments without the batch dim.

    training: with numbered samples, or a stream; held_out: with numbered ones, None where there is nothing to evaluate on. tokens: of a
    sample, None where it is not made of tokens.
    """

    name: str
    training: Dataset[Any]
    held_out: Dataset[Any] | None = None
    tokens: int | None = None


def first_samples(data: Any, count: int) -> list[Any]:
    """Fewer where there are not so many."""
    with own_draws():
        return [data[index] for index in range(min(count, len(data)))] if has_numbers(data) else list(islice(iter(data), count))
