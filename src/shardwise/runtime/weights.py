"""Where a rank's parts of the weights come from; none of the ways but the first holds a whole model.

LiveWeights      the parameters of a model that was built as usual
DeferredWeights  values that are drawn as the model's construction would draw them (`shardwise.capture.deferred`)
FileWeights      safetensors files, of which the parts alone are read; buffers that are not saved come from one of the above
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from shardwise.capture.deferred import Deferred
from shardwise.capture.graph import Graph, Value
from shardwise.capture.state import refuse_without_values
from shardwise.checkpoint.safetensors import Checkpoint, Entry
from shardwise.errors import WeightsError
from shardwise.program.program import ParameterPart, Program
from shardwise.sharding.types import Shard, take

__all__ = ["DeferredWeights", "FileWeights", "LiveWeights", "Weights", "local_part", "own_indices", "own_part", "read_parts"]

_NAMED = 3  # of many names, those that a message shows


class Weights(Protocol):
    """What parameters and buffers are at the start."""

    def parts(self, parts: Sequence[ParameterPart], program: Program, device: torch.device) -> dict[str, Tensor]:
        """What this rank keeps of each, as `own_part` would cut it."""

    def whole(self, names: Iterable[str]) -> dict[str, Tensor]:
        """These buffers, on the CPU."""


def local_part(whole: Tensor, part: ParameterPart, program: Program) -> Tensor:
    """What this rank's operators read of a whole tensor (a view where it can be)."""
    for axis, placement in part.type.items():
        if isinstance(placement, Shard) and axis != "mb":
            whole = take(whole, placement, program.mesh[axis], program.coordinates[axis])
    return whole


def own_part(whole: Tensor, part: ParameterPart, program: Program, device: torch.device) -> Tensor:
    """What this rank keeps of a whole tensor, as it keeps it, on the device, in memory that no larger tensor keeps alive."""
    tensor = local_part(whole, part, program).detach()
    if part.division is not None and part.stored != part.local:
        tensor = part.division.take(tensor)
    tensor = tensor.to(device, part.stored_dtype)
    small = tensor.untyped_storage().nbytes() > tensor.numel() * tensor.element_size()
    return tensor.clone(memory_format=torch.contiguous_format) if small else tensor.contiguous()


def own_indices(part: ParameterPart, program: Program) -> list[Tensor]:
    """Which indices along each dim of the whole tensor `own_part` keeps: int64, increasing."""
    indices = [torch.arange(size) for size in part.shape]
    for axis, placement in part.type.items():
        if isinstance(placement, Shard) and axis != "mb":
            dim = placement.dim
            indices[dim] = take(indices[dim], replace(placement, dim=0), program.mesh[axis], program.coordinates[axis])
    if part.division is not None and part.stored != part.local:
        dim = part.division.dim
        indices[dim] = take(indices[dim], Shard(0), part.division.ranks, part.division.rank)
    return indices


def read_parts(weights: Weights, program: Program, device: torch.device) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What operators read, and of what they read a copy of, what is updated."""
    copied = [part for part in program.parameters if part.has_copy]
    masters = weights.parts([part.updated_part for part in copied], program, device) if copied else {}
    same = {part.name for part in copied if part.updated == part.stored}
    state = weights.parts([part for part in (*program.parameters, *program.buffers) if part.name not in same], program, device)
    return state | {part.name: masters[part.name].to(part.stored_dtype) for part in copied if part.name in same}, masters


class LiveWeights:
    """Those of a state: name → the whole tensor. Raises CaptureError for one on the meta device."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self.state = state

    def parts(self, parts: Sequence[ParameterPart], program: Program, device: torch.device) -> dict[str, Tensor]:
        found = self.whole(part.name for part in parts)
        return {part.name: own_part(found[part.name], part, program, device) for part in parts}

    def whole(self, names: Iterable[str]) -> dict[str, Tensor]:
        found = {name: self.state[name] for name in names}
        refuse_without_values(found)
        return found


class DeferredWeights:
    """Those of a construction that was put off. constants: tensors of the graph that belong to no module."""

    def __init__(self, deferred: Deferred, constants: Mapping[str, Tensor]) -> None:
        self.deferred, self.constants = deferred, constants

    def parts(self, parts: Sequence[ParameterPart], program: Program, device: torch.device) -> dict[str, Tensor]:
        cuts = {part.name: partial(own_part, part=part, program=program, device=device) for part in parts}
        made = self.deferred.values({name: cut for name, cut in cuts.items() if name not in self.constants})
        return {name: made[name] if name in made else cut(self.constants[name]) for name, cut in cuts.items()}

    def whole(self, names: Iterable[str]) -> dict[str, Tensor]:
        wanted = list(names)
        made = self.deferred.values({name: torch.clone for name in wanted if name not in self.constants})
        return {name: made[name] if name in made else self.constants[name] for name in wanted}


class FileWeights:
    """Those of files.

    model: whose names they have, with or without values; rest: for buffers that are not saved (`persistent=False`) and constants.
    Raises WeightsError where names, shapes or dtypes are not those of the model.
    """

    def __init__(self, checkpoint: Checkpoint, graph: Graph, model: nn.Module, rest: Weights) -> None:
        self.checkpoint, self.rest = checkpoint, rest
        entries = checkpoint.entries
        names: dict[str, list[str]] = {}
        for name in _saved(model):
            names.setdefault(graph.aliases.get(name, name), []).append(name)
        values = {**graph.parameters, **{name: value for name, value in graph.buffers.items() if name in names}}
        self.entries = {name: [entries[each] for each in names.get(name, [name]) if each in entries] for name in values}
        self._check_names(set(_names(model)), [name for name, found in self.entries.items() if not found])
        for name, found in self.entries.items():
            for entry in found:
                _check(entry, name, values[name], rounds=graph.master is not None)

    def _check_names(self, known: set[str], missing: list[str]) -> None:
        unknown = [name for name in self.checkpoint.entries if name not in known]
        if not missing and not unknown:
            return
        lacks = f"it lacks {_some(missing)}" if missing else ""
        more = f"the model has no {_some(unknown)}" if unknown else ""
        raise WeightsError(
            f"{self.checkpoint.path} holds {len(self.checkpoint.entries)} tensors that are not those of the model: "
            f"{' and '.join(filter(None, (lacks, more)))}; name them as the model's state_dict does"
        )

    def parts(self, parts: Sequence[ParameterPart], program: Program, device: torch.device) -> dict[str, Tensor]:
        found = self.rest.parts([part for part in parts if part.name not in self.entries], program, device)
        for part in parts:
            if part.name in self.entries:
                found[part.name] = self._read(part.name, own_indices(part, program)).to(device, part.stored_dtype)
        return found

    def whole(self, names: Iterable[str]) -> dict[str, Tensor]:
        wanted = list(names)
        found = self.rest.whole([name for name in wanted if name not in self.entries])
        for name in wanted:
            if name in self.entries:
                found[name] = self._read(name, [torch.arange(size) for size in self.entries[name][0].shape])
        return found

    def _read(self, name: str, indices: list[Tensor]) -> Tensor:
        """Tied tensors that are there under several names must be equal."""
        first, *others = self.entries[name]
        tensor = first.read(indices)
        for other in others:
            if not torch.equal(_bits(tensor), _bits(other.read(indices))):
                raise WeightsError(
                    f"{self.checkpoint.path}: {first.name} and {other.name} are one tensor in the model and two unequal ones there; "
                    "untie them in the model, or leave one out of the file"
                )
        return tensor


def _names(model: nn.Module) -> list[str]:
    return [name for name, _ in (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))]


def _saved(model: nn.Module) -> list[str]:
    """Names that a state_dict has: all but those of buffers that are not persistent."""
    passing = {f"{path}.{name}" if path else name for path, module in model.named_modules() for name in module._non_persistent_buffers_set}
    return [name for name in _names(model) if name not in passing]


def _check(entry: Entry, name: str, value: Value, *, rounds: bool) -> None:
    """rounds: whether operators read 16 bits of what a file may hold in more."""
    same = entry.dtype == value.dtype or (rounds and entry.dtype.is_floating_point and value.dtype.is_floating_point)
    if entry.shape != value.shape or not same:
        raise WeightsError(
            f"{entry.name} in {entry.path} is {_text(entry.dtype)} {list(entry.shape)}, {name} of the model is {_text(value.dtype)} "
            f"{list(value.shape)}; build the model with the sizes and the dtype of its weights"
        )


def _text(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view(-1).view(torch.uint8)
