"""A job's state as one device would have it, from the ranks' parts, and back.

    {"model":      name → tensor, the keys of the model's own state_dict(), tied names included
     "optimizer":  {"state": name → what the optimizer keeps of that parameter, "groups": [{"parameters": [names], "lr": …}, …]}
     "steps", "seed": from which the random numbers of the next step follow
     "loss_scale":  {"scale", "skipped", "good"}, where the job trains in fp16}

Of a parameter that operators read in 16 bits, the float32 is meant that the optimizer updates. The whole is put together on rank 0, one
tensor after the other, in CPU memory; any layout loads it, and so does one device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from shardwise.errors import PlanError
from shardwise.program.program import ParameterPart, Program
from shardwise.runtime.parameters import own_view
from shardwise.runtime.weights import local_part, own_part
from shardwise.sharding.types import Shard, Type, join

if TYPE_CHECKING:
    from shardwise.runtime.job import Job

SCALE = ("scale", "skipped", "good")

__all__ = [
    "SCALE",
    "Gatherer",
    "cut_key",
    "every_whole",
    "groups_of",
    "kept_by_optimizers",
    "load_state",
    "put_state",
    "state_of_job",
    "updated_part",
]


@dataclass(frozen=True, kw_only=True)
class _Held:
    """What a rank holds."""

    coordinates: Mapping[str, int]
    parts: Mapping[str, ParameterPart]


def _split_over(part: ParameterPart) -> tuple[str, ...]:
    return tuple(axis for axis, each in part.type.items() if isinstance(each, Shard) and axis != "mb")


def cut_key(part: ParameterPart, coordinates: Mapping[str, int], shape: tuple[int, ...]) -> tuple[int, ...]:
    """Which part of the whole a rank with these coordinates has, of which it holds this shape; ranks that hold the same have one key."""
    place = part.division.rank if part.division is not None and shape != part.local else 0
    return (*(coordinates[axis] for axis in _split_over(part)), place)


class Gatherer:
    """Puts tensors together that ranks hold in parts. Every rank makes one at the same time, and calls it for the same tensors."""

    def __init__(self, program: Program, device: torch.device) -> None:
        self.rank, self.mesh, self.device = program.rank, dict(program.mesh), device
        own = _Held(coordinates=dict(program.coordinates), parts={part.name: part for part in (*program.parameters, *program.buffers)})
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, own)
        self.held: list[_Held] = found
        self.names = sorted({name for each in self.held for name in each.parts})

    def whole(self, name: str, mine: Tensor | None, *, updated: bool = False, dtype: torch.dtype | None = None) -> Tensor | None:
        """The whole tensor in CPU memory, on rank 0 alone.

        mine: this rank's part as it is stored, None where it has none; updated: it has the shape of what the optimizer updates.
        """
        pieces: dict[tuple[Any, ...], Tensor] = {}
        dims: dict[tuple[Any, ...], int] = {}  # along which data ranks divide what a place holds; it may differ with its length
        split: tuple[str, ...] = ()
        for rank, held in enumerate(self.held):
            if (part := held.parts.get(name)) is None:
                continue
            split = _split_over(part)
            shape = part.updated if updated else part.stored
            key = cut_key(part, held.coordinates, shape)
            dims[key[:-1]] = part.division.dim if part.division is not None else 0
            if key not in pieces:
                pieces[key] = self._fetched(rank, mine, shape, dtype or (part.wide if updated else part.stored_dtype))
        if self.rank != 0:
            return None
        part = next(each.parts[name] for each in self.held if name in each.parts)
        return self._joined(pieces, dims, part.type, split, ())

    def alone(self, rank: int, mine: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """What one rank has, on rank 0."""
        return self._fetched(rank, mine if self.rank == rank else None, shape, dtype)

    def _fetched(self, rank: int, mine: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A rank's part, on rank 0; what others return means nothing."""
        if rank == self.rank:
            assert mine is not None
            if rank == 0:
                return mine.detach().to("cpu", copy=True)
            dist.send(mine.detach().contiguous(), 0)
            return mine
        received = torch.empty(shape if self.rank == 0 else (), dtype=dtype, device=self.device)
        if self.rank == 0:
            dist.recv(received, rank)
        return received.cpu()

    def _joined(
        self,
        pieces: Mapping[tuple[Any, ...], Tensor],
        dims: Mapping[tuple[Any, ...], int],
        type_: Type,
        split: tuple[str, ...],
        at: tuple[int, ...],
    ) -> Tensor:
        if len(at) < len(split):
            axis = split[len(at)]
            shard = type_[axis]
            assert isinstance(shard, Shard)
            return join([self._joined(pieces, dims, type_, split, (*at, place)) for place in range(self.mesh[axis])], shard)
        here = [pieces[key] for key in sorted(pieces) if key[:-1] == at]
        return here[0] if len(here) == 1 else torch.cat(here, dims[at])


def updated_part(whole: Tensor, part: ParameterPart, program: Program) -> Tensor:
    """What this rank's optimizer has of a whole tensor (a view where it can be)."""
    whole = local_part(whole, part, program)
    return part.division.take(whole) if part.division is not None and part.updated != part.local else whole


def every_whole(program: Program, state: Mapping[str, Tensor], device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """All parameters and buffers, whole, one after the other, on every rank."""
    gatherer = Gatherer(program, device)
    for name in gatherer.names:
        whole = gatherer.whole(name, state.get(name))
        part = next(each.parts[name] for each in gatherer.held if name in each.parts)
        sent = torch.empty(part.shape, dtype=part.stored_dtype, device=device) if whole is None else whole.to(device)
        dist.broadcast(sent, 0)
        yield name, sent


# -- out -----------------------------------------------------------------------------------------------------------------------------------


def state_of_job(job: Job, *, sharded: bool) -> dict[str, Any]:
    """As of `Job.state_dict`."""
    common: dict[str, Any] = {"steps": job.steps, "seed": job.seed}
    if job.scaler is not None:
        common["loss_scale"] = {name: getattr(job.scaler, name) for name in SCALE}
    if sharded:
        place = {"rank": job.program.rank, "ranks": job.plan.ranks, "layout": job.plan.layout, "fingerprint": job.plan.fingerprint}
        model = job.state | {part.name: job.parameters.of[part.name].detach() for part in job.program.parameters if part.has_copy}
        return {"model": model, "optimizer": {"state": kept_by_optimizers(job), "groups": groups_of(job)}, **common, **place}
    gatherer = Gatherer(job.program, job.device)
    model = _whole_model(job, gatherer)
    optimizer = _whole_optimizer(job, gatherer)
    return {"model": model, "optimizer": optimizer, **common} if job.program.rank == 0 else {}


def _whole_model(job: Job, gatherer: Gatherer) -> dict[str, Tensor]:
    copied = {part.name for held in gatherer.held for part in held.parts.values() if part.has_copy}
    found = {
        name: gatherer.whole(name, job.parameters.of.get(name) if name in copied else job.state.get(name), updated=name in copied)
        for name in gatherer.names
    }
    if job.program.rank != 0:
        return {}
    names = job.source.names
    unread = {name: tensor.detach().to("cpu", copy=True) for name, tensor in job.source.unread(job.graph).items()}
    return {name: tensor for name, first in names.items() if (tensor := found.get(first, unread.get(first))) is not None}


def kept_by_optimizers(job: Job) -> dict[str, dict[str, Any]]:
    """Parameter → what this rank's optimizers keep of it."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in job.named.items()}
    return {names[each]: dict(kept) for optimizer in job.optimizers for each, kept in optimizer.state.items() if kept}


def groups_of(job: Job) -> list[dict[str, Any]]:
    """Of all optimizers; the same on every rank."""
    names = {parameter: name for name, parameter in job.named.items()}
    return [
        {"optimizer": number, "parameters": [names[each] for each in group["params"]], **dict(_options(group))}
        for number, optimizer in enumerate(job.optimizers)
        for group in optimizer.param_groups
    ]


def _options(group: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Those that say how to update; not those that say how to compute it."""
    left_out = ("params", "parameters", "param_names", "optimizer", "fused", "foreach")
    return ((key, _plain(value)) for key, value in group.items() if key not in left_out)


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value


def _whole_optimizer(job: Job, gatherer: Gatherer) -> dict[str, Any]:
    kept = kept_by_optimizers(job)
    described = {name: {key: _described(value) for key, value in found.items()} for name, found in kept.items()}
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, (described, set(job.whole.of)))
    state: dict[str, dict[str, Any]] = {}
    for name in gatherer.names:
        holders = [rank for rank, (each, _) in enumerate(every) if name in each]
        for key, (shape, dtype, value) in every[holders[0]][0][name].items() if holders else ():
            part = gatherer.held[holders[0]].parts[name]
            mine = kept.get(name, {}).get(key)
            if shape is None or (shape == () and part.updated != ()):
                state.setdefault(name, {})[key] = value if shape is None else torch.tensor(value, dtype=dtype)
            elif name in every[holders[0]][1] or shape != part.updated:
                if name not in every[holders[0]][1] and part.updated != part.shape:
                    raise PlanError(
                        f"the optimizer keeps {key} of shape {list(shape)} for {name}, of which a rank has {list(part.updated)} of "
                        f"{list(part.shape)}: it cannot be put together; take state_dict(sharded=True)"
                    )
                state.setdefault(name, {})[key] = gatherer.alone(holders[0], mine, shape, dtype)
            else:
                state.setdefault(name, {})[key] = gatherer.whole(name, mine, updated=True, dtype=dtype)
    return {"state": state, "groups": groups_of(job)}


def _described(value: Any) -> tuple[tuple[int, ...] | None, torch.dtype | None, Any]:
    """(shape, dtype, the value where it is one number or no tensor)."""
    if not isinstance(value, Tensor):
        return None, None, value
    return tuple(value.shape), value.dtype, value.item() if value.dim() == 0 else None


# -- in ------------------------------------------------------------------------------------------------------------------------------------


def load_state(job: Job, state: Mapping[str, Any]) -> None:
    """As of `Job.load_state_dict`."""
    lacking = [key for key in ("model", "optimizer", "steps", "seed") if key not in state]
    if lacking:
        raise PlanError(f"the state lacks {lacking[0]!r}; give what job.state_dict() returned, on every rank the same whole one")
    if "layout" in state:
        _check_same_place(job, state)
    put_state(job, state, own="layout" in state)
    if "layout" not in state:
        job.source.load_unread(job.graph, state["model"])


def put_state(job: Job, state: Mapping[str, Any], *, own: bool) -> None:
    """A state's values into the job; own: of this rank's parts alone. Every rank does it at the same time."""
    _check_groups(job, state["optimizer"]["groups"])
    if own:
        _load_model(job, state["model"], lambda tensor, part: _of_shape(tensor, part.updated if part.has_copy else part.stored, part.name))
        _load_optimizer(job, state["optimizer"], lambda tensor, part: tensor)
    else:
        _load_model(job, state["model"], lambda tensor, part: _own(job, _of_shape(tensor, part.shape, part.name), part))
        _load_optimizer(job, state["optimizer"], lambda tensor, part: updated_part(tensor, part, job.program))
    job.steps, job.seed = int(state["steps"]), int(state["seed"])
    if job.scaler is not None:
        for name, value in state.get("loss_scale", {}).items():
            setattr(job.scaler, name, value)


def _check_same_place(job: Job, state: Mapping[str, Any]) -> None:
    mine = {"rank": job.program.rank, "ranks": job.plan.ranks, "layout": job.plan.layout, "fingerprint": job.plan.fingerprint}
    for key, value in mine.items():
        if state.get(key) != value:
            raise PlanError(
                f"the state is a rank's own part, with {key}={state.get(key)!r}; here {key}={value!r}. Load it where it was taken, or take "
                "whole ones (state_dict() without sharded=True), which any layout loads"
            )


Take = Callable[[Tensor, ParameterPart], Tensor]


def _own(job: Job, whole: Tensor, part: ParameterPart) -> Tensor:
    """This rank's part of a whole parameter or buffer: what is updated where operators read a copy of it, else what is stored."""
    return updated_part(whole, part, job.program) if part.has_copy else own_part(whole, part, job.program, job.device)


@torch.no_grad()
def _load_model(job: Job, given: Mapping[str, Tensor], own: Take) -> None:
    for part in (*job.program.parameters, *job.program.buffers):
        if part.name in given and part.has_copy:
            job.parameters.of[part.name].copy_(own(given[part.name], part))
        elif part.name in given:
            job.state[part.name].copy_(own(given[part.name], part))
        elif part.name in job.source.names:
            raise PlanError(f"the state lacks {part.name}, which the model has: it is of another model")
        if part.updated != part.stored and not part.has_copy:
            job.parameters.of[part.name].copy_(own_view(job.state[part.name], part))
    job.parameters.gather()
    job.renew()


def _of_shape(tensor: Tensor, shape: tuple[int, ...], name: str) -> Tensor:
    if tuple(tensor.shape) != shape:
        raise PlanError(f"{name} is {list(tensor.shape)} in the state, {list(shape)} here: it is of another model")
    return tensor


def _check_groups(job: Job, groups: Sequence[Mapping[str, Any]]) -> None:
    own = groups_of(job)
    if [group["parameters"] for group in groups] != [group["parameters"] for group in own]:
        raise PlanError(
            f"the state is of an optimizer with {len(groups)} groups of parameters, this one has {len(own)}, or of other "
            "parameters; make it alike"
        )


@torch.no_grad()
def _load_optimizer(job: Job, given: Mapping[str, Any], own: Take) -> None:
    own_groups = [group for optimizer in job.optimizers for group in optimizer.param_groups]
    for group, saved in zip(own_groups, given["groups"], strict=True):
        group.update({key: tuple(value) if isinstance(group.get(key), tuple) else value for key, value in _options(saved)})
    parts = {part.name: part for part in job.program.parameters}
    for optimizer in job.optimizers:
        fused = {each for group in optimizer.param_groups if group.get("fused") or group.get("capturable") for each in group["params"]}
        for name, parameter in job.named.items():
            if any(parameter is each for group in optimizer.param_groups for each in group["params"]) and _is_here(job, name):
                take_part = (lambda tensor, part: tensor) if name in job.whole.of else own
                optimizer.state[parameter] = {
                    key: _placed(value, parts[name], take_part, job.device, numbers_too=parameter in fused)
                    for key, value in given["state"].get(name, {}).items()
                }


def _is_here(job: Job, name: str) -> bool:
    """Whether this rank updates (a part of) the parameter."""
    return name in job.whole.of or (name in job.parameters.of and job.named[name] is job.parameters.of[name])


def _placed(value: Any, part: ParameterPart, own: Take, home: torch.device, *, numbers_too: bool) -> Any:
    """On the parameter's device; a count of steps only where the optimizer wants that."""
    if not isinstance(value, Tensor):
        return value
    if value.dim() and tuple(value.shape) == part.shape:
        value = own(value, part)
    device = home if value.dim() or numbers_too else value.device
    return value.detach().to(device, copy=True, memory_format=torch.contiguous_format)
