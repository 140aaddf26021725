"""The model that a job was made from: what inference captures again, and what of it no operator reads."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from shardwise.capture.batch import named_tensors
from shardwise.capture.graph import Graph
from shardwise.runtime.weights import Weights

__all__ = ["Source"]


class Source:
    """Made while the model still has its parameters, if it ever has. loss, batch_dims, batch: as `parallelize` takes them.

    weights: where values come from that a model on the meta device lacks; of another model they are not kept.
    names: the keys of the model's state_dict → the first name of the same tensor.
    """

    def __init__(
        self,
        model: nn.Module,
        batch: Mapping[str, Any],
        loss: Callable[[Any], Tensor] | None = None,
        batch_dims: Mapping[str, int | None] | None = None,
        weights: Weights | None = None,
    ) -> None:
        self.model, self.loss, self.batch_dims = model, loss, dict(batch_dims or {})
        self.constants = {name: value for name, value in batch.items() if not named_tensors({name: value})}
        self.like = {parameter: torch.empty_like(parameter, device="meta") for parameter in model.parameters()}
        tensors = [*model.parameters(), *model.buffers()]
        self.on_meta = any(tensor.is_meta for tensor in tensors)
        self.weights = weights if self.on_meta else None
        self.loaded: dict[str, Tensor] = {}  # what has no place in a model on the meta device
        first: dict[int, str] = {}
        for name, tensor in (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)):
            first.setdefault(id(tensor), name)
        kept = model.state_dict(keep_vars=True)
        self.names = {name: first.get(id(tensor), name) for name, tensor in kept.items() if isinstance(tensor, Tensor)}

    def unread(self, graph: Graph) -> dict[str, Tensor]:
        """Parameters and buffers that no operator reads, which stay in the model."""
        read = {value.name for op in graph.ops for value in op.inputs} | set(graph.updates)
        found = {name: each for name, each in self.model.state_dict().items() if self.names.get(name, name) not in read}
        return {name: self._value(name, tensor) for name, tensor in found.items()}

    def load_unread(self, graph: Graph, given: Mapping[str, Tensor]) -> None:
        """Puts values there."""
        for name, tensor in self.unread(graph).items():
            if name in given and tensor.shape == given[name].shape:
                if self.on_meta:
                    self.loaded[name] = given[name].clone()
                else:
                    tensor.copy_(given[name])

    def _value(self, name: str, tensor: Tensor) -> Tensor:
        if not tensor.is_meta:
            return tensor
        if name not in self.loaded:
            assert self.weights is not None
            self.loaded |= self.weights.whole([name])
        return self.loaded[name]

    def fixed(self, names: Collection[str]) -> dict[str, Tensor]:
        """Those of the buffers that the model has, as they were before training."""
        every = {name: buffer.detach() for name, buffer in self.model.named_buffers(remove_duplicate=False)}
        return {name: self._value(name, every[name]) for name in names if name in every}

    def fill(self, values: Iterable[tuple[str, Tensor]]) -> None:
        """Within `answering`: gives the parameters their values."""
        named = dict(self.model.named_parameters(remove_duplicate=False))
        with torch.no_grad():
            for name, value in values:
                if name in named:
                    named[name].copy_(value)

    @contextmanager
    def answering(self) -> Iterator[nn.Module]:
        """The model in eval mode, with tensors of the right shapes for parameters, which have no values: nothing writes their memory."""
        home = "meta" if self.on_meta else "cpu"
        empty = {parameter: nn.Parameter(_unwritten(like, home), parameter.requires_grad) for parameter, like in self.like.items()}
        places = [
            (module, name, parameter)
            for module in self.model.modules()
            for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False)
        ]
        modes = {module: module.training for module in self.model.modules()}
        try:
            for module, name, parameter in places:
                setattr(module, name, empty[parameter])
            yield self.model.eval()
        finally:
            for module, name, parameter in places:
                setattr(module, name, parameter)
            for module, training in modes.items():
                module.training = training


def _unwritten(like: Tensor, home: str) -> Tensor:
    """Memory that the system gives when it is first written, which is never."""
    return torch.empty_like(like, device=home, requires_grad=False)
