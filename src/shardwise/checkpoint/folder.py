"""A checkpoint is a folder. It is written beside its place and renamed when it is whole, so that the last good one is there at any time.

run/                     model-00001-of-00002.safetensors …, model.safetensors.index.json    parameters and buffers, under their names
    optimizer/           optimizer-00001-of-00001.safetensors …                              state.<parameter>.<key>
    checkpoint.json      steps, seed, groups, positions; written last
.run.draft/              while it is written
.run.previous/           the one before, for the moment in which the new one takes its name
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from shardwise.errors import WeightsError

__all__ = ["OPTIMIZER", "RECORD", "Record", "begin", "discard", "finish", "found", "plain", "read_record"]

RECORD, OPTIMIZER = "checkpoint.json", "optimizer"


class Record(BaseModel):
    """What a checkpoint holds beside tensors.

    optimizers: their classes; groups: theirs, with their parameters' names; states: names of their tensors; values: parameter → what else
    an optimizer keeps of it; layout: in which it was saved, for people; others: what else was saved, by name.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: Literal[1] = 1
    steps: int
    seed: int
    layout: str
    loss_scale: dict[str, int | float] | None = None
    optimizers: list[str]
    groups: list[dict[str, Any]]
    states: list[str] = []
    values: dict[str, dict[str, Any]]
    others: dict[str, Any]


def _beside(folder: Path, what: str) -> Path:
    return folder.with_name(f".{folder.name}.{what}")


def begin(folder: Path) -> Path:
    """An empty folder to write into. Raises WeightsError where `folder` holds something else than a checkpoint."""
    previous, draft = _beside(folder, "previous"), _beside(folder, "draft")
    if previous.exists() and not folder.exists():  # a save ended between its two renames
        previous.rename(folder)
    if folder.exists() and not (folder / RECORD).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise WeightsError(f"{folder} is there and is no checkpoint, which would take its place; name another folder or empty it")
    for stale in (draft, previous):
        if stale.exists():
            shutil.rmtree(stale)
    (draft / OPTIMIZER).mkdir(parents=True)
    return draft


def finish(folder: Path, record: Record) -> None:
    """Gives the draft, of which all tensors are written, its place."""
    draft, previous = _beside(folder, "draft"), _beside(folder, "previous")
    (draft / RECORD).write_text(json.dumps(record.model_dump(), indent=1))
    for path in (*draft.glob("*.json"), *(draft / OPTIMIZER).glob("*.json"), draft / OPTIMIZER, draft):
        _settle(path)
    if folder.exists():
        folder.rename(previous)
    draft.rename(folder)
    _settle(folder.parent)
    if previous.exists():
        shutil.rmtree(previous)


def discard(folder: Path) -> None:
    """What was written of a checkpoint that cannot be finished."""
    shutil.rmtree(_beside(folder, "draft"), ignore_errors=True)


def _settle(path: Path) -> None:
    """Waits until it is on disk."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def found(folder: Path) -> Path:
    """Where the last good checkpoint of this name is. Raises WeightsError where there is none."""
    for path in (folder, _beside(folder, "previous")):
        if (path / RECORD).is_file():
            return path
    raise WeightsError(
        f"there is no checkpoint in {folder} (no {RECORD}); give a folder that job.save or `shardwise train --save` has made"
    )


def read_record(folder: Path) -> Record:
    """Raises WeightsError where it is missing, damaged or of another version."""
    path = found(folder) / RECORD
    try:
        return Record.model_validate(json.loads(path.read_bytes()))
    except ValidationError as error:
        first = error.errors()[0]
        raise WeightsError(f"{path} is damaged or of another version: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path} cannot be read: {error}") from error


def plain(value: Any, where: str) -> Any:
    """The value as JSON can hold it. Raises WeightsError, with the place, for what it cannot: nothing is pickled."""
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise WeightsError(f"{where} has the key {key!r}, a {type(key).__name__}; a checkpoint holds names that are strings")
        return {key: plain(each, f"{where}.{key}") for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each, f"{where}[{number}]") for number, each in enumerate(value)]
    if value is None or isinstance(value, (bool, int, float, str)):
        return json.loads(json.dumps(value))
    raise WeightsError(
        f"{where} is a {type(value).__name__}; beside the model's tensors a checkpoint holds numbers, strings, lists and dicts of them: "
        "return these from state_dict (a tensor's .tolist())"
    )
