"""A job's state in files, and back: each rank writes what it holds to its places in whole tensors, and reads what it will hold.

    rank 0   w[:, :4] ──┐                                  ┌──▶ w[:2]   rank 0
    rank 1   w[:, 4:] ──┴─▶ w in model-….safetensors ──────┴──▶ w[2:]   rank 1, in another layout

No tensor is put together in memory, and nothing is pickled. Of what several ranks hold alike one writes it; which one, is spread over them.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from shardwise.checkpoint.folder import OPTIMIZER, Record, begin, discard, finish, found, plain, read_record
from shardwise.checkpoint.safetensors import Checkpoint, Entry, make_files
from shardwise.errors import ShardwiseError, WeightsError
from shardwise.program.program import ParameterPart, Program
from shardwise.runtime.state import SCALE, cut_key, groups_of, kept_by_optimizers, put_state
from shardwise.runtime.weights import FileWeights, LiveWeights, own_indices

if TYPE_CHECKING:
    from shardwise.runtime.job import Job

__all__ = ["Positioned", "load_job", "save_job"]

Described = tuple[str, str, torch.dtype, tuple[int, ...], tuple[int, ...], int]  # a piece's file, name, dtype, whole shape, part, elements


class Positioned(Protocol):
    """Something that knows where it is: a loader, a schedule of learning rates. Its state is numbers, strings, lists and dicts of them."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Any, /) -> Any: ...


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """What this rank holds of a tensor. file: "model" or "optimizer"; part: None of what is there whole; at: which part, the same on ranks
    that hold it alike."""

    file: str
    name: str
    tensor: Tensor
    shape: tuple[int, ...]
    part: ParameterPart | None = None
    at: tuple[int, ...] = ()

    @property
    def described(self) -> Described:
        return self.file, self.name, self.tensor.dtype, self.shape, self.at, self.tensor.numel()


def save_job(job: Job, folder: Path, others: Mapping[str, Positioned]) -> None:
    """As of `Job.save`."""
    folder = folder.absolute()
    rank, first = job.program.rank, job.program.rank == 0
    pieces: list[_Piece] = []
    records: list[Record] = []

    def held() -> tuple[list[Described], str, dict[str, Any]]:
        pieces.extend(_pieces(job))
        records.append(_record(job, others))
        return [piece.described for piece in pieces], _digest(records[0].others), records[0].values

    every = _together(folder, held)
    described = [each for each, _, _ in every]
    for other, (_, digest, _) in enumerate(every):
        if digest != every[0][1]:
            raise WeightsError(
                f"rank {other}'s {', '.join(others)} is at another place than rank 0's: all ranks must have taken the same number of "
                "batches, and their state must be the same"
            )
    writers = _writers(described)
    states = sorted({name for each in described for file, name, *_ in each if file == OPTIMIZER})
    rest = {"states": states, "values": {name: kept for _, _, each in every for name, kept in each.items()}}
    try:
        drafts = _together(folder, lambda: str(_made(folder, described)) if first else "")
        mine = [each for each in pieces if writers[each.file, each.name, each.at] == rank]
        _together(folder, lambda: _write(Path(drafts[0]), mine, job.program))
        _together(folder, lambda: finish(folder, records[0].model_copy(update=rest)) if first else None)
    except ShardwiseError:
        if first:
            discard(folder)
        raise


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _together(folder: Path, work: Callable[[], Any]) -> list[Any]:
    """What it returns on each rank. Where it fails on one, all raise the same error, naming the rank, and none waits for it."""
    result: Any = None
    wrong: tuple[type[ShardwiseError], str] | None = None
    try:
        result = work()
    except ShardwiseError as error:
        wrong = type(error), str(error)
    except OSError as error:
        wrong = WeightsError, f"{error.filename or folder}: {error.strerror or error}"
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, (result, wrong))
    for rank, (_, failure) in enumerate(every):
        if failure is not None:
            raise failure[0](f"{failure[1]} (rank {rank} of {len(every)})")
    return [each for each, _ in every]


# -- out -----------------------------------------------------------------------------------------------------------------------------------


def _record(job: Job, others: Mapping[str, Positioned]) -> Record:
    kept = kept_by_optimizers(job)
    values = {name: {key: value for key, value in each.items() if not isinstance(value, Tensor)} for name, each in kept.items()}
    return Record(
        steps=job.steps,
        seed=job.seed,
        layout=job.plan.layout,
        optimizers=[type(optimizer).__name__ for optimizer in job.optimizers],
        loss_scale=None if job.scaler is None else {name: getattr(job.scaler, name) for name in SCALE},
        groups=plain(groups_of(job), "optimizer"),
        values=plain({name: each for name, each in values.items() if each}, "optimizer"),
        others={name: plain(each.state_dict(), name) for name, each in others.items()},
    )


def _pieces(job: Job) -> Iterator[_Piece]:
    saved = set(job.source.names.values())
    for part in (*job.program.parameters, *job.program.buffers):
        if part.name in saved:
            tensor = job.parameters.of[part.name].detach() if part.has_copy else job.state[part.name]
            yield _piece(job, "model", part.name, tensor, part.updated_part if part.has_copy else part)
    if job.program.rank == 0:
        for name, tensor in job.source.unread(job.graph).items():
            yield _whole("model", name, tensor.detach())
    parts = {part.name: part for part in job.program.parameters}
    for name, kept in kept_by_optimizers(job).items():
        part = parts[name]
        for key, value in kept.items():
            if not isinstance(value, Tensor):
                continue
            if name in job.whole.of or not value.dim() or (value.shape != part.updated and part.updated == part.shape):
                yield _whole(OPTIMIZER, _state_name(name, key), value)
            elif tuple(value.shape) == part.updated:
                yield _piece(job, OPTIMIZER, _state_name(name, key), value, part.updated_part)
            else:
                raise WeightsError(
                    f"the optimizer keeps {key} of shape {list(value.shape)} for {name}, of which a rank has {list(part.updated)} of "
                    f"{list(part.shape)}: which part of a whole that is, is not known; take job.state_dict(sharded=True)"
                )


def _state_name(name: str, key: str) -> str:
    """As torch names it in flat states of optimizers."""
    return f"state.{name}.{key}"


def _piece(job: Job, file: str, name: str, tensor: Tensor, part: ParameterPart) -> _Piece:
    at = cut_key(part, job.program.coordinates, part.stored)
    return _Piece(file=file, name=name, tensor=tensor, shape=part.shape, part=part, at=at)


def _whole(file: str, name: str, tensor: Tensor) -> _Piece:
    return _Piece(file=file, name=name, tensor=tensor, shape=tuple(tensor.shape))


def _made(folder: Path, every: list[list[Described]]) -> Path:
    """The draft with its files, without their values."""
    draft = begin(folder)
    tensors: dict[str, dict[str, tuple[torch.dtype, tuple[int, ...]]]] = {"model": {}, OPTIMIZER: {}}
    covered: dict[tuple[str, str], dict[tuple[int, ...], int]] = {}
    for described in every:
        for file, name, dtype, shape, at, count in described:
            tensors[file][name] = dtype, shape
            covered.setdefault((file, name), {})[at] = count
    for (file, name), counts in covered.items():
        assert sum(counts.values()) == prod(tensors[file][name][1]), f"the parts of {name} are not the whole: {counts}"
    make_files(draft, "model", tensors["model"])
    make_files(draft / OPTIMIZER, OPTIMIZER, tensors[OPTIMIZER])
    return draft


def _writers(every: list[list[Described]]) -> dict[tuple[str, str, tuple[int, ...]], int]:
    holders: dict[tuple[str, str, tuple[int, ...]], list[int]] = {}
    for rank, described in enumerate(every):
        for file, name, _, _, at, _ in described:
            holders.setdefault((file, name, at), []).append(rank)
    return {key: ranks[zlib.crc32(key[1].encode()) % len(ranks)] for key, ranks in holders.items()}


def _write(draft: Path, pieces: list[_Piece], program: Program) -> None:
    if not draft.is_dir():
        raise WeightsError(f"{draft}, which rank 0 has made, is not there: save to a folder that all hosts share")
    entries = {"model": Checkpoint(draft).entries, OPTIMIZER: Checkpoint(draft / OPTIMIZER).entries} if pieces else {}
    files: dict[Path, int] = {}
    try:
        for piece in pieces:
            entry = entries[piece.file][piece.name]
            if entry.path not in files:
                files[entry.path] = os.open(entry.path, os.O_WRONLY)
            indices = _all(entry) if piece.part is None else own_indices(piece.part, program)
            entry.write(piece.tensor.detach().cpu(), indices, files[entry.path])
        for file in files.values():
            os.fsync(file)
    finally:
        for file in files.values():
            with suppress(OSError):
                os.close(file)


# -- in ------------------------------------------------------------------------------------------------------------------------------------


def load_job(job: Job, folder: Path, others: Mapping[str, Positioned]) -> None:
    """As of `Job.load`."""
    opened: list[tuple[Record, _Model, _Optimizer]] = []
    _together(folder, lambda: opened.append(_opened(job, folder, others)))
    record, model, optimizer = opened[0]
    state = {
        "model": model,
        "optimizer": {"state": optimizer, "groups": record.groups},
        "steps": record.steps,
        "seed": record.seed,
        "loss_scale": record.loss_scale or {},
    }
    for name, each in others.items():
        each.load_state_dict(record.others[name])
    put_state(job, state, own=True)
    job.source.load_unread(job.graph, model.unread())


def _opened(job: Job, folder: Path, others: Mapping[str, Positioned]) -> tuple[Record, _Model, _Optimizer]:
    """What is checked before anything is changed."""
    folder = found(folder.absolute())
    record = read_record(folder)
    for name in others:
        if name not in record.others:
            there = ", ".join(record.others) or "no such thing"
            raise WeightsError(f"the checkpoint {folder} has no {name}; beside the job it has {there}: save with {name}=")
    own = [type(optimizer).__name__ for optimizer in job.optimizers]
    if record.optimizers != own:
        raise WeightsError(
            f"the checkpoint {folder} is of {', '.join(record.optimizers)}, the job has {', '.join(own)}, which keeps other things; to "
            "begin from its parameters alone give the folder to parallelize as weights="
        )
    return record, _Model(job, Checkpoint(folder)), _Optimizer(job, Checkpoint(folder / OPTIMIZER), record)


class _Model(Mapping[str, Tensor]):
    """Name → this rank's part of it, read when it is asked for. Raises WeightsError where names, shapes or dtypes are not the model's."""

    def __init__(self, job: Job, checkpoint: Checkpoint) -> None:
        self.job, self.entries = job, checkpoint.entries
        self.files = FileWeights(checkpoint, job.graph, job.source.model, LiveWeights({}))
        self.parts = {part.name: part for part in (*job.program.parameters, *job.program.buffers)}

    def __getitem__(self, name: str) -> Tensor:
        part = self.parts[name]
        return self.files.parts([part.updated_part if part.has_copy else part], self.job.program, self.job.device)[name]

    def __contains__(self, name: object) -> bool:
        return name in self.parts and bool(self.files.entries.get(str(name)))

    def __iter__(self) -> Iterator[str]:
        return (name for name in self.parts if name in self)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def unread(self) -> dict[str, Tensor]:
        """What no operator reads, whole."""
        return {name: _read(self.entries[name]) for name in self.job.source.unread(self.job.graph) if name in self.entries}


class _Optimizer(Mapping[str, dict[str, Any]]):
    """Parameter → what this rank's optimizers keep of it, read when it is asked for."""

    def __init__(self, job: Job, checkpoint: Checkpoint, record: Record) -> None:
        self.job, self.record = job, record
        self.parts = {part.name: part for part in job.program.parameters}
        for name in sorted({*record.states} ^ {*checkpoint.entries}):
            lacks = "lacks" if name in record.states else "has, beside what was saved,"
            raise WeightsError(f"{checkpoint.path} {lacks} {name}: it is not as it was written; take another checkpoint")
        self.entries: dict[str, dict[str, Entry]] = {}
        for full, entry in checkpoint.entries.items():
            name, _, key = full.removeprefix("state.").rpartition(".")
            self.entries.setdefault(name, {})[key] = entry
        if unknown := [name for name in {**self.entries, **record.values} if name not in job.named]:
            raise WeightsError(f"{checkpoint.path} has states of {unknown[0]}, which the optimizer does not train; make it as it was")

    def __getitem__(self, name: str) -> dict[str, Any]:
        found = {key: self._own(name, entry) for key, entry in self.entries.get(name, {}).items()}
        return found | self.record.values.get(name, {})

    def _own(self, name: str, entry: Entry) -> Tensor:
        part = self.parts[name]
        is_cut = entry.shape == part.shape and name not in self.job.whole.of
        return entry.read(own_indices(part.updated_part, self.job.program)) if is_cut else _read(entry)

    def __iter__(self) -> Iterator[str]:
        return iter({**self.entries, **self.record.values})

    def __len__(self) -> int:
        return len({**self.entries, **self.record.values})


def _read(entry: Entry) -> Tensor:
    return entry.read(_all(entry))


def _all(entry: Entry) -> list[Tensor]:
    return [torch.arange(size) for size in entry.shape]
