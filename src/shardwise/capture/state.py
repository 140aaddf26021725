"""The tensors of a model that its graph reads."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from shardwise.capture.graph import Graph
from shardwise.errors import CaptureError

__all__ = ["refuse_without_values", "state_of", "tensors_of"]


def tensors_of(model: nn.Module, graph: Graph) -> dict[str, Tensor]:
    """Parameters, buffers and constants by the graph's names, detached, with values or without."""
    named = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}
    return {name: named[name].detach() for name in (*graph.parameters, *graph.buffers) if name in named} | dict(graph.constants)


def state_of(model: nn.Module, graph: Graph) -> dict[str, Tensor]:
    """The same. Raises CaptureError where one has no values."""
    found = tensors_of(model, graph)
    refuse_without_values(found)
    return found


def refuse_without_values(tensors: Mapping[str, Tensor]) -> None:
    """Raises CaptureError for tensors on the meta device."""
    if missing := [name for name, tensor in tensors.items() if tensor.is_meta]:
        raise CaptureError(
            f"{missing[0]} and {len(missing) - 1} more tensors of the model are on the meta device: they have no "
            f"values; build the model on cpu, or give `parallelize` the function that builds it, or files with `weights=`"
        )
