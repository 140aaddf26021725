"""Byte-level text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from shardwise.data.text import ByteText
from shardwise.errors import DataError


@pytest.fixture
def text(tmp_path: Path) -> ByteText:
    path = tmp_path / "text.txt"
    path.write_bytes(bytes(range(250)) * 8)
    return ByteText.load(path, sequence=16)


def test_the_tail_is_held_out(text: ByteText) -> None:
    assert len(text.training) + len(text.held_out) == 2000
    assert len(text.held_out) == 100


def test_a_sample_is_real_text_and_its_labels_are_itself(text: ByteText) -> None:
    training, held_out = text.corpus.training, text.corpus.held_out
    assert len(training) == 1900 // 16 and len(held_out) == 100 // 16  # type: ignore[arg-type]
    for number in (0, 7, 117):
        sample = training[number]
        assert sample["input_ids"].shape == (16,) and sample["input_ids"].dtype == torch.int64
        assert torch.equal(sample["input_ids"], sample["labels"])
        assert torch.equal(sample["input_ids"].byte(), text.training[number * 16 : number * 16 + 16])


def test_held_out_sequences_are_spread_evenly(text: ByteText) -> None:
    batch = text.held_out_batch(size=2)
    assert torch.equal(batch["input_ids"][0].byte(), text.held_out[:16])
    assert torch.equal(batch["input_ids"][1].byte(), text.held_out[-16:])


def test_the_shortest_text_that_serves(tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_bytes(b"x" * 32)
    text = ByteText.load(path, sequence=16)
    assert text.held_out_batch(size=2)["input_ids"].shape == (2, 16)
    assert len(text.corpus.training) == len(text.corpus.held_out) == 1  # type: ignore[arg-type]


def test_a_folder_of_text(tmp_path: Path) -> None:
    for name, content in (("b.txt", b"y" * 40), ("a/a.md", b"x" * 40), ("c.bin", b"z" * 40)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    text = ByteText.load(tmp_path, sequence=16)
    assert bytes(text.training.tolist() + text.held_out.tolist()) == b"x" * 40 + b"y" * 40
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="has no text"):
        ByteText.load(tmp_path / "none", sequence=16)


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
