"""The user's optimizers: made over all of the model's trained parameters on every rank, and run in their fastest form."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from shardwise.errors import LayoutError

__all__ = ["OptimizerFactory", "absent", "make_on_parts", "make_optimizers", "make_states", "prefer_fused"]

Named = Iterable[tuple[str, nn.Parameter]]
OptimizerFactory = Callable[[Named], torch.optim.Optimizer | Sequence[torch.optim.Optimizer]]


def make_optimizers(factory: OptimizerFactory, named: Sequence[tuple[str, nn.Parameter]]) -> list[torch.optim.Optimizer]:
    """What the factory makes of the parameters: one optimizer, or several (Muon for matrices, AdamW for the rest).

    Raises LayoutError where it makes something else, has one parameter updated twice, or wants a closure.
    """
    made = factory(iter(named))
    found = [made] if isinstance(made, torch.optim.Optimizer) else list(made) if isinstance(made, Sequence) else []
    if not found or not all(isinstance(each, torch.optim.Optimizer) for each in found):
        raise LayoutError(f"`optimizer` must return a torch.optim.Optimizer or a sequence of them, not {type(made).__name__}")
    names = {id(parameter): name for name, parameter in named}
    seen: set[int] = set()
    for optimizer in found:
        _refuse_closures(optimizer)
        for parameter in (each for group in optimizer.param_groups for each in group["params"]):
            if id(parameter) not in names:
                raise LayoutError(
                    f"{type(optimizer).__name__} has a parameter of {list(parameter.shape)} that it was not given: each rank has parts of "
                    "its own; make the optimizer of the (name, parameter) pairs that the function gets"
                )
            if id(parameter) in seen:
                raise LayoutError(f"{names[id(parameter)]} is in two optimizers, which would both update it; give it to one")
            seen.add(id(parameter))
    return found


def _refuse_closures(optimizer: torch.optim.Optimizer) -> None:
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise LayoutError(
            f"{type(optimizer).__name__} cannot be used: its step() calls a closure to evaluate the loss several times in a step, where a "
            "job's step computes it and the gradients once; use an optimizer that needs the gradients alone (AdamW, SGD, Muon, …)"
        )


def absent(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    """What stands for a parameter that this rank does not update: as many dims, no elements, never a gradient.

    So an optimizer has the same groups on every rank, and a rank without parameters has one, too.
    """
    return nn.Parameter(torch.empty((0, *shape[1:]) if shape else (), dtype=dtype, device=device))


def make_on_parts(
    factory: OptimizerFactory, shapes: Mapping[str, Sequence[int]], mine: Sequence[tuple[str, nn.Parameter]]
) -> list[torch.optim.Optimizer]:
    """The optimizers of this rank's parameters. shapes: of the whole parameters.

    Raises LayoutError where the factory's groups depend on sizes: those of parts would lead it elsewhere than one device.
    """
    expected = _groups_on_wholes(factory, shapes, {name: parameter.dtype for name, parameter in mine})
    optimizers = make_optimizers(factory, mine)
    found = _groups(optimizers, mine)
    for name in shapes:
        if differing := _differing(expected.get(name, {}), found.get(name, {})):
            raise LayoutError(
                f"the optimizer's options of {name} depend on its size: {differing}, where this rank has a part of it. Take sizes from the "
                "model before parallelize: `sizes = {name: p.shape for name, p in model.named_parameters()}`"
            )
    return optimizers


Groups = dict[str, dict[str, Any]]  # name → its optimizer, its group, and the group's options


def _groups_on_wholes(factory: OptimizerFactory, shapes: Mapping[str, Sequence[int]], dtypes: Mapping[str, torch.dtype]) -> Groups:
    """As one device would make them; no tensor takes memory."""
    meta = [(name, nn.Parameter(torch.empty(tuple(shape), dtype=dtypes[name], device="meta"))) for name, shape in shapes.items()]
    try:
        return _groups(make_optimizers(factory, meta), meta)
    except RuntimeError:  # `fused=True` refuses the meta device: each size in the memory of one element
        spread = [(name, nn.Parameter(torch.zeros((), dtype=dtypes[name]).expand(tuple(shape)))) for name, shape in shapes.items()]
        return _groups(make_optimizers(factory, spread), spread)


def _groups(optimizers: Sequence[torch.optim.Optimizer], named: Sequence[tuple[str, nn.Parameter]]) -> Groups:
    names = {id(parameter): name for name, parameter in named}
    return {
        names[id(parameter)]: {"optimizer": number, "group": place} | {k: v for k, v in group.items() if k not in ("params", "param_names")}
        for number, optimizer in enumerate(optimizers)
        for place, group in enumerate(optimizer.param_groups)
        for parameter in group["params"]
    }


def _differing(whole: Mapping[str, Any], part: Mapping[str, Any]) -> str:
    """The first difference in words."""
    for key in sorted({*whole, *part}):
        one, other = whole.get(key), part.get(key)
        if not (callable(one) and callable(other)) and not bool(one == other):
            return f"{key} is {one} on one device and {other} here"
    return ""


_FUSED = (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD)


def prefer_fused(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Lets torch's own Adam, AdamW and SGD run as one kernel over each parameter where the user left that open (foreach and fused None).

    The numbers are the same to rounding; on a CPU a step takes a third of the time. Must come before the first step.
    """
    if type(optimizer) in _FUSED:
        for group in optimizer.param_groups:
            real = all(parameter.is_floating_point() for parameter in group["params"])
            plain = not group.get("capturable") and not group.get("differentiable")
            if group.get("foreach") is None and group.get("fused") is None and real and plain:
                group["fused"] = True
    return optimizer


def make_states(optimizer: torch.optim.Optimizer) -> None:
    """Makes what torch's own Adam and AdamW keep of each parameter that has a gradient, as their first step would.

    That step would put it between what the passes before it have freed, and leave holes in the heap that no later step can fill; other
    optimizers do so. What is there already (loaded from a checkpoint) stays.
    """
    if type(optimizer) not in (torch.optim.Adam, torch.optim.AdamW):
        return
    for group in optimizer.param_groups:
        if group.get("capturable") or group.get("differentiable"):
            continue
        names = ["exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if group["amsgrad"] else [])]
        for parameter in group["params"]:
            if parameter.grad is not None and not optimizer.state.get(parameter):
                optimizer.state[parameter] = {"step": _count_of_steps(parameter, fused=bool(group.get("fused")))} | {
                    name: torch.zeros_like(parameter, memory_format=torch.preserve_format) for name in names
                }


def _count_of_steps(parameter: nn.Parameter, *, fused: bool) -> torch.Tensor:
    """Where and how torch's Adam counts; a fused kernel reads it on the parameter's device."""
    if fused:
        return torch.zeros((), dtype=torch.float32, device=parameter.device)
    return torch.tensor(0.0, dtype=torch.float64 if torch.get_default_dtype() is torch.float64 else torch.float32)
