"""TOML files checked against a model: what is wrong, with file, line, key, value and what is accepted."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from shardwise.errors import ClusterError

__all__ = ["line_of", "parsed", "validated"]

_M = TypeVar("_M", bound=BaseModel)
_Place = tuple[str | int, ...]


def parsed(text: str, file: str) -> dict[str, Any]:
    """The document in ``text``; ClusterError with the line of a mistake in its syntax. file: what messages call it."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ClusterError(f"{file} cannot be read as TOML: {error}") from error


def validated(model: type[_M], document: Mapping[str, Any], text: str, file: str) -> _M:
    """``document``, which ``text`` holds, as a ``model``; ClusterError names every key that is wrong, with its line."""
    try:
        return model.model_validate(document)
    except ValidationError as error:
        said = [_said(model, problem["loc"], problem, text) for problem in error.errors()]
        raise ClusterError(f"{file}: {'; '.join(dict.fromkeys(said))}") from error


def line_of(text: str, place: _Place) -> int:
    """The line, from 1, where the key of a place such as ("groups", 1, "nodes") stands; that of its table where it is missing, else 0."""
    lines = text.splitlines()
    found = -1
    for index, part in enumerate(place):
        if isinstance(part, int):
            header = re.compile(rf"\s*\[\[\s*{re.escape(str(place[index - 1]))}\s*\]\]")
            headers = [number for number, line in enumerate(lines) if header.match(line)]
            found = headers[part] if part < len(headers) else found
            continue
        word = re.compile(rf"(?<![\w-])[\"']?{re.escape(part)}[\"']?\s*[=.\]]")
        found = next((number for number in range(max(found, 0), len(lines)) if word.search(_code(lines[number]))), found)
    return found + 1


def _code(line: str) -> str:
    return line.split("#", 1)[0]


def _said(model: type[BaseModel], place: _Place, problem: Any, text: str) -> str:
    key = ".".join(str(part + 1) if isinstance(part, int) else part for part in place)
    line = line_of(text, place)
    where = f"line {line}: key {key!r}" if line and place else f"key {key!r}" if place else "the file"
    if problem["type"] == "missing":
        return f"{where} is missing"
    if problem["type"] == "extra_forbidden":
        return f"{where} is unknown; known are {', '.join(_known(model, place[:-1]))}"
    wrong = str(problem["ctx"]["error"]) if problem["type"] == "value_error" else problem["msg"]
    value = problem["input"]
    return f"{where}: {wrong}" if isinstance(value, Mapping | list) else f"{where} is {value!r}: {wrong}"


def _known(model: type[BaseModel], place: _Place) -> list[str]:
    """The keys of the table at a place."""
    for part in place:
        annotation = model.model_fields[part].annotation if isinstance(part, str) and part in model.model_fields else None
        model = next(iter(_models(annotation)), model)
    return [name for name in model.model_fields if name not in ("name", "sources") or not place]


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in getattr(annotation, "__args__", ()) for model in _models(inner)]
