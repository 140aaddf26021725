"""Keeps what was found of operators by running them, as one JSON file for each in the user's cache directory.

A file that is damaged, or of another format, is as good as none and is written anew. A kept rule is checked again by whoever loads it.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import sys
import tempfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from shardwise._torch import functions_behind
from shardwise.capture.graph import Op
from shardwise.sharding.finding import Finding
from shardwise.sharding.signature import Dims, Split, dims

__all__ = ["Entry", "cache_file", "cached", "call_key", "keep"]

_FORMAT = 1  # raise it when the search changes: what an older one found is then searched anew


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What was found; without a finding the operator is kept whole, for a reason."""

    finding: Finding | None
    reason: str


class _Split(BaseModel):
    model_config = ConfigDict(extra="forbid")
    addends: list[int]
    uneven: bool


class _File(BaseModel):
    """key: of the call; shapes: on which a reason holds (a finding holds for all)."""

    model_config = ConfigDict(extra="forbid")
    key: str
    shapes: list[list[int]]
    reason: str = ""
    signature: str | None = None
    splits: dict[str, _Split] = {}
    linear: list[list[int]] = []
    reasons: dict[str, str] = {}


def call_key(op: Op) -> str:
    """What decides how a call may be split: operator and versions, constants, and its tensors' ranks, dtypes, gradients and dims of one."""
    inputs = [
        (len(value.shape), [dim for dim, size in enumerate(value.shape) if size == 1], str(value.dtype), value.requires_grad)
        for value in op.inputs
    ]
    outputs = [(len(value.shape), value.requires_grad) for value in op.outputs]
    versions = (_FORMAT, torch.__version__, metadata.version("shardwise"), _version(op.target))
    return repr((op.name, versions, inputs, outputs, op.args, op.kwargs))


def _version(target: Any) -> str:
    """Of what defines an operator: its own word, its source's hash, or its package's version."""
    if given := getattr(target, "version", None):
        return str(given)
    functions = functions_behind(target) if isinstance(target, torch._ops.OpOverload) else [target]
    try:
        source = "".join(inspect.getsource(function) for function in functions)
        return hashlib.sha256(source.encode()).hexdigest()[:16] if source else _package_version(target.__module__)
    except (OSError, TypeError):
        return _package_version(getattr(target, "__module__", None) or "")


def _package_version(module: str) -> str:
    name = module.split(".")[0]
    try:
        return metadata.version(name)
    except (metadata.PackageNotFoundError, ValueError):
        return str(getattr(sys.modules.get(name), "__version__", ""))


def cache_file(op: Op, directory: Path) -> Path:
    """The file that keeps what was found of such calls."""
    name = "".join(letter if letter.isalnum() or letter in "._" else "_" for letter in op.name)[:64]
    return directory / "rules" / f"{name}-{hashlib.sha256(call_key(op).encode()).hexdigest()[:16]}.json"


def cached(op: Op, directory: Path) -> Entry | None:
    """What is kept of such a call; None where nothing is, or it is damaged, or says that another shape is kept whole."""
    try:
        kept = _File.model_validate_json(cache_file(op, directory).read_bytes())
        if kept.key != call_key(op) or (kept.signature is None and kept.shapes != [list(value.shape) for value in op.inputs]):
            return None
        return Entry(finding=_read(kept), reason=kept.reason)
    except (OSError, ValidationError, ValueError):
        return None


def keep(op: Op, entry: Entry, directory: Path) -> None:
    """Writes beside and renames, so that a reader never sees half a file. A directory that cannot be written is none."""
    path = cache_file(op, directory)
    text = _written(op, entry).model_dump_json(indent=1)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
            file.write(text)
        os.replace(file.name, path)
    except OSError:
        return


def _written(op: Op, entry: Entry) -> _File:
    shapes = [list(value.shape) for value in op.inputs]
    found = entry.finding
    if found is None:
        return _File(key=call_key(op), shapes=shapes, reason=entry.reason)
    return _File(
        key=call_key(op),
        shapes=shapes,
        signature=f"{_text(found.inputs)} -> {_text(found.outputs)}",
        splits={name: _Split(addends=sorted(split.addends), uneven=split.uneven) for name, split in found.splits.items()},
        linear=[sorted(each) for each in found.linear],
        reasons=dict(found.reasons),
    )


def _text(tensors: tuple[Dims, ...]) -> str:
    return ", ".join(" ".join(f"({' '.join(dim)})" if len(dim) > 1 else dim[0] if dim else "1" for dim in tensor) for tensor in tensors)


def _read(kept: _File) -> Finding | None:
    if kept.signature is None:
        return None
    before, after = kept.signature.split("->")
    splits = {name: Split(addends=frozenset(each.addends), uneven=each.uneven, blocked=False) for name, each in kept.splits.items()}
    linear = tuple(frozenset(each) for each in kept.linear)
    return Finding(inputs=dims(before) if before.strip() else (), outputs=dims(after), splits=splits, linear=linear, reasons=kept.reasons)
