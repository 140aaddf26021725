"""Folders of text, images and recordings."""

from __future__ import annotations

import wave
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from shardwise.data import AudioFolder, ImageFolder
from shardwise.errors import DataError


def recording(path: Path, values: np.ndarray, *, rate: int = 8000, channels: int = 1, width: int = 2) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(values.tobytes())


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for number, name in enumerate(["cat/a.png", "cat/deep/b.png", "dog/a.jpg"]):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB" if number else "L", (5 + number, 9), color=255 if not number else (255, 0, 128)).save(tmp_path / name)
    (tmp_path / "dog" / "note.txt").write_text("no image")
    return tmp_path


@pytest.fixture
def recordings(tmp_path: Path) -> Path:
    recording(tmp_path / "no" / "a.wav", np.array([0, 16384, -32768], dtype="<i2"))
    recording(tmp_path / "yes" / "b.wav", np.array([32767, 0, 0, 0, 100], dtype="<i2"))
    recording(tmp_path / "yes" / "c.wav", np.array([2**30, 0, 2**29, 2**29], dtype="<i4"), channels=2, width=4)
    recording(tmp_path / "yes" / "d.wav", np.array([128, 192, 0], dtype=np.uint8), width=1)
    return tmp_path


def test_images(images: Path) -> None:
    found = ImageFolder(images, size=4)
    assert found.classes == ["cat", "dog"] and len(found) == 3
    white, last = found[0], found[2]
    assert white["pixel_values"].dtype == torch.float32 and torch.equal(white["pixel_values"], torch.ones(3, 4, 4))
    assert [each["labels"].item() for each in found] == [0, 0, 1]  # type: ignore[attr-defined]
    torch.testing.assert_close(last["pixel_values"].mean((1, 2)), torch.tensor([1.0, -1.0, 0.004]), atol=0.05, rtol=0)


def test_recordings(recordings: Path) -> None:
    found = AudioFolder(recordings, samples=4)
    heard = [found[index] for index in range(len(found))]
    assert heard[0]["input_values"].tolist() == [0, 0.5, -1, 0], "filled up with silence"
    assert heard[1]["input_values"].tolist() == [32767 / 32768, 0, 0, 0], "cut"
    assert heard[2]["input_values"].tolist() == [0.25, 0.25, 0, 0], "the mean of two channels"
    assert heard[3]["input_values"].tolist() == [0, 0.5, -1, 0], "8 bits"
    assert [each["labels"].item() for each in heard] == [0, 1, 1, 1]


def test_bad_folders_are_named(images: Path, recordings: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no folder nowhere"):
        ImageFolder("nowhere", size=4)
    (tmp_path / "empty" / "class").mkdir(parents=True)
    with pytest.raises(DataError, match=r"empty has no recordings \(\.wav\) in subfolders, of which it has 1"):
        AudioFolder(tmp_path / "empty", samples=4)
    (images / "cat" / "a.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"a\.png is no image that can be read"):
        ImageFolder(images, size=4)[0]
    recording(recordings / "yes" / "b.wav", np.zeros(3, dtype="<i2"), rate=16000)
    with pytest.raises(DataError, match=r"b\.wav has 16000 samples a second, others have 8000"):
        AudioFolder(recordings, samples=4)[1]
