"""What --data names."""

from __future__ import annotations

import wave
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from shardwise.errors import DataError, ModelError
from shardwise.training_data import Inputs, read_corpus

TEXT: Inputs = {"input_ids": (torch.int64, (2, 8)), "labels": (torch.int64, (2, 8))}
IMAGES: Inputs = {"pixel_values": (torch.float32, (2, 3, 8, 8)), "labels": (torch.int64, (2,))}
SOUNDS: Inputs = {"input_values": (torch.float32, (2, 1)), "labels": (torch.int64, (2,))}
OWN: Inputs = {"x": (torch.float32, (4, 3))}

FUNCTIONS = """
import torch

def one():
    return [{"x": torch.full((3,), float(i))} for i in range(5)]

def two():
    return one(), one()[:2]

def wrong_shape():
    return [{"x": torch.zeros(4)}]

def wrong_name():
    return [{"y": torch.zeros(3)}]

def tuples():
    return [(torch.zeros(3),)]

def nothing():
    return []

class Stream:
    def __iter__(self):
        return iter(one())

def stream():
    return Stream(), one()[:2]

def held_out_stream():
    return one(), Stream()

def generator():
    return (sample for sample in one())
"""


def numbers(data: Any, name: str) -> list[float]:
    return [data[index][name].reshape(-1)[0].item() for index in range(len(data))]


def test_text(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("some text " * 50)
    found = read_corpus(str(tmp_path / "text.txt"), TEXT)
    assert found.tokens == 8 and bytes(found.training[1]["input_ids"].tolist()) == b"t some t"
    assert read_corpus(None, TEXT).name == "Python's standard library"


def test_recordings_and_one_in_twenty_held_out(tmp_path: Path) -> None:
    for number in range(100):
        path = tmp_path / str(number % 3) / f"{number}.wav"
        path.parent.mkdir(exist_ok=True)
        with wave.open(str(path), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(8000)
            file.writeframes(np.array([number], dtype="<i2").tobytes())
    found = read_corpus(str(tmp_path), SOUNDS)
    values = [[round(each * 32768) for each in numbers(part, "input_values")] for part in (found.training, found.held_out)]
    assert len(values[1]) == 5 and sorted(chain(*values)) == list(range(100)) and found.tokens is None


def test_images(tmp_path: Path) -> None:
    (tmp_path / "white").mkdir()
    for name in "abc":
        Image.new("RGB", (5, 9), color=(255, 255, 255)).save(tmp_path / "white" / f"{name}.png")
    found = read_corpus(str(tmp_path), IMAGES)
    assert torch.equal(found.training[1]["pixel_values"], torch.ones(3, 8, 8)) and len(found.held_out) == 1  # type: ignore[arg-type]


def test_a_function_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "own_data.py"
    path.write_text(FUNCTIONS)
    one, two = (read_corpus(f"{path}:{name}", OWN) for name in ("one", "two"))
    assert numbers(one.training, "x") == [0, 1, 2, 3, 4] and one.held_out is None
    assert numbers(two.held_out, "x") == [0, 1]
    assert [sample["x"][0].item() for sample in read_corpus(f"{path}:stream", OWN).training] == [0, 1, 2, 3, 4]
    for name, message in {
        "held_out_stream": r"the second is no stream\); it returned list and Stream",
        "wrong_shape": r"x in a sample of .*:wrong_shape is torch\.float32 \[4\]; the model's example batch has torch\.float32 \[3\]",
        "wrong_name": "x in a sample of .* is missing",
        "tuples": "a sample of .* is a tuple; it must be a dict",
        "nothing": "without samples",
        "generator": "must return a dataset with __len__ and __getitem__ or a stream.* it returned generator",
    }.items():
        with pytest.raises(DataError, match=message):
            read_corpus(f"{path}:{name}", OWN)
    with pytest.raises(ModelError, match=r"has no function 'three'\. Define .* return dataset"):
        read_corpus(f"{path}:three", OWN)


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"the model's batch is x; .*--data FILE\.py:FUNCTION"):
        read_corpus(str(tmp_path), OWN)
    with pytest.raises(DataError, match=r"pixel_values of the model's example batch is \[2, 8\]; it must have 4 dims"):
        read_corpus(str(tmp_path), {"pixel_values": (torch.float32, (2, 8)), "labels": (torch.int64, (2,))})
    (tmp_path / "class").mkdir()
    Image.new("L", (2, 2)).save(tmp_path / "class" / "one.png")
    with pytest.raises(DataError, match="has 1 sample; at least 2 are needed"):
        read_corpus(str(tmp_path), IMAGES)
