"""Parts of tensors in safetensors files, read without the rest; what is wrong with a file is named."""

from __future__ import annotations

import itertools
import json
import os
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from shardwise.checkpoint import safetensors as reading
from shardwise.checkpoint.safetensors import Checkpoint, make_files
from shardwise.errors import WeightsError

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn]


def indices(size: int, choose: random.Random) -> torch.Tensor:
    """All, a run, or several runs."""
    kind = choose.randrange(3)
    if kind == 0:
        return torch.arange(size)
    if kind == 1:
        start = choose.randrange(size + 1)
        return torch.arange(start, choose.randrange(start, size + 1))
    return torch.tensor([index for index in range(size) if choose.random() < 0.6], dtype=torch.int64)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("small", [False, True])
def test_parts_are_what_indexing_the_whole_gives(seed: int, small: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """small: buffers that hold a row or two, and runs that are never too short to be read alone."""
    if small:
        monkeypatch.setattr(reading, "_BUFFER_BYTES", 40)
        monkeypatch.setattr(reading, "_RUN_BYTES", 12)
    choose, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    shapes = [(), (7,), (5, 6), (3, 4, 5), (2, 3, 1, 4), (0, 3)]
    tensors = {
        f"{shape}": torch.randint(0, 2, shape, generator=generator).to(choose.choice(DTYPES))
        if choose.random() < 0.5
        else torch.randn(shape, generator=generator)
        for shape in shapes
    }
    save_file(tensors, tmp_path / "w.safetensors")
    entries = Checkpoint(tmp_path).entries
    assert set(entries) == set(tensors)
    for name, tensor in tensors.items():
        assert (entries[name].shape, entries[name].dtype) == (tuple(tensor.shape), tensor.dtype)
        for _ in range(6):
            wanted = [indices(size, choose) for size in tensor.shape]
            expected = tensor
            for dim, index in enumerate(wanted):
                expected = (
                    expected.view(torch.uint8).index_select(dim, index).view(tensor.dtype)
                    if tensor.dtype == torch.float8_e4m3fn
                    else expected.index_select(dim, index)
                )
            part = entries[name].read(wanted)
            assert part.is_contiguous() and part.shape == expected.shape
            assert torch.equal(part.to(torch.float64), expected.to(torch.float64))


def test_no_more_is_read_than_the_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"w": torch.zeros(4096, 1024)}, tmp_path / "w.safetensors")
    counted: list[int] = []
    preadv = reading.os.preadv
    monkeypatch.setattr(reading.os, "preadv", lambda *arguments: counted.append(preadv(*arguments)) or counted[-1])
    entry = Checkpoint(tmp_path / "w.safetensors").entries["w"]
    entry.read([torch.arange(1024, 2048), torch.arange(1024)])
    assert sum(counted) == 1024 * 1024 * 4


def test_several_files_with_an_index(tmp_path: Path) -> None:
    save_file({"a": torch.arange(3.0)}, tmp_path / "one.safetensors")
    save_file({"b": torch.arange(4.0), "c": torch.ones(2)}, tmp_path / "two.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
    for path in (index, tmp_path):
        entries = Checkpoint(path).entries
        assert list(entries) == ["a", "b"]
        assert torch.equal(entries["b"].read([torch.arange(4)]), torch.arange(4.0))


def damaged(tmp_path: Path, header: object, size: int = 16) -> Path:
    text = json.dumps(header).encode()
    path = tmp_path / "w.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(size))
    return path


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 12]}}, r"w of F32 \[4\] takes 16 bytes, the header gives it 12"),
        ({"w": {"dtype": "F32", "shape": [8], "data_offsets": [0, 32]}}, r"cut short: w ends at byte [\d,]+, the file at [\d,]+"),
        ({"w": {"dtype": "F4", "shape": [4], "data_offsets": [0, 16]}}, "w has dtype F4, which is not read; there are BOOL"),
        ({"w": {"shape": [4]}}, "the header's entry of w is damaged"),
        ([1, 2], "its header is no JSON object"),
    ],
)
def test_a_damaged_header_is_named(header: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=message):
        _ = Checkpoint(damaged(tmp_path, header)).entries


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"there are no weights at .*; give a .safetensors file"):
        _ = Checkpoint(tmp_path / "nothing").entries
    with pytest.raises(WeightsError, match=r"holds no \.safetensors file"):
        _ = Checkpoint(tmp_path).entries
    path = tmp_path / "w.safetensors"
    path.write_bytes(b"PK\x03\x04 a pickle inside a zip archive")
    with pytest.raises(WeightsError, match=r"its header would have .* bytes, the file has"):
        _ = Checkpoint(path).entries
    (tmp_path / "x.safetensors").write_bytes(b"")
    with pytest.raises(WeightsError, match=r"holds 2 files \*\.safetensors \(w\.safetensors, x\.safetensors"):
        _ = Checkpoint(tmp_path).entries
    index = tmp_path / "w.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "../other.safetensors"}}')
    with pytest.raises(WeightsError, match="files of an index lie beside it"):
        _ = Checkpoint(index).entries
    index.write_text("{}")
    with pytest.raises(WeightsError, match="is no index of weights"):
        _ = Checkpoint(index).entries


def test_a_file_that_shrinks_meanwhile_is_named(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(100)}, tmp_path / "w.safetensors")
    entry = Checkpoint(tmp_path).entries["w"]
    with (tmp_path / "w.safetensors").open("r+b") as file:
        file.truncate(200)
    with pytest.raises(WeightsError, match=r"ends at byte \d+, inside w, .* changed while it was read"):
        entry.read([torch.arange(100)])


@pytest.mark.parametrize("seed", range(8))
def test_parts_that_many_write_are_the_whole(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each dim's indices are dealt out to up to three writers; the format's own reader then reads all of it."""
    monkeypatch.setattr(reading, "_MOST_FILE_BYTES", 200)
    choose, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    shapes = [(), (7,), (5, 6), (3, 4, 5), (2, 3, 1, 4), (0, 3)]
    tensors = {f"{shape}": torch.randint(0, 2, shape, generator=generator).to(choose.choice(DTYPES)) for shape in shapes}
    make_files(tmp_path, "model", {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()})
    entries = Checkpoint(tmp_path).entries
    for name, tensor in tensors.items():
        dealt = [[choose.randrange(3) for _ in range(size)] for size in tensor.shape]
        for writers in itertools.product(*(range(3) for _ in tensor.shape)):
            pairs = zip(dealt, writers, strict=True)
            own = [torch.tensor([at for at, who in enumerate(every) if who == own], dtype=torch.int64) for every, own in pairs]
            part = tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor
            for dim, index in enumerate(own):
                part = part.index_select(dim, index)
            file = os.open(entries[name].path, os.O_WRONLY)
            entries[name].write(part.view(tensor.dtype), own, file)
            os.close(file)
    files = sorted({entry.path for entry in entries.values()})
    assert len(files) > 1 and files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    found = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(
            found[name].view(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)
        )
    assert json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"] == {n: e.path.name for n, e in entries.items()}
