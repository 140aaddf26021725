"""What an optimizer needs to update a parameter, found by running it on small tensors, in float64:

    element     the element and its gradient: it runs on any part            Adam, AdamW, SGD, Lion
    parameter   the whole parameter and its gradient                          Muon, Adafactor, Shampoo
    all         all parameters: what one does depends on others' gradients    D-Adaptation, clipping by the norm of all inside the optimizer

The small tensors have the parameters' names and numbers of dims, and sizes up to _LONGEST, so that what depends on names, groups or small
thresholds is met. They are cut unevenly: blocks of a power of two do not fit the cut.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from shardwise.errors import LayoutError
from shardwise.runtime.optimizer import OptimizerFactory, make_optimizers

__all__ = ["Need", "needs"]

Need = Literal["element", "parameter", "all"]

_LONGEST = {0: 1, 1: 8191, 2: 139, 3: 19}  # number of dims → largest size of one; more dims: _OTHERWISE
_OTHERWISE = 7
_STEPS = 3
_ALIKE = 2  # parameters tried of those in one group with the same small tensor


def needs(factory: OptimizerFactory, shapes: Mapping[str, Sequence[int]]) -> dict[str, Need]:
    """Name → what its optimizer needs; shapes: of the whole parameters.

    Raises LayoutError for an optimizer that draws random numbers, which copies on several ranks would not share, or that cannot be tried.
    """
    if not shapes:
        return {}
    trial = _Trial(factory=factory, shapes={name: _small(shape) for name, shape in shapes.items()})
    try:
        found = trial.run()
    except (RuntimeError, ValueError, TypeError, ArithmeticError) as error:
        if isinstance(error, LayoutError):
            raise
        raise LayoutError(f"the optimizer was tried on small float64 tensors to see what it needs, and failed: {error}") from error
    return {name: found[trial.kind[name]] if name in trial.kind else "element" for name in shapes}


def _small(shape: Sequence[int]) -> tuple[int, ...]:
    longest = _LONGEST.get(len(shape), _OTHERWISE)
    return tuple(min(size, longest + 2 * place) for place, size in enumerate(shape))


Kind = tuple[int, int, tuple[int, ...]]  # optimizer, group, shape of the small tensor


@dataclass(kw_only=True)
class _Trial:
    factory: OptimizerFactory
    shapes: Mapping[str, tuple[int, ...]]

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(0)

        def draw(shape: Sequence[int]) -> Tensor:
            return torch.randn(tuple(shape), dtype=torch.float64, generator=generator)

        named = self._named({})
        names = {id(parameter): name for name, parameter in named}
        self.kind: dict[str, Kind] = {}
        for number, optimizer in enumerate(make_optimizers(self.factory, named)):
            for place, group in enumerate(optimizer.param_groups):
                for name in (names[id(parameter)] for parameter in group["params"]):
                    self.kind[name] = (number, place, self.shapes[name])
        self.tried: dict[str, Kind] = {}
        for name, kind in self.kind.items():
            if list(self.tried.values()).count(kind) < _ALIKE:
                self.tried[name] = kind
        self.start = {name: draw(self.shapes[name]) for name in self.tried}
        self.gradients = {name: [draw(self.shapes[name]) for _ in range(_STEPS)] for name in self.tried}

    def _named(self, values: Mapping[str, Tensor]) -> list[tuple[str, nn.Parameter]]:
        """All parameters; zeros where no value is given."""
        return [
            (name, nn.Parameter(values[name].clone() if name in values else torch.zeros(shape, dtype=torch.float64)))
            for name, shape in self.shapes.items()
        ]

    def run(self) -> dict[Kind, Need]:
        """Of each kind that was tried."""
        every = list(self.tried)
        whole, odd_state = self._steps({name: self.start[name] for name in every}, self.gradients)
        found: dict[Kind, Need] = dict.fromkeys(self.tried.values(), "element")
        for name in odd_state | {name for name in every if not self._same_in_parts(name, every, whole)}:
            found[self.tried[name]] = "parameter"
        coupled = self._coupled(every, whole)
        return {kind: "all" if kind[0] in coupled else need for kind, need in found.items()}

    def _steps(self, start: Mapping[str, Tensor], gradients: Mapping[str, Sequence[Tensor]]) -> tuple[dict[str, Tensor], set[str]]:
        """The parameters after the steps, and those for which an optimizer keeps tensors of another shape than theirs."""
        named = self._named(start)
        parameters = dict(named)
        with torch.random.fork_rng(devices=[]):
            state = torch.get_rng_state()
            optimizers = make_optimizers(self.factory, named)
            for step in range(_STEPS):
                for name, each in gradients.items():
                    parameters[name].grad = each[step].clone()
                for optimizer in optimizers:
                    optimizer.step()
            if not torch.equal(state, torch.get_rng_state()):
                kinds = ", ".join(type(optimizer).__name__ for optimizer in optimizers)
                raise LayoutError(f"{kinds} draws random numbers: ranks that hold the same part would update it in different ways")
        odd = {
            name
            for name in gradients
            for optimizer in optimizers
            for kept in optimizer.state.get(parameters[name], {}).values()
            if isinstance(kept, Tensor) and kept.numel() > 1 and kept.shape != parameters[name].shape
        }
        return {name: parameters[name].detach() for name in gradients}, odd

    def _same_in_parts(self, name: str, every: Sequence[str], whole: Mapping[str, Tensor]) -> bool:
        """Whether steps on two parts of the parameter, cut along any dim, give what they gave on the whole."""
        for dim, size in enumerate(self.shapes[name]):
            cut = 3 * size // 7
            sizes = [length for length in (cut, size - cut) if length]
            starts = self.start[name].split(sizes, dim)
            gradients = [gradient.split(sizes, dim) for gradient in self.gradients[name]]
            parts = [self._steps({name: start}, {name: [each[i] for each in gradients]})[0][name] for i, start in enumerate(starts)]
            if not _equal(torch.cat(parts, dim), whole[name]):
                return False
        return True

    def _coupled(self, every: Sequence[str], whole: Mapping[str, Tensor]) -> set[int]:
        """The optimizers that do something else to a parameter when others have no gradient."""
        found: set[int] = set()
        for names in (every[::2], every[1::2]):
            if names and len(names) < len(every):
                apart, _ = self._steps({name: self.start[name] for name in names}, {name: self.gradients[name] for name in names})
                found |= {self.tried[name][0] for name in names if not _equal(apart[name], whole[name])}
        return found


def _equal(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-12, atol=1e-14)
