"""Chains of elementwise operators as a compiler would run them: one kernel, whose intermediate results never reach memory.

Operators that are bound by memory (elementwise, reductions, norms, copies) are fused where no product, attention, convolution or
collective lies between them. Of a fused operator's traffic there remains what it reads from elsewhere and what is read elsewhere.
"""

from __future__ import annotations

from collections.abc import Collection

from torch import fx

from shardwise.cost.memory import bases, tensor_bytes
from shardwise.cost.operators import FREE, MATMULS, is_view, name_of
from shardwise.sharding.collectives import COLLECTIVES

__all__ = ["fused_traffic", "is_free", "is_fused_kernel"]

_HEAVY = MATMULS | {
    "convolution",
    "convolution_backward",
    "scaled_dot_product_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention_for_cpu_backward",
    "_grouped_mm",
    "expert_mm",
    "expert_outer",
    "end_shift",
}
_APART = frozenset(
    {
        *("embedding", "embedding_dense_backward", "index", "index_select", "index_put", "index_add"),
        *("scatter", "scatter_add", "gather", "sort", "argsort", "expert_order", "topk"),
    }
)


def fused_traffic(graph: fx.Graph, returned: Collection[fx.Node] | None = None) -> dict[fx.Node, tuple[int, int]]:
    """Node → (bytes read, bytes written) of every operator that is fused with a neighbour or could be. returned: what the graph returns,
    where it is not to be all of that."""
    base = bases(graph, {})
    level: dict[fx.Node, int] = {}
    for node in graph.nodes:
        before = max((level[parent] for parent in node.all_input_nodes), default=0)
        level[node] = before + (node.op == "call_function" and not _light(node))
    readers: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "output" or (node.op == "call_function" and base[node] is node):
            given = node.all_input_nodes if node.op != "output" or returned is None else returned
            for parent in dict.fromkeys(base[each] for each in given):
                readers.setdefault(parent, []).append(node)
    found: dict[fx.Node, tuple[int, int]] = {}
    for node in graph.nodes:
        if not is_fused_kernel(node) or is_free(node):
            continue
        sources = dict.fromkeys(base[each] for each in node.all_input_nodes)
        read = sum(tensor_bytes(each.meta.get("val")) for each in sources if not (is_fused_kernel(each) and level[each] == level[node]))
        outside = any(not is_fused_kernel(each) or level[each] != level[node] for each in readers.get(node, []))
        found[node] = read, tensor_bytes(node.meta.get("val")) if outside else 0
    return found


def is_fused_kernel(node: fx.Node) -> bool:
    """Whether a node is an operator bound by memory that fuses with its neighbours."""
    return node.op == "call_function" and _light(node) and name_of(node.target) not in _APART


def _light(node: fx.Node) -> bool:
    return node.target not in COLLECTIVES and name_of(node.target) not in _HEAVY


def is_free(node: fx.Node) -> bool:
    """Whether a node is no kernel: a view, an allocation, an item of a tuple."""
    name = name_of(node.target)
    return not name or name in FREE or is_view(node.target)
