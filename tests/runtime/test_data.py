"""Byte-level text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from shardwise.errors import DataError
from shardwise.runtime.data import ByteText


@pytest.fixture
def text(tmp_path: Path) -> ByteText:
    path = tmp_path / "text.txt"
    path.write_bytes(bytes(range(250)) * 8)
    return ByteText.load(path, sequence=16)


def test_the_tail_is_held_out(text: ByteText) -> None:
    assert len(text.training) + len(text.held_out) == 2000
    assert len(text.held_out) == 100


def test_a_batch_is_real_text_and_its_labels_are_itself(text: ByteText) -> None:
    batch = text.batch(0, size=4)
    assert batch["input_ids"].shape == (4, 16)
    assert batch["input_ids"].dtype == torch.int64
    assert torch.equal(batch["input_ids"], batch["labels"])
    assert torch.equal(batch["input_ids"].diff(dim=1) % 250, torch.ones(4, 15, dtype=torch.int64))


def test_a_batch_depends_on_seed_and_step_alone(text: ByteText) -> None:
    assert torch.equal(text.batch(3, size=8, seed=1)["input_ids"], text.batch(3, size=8, seed=1)["input_ids"])
    assert not torch.equal(text.batch(3, size=8, seed=1)["input_ids"], text.batch(4, size=8, seed=1)["input_ids"])
    assert not torch.equal(text.batch(3, size=8, seed=1)["input_ids"], text.batch(3, size=8, seed=2)["input_ids"])


def test_held_out_sequences_are_spread_evenly(text: ByteText) -> None:
    batch = text.held_out_batch(size=2)
    assert torch.equal(batch["input_ids"][0].byte(), text.held_out[:16])
    assert torch.equal(batch["input_ids"][1].byte(), text.held_out[-16:])


def test_the_shortest_text_that_serves(tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_bytes(b"x" * 32)
    text = ByteText.load(path, sequence=16)
    assert text.batch(0, size=2)["input_ids"].shape == text.held_out_batch(size=2)["input_ids"].shape == (2, 16)


def test_every_machine_has_text() -> None:
    text = ByteText.load(None, sequence=64)
    assert 4_000_000 < len(text.training) + len(text.held_out) <= 8_000_000
    assert torch.equal(text.training[:1000], ByteText.load(None, sequence=64).training[:1000])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no data file"),
        (b"", "is empty: it has 0 bytes"),
        (b"x" * 31, "has 31 bytes, but sequences of 16 bytes need at least 32"),
    ],
)
def test_bad_data_is_named(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        ByteText.load(path, sequence=16)
