"""Runs a model on its example batch and notes what exporting cannot find out from shapes alone.

- what each call of a submodule that is kept as one operator returns
- the answers to questions about values (`if mask.any()`): they decide which way the code goes
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from shardwise.capture.calls import GRADIENTS
from shardwise.capture.opaque import Result
from shardwise.errors import CaptureError

__all__ = ["QUESTIONS", "TENSOR", "Answer", "Call", "Recording", "record"]

TENSOR = object()  # stands for a tensor among the leaves of a structure
Answer = bool | int | float

QUESTIONS: dict[Callable[..., Any], Callable[[Any], Answer]] = {
    Tensor.__bool__: bool,
    Tensor.__int__: int,
    Tensor.__float__: float,
    Tensor.item: lambda answer: answer,
}


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call of a submodule on the example batch.

    structure, leaves: of what it returned, TENSOR for each tensor. results: those tensors, then arguments and buffers that it changed.
    arguments: which tensors among its arguments it changed in place; buffers: which of its buffers (of a tail: in its own code). random: it
    drew random numbers; gradients: it took gradients.
    children: the submodules that its own code called, in their order; own: names of the parameters and buffers that this code read itself.
    """

    structure: Any
    leaves: list[Any]
    results: tuple[Result, ...]
    arguments: tuple[int, ...]
    buffers: tuple[str, ...]
    random: bool
    gradients: bool
    children: tuple[nn.Module, ...]
    own: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Recording:
    """calls: of every watched submodule in their order; answers: to the questions asked outside code that is kept, in their order."""

    calls: dict[nn.Module, list[Call]] = field(default_factory=dict)
    answers: list[Answer] = field(default_factory=list)


@dataclass(kw_only=True)
class _Frame:
    """A call under way. At the end of its last child: the generator's state, how many answers there were and the buffers.

    own_buffers: those that its own code changed before; theirs: those that its children changed.
    """

    module: nn.Module
    tensors: list[Tensor]
    versions: list[int]
    buffers: dict[str, Tensor]
    generator: Tensor
    answers: int
    gradients: bool = False
    children: list[nn.Module] = field(default_factory=list)
    own: dict[str, None] = field(default_factory=dict)
    own_buffers: dict[str, None] = field(default_factory=dict)
    theirs: dict[str, None] = field(default_factory=dict)

    def changed(self) -> dict[str, None]:
        """The buffers that have changed since this was last asked."""
        now = dict(self.module.named_buffers())
        found = {name: None for name, buffer in now.items() if not torch.equal(buffer, self.buffers[name])}
        self.buffers |= {name: now[name].clone() for name in found}
        return found


class _Watch(TorchFunctionMode):
    """Follows the calls of submodules and the questions. whole: kept whole; tails: kept from the end of their last child on."""

    def __init__(self, model: nn.Module, whole: Iterable[nn.Module], tails: Iterable[nn.Module]) -> None:
        super().__init__()
        self.whole, self.tails = set(whole), set(tails)
        self.recording = Recording(calls={module: [] for module in (*self.whole, *self.tails)})
        self.stack: list[_Frame] = []
        self.names = {module: {id(t): name for name, t in (*module.named_parameters(), *module.named_buffers())} for module in self.tails}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in GRADIENTS:
            for frame in self.stack:
                frame.gradients = True
        if func in QUESTIONS and not any(frame.module in self.whole for frame in self.stack):
            self.recording.answers.append(QUESTIONS[func](result))
        if self.stack and self.stack[-1].module in self.tails:
            frame = self.stack[-1]
            names = self.names[frame.module]
            frame.own |= {names[id(t)]: None for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor) and id(t) in names}
        return result

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        watched = module in self.whole or module in self.tails
        if self.stack and self.stack[-1].module in self.tails:
            self.stack[-1].own_buffers |= self.stack[-1].changed()
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)] if watched else []
        self.stack.append(
            _Frame(
                module=module,
                tensors=tensors,
                versions=[tensor._version for tensor in tensors],
                buffers={name: buffer.clone() for name, buffer in module.named_buffers()} if watched else {},
                generator=torch.get_rng_state(),
                answers=len(self.recording.answers),
            )
        )

    def leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        frame = self.stack.pop()
        if self.stack:
            parent = self.stack[-1]
            parent.children.append(module)
            if parent.module in self.tails:
                parent.generator, parent.answers = torch.get_rng_state(), len(self.recording.answers)
                parent.theirs |= parent.changed()
        if module in self.recording.calls:
            if module in self.tails:
                del self.recording.answers[frame.answers :]
            self.recording.calls[module].append(_finished(frame, output))


def _finished(frame: _Frame, output: Any) -> Call:
    leaves, structure = pytree.tree_flatten(output)
    changed = [i for i, (tensor, version) in enumerate(zip(frame.tensors, frame.versions, strict=True)) if tensor._version != version]
    own = frame.own_buffers | frame.changed()
    if both := own.keys() & frame.theirs.keys():
        raise CaptureError(
            f"buffer {min(both)} of {type(frame.module).__name__} is changed by the module's own code and by a submodule, and the end of "
            "that code cannot be captured; let one of them change it"
        )
    buffers = {name: buffer for name, buffer in frame.module.named_buffers() if name in own}
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)] + [frame.tensors[i] for i in changed] + list(buffers.values())
    return Call(
        structure=structure,
        leaves=[TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves],
        results=tuple(Result(shape=tuple(each.shape), dtype=each.dtype) for each in tensors),
        arguments=tuple(changed),
        buffers=tuple(buffers),
        random=not torch.equal(frame.generator, torch.get_rng_state()),
        gradients=frame.gradients,
        children=tuple(frame.children),
        own=tuple(frame.own),
    )


def record(
    model: nn.Module, run: Callable[[], Any], whole: Sequence[nn.Module], tails: Sequence[nn.Module], *, gradients: bool = False
) -> Recording:
    """Runs the model on real tensors, with autograd on if it takes gradients. Buffers and generators are left as they were."""
    watch = _Watch(model, whole, tails)
    kept = {name: buffer.clone() for name, buffer in model.named_buffers()}
    hooks = [
        hook
        for module in model.modules()
        for hook in (
            module.register_forward_pre_hook(watch.enter, with_kwargs=True),
            module.register_forward_hook(watch.leave, with_kwargs=True),
        )
    ]
    try:
        with torch.random.fork_rng(), torch.no_grad():
            with torch.set_grad_enabled(gradients), watch:
                run()
            for name, buffer in model.named_buffers():
                buffer.copy_(kept[name])
    finally:
        for hook in hooks:
            hook.remove()
    return watch.recording
