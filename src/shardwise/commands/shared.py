"""What commands do alike: report wrong input, refuse, give up, print. Exit codes: 1 the numbers differ, 2 wrong input, 3 infeasible."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import typer
from rich.console import Console

from shardwise.errors import ShardwiseError

__all__ = ["DIFFERS", "INFEASIBLE", "WRONG_INPUT", "feasible", "pinned_layout", "reported", "required", "show"]

DIFFERS, WRONG_INPUT, INFEASIBLE = 1, 2, 3

_P = ParamSpec("_P")
_R = TypeVar("_R")


def reported(command: Callable[_P, _R]) -> Callable[_P, _R]:
    """A wrong input prints one message and exits with 2, without a traceback."""

    @functools.wraps(command)
    def wrapper(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            return command(*args, **kwargs)
        except ShardwiseError as error:
            Console(stderr=True).print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
            raise typer.Exit(WRONG_INPUT) from None

    return wrapper


def required(model: str | None) -> str:
    """The model's specification. Raises ShardwiseError where none was given."""
    if model is None:
        raise ShardwiseError("no model was given: add --model hf:CONFIG.json or --model FILE.py:FUNCTION.")
    return model


def pinned_layout(layout: str | None, **options: str | None) -> str | None:
    """The layout with what options of their own name."""
    named = [f"{name}={value}" for name, value in options.items() if value is not None]
    return ",".join(filter(None, (layout, *named))) or None


def feasible(result: Any) -> Any:
    """The result; where it is an Infeasible its reasons are printed and the command ends with 3."""
    import shardwise as sw

    if isinstance(result, sw.Infeasible):
        Console(stderr=True).print(str(result), style="yellow", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(INFEASIBLE)
    return result


def show(values: dict[str, Any], as_json: bool) -> None:
    """Prints names and values, for people or as JSON."""
    if as_json:
        typer.echo(json.dumps(values, indent=2))
        return
    width = max(len(name) for name in values)
    for name, value in values.items():
        typer.echo(f"{name.replace('_', ' '):{width}}  {value}")
