"""`--config run.toml`: a command's options in a file. Options on the command line win.

model = "hf:config.json"     each key is an option without its dashes; global-batch and global_batch are the same
steps = 200
[layout]                     the same as layout = "tp=2,pp=2"
tp = 2
pp = 2
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from shardwise.commands.shared import reported
from shardwise.errors import ShardwiseError

__all__ = ["ConfigOption", "read_options"]

_TABLE = re.compile(r"\s*\[\s*([^\]]+?)\s*\]")
_KEY = re.compile(r"""\s*["']?([\w-]+)["']?\s*[.=]""")
_NEAREST = 3


def read_options(path: Path, ctx: typer.Context) -> dict[str, Any]:
    """Parameter's name → value, of the options that the file gives.

    Raises ShardwiseError with file and line for what is no TOML, no option of the command (naming the nearest ones), or no value for it.
    """
    try:
        text = path.read_text()
        given = tomllib.loads(text)
    except OSError as error:
        raise ShardwiseError(f"there is no configuration file {path} that can be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ShardwiseError(f"{path} is not TOML: {error}") from error
    known = _options(ctx)
    found: dict[str, Any] = {}
    for key, value in given.items():
        where = f"{path}, line {_line(text, key)}"
        option = key.replace("_", "-")
        if option not in known:
            near = difflib.get_close_matches(option, known, n=_NEAREST, cutoff=0.4) or sorted(known)
            raise ShardwiseError(f"{where}: {key!r} is no option of {ctx.command.name}; the nearest are {', '.join(near)}")
        if known[option].name in found:
            raise ShardwiseError(f"{where}: {key!r} is given twice, with a dash and with an underscore")
        found[str(known[option].name)] = _checked(where, key, value, known[option], ctx)
    return found


def _options(ctx: typer.Context) -> dict[str, Any]:
    """`global-batch` → the parameter. Not --config itself, and not --help."""
    options = {name.removeprefix("--"): each for each in ctx.command.params for name in each.opts if name.startswith("--")}
    return {name: each for name, each in options.items() if name not in ("config", "help")}


def _checked(where: str, key: str, value: Any, option: Any, ctx: typer.Context) -> Any:
    """The value as the command line would have it."""
    if isinstance(value, Mapping):
        if key != "layout" or any(isinstance(each, Mapping) for each in value.values()):
            raise ShardwiseError(f"{where}: {key!r} is a table; only [layout] may be one")
        value = ",".join(f"{name}={':'.join(map(str, one)) if isinstance(one, list) else one}" for name, one in value.items())
    flag = bool(getattr(option, "is_flag", False))
    if isinstance(value, bool) != flag:
        raise ShardwiseError(f"{where}: {key} = {_written(value)}; it takes {'true or false' if flag else 'a value'}")
    try:
        option.process_value(ctx, value if flag else str(value))
    except typer.BadParameter as error:
        raise ShardwiseError(f"{where}: {key} = {_written(value)}: {error.message}") from error
    return value if flag else str(value)


def _written(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value)


def _line(text: str, key: str) -> int:
    """The number of the line where a key of the first level begins."""
    table = ""
    for number, line in enumerate(text.splitlines(), start=1):
        if match := _TABLE.match(line):
            table = match[1].strip("\"'")
            if table.partition(".")[0] == key:
                return number
        elif not table and (match := _KEY.match(line)) and match[1] == key:
            return number
    return 1


@reported
def _read(ctx: typer.Context, path: Path | None) -> Path | None:
    """Makes the file's values the defaults of all other options."""
    if path is not None:
        ctx.default_map = {**(ctx.default_map or {}), **read_options(path, ctx)}
    return path


ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", callback=_read, is_eager=True, help="A file with options (.toml); those on the command line win."),
]
