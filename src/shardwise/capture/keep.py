"""What stands in for code that exporting cannot follow, or would change, while a model is exported.

    torch.autograd.Function    the user's own: always kept as one operator; exporting would go through it and lose its backward
    a question about values    (`if mask.any()`) is answered as on the example batch, and becomes a check of the graph
    the end of a submodule     from the end of its last child on, kept as one operator: where exporting failed in the submodule's own code
    a whole submodule          kept as one operator: where it has no child, or keeping its end did not help

The first is found here. A `Treatment` names the others; their answers, and the shapes of their results, are those of a run on the
example batch (`record`).
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from shardwise._torch import FakeTensorMode, without_modes
from shardwise.capture.opaque import Opaque, Result
from shardwise.capture.record import QUESTIONS, TENSOR, Answer, Call, Recording
from shardwise.errors import CaptureError

__all__ = ["Treatment", "keeping"]


@dataclass(kw_only=True)
class Treatment:
    """What is kept, and why: submodules whole, or their ends (tails). answering: questions about values are answered.

    gradients: some that are kept whole take gradients in their forward pass.
    """

    whole: dict[nn.Module, str] = field(default_factory=dict)
    tails: dict[nn.Module, str] = field(default_factory=dict)
    answering: bool = False
    gradients: bool = False

    @property
    def needs_recording(self) -> bool:
        """Whether something must be known of a run on the example batch."""
        return self.answering or bool(self.whole or self.tails)


@contextmanager
def keeping(treatment: Treatment, recording: Recording, names: Mapping[nn.Module, str]) -> Iterator[list[Opaque]]:
    """Inside, code that must be kept becomes calls of `shardwise.opaque`; yields what it became, to be held while the graph lives."""
    kept: list[Opaque] = []
    with ExitStack() as stack:
        stack.enter_context(_keeping_functions(kept))
        stack.enter_context(_unchanged_dtypes())
        for module in treatment.whole:
            stack.enter_context(_replaced(module, _whole_forward(module, names[module], recording.calls[module], kept)))
        for module in treatment.tails:
            stack.enter_context(_replaced(module, _tail_forward(module, names[module], recording.calls[module], kept)))
        if treatment.answering:
            stack.enter_context(_Answering(recording.answers))
        yield kept


@contextmanager
def _unchanged_dtypes() -> Iterator[None]:
    """`module.to(dtype)` that changes nothing does nothing: exporting would refuse it."""
    original = nn.Module.to

    def to(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        device, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)
        tensors = [*module.parameters(), *module.buffers()]
        same = all(dtype in (None, each.dtype) or not each.is_floating_point() for each in tensors)
        return module if same and device is None else original(module, *args, **kwargs)

    nn.Module.to = to  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.to = original  # type: ignore[method-assign]


class _Answering(TorchFunctionMode):
    """Answers questions about values as recorded; each becomes a call of `shardwise.expect` on the tensor that was asked."""

    def __init__(self, answers: Sequence[Answer]) -> None:
        super().__init__()
        self.answers = iter(answers)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in QUESTIONS:
            return func(*args, **(kwargs or {}))
        answer = next(self.answers, None)
        if answer is None:
            raise RuntimeError("it asks for values that it did not ask for on the example batch")
        torch.ops.shardwise.expect(args[0], float(answer))
        return answer


# ---- functions with a backward of their own ----------------------------------------------------------------------------------------


@contextmanager
def _keeping_functions(kept: list[Opaque]) -> Iterator[None]:
    """`Function.apply` gets other code, not another function: `relu = MyRelu.apply` at the top of a module holds the one that is there."""
    shared: FunctionType = torch.autograd.Function.__dict__["apply"].__func__
    code, defaults = shared.__code__, shared.__kwdefaults__
    original = FunctionType(code, shared.__globals__, shared.__name__, shared.__defaults__, shared.__closure__)

    def keep(cls: type, *args: Any, **kwargs: Any) -> Any:
        apply = partial(original, cls)
        if cls.__module__.startswith("torch."):
            return apply(*args, **kwargs)
        return _kept_call(apply, args, kwargs, f"{cls.__module__}.{cls.__qualname__}", _version(cls), kept)

    shared.__code__, shared.__kwdefaults__ = _handing_over(type).__code__, {"_keep": keep}
    try:
        yield
    finally:
        shared.__code__, shared.__kwdefaults__ = code, defaults


def _handing_over(__class__: type) -> FunctionType:
    """A method that calls its `_keep`. It reads __class__, as every method that calls super() does: code goes with what it reads."""

    def apply(cls: type, *args: Any, _keep: Callable[..., Any], **kwargs: Any) -> Any:
        _ = __class__
        return _keep(cls, *args, **kwargs)

    return apply  # type: ignore[return-value]


def _kept_call(function: Callable[..., Any], args: Any, kwargs: Any, name: str, version: str, kept: list[Opaque]) -> Any:
    """The call as an opaque operator: shapes of results are found by calling it on descriptions of its tensors."""
    whole = _Whole.of(function, args, kwargs)
    found, form = pytree.tree_flatten(_described(whole, name))
    results = tuple(Result(shape=tuple(leaf.shape), dtype=leaf.dtype) for leaf in found if isinstance(leaf, Tensor))
    made = iter(whole.kept(name, version, results, kept, pure=True))
    return pytree.tree_unflatten([next(made) if isinstance(leaf, Tensor) else leaf for leaf in found], form)


@dataclass(frozen=True, kw_only=True)
class _Whole:
    """A call as a function of its tensors alone."""

    function: Callable[..., Any]
    structure: Any
    constants: list[Any]
    tensors: list[Tensor]

    @staticmethod
    def of(function: Callable[..., Any], args: Any, kwargs: Any) -> _Whole:
        leaves, structure = pytree.tree_flatten((args, kwargs))
        constants = [TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        return _Whole(function=function, structure=structure, constants=constants, tensors=_tensors(leaves))

    def __call__(self, tensors: Sequence[Tensor]) -> Any:
        given = iter(tensors)
        leaves = [next(given) if leaf is TENSOR else leaf for leaf in self.constants]
        args, kwargs = pytree.tree_unflatten(leaves, self.structure)
        return self.function(*args, **kwargs)

    def kept(self, name: str, version: str, results: tuple[Result, ...], kept: list[Opaque], **more: bool) -> tuple[Tensor, ...]:
        """Its results as those of an opaque operator. Calls with unlike constants are unlike code: they are numbered."""
        again = _Whole(function=self.function, structure=self.structure, constants=self.constants, tensors=[])  # none of the capture's
        constants = repr((self.structure, ["tensor" if each is TENSOR else each for each in self.constants]))
        known = list(dict.fromkeys(each.constants for each in kept if each.of == name))
        number = known.index(constants) if constants in known else len(known)
        kept.append(
            Opaque(
                name=f"{name}.{number}" if number else name,
                of=name,
                constants=constants,
                version=version,
                code=lambda tensors: _tensors(again(tensors)),
                results=results,
                **more,
            )
        )
        return kept[-1](*self.tensors)


def _described(call: _Whole, name: str) -> Any:
    """What the call makes of tensors with these shapes and dtypes, computing nothing."""
    with without_modes(), FakeTensorMode(allow_non_fake_inputs=True):
        fakes = [torch.empty([int(size) for size in each.shape], dtype=each.dtype) for each in call.tensors]
        try:
            return call(fakes)
        except Exception as error:
            raise CaptureError(f"{name} cannot be kept as one operator: on tensors without values it raised {error}") from error


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _version(code: Any) -> str:
    """Changes when the source of a class or function does."""
    try:
        return hashlib.sha256(inspect.getsource(code).encode()).hexdigest()[:12]
    except (OSError, TypeError):
        return ""


# ---- submodules --------------------------------------------------------------------------------------------------------------------

Forward = Callable[..., Any]


@contextmanager
def _replaced(module: nn.Module, forward: Forward) -> Iterator[None]:
    """Inside, the module's forward is this one."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def _whole_forward(module: nn.Module, name: str, calls: Sequence[Call], kept: list[Opaque]) -> Forward:
    """The module's calls, in their order, as opaque operators of its parameters, buffers and arguments."""
    pending = iter(calls)

    def forward(*args: Any, **kwargs: Any) -> Any:
        call = next(pending)
        held = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        return _opaque_call(module, name, call, held, (), args, kwargs, kept)

    return forward


class _Enough(Exception):
    """A module's own code goes on after its last child's call."""


def _tail_forward(module: nn.Module, name: str, calls: Sequence[Call], kept: list[Opaque]) -> Forward:
    """The module's calls up to the end of its last child, and the rest of each as an opaque operator of what the children returned."""
    pending = iter(calls)
    original = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        call = next(pending)
        children = _Children(module, len(call.children))
        every = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        before = {each: every[each].clone() for each in call.buffers}  # the end runs the module's own code from its start
        try:
            with children:
                return original(*args, **kwargs)
        except _Enough:
            held = {each: before.get(each, every[each]) for each in dict.fromkeys((*call.own, *call.buffers))}
            return _opaque_call(module, f"{name} (its end)", call, held, tuple(children.outputs), args, kwargs, kept)

    return forward


_MODES = (torch._C._set_grad_enabled, torch.amp.autocast_mode._enter_autocast, torch.amp.autocast_mode._exit_autocast)


class _Children(TorchFunctionMode):
    """Collects what the submodules that a module's own code calls return; after `count` of them, stops that code at its next operator."""

    def __init__(self, module: nn.Module, count: int) -> None:
        super().__init__()
        self.submodules = [child for child in module.modules() if child is not module]
        self.count, self.depth = count, 0
        self.outputs: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.depth == 0 and len(self.outputs) == self.count and func not in _MODES:  # the end of a `with torch.no_grad()`
            raise _Enough
        return func(*args, **(kwargs or {}))

    def __enter__(self) -> Any:
        self.hooks = [
            hook
            for child in self.submodules
            for hook in (child.register_forward_pre_hook(self._go_in), child.register_forward_hook(self._go_out))
        ]
        return super().__enter__()

    def __exit__(self, *error: Any) -> Any:
        for hook in self.hooks:
            hook.remove()
        return super().__exit__(*error)

    def _go_in(self, child: nn.Module, args: Any) -> None:
        self.depth += 1

    def _go_out(self, child: nn.Module, args: Any, output: Any) -> None:
        self.depth -= 1
        if self.depth == 0:
            self.outputs.append(output)


def _opaque_call(
    module: nn.Module, name: str, call: Call, held: dict[str, Tensor], outputs: tuple[Any, ...], args: Any, kwargs: Any, kept: list[Opaque]
) -> Any:
    """One call (or the end of one, given its children's outputs) as an opaque operator; what it changes in place is copied there."""
    code = _module_code(module, tuple(held), call, bool(outputs))
    inner = _Whole.of(code, (list(held.values()), outputs, args, kwargs), {})
    made = list(inner.kept(name, _version(type(module)), call.results, kept, random=call.random, gradients=call.gradients))
    changed = dict(module.named_buffers())
    for buffer in reversed(call.buffers):
        changed[buffer].copy_(made.pop())
    given = _tensors((args, kwargs))
    for place in reversed(call.arguments):
        given[place].copy_(made.pop())
    found = iter(made)
    return pytree.tree_unflatten([next(found) if leaf is TENSOR else leaf for leaf in call.leaves], call.structure)


def _module_code(module: nn.Module, names: tuple[str, ...], call: Call, is_tail: bool) -> Callable[..., Any]:
    """The module as a function of its parameters and buffers, its children's outputs if they are given, and its arguments.

    Arguments and buffers that it changes in place are results, too.
    """

    def code(held: Sequence[Tensor], outputs: Sequence[Any], args: Any, kwargs: Any) -> Any:
        state = {name: each.clone() if name in call.buffers else each for name, each in zip(names, held, strict=True)}
        if call.arguments:
            args, kwargs = pytree.tree_map_only(Tensor, torch.clone, (args, kwargs))
        with _answered(call.children if is_tail else (), outputs):
            output = torch.func.functional_call(module, state, args, kwargs)
        given = _tensors((args, kwargs))
        return output, [given[place] for place in call.arguments], [state[name] for name in call.buffers]

    return code


@contextmanager
def _answered(children: Sequence[nn.Module], outputs: Sequence[Any]) -> Iterator[None]:
    """Inside, the children return these outputs, one after the other."""
    given = iter(outputs)
    with ExitStack() as stack:
        for child in dict.fromkeys(children):
            stack.enter_context(_replaced(child, lambda *args, **kwargs: next(given)))
        yield
