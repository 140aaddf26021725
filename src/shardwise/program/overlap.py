"""Lets ZeRO's messages travel while other work goes on: each is begun early and awaited late.

    before    gather a · use a · gather b · use b                      gradient · to parts · next gradient · to parts
    after     begin a · a arrived · begin b · use a · b arrived · …    gradient · begin · next gradient · arrived · begin · …

A gather is begun when the one before it has arrived: beside what is in use one message more is held. A gradient's reduction to parts is
awaited when the next begins, or where its result is read: one is held. What is sent stays as it is until it has arrived. The order in which
messages begin is that of the graph, which is the same on all ranks that take part.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import fx

from shardwise.sharding.collectives import ARRIVED, BEGINS, COLLECTIVES

__all__ = ["overlap_messages"]


def overlap_messages(graph: fx.Graph) -> None:
    """Exchanges the collectives that gather parameters (nodes whose meta has "gathered") and reduce their gradients to parts ("scattered")
    for ones that are begun and awaited."""
    _gathers([node for node in graph.nodes if _is(node, "all_gather", "gathered")])
    _scatters(graph, [node for node in graph.nodes if _is(node, "reduce_scatter", "scattered")])


def _is(node: fx.Node, kind: str, mark: str) -> bool:
    return node.op == "call_function" and COLLECTIVES.get(node.target) == kind and bool(node.meta.get(mark))  # type: ignore[call-overload]


def _gathers(nodes: Sequence[fx.Node]) -> None:
    """In the graph's order; the first is begun before everything else."""
    before: fx.Node | None = None
    for node in nodes:
        begun, arrived = _in_two(node)
        place = next(each for each in begun.graph.nodes if each.op != "placeholder") if before is None else before.next
        for each in [*_made_of(begun.all_input_nodes, place), begun]:
            if each is place:
                place = place.next
            else:
                place.prepend(each)
        before = arrived


def _made_of(nodes: Iterable[fx.Node], place: fx.Node) -> list[fx.Node]:
    """Those that stand at the place or later, and what they are made of, in order: parameters' parts, and what puts them together."""
    later: list[fx.Node] = []
    at: fx.Node = place
    while at.op != "root":
        later.append(at)
        at = at.next
    position = {node: number for number, node in enumerate(later)}
    found: set[fx.Node] = set()
    pending = [node for node in nodes if node in position]
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            pending.extend(parent for parent in node.all_input_nodes if parent in position)
    return sorted(found, key=position.__getitem__)


def _scatters(graph: fx.Graph, nodes: Sequence[fx.Node]) -> None:
    position = {node: number for number, node in enumerate(graph.nodes)}
    for number, node in enumerate(nodes):
        taken_apart = _only_of(node)
        readers = {user for each in (node, *taken_apart) for user in each.users} - set(taken_apart)
        place = min(readers, key=position.__getitem__)  # the graph's end, where nothing reads it before
        if number + 1 < len(nodes) and position[nodes[number + 1]] < position[place]:
            place = nodes[number + 1]
        begun, arrived = _in_two(node)
        for each in (arrived, *taken_apart):
            place.prepend(each)
        position |= {begun: position[node], arrived: position[place] - 0.5}  # type: ignore[dict-item]


def _only_of(node: fx.Node) -> list[fx.Node]:
    """What takes a message apart into parameters' parts, in the graph's order: made of it alone."""
    found = [node]
    for each in found:
        for user in each.users:
            if user.meta.get("scattered") and user not in found and all(parent in found for parent in user.all_input_nodes):
                found.append(user)
    return found[1:]


def _in_two(node: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Where the collective stood it is begun and awaited."""
    graph, source = node.graph, node.args[0]
    with graph.inserting_before(node):
        begun = graph.call_function(BEGINS[node.target], node.args, node.kwargs)  # type: ignore[index]
        arrived = graph.call_function(ARRIVED, (begun, source))
    begun.meta, arrived.meta = dict(node.meta), dict(node.meta)
    node.replace_all_uses_with(arrived)
    graph.erase_node(node)
    return begun, arrived
