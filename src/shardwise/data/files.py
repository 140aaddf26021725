"""Folders of images and recordings, a subfolder a class.

images/cat/1.jpg        label 0      audio/no/a.wav         label 0
images/dog/2.png        label 1      audio/yes/b.wav        label 1
"""

from __future__ import annotations

import wave
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from shardwise.errors import DataError

__all__ = ["AudioFolder", "ImageFolder"]

_IMAGES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
_RECORDINGS = (".wav",)


class _Folder(Dataset[dict[str, Tensor]]):
    """Files by class, in the order of their names."""

    def __init__(self, path: str | Path, endings: Sequence[str], kind: str) -> None:
        root = Path(path)
        if not root.is_dir():
            raise DataError(f"there is no folder {root}; give one with a subfolder of {kind} for each class")
        self.classes = sorted(each.name for each in root.iterdir() if each.is_dir() and not each.name.startswith("."))
        self.files = [
            (file, label)
            for label, name in enumerate(self.classes)
            for file in sorted((root / name).rglob("*"))
            if file.suffix.lower() in endings
        ]
        if not self.files:
            raise DataError(
                f"{root} has no {kind} ({', '.join(endings)}) in subfolders, of which it has {len(self.classes)}, one for each class"
            )

    def __len__(self) -> int:
        return len(self.files)


class ImageFolder(_Folder):
    """Images as the transformers library's image models take them: pixel_values, float32 [3, size, size] from -1 to 1, and labels, int64.

    size: to which an image is resized, whatever its shape was. Needs the package Pillow.
    Raises DataError for a folder without images, and for a file that is none.
    """

    def __init__(self, path: str | Path, *, size: int) -> None:
        super().__init__(path, _IMAGES, "images")
        self.size = size

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        file, label = self.files[index]
        pixels = torch.from_numpy(_pixels(file, self.size)).permute(2, 0, 1).float() / 127.5 - 1
        return {"pixel_values": pixels.contiguous(), "labels": torch.tensor(label)}


def _pixels(file: Path, size: int) -> Any:
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise DataError("reading images needs the package Pillow: pip install pillow") from error
    try:
        with Image.open(file) as image:
            return np.array(image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR))
    except (UnidentifiedImageError, OSError) as error:
        raise DataError(f"{file} is no image that can be read: {error}") from error


class AudioFolder(_Folder):
    """Recordings (.wav, whole numbers of 8, 16 or 32 bits) as input_values, float32 [samples] from -1 to 1, and labels, int64.

    samples: length to which a recording is cut, or filled up with silence; rate: samples a second that all must have, the first one's by
    default. Channels are averaged.
    Raises DataError for a folder without recordings, a file that is none, and one of another rate.
    """

    def __init__(self, path: str | Path, *, samples: int, rate: int | None = None) -> None:
        super().__init__(path, _RECORDINGS, "recordings")
        self.samples, self.rate = samples, rate or _rate(self.files[0][0])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        file, label = self.files[index]
        rate, sound = _sound(file)
        if rate != self.rate:
            raise DataError(f"{file} has {rate} samples a second, others have {self.rate}; bring all to one rate")
        heard = torch.zeros(self.samples)
        heard[: len(sound)] = torch.from_numpy(sound[: self.samples])
        return {"input_values": heard, "labels": torch.tensor(label)}


_PCM: dict[int, tuple[Any, float, float]] = {1: (np.uint8, 128.0, 128.0), 2: ("<i2", 0.0, 32768.0), 4: ("<i4", 0.0, 2147483648.0)}


def _rate(file: Path) -> int:
    return _sound(file)[0]


def _sound(file: Path) -> tuple[int, Any]:
    """(samples a second, float32 [samples])."""
    try:
        with wave.open(str(file)) as recording:
            width, channels, rate = recording.getsampwidth(), recording.getnchannels(), recording.getframerate()
            content = recording.readframes(recording.getnframes())
    except (wave.Error, EOFError, OSError) as error:
        raise DataError(f"{file} is no recording that can be read: {error}") from error
    if width not in _PCM:
        raise DataError(f"{file} has samples of {8 * width} bits; 8, 16 and 32 can be read")
    kind, zero, full = _PCM[width]
    values = (np.frombuffer(content, dtype=kind).astype(np.float32) - zero) / full
    return rate, values.reshape(-1, channels).mean(axis=1, dtype=np.float32)
