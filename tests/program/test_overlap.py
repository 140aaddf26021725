"""ZeRO's messages begun early and awaited late: in order, two at a time, with what they need, and what that hides."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache

import pytest
from tests.clusters import made_up
from tests.models import Example, gpt2, llama, mlp
from tests.program.support import Built, build
from torch import fx

import shardwise as sw
from shardwise.cost.memory import most_bytes, requests, tensor_bytes
from shardwise.program.check import check_programs
from shardwise.program.joint import JointGraph
from shardwise.program.program import Program
from shardwise.sharding.collectives import ARRIVED, BEGINS, COLLECTIVES
from shardwise.simulate.costs import graph_seconds, node_seconds
from shardwise.simulate.traffic import traffic_of, traffic_seconds
from shardwise.verify.verify import Report

LAYOUTS: dict[str, tuple[Callable[[], Example], str]] = {
    "large alone": (lambda: mlp(hidden=160), "dp=3,tp=1,pp=1,microbatches=1,zero=3"),
    "tied, full": (lambda: gpt2(layers=3), "dp=2,tp=1,pp=1,microbatches=2,zero=3,recompute=full"),
    "with tp": (lambda: llama(layers=2), "dp=2,tp=2,pp=1,microbatches=1,zero=3"),
    "two parts of backward": (lambda: gpt2(layers=2), "dp=2,tp=1,pp=2,microbatches=2,zero=3,schedule=zb-h1"),
    "gradients alone": (lambda: llama(layers=2), "dp=2,tp=1,pp=1,microbatches=2,zero=2"),
}


@cache
def built(name: str) -> Built:
    make, layout = LAYOUTS[name]
    return build(make(), layout)


@cache
def at_once(name: str) -> Built:
    """With every message awaited where it is begun."""
    make, layout = LAYOUTS[name]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("shardwise.program.joint.overlap_messages", lambda graph: None)
        return build(make(), layout)


def graphs(program: Program) -> Iterator[fx.Graph]:
    for stage in program.stages.values():
        yield from stage.graphs.values()


def counted(graph: fx.Graph) -> Counter[str]:
    return Counter(COLLECTIVES[node.target] for node in graph.nodes if node.target in COLLECTIVES)  # type: ignore[index]


@pytest.mark.parametrize("name", LAYOUTS)
def test_each_is_awaited_once_and_few_are_under_way(name: str) -> None:
    """One that gathers and one that reduces at most; nobody reads what has not arrived; the same messages as without."""
    what = built(name)
    check_programs(what.programs, what.applied.assignment, what.applied.cut, what.choose)
    hidden = 0
    for program, plain in zip(what.programs.values(), at_once(name).programs.values(), strict=True):
        for graph, other in zip(graphs(program), graphs(plain), strict=True):
            assert counted(graph) == counted(other)
            under_way: list[fx.Node] = []
            for node in graph.nodes:
                if node.target in BEGINS.values():
                    under_way.append(node)
                    hidden += next(iter(node.users)) is not node.next
                elif node.target is ARRIVED:
                    begun, source = node.args
                    under_way.remove(begun)  # type: ignore[arg-type]
                    assert source is begun.args[0]  # type: ignore[union-attr]
                assert not any(each in under_way for each in node.all_input_nodes if node.target is not ARRIVED)
                kinds = Counter(COLLECTIVES[each.target] for each in under_way)  # type: ignore[index]
                assert max(kinds.values(), default=0) <= 1
            assert not under_way
            graph.lint()
    assert hidden > 2


@pytest.mark.parametrize("name", LAYOUTS)
def test_one_message_of_each_kind_more_is_held(name: str) -> None:
    for program, plain in zip(built(name).programs.values(), at_once(name).programs.values(), strict=True):
        for graph, other in zip(graphs(program), graphs(plain), strict=True):
            sizes: Counter[str] = Counter()
            for node in graph.nodes:
                if node.target in BEGINS.values():
                    kind, (source, *_) = COLLECTIVES[node.target], node.args  # type: ignore[index]
                    sizes[kind] = max(sizes[kind], tensor_bytes(node.meta["val"]) + tensor_bytes(source.meta["val"]))  # type: ignore[union-attr]
            assert most_bytes(requests(graph)) <= most_bytes(requests(other)) + sizes.total()


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_is_computed_beside_a_message_hides_it(name: str) -> None:
    """Against a clock on which a link carries one message after the other."""
    cluster = made_up(4, link_bytes_per_s=2e8)
    for program, plain in zip(built(name).programs.values(), at_once(name).programs.values(), strict=True):
        for graph, other in zip(graphs(program), graphs(plain), strict=True):
            found, before = graph_seconds(graph, cluster), graph_seconds(other, cluster)
            assert found.communicate_s <= before.communicate_s * (1 + 1e-9)
            assert found.communicate_s + found.compute_s >= clock(graph) * (1 - 1e-9)


def clock(graph: fx.Graph) -> float:
    """When a rank ends, on the cluster of the test above."""
    cluster = made_up(4, link_bytes_per_s=2e8)
    each = node_seconds(graph, cluster)
    now = free = 0.0
    ends: dict[fx.Node, float] = {}
    for node in graph.nodes:
        if node.target in BEGINS.values():
            free = ends[node] = max(now, free) + traffic_seconds([traffic_of(node)], cluster)
        elif node.target in COLLECTIVES:
            now += each[node]
        elif node.target is ARRIVED:
            now = max(now, ends[node.args[0]])  # type: ignore[index]
        else:
            now += each.get(node, 0.0)
    return now


def test_a_message_that_is_read_before_it_arrived_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks in one process show a result only when it is awaited."""
    split = JointGraph.split

    def hasty(self: JointGraph, *args: object, **more: object) -> object:
        halves = split(self, *args, **more)  # type: ignore[arg-type]
        first = next((node for node in halves.forward.nodes if node.target is ARRIVED), None)
        if first is not None:
            reader = max(first.users, key=list(halves.forward.nodes).index)
            reader.replace_input_with(first, first.args[0])  # type: ignore[arg-type]
            halves.forward.output_node().prepend(first)
        return halves

    monkeypatch.setattr(JointGraph, "split", hasty)
    report = sw.verify(*mlp(), cluster=made_up(2), layout="dp=2,zero=3", processes=False)
    assert isinstance(report, Report) and not report.ok
