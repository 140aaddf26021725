"""What each mesh axis splits, in words; for the tensor axis parameter by parameter."""

from __future__ import annotations

from collections.abc import Iterable

from shardwise.planner.plan import Plan
from shardwise.report.markup import Markup, element, join
from shardwise.report.words import operator_words, parameter_words, short_name

__all__ = ["splits"]

_WITH_PARAMETERS = ("linear", "addmm", "embedding", "conv", "norm")


def splits(plan: Plan) -> Markup:
    """A sentence for each axis and the tables of the tensor axis."""
    sentences = [element("div", element("dt", name), element("dd", text)) for name, text in _sentences(plan)]
    axes = element("dl", *sentences, class_="axes")
    return join(axes, _parameters(plan), _operators(plan)) if plan.tp > 1 else axes


def _sentences(plan: Plan) -> list[tuple[str, str]]:
    said: list[tuple[str, str]] = []
    if plan.dp > 1:
        own = [plan.global_batch * share // sum(plan.shares) for share in plan.shares]
        each = ", ".join(map(str, own)) if own else f"each on {plan.global_batch // plan.dp}"
        text = f"{plan.dp} copies, {'on ' if own else ''}{each} of the {plan.global_batch} samples; gradients are added up once a step"
        said.append((f"dp {plan.dp}", text))
    if plan.ep > 1:
        said.append((f"ep {plan.ep}", f"{plan.ep} of the copies divide the experts; rows go to their experts and back in each microbatch"))
    if plan.cp > 1:
        dims = ", ".join(f"dim {dim} of {name}" for name, dim in plan.sequence_dims.items())
        said.append((f"cp {plan.cp}", f"{plan.cp} ranks share each sequence ({dims}); gradients are added up once a step"))
    if plan.tp > 1:
        split = sum(text.startswith("S") for text in plan.parameters.values())
        said.append(
            (f"tp {plan.tp}", f"{plan.tp} ranks share each operator; {split} of {len(plan.parameters)} kinds of parameters are split")
        )
    if plan.pp > 1:
        said.append((f"pp {plan.pp}", _pipeline(plan)))
    if plan.microbatches > 1:
        order = f", in the order {plan.schedule}" if plan.pp > 1 else ""
        said.append((f"{plan.microbatches} microbatches", f"the batch is worked on in {plan.microbatches} parts{order}"))
    return said or [("1 rank", "does everything")]


def _pipeline(plan: Plan) -> str:
    if plan.chunks == 1:
        return f"{plan.pp} stages, one after the other, on ranks of their own"
    return f"{plan.pp * plan.chunks} stages, one after the other, {plan.chunks} on each of {plan.pp} ranks"


def _parameters(plan: Plan) -> Markup:
    rows = []
    for name, placement in plan.parameters.items():
        user = _user(plan, name.rpartition(".")[0])
        words = parameter_words(placement, *(user or (None, None)))
        rows.append(_row(name, placement, words, split=placement.startswith("S")))
    return _table(("parameter", "type", "in words"), rows)


def _user(plan: Plan, module: str) -> tuple[str, str] | None:
    """The operator, and its choice, that most likely uses the parameters of a module."""
    mine = [(key.split(":")[1], text) for key, text in plan.operators.items() if key.split(":")[0] == module]
    known = [pair for pair in mine if any(word in short_name(pair[0]) for word in _WITH_PARAMETERS)]
    return next(iter(known or mine[-1:]), None)


def _operators(plan: Plan) -> Markup:
    """All operators, folded away."""
    rows = []
    for key, text in plan.operators.items():
        module, operator, ordinal = key.split(":")
        name = short_name(operator) + (f" #{ordinal}" if ordinal != "0" else "")
        words = operator_words(operator, text)
        rows.append(_row(f"{module or plan.model} · {name}", text, words, split=text not in ("I", "R")))
    summary = element("summary", f"All {len(rows)} operators on the tensor axis")
    return element("details", summary, _table(("operator", "choice", "in words"), rows))


def _row(name: str, choice: str, words: str, *, split: bool) -> Markup:
    cells = (element("td", element("code", name)), element("td", element("code", choice)), element("td", words))
    return element("tr", *cells, class_=None if split else "whole")


def _table(names: Iterable[str], rows: list[Markup]) -> Markup:
    head = element("thead", element("tr", *(element("th", name) for name in names)))
    return element("div", element("table", head, element("tbody", *rows)), class_="scroll splits")
