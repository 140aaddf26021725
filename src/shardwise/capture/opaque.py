"""Python code that is kept as one operator: what capturing would change or cannot follow.

    torch.autograd.Function      its hand-written backward would be lost
    submodule                    its control flow depends on the values of tensors

Such code becomes an `Opaque`, the target of one `Op`. When it runs it calls the torch operator `shardwise.opaque`, which traces to one
node; its gradient is `shardwise.opaque_backward`, which runs the code once more with autograd on and asks it for its gradients. Both are
looked up by a key: operators take tensors and numbers, not functions.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from shardwise._torch import with_autograd
from shardwise.capture import rerun
from shardwise.errors import BatchError, CaptureError, ShardwiseError

__all__ = ["EXPECT", "OPERATOR", "InFloat64", "Opaque", "Result", "opaque_of"]

_LIBRARY = torch.library.Library("shardwise", "FRAGMENT")
_LIBRARY.define("opaque(Tensor[] inputs, str key, int[] sizes, int[] dims) -> Tensor[]")
_LIBRARY.define("expect(Tensor x, float value) -> ()")
_LIBRARY.define("opaque_backward(Tensor[] inputs, Tensor[] gradients, int[] wanted, str key) -> Tensor[]")

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_alone = threading.RLock()  # parameters are put into the user's own modules while these run, and there is one generator
_known: WeakValueDictionary[str, Opaque] = WeakValueDictionary()  # by key: a torch operator can reach its code in no other way


OPERATOR = torch.ops.shardwise.opaque.default
EXPECT = torch.ops.shardwise.expect.default  # what a value was on the example batch; it stays in an exported graph for its effect
torch.fx.node.has_side_effect(EXPECT)


def opaque_of(key: str) -> Opaque:
    """The code that a call of `OPERATOR` names."""
    return _known[key]


@dataclass(frozen=True, kw_only=True)
class Result:
    """Shape and dtype of one result on the example batch."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, kw_only=True, eq=False)
class Opaque:
    """Code that is called with tensors and returns tensors.

    name: what it is, for people, and unlike that of any code which does something else. version: changes when the code does.
    code: the function; results: what it made of the example batch. of: what was called; constants: with what beside tensors.
    random: it draws random numbers; then the last of its inputs is the graph's random state, from which it is seeded, and `number` tells it
    from the graph's other random operators. pure: it treats all numbers alike, so that running it on parts tells how it may be split; code
    whose control flow depends on values may go another way next time.
    gradients: it takes gradients itself, so that it runs with autograd on.
    """

    name: str
    version: str
    code: Callable[[Sequence[Tensor]], Sequence[Tensor]]
    results: tuple[Result, ...]
    of: str = ""
    constants: str = ""
    random: bool = False
    number: int = 0
    pure: bool = False
    gradients: bool = False
    float64: bool = False

    def __post_init__(self) -> None:
        _known[self.key] = self

    @property
    def key(self) -> str:
        """By which the torch operator finds this code."""
        return f"{self.name}#{id(self)}"

    @property
    def __name__(self) -> str:
        return f"opaque[{self.name}]"

    def cast(self, dtype: torch.dtype) -> Opaque:
        """The same code computing in float64, where that is wanted: then what it casts to float32 stays in float64, too."""
        results = tuple(replace(each, dtype=dtype if each.dtype in _FLOATS else each.dtype) for each in self.results)
        return replace(self, results=results, float64=dtype is torch.float64)

    def __call__(self, *inputs: Tensor, shapes: Sequence[tuple[int, ...]] | None = None) -> tuple[Tensor, ...]:
        """Runs it. shapes: of the results; as on the example batch by default."""
        chosen = [result.shape for result in self.results] if shapes is None else shapes
        sizes = [0] + [size for shape in chosen for size in shape]  # torch would take an empty list for one of tensors
        return tuple(torch.ops.shardwise.opaque(list(inputs), self.key, sizes, [len(shape) for shape in chosen]))

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The code itself, on real tensors, differentiable."""
        state, tensors = (inputs[-1], inputs[:-1]) if self.random else (None, inputs)
        seeded = nullcontext() if state is None else _seeded(state, self.number, {each.device for each in tensors if each.is_cuda})
        with _alone, seeded, InFloat64() if self.float64 else nullcontext():
            made = self._made(tensors)
        return [each.to(result.dtype) for each, result in zip(made, self.results, strict=True)]

    def _made(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        try:
            return self.code(tensors)
        except (ShardwiseError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            if self.pure:  # tried on parts
                raise
            reason = (str(error).strip() or "no message").splitlines()[0]
            raise CaptureError(
                f"{self.name} is kept as one operator, and its code raised {type(error).__name__}: {reason}. If the model itself does not, "
                "code before it behaves otherwise while it is captured: give it what it makes of values (masks, lengths) as an input"
            ) from error


@contextmanager
def _seeded(state: Tensor, number: int, devices: Iterable[torch.device]) -> Iterator[None]:
    """torch's generator as a function of the step and which operator this is; as it was before, afterwards.

    Not of the microbatch: code that draws for samples is not split over microbatches, and what it draws for all is the same in each.
    """
    step, _ = state.tolist()
    with torch.random.fork_rng(devices=list(devices)):
        torch.manual_seed((step * 1_000_003 + number) & (2**63 - 1))
        yield


class InFloat64(TorchFunctionMode):
    """Casts to smaller floats become casts to float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.float, Tensor.half, Tensor.bfloat16):
            func = Tensor.double
        return func(*map(_double, args), **{name: _double(value) for name, value in (kwargs or {}).items()})


def _double(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value in _FLOATS else value


def _shapes(sizes: Sequence[int], dims: Sequence[int]) -> list[tuple[int, ...]]:
    flat = iter(sizes[1:])
    return [tuple(next(flat) for _ in range(count)) for count in dims]


@torch.library.impl(_LIBRARY, "opaque", "CompositeExplicitAutograd")
def _opaque(inputs: Sequence[Tensor], key: str, sizes: Sequence[int], dims: Sequence[int]) -> list[Tensor]:
    kept = _known[key]
    if kept.gradients:
        inputs = [each.detach().requires_grad_(each.is_floating_point()) for each in inputs]
    with with_autograd() if kept.gradients else torch.no_grad():
        made = [each.detach().clone(memory_format=torch.contiguous_format) for each in kept.run(inputs)]
    for number, (each, shape) in enumerate(zip(made, _shapes(sizes, dims), strict=True)):
        if tuple(each.shape) != shape:
            raise BatchError(
                f"{kept.name} made a tensor of shape {list(each.shape)} as result {number}, the plan was made for {list(shape)}: its size "
                "depends on the data; let it return a tensor of fixed shape (padded or masked)"
            )
    return made


@torch.library.impl(_LIBRARY, "opaque_backward", "CompositeExplicitAutograd")
def _opaque_backward(inputs: Sequence[Tensor], gradients: Sequence[Tensor], wanted: Sequence[int], key: str) -> list[Tensor]:
    return rerun.gradients(_known[key].run, inputs, gradients, wanted)


@torch.library.impl(_LIBRARY, "expect", "CompositeExplicitAutograd")
@torch.library.register_fake("shardwise::expect", lib=_LIBRARY)
def _expect(x: Tensor, value: float) -> None:
    """Nothing: `shardwise.capture.export` makes it a check of the graph."""


@torch.library.register_fake("shardwise::opaque", lib=_LIBRARY)
def _fake_opaque(inputs: Sequence[Tensor], key: str, sizes: Sequence[int], dims: Sequence[int]) -> list[Tensor]:
    results = _known[key].results
    return [inputs[0].new_empty(shape, dtype=each.dtype) for each, shape in zip(results, _shapes(sizes, dims), strict=True)]


@torch.library.register_fake("shardwise::opaque_backward", lib=_LIBRARY)
def _fake_opaque_backward(inputs: Sequence[Tensor], gradients: Sequence[Tensor], wanted: Sequence[int], key: str) -> list[Tensor]:
    return rerun.described(inputs, wanted)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Sequence[Tensor]) -> None:
    ctx.key = inputs[1]
    rerun.remember(ctx, inputs[0], output)
    ctx.mark_non_differentiable(*(each for each in output if not each.is_floating_point()))


def _gradient(ctx: Any, gradients: Sequence[Tensor | None]) -> tuple[Any, ...]:
    each = rerun.backward(ctx, gradients, lambda *call: torch.ops.shardwise.opaque_backward(*call, ctx.key))
    return each, None, None, None


torch.library.register_autograd("shardwise::opaque", _gradient, setup_context=_setup, lib=_LIBRARY)
