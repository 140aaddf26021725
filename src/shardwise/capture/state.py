"""The tensors of a model that its graph reads."""

from __future__ import annotations

from torch import Tensor, nn

from shardwise.capture.graph import Graph
from shardwise.errors import CaptureError

__all__ = ["state_of"]


def state_of(model: nn.Module, graph: Graph) -> dict[str, Tensor]:
    """Parameters, buffers and constants by the graph's names, detached. Raises CaptureError where one has no values."""
    named = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}
    found = {name: named[name].detach() for name in (*graph.parameters, *graph.buffers) if name in named} | dict(graph.constants)
    if missing := [name for name, tensor in found.items() if tensor.is_meta]:
        raise CaptureError(
            f"{missing[0]} and {len(missing) - 1} more tensors of the model are on the meta device: they have no "
            f"values; build the model on cpu"
        )
    return found
