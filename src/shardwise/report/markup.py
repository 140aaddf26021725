"""HTML from Python: what is not `Markup` is text and is escaped."""

from __future__ import annotations

from html import escape

__all__ = ["Markup", "element", "join"]


class Markup(str):
    """HTML that is safe as it stands."""

    __slots__ = ()


def element(name: str, *children: str, **attributes: object) -> Markup:
    """`element("td", "a < b", class_="wide")`. An attribute that is True stands alone, one that is None or False is left out."""
    words = [name]
    for key, value in attributes.items():
        spelled = key.rstrip("_").replace("_", "-")
        if value is True:
            words.append(spelled)
        elif value is not None and value is not False:
            words.append(f'{spelled}="{escape(str(value))}"')
    return Markup(f"<{' '.join(words)}>{join(*children)}</{name}>")


def join(*children: str) -> Markup:
    """The children one after the other."""
    return Markup("".join(child if isinstance(child, Markup) else escape(child) for child in children))
