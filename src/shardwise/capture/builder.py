"""What a call that is rewritten while capturing needs: the graph under construction, and the call itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from shardwise.capture.graph import Value

__all__ = ["Builder", "Request"]


class Builder(Protocol):
    """Appends to the graph under construction."""

    def add(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], metas: list[Tensor]) -> tuple[Value, ...]:
        """Appends one operator call; returns its results, described by `metas`."""

    def random_state(self) -> Value:
        """The input from which random numbers are made, int64 [2]: a number for the step, the microbatch."""

    def random_key(self) -> int:
        """A number for a random operator that no other one of the graph has."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """An operator call of the exported program; metas: descriptions of its results."""

    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    metas: list[Tensor]
    builder: Builder

    @property
    def meta(self) -> Tensor:
        """Of the first result."""
        return self.metas[0]

    def get(self, name: str) -> Any:
        """The argument of this name, however it was passed, or its default."""
        place, argument = next((place, each) for place, each in enumerate(self.target._schema.arguments) if each.name == name)
        return self.args[place] if len(self.args) > place else self.kwargs.get(name, argument.default_value)

    def add(self, target: Any, *args: Any, meta: Tensor | None = None, **kwargs: Any) -> Value:
        """Appends a call with one result, described as this call's first one unless `meta` is given."""
        return self.builder.add(target, args, kwargs, [self.meta if meta is None else meta])[0]
