"""Reads and writes parts of tensors in safetensors files, and no more of the file than a part is.

    8 bytes   n, little-endian
    n bytes   JSON: {"name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [begin, end]}, …, "__metadata__": {…}}
    the rest  the tensors, row-major; offsets count from here

(https://huggingface.co/docs/safetensors). Weights of several files have an index, JSON with `weight_map`: name → file. What is read goes
straight into the part's own memory: a mapped file would count as memory of the process, page for page, until the last of it is closed.
What is written goes to its places in files that have their headers and lengths already (`make_files`), so that many may write one tensor.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shardwise.errors import WeightsError

__all__ = ["Checkpoint", "Entry", "make_files"]

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_LENGTH_BYTES = 8
_MOST_FILE_BYTES = 5_000_000_000  # of several tensors; as others cut their files
_MOST_HEADER_BYTES = 100_000_000  # as the format's own reader allows
_BUFFER_BYTES = 1 << 22
_RUN_BYTES = 1 << 15  # shorter runs are read together with what lies between them
_INDEX = ".safetensors.index.json"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A tensor in a file; offset: of its first byte in the file."""

    name: str
    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    def read(self, indices: Sequence[Tensor]) -> Tensor:
        """The part of the tensor with these indices along each dim (int64, increasing), contiguous on the CPU.

        Raises WeightsError where the file is shorter than it was.
        """
        part = torch.empty([len(each) for each in indices], dtype=self.dtype)
        if part.numel():
            with self.path.open("rb", buffering=0) as file:
                _Reader(self, file.fileno()).read(part, indices)
        return part

    def write(self, part: Tensor, indices: Sequence[Tensor], file: int) -> None:
        """Puts the part (of the tensor's dtype, on the CPU) there. file: descriptor of a file that is open for writing."""
        if not part.numel():
            return
        view = part.contiguous().view(-1).view(torch.uint8).numpy().data
        for at, offset, size in _stretches(self, indices):
            done = 0
            while done < size:
                done += os.pwrite(file, view[at + done : at + size], offset + done)


@dataclass(frozen=True)
class _Reader:
    entry: Entry
    file: int

    def read(self, part: Tensor, indices: Sequence[Tensor]) -> None:
        """Row by row of the dims that are cut, in runs of what lies next to each other in the file."""
        flat = part.view(-1).view(torch.uint8)
        cut = _Cut.of(self.entry, indices)
        if cut is not None and cut.is_fine:
            self._by_blocks(flat.view(len(cut.outer), -1), cut.outer, cut.inner, cut.step, cut.row_bytes)
            return
        for at, offset, size in _stretches(self.entry, indices):
            self._fill(flat[at : at + size], offset)

    def _by_blocks(self, rows: Tensor, outer: Tensor, inner: list[tuple[int, int]], step: int, row_bytes: int) -> None:
        """Short runs: all from the first to the last of them, of as many neighbouring rows as a buffer holds."""
        first, last = inner[0][0] * row_bytes, inner[-1][1] * row_bytes
        count = max(1, _BUFFER_BYTES // step)
        buffer = torch.empty(min(count, len(outer)) * step, dtype=torch.uint8)
        for begin, end in _neighbours(outer, count):
            held = buffer[: (end - begin) * step]
            self._fill(held[first : len(held) - step + last], self.entry.offset + int(outer[begin]) * step + first)
            at = 0
            for start, stop in inner:
                size = (stop - start) * row_bytes
                rows[begin:end, at : at + size] = held.view(end - begin, step)[:, start * row_bytes : stop * row_bytes]
                at += size

    def _fill(self, target: Tensor, offset: int) -> None:
        """Bytes of the file into a flat tensor of bytes."""
        view = target.numpy().data
        done = 0
        while done < len(view):
            count = os.preadv(self.file, [view[done : done + _BUFFER_BYTES]], offset + done)
            if count == 0:
                raise WeightsError(
                    f"{self.entry.path} ends at byte {offset + done}, inside {self.entry.name}, which goes on to {offset + len(view)}: "
                    "it was changed while it was read"
                )
            done += count


@dataclass(frozen=True, kw_only=True)
class _Cut:
    """How a part lies in the file: of each of the rows `outer`, `step` bytes apart, the runs `inner`, in units of `row_bytes`."""

    outer: Tensor
    inner: list[tuple[int, int]]
    step: int
    row_bytes: int

    @staticmethod
    def of(entry: Entry, indices: Sequence[Tensor]) -> _Cut | None:
        """None where it is the whole tensor."""
        shape = entry.shape
        whole = next((dim for dim in range(len(shape), 0, -1) if len(indices[dim - 1]) != shape[dim - 1]), 0)  # dims from here on are whole
        if whole == 0:
            return None
        row_bytes = prod(shape[whole:]) * entry.dtype.itemsize
        return _Cut(
            outer=_positions(indices[: whole - 1], shape[: whole - 1]),
            inner=_runs(indices[whole - 1]),
            step=shape[whole - 1] * row_bytes,
            row_bytes=row_bytes,
        )

    @property
    def is_fine(self) -> bool:
        """Whether its runs are so short, and so near each other, that what lies between them is better read with them."""
        spread = (self.inner[-1][1] - self.inner[0][0]) * self.row_bytes
        return min(stop - start for start, stop in self.inner) * self.row_bytes < _RUN_BYTES and spread <= _BUFFER_BYTES


def _stretches(entry: Entry, indices: Sequence[Tensor]) -> Iterator[tuple[int, int, int]]:
    """(first byte in the part, first byte in the file, how many) of each run."""
    cut = _Cut.of(entry, indices)
    if cut is None:
        yield 0, entry.offset, prod(entry.shape) * entry.dtype.itemsize
        return
    at = 0
    for position in cut.outer.tolist():
        for start, stop in cut.inner:
            size = (stop - start) * cut.row_bytes
            yield at, entry.offset + position * cut.step + start * cut.row_bytes, size
            at += size


def _runs(indices: Tensor) -> list[tuple[int, int]]:
    """[0, 1, 2, 6, 7] → (0, 3), (6, 8)."""
    breaks = (indices.diff() != 1).nonzero().flatten() + 1
    edges = [0, *breaks.tolist(), len(indices)]
    return [(int(indices[start]), int(indices[stop - 1]) + 1) for start, stop in itertools.pairwise(edges)]


def _positions(indices: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    """Numbers of the rows that these indices name, in order."""
    found = torch.zeros(1, dtype=torch.int64)
    for index, size in zip(indices, shape, strict=True):
        found = (found[:, None] * size + index[None, :]).flatten()
    return found


def _neighbours(positions: Tensor, most: int) -> Iterator[tuple[int, int]]:
    """Stretches of at most so many rows that follow each other."""
    begin = 0
    for start, stop in _runs(positions):
        for first in range(start, stop, most):
            end = begin + min(most, stop - first)
            yield begin, end
            begin = end


@dataclass(frozen=True)
class Checkpoint:
    """Weights on disk. path: a .safetensors file, an index of several, or a directory that holds one of these."""

    path: Path

    @cached_property
    def entries(self) -> dict[str, Entry]:
        """Name → where it is. Raises WeightsError for what is missing or damaged."""
        found = _found(self.path)
        if not found.name.endswith(_INDEX):
            return _header(found)
        where = _weight_map(found)
        files = {name: _header(found.parent / name) for name in sorted(set(where.values()))}
        for name, file in where.items():
            if name not in files[file]:
                raise WeightsError(f"{found} says that {name} is in {file}, which holds {len(files[file])} other tensors")
        return {name: files[file][name] for name, file in where.items()}


def make_files(folder: Path, stem: str, tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]]) -> None:
    """Files of these tensors (name → dtype, shape) with room for their values, and the index `{stem}.safetensors.index.json` of them.

    Each file has 5 GB at most where it has several tensors, as other programs that write the format do it. Raises OSError.
    """
    groups: list[list[str]] = [[]]
    sizes = {name: prod(shape) * dtype.itemsize for name, (dtype, shape) in tensors.items()}
    held = 0
    for name, size in sizes.items():
        if groups[-1] and held + size > _MOST_FILE_BYTES:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += size
    where: dict[str, str] = {}
    for number, names in enumerate(groups, 1):
        file = f"{stem}-{number:05}-of-{len(groups):05}.safetensors"
        where |= dict.fromkeys(names, file)
        _make_file(folder / file, {name: tensors[name] for name in names})
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where}
    (folder / f"{stem}{_INDEX}").write_text(json.dumps(index, indent=2))


def _make_file(path: Path, tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]]) -> None:
    """Wider dtypes first: so each tensor begins at a multiple of its width."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in sorted(tensors.items(), key=lambda item: -item[1][0].itemsize):
        begin, end = end, end + prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _LENGTH_BYTES)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(_LENGTH_BYTES, "little") + text)
        file.truncate(_LENGTH_BYTES + len(text) + end)


def _found(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise WeightsError(f"there are no weights at {path}; give a .safetensors file, an index *{_INDEX}, or their directory")
    for pattern in (f"*{_INDEX}", "*.safetensors"):
        files = sorted(path.glob(pattern))
        if len(files) > 1:
            raise WeightsError(f"{path} holds {len(files)} files {pattern} ({files[0].name}, {files[1].name}, …); name the one to load")
        if files:
            return files[0]
    raise WeightsError(f"{path} holds no .safetensors file; weights in other forms are not read")


def _weight_map(path: Path) -> dict[str, str]:
    try:
        found = json.loads(path.read_bytes())["weight_map"]
        names = {str(name): str(file) for name, file in found.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{path} is no index of weights (JSON with weight_map: name → file): {type(error).__name__}: {error}") from error
    if outside := next((file for file in names.values() if Path(file).name != file), None):
        raise WeightsError(f"{path} names the file {outside!r}; files of an index lie beside it")
    return names


def _header(path: Path) -> dict[str, Entry]:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            if not 0 < length <= min(size - _LENGTH_BYTES, _MOST_HEADER_BYTES):
                raise WeightsError(f"{path} is no safetensors file: its header would have {length:,} bytes, the file has {size:,}")
            found = json.loads(file.read(length))
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path} cannot be read as safetensors: {error}") from error
    if not isinstance(found, dict):
        raise WeightsError(f"{path} is no safetensors file: its header is no JSON object")
    start = _LENGTH_BYTES + length
    return {name: _entry(name, said, path, start, size) for name, said in found.items() if name != "__metadata__"}


def _entry(name: str, said: Any, path: Path, start: int, size: int) -> Entry:
    try:
        dtype, shape, (begin, end) = said["dtype"], tuple(int(each) for each in said["shape"]), said["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"{path}: the header's entry of {name} is damaged: {said!r}") from error
    if dtype not in _DTYPES:
        raise WeightsError(f"{path}: {name} has dtype {dtype}, which is not read; there are {', '.join(_DTYPES)}")
    expected = prod(shape) * _DTYPES[dtype].itemsize
    if end - begin != expected or begin < 0:
        raise WeightsError(f"{path}: {name} of {dtype} {list(shape)} takes {expected:,} bytes, the header gives it {end - begin:,}")
    if start + end > size:
        raise WeightsError(f"{path} is cut short: {name} ends at byte {start + end:,}, the file at {size:,}")
    return Entry(name=name, path=path, dtype=_DTYPES[dtype], shape=shape, offset=start + begin)
