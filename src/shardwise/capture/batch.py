"""A batch: keyword arguments of a module's forward. Tensors may stand in lists, tuples and dicts there; each has its path for a name:

{"image": a, "crops": [b, c], "cond": {"text": d}}   →   image, crops.0, crops.1, cond.text
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

__all__ = ["dim_of", "leaf_names", "map_tensors", "named_tensors"]


def named_tensors(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """All tensors of a batch by their names."""
    return {_name(path): leaf for path, leaf in pytree.tree_flatten_with_path(dict(batch))[0] if isinstance(leaf, Tensor)}


def leaf_names(batch: Mapping[str, Any]) -> list[str]:
    """The names of all that stands in a batch, tensors or not, in the order of pytree's leaves."""
    return [_name(path) for path, _ in pytree.tree_flatten_with_path(dict(batch))[0]]


def map_tensors(function: Callable[[str, Tensor], Any], batch: Mapping[str, Any]) -> dict[str, Any]:
    """The same batch with function(name, tensor) in the place of each tensor."""
    result: dict[str, Any] = pytree.tree_map_with_path(
        lambda path, leaf: function(_name(path), leaf) if isinstance(leaf, Tensor) else leaf, dict(batch)
    )
    return result


def dim_of(name: str, dims: Mapping[str, int | None]) -> int | None:
    """What dims say of a tensor: by its name, or by that of what it stands in; 0 where they say nothing."""
    while name not in dims and "." in name:
        name = name.rpartition(".")[0]
    return dims.get(name, 0)


def _name(path: tuple[Any, ...]) -> str:
    return ".".join(map(_step, path))


def _step(key: Any) -> str:
    match key:
        case pytree.SequenceKey(idx=place):
            return str(place)
        case pytree.GetAttrKey(name=name):
            return name
    return str(key.key)
