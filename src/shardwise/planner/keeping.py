"""What a piece holds between its forward and its backward pass, and while either runs, by what is computed once more.

    none        what the backward graph reads: inputs of products and norms, outputs of softmax, masks of dropout
    attention   of that, not what lies between the two products of attention that is not fused (Korthikanti et al. 2022, section 4.2)
    selective   the piece's inputs and what its products with weights make
    alternate   the piece's inputs, what attention makes, and every second product with weights (torchtitan's per-operator policy)
    full        the piece's inputs (Chen et al. 2016)

and by which of these values are made again anyhow, from no more bytes: "none"; "kernels", as Megatron-LM does whose fused kernels (norms,
rotary positions, gated activations) keep what they read and not what lies inside them, and which gathers again what was gathered over the
tensor axis (Korthikanti et al. 2022, section 4.2.2); "all", whatever elementwise chains make, as compilers do.

A block of a GPT of width h with a heads on b sequences of s tokens keeps sbh·(34 + 5as/h) bytes as autograd does, 34·sbh without
attention's core, 2·sbh where all is computed again (Korthikanti et al. 2022, equation 1 and table 2).
"""

from __future__ import annotations

from collections.abc import Collection, Container, Hashable, Iterable, Mapping
from dataclasses import dataclass
from itertools import chain

from torch import fx

from shardwise.capture.keyed import is_random
from shardwise.cost.allocator import Block, CachingAllocator
from shardwise.cost.fusion import fused_traffic, is_fused_kernel
from shardwise.cost.memory import bases, most_bytes, requests, tensor_bytes
from shardwise.cost.operators import name_of
from shardwise.program.program import Binding, StageProgram
from shardwise.program.recompute import WEIGHED
from shardwise.sharding.collectives import COLLECTIVES
from shardwise.simulate.passes import Passed, saved_values

__all__ = ["LEVELS", "Kept", "kept", "of_the_batch"]

LEVELS = ("none", "kernels", "all")
_ATTENTION = "scaled_dot_product"  # begins, after underscores, the names of fused attention


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Bytes of one microbatch on a rank.

    saved: by what is made again anyhow, what is kept; entered: of it, what other pieces made.
    shared: kept beside, once for all equal pieces of a stage: masks and the like, made of the batch alone.
    core: of it, what lies inside attention that is not fused. made: what products with weights make; attended: what fused attention makes.
    chosen: what every second of them and
    attention make; needed: of that, what anything that autograd keeps is made from.
    late: what the weights' part of the backward pass reads, of what is kept and of what the inputs' part makes (Qi et al. 2023, table 1).
    working: by what is made again anyhow, the most beside, in either pass; cached: what the allocator takes from the device beside both.
    """

    saved: Mapping[str, int]
    shared: int
    entered: int
    core: int
    made: int
    attended: int
    chosen: int
    needed: int
    late: int
    working: Mapping[str, int]
    cached: Mapping[str, int]

    def share(self, part: float) -> Kept:
        """A part of what is kept, with nothing beside."""
        nothing = dict.fromkeys(self.working, 0)
        return Kept(
            saved={remade: int(nbytes * part) for remade, nbytes in self.saved.items()},
            shared=int(self.shared * part),
            entered=int(self.entered * part),
            core=int(self.core * part),
            made=int(self.made * part),
            attended=int(self.attended * part),
            chosen=int(self.chosen * part),
            needed=int(self.needed * part),
            late=int(self.late * part),
            working=nothing,
            cached=nothing,
        )

    def kept(self, recompute: str, remade: str) -> int:
        """Bytes kept until the backward pass begins."""
        saved = self.saved[remade]
        least = {
            "none": saved,
            "attention": max(saved - self.core, self.entered),
            "pointwise": self.entered + self.made + self.attended,
            "selective": self.entered + self.made,
            "alternate": self.entered + (self.needed if remade == "all" else self.chosen),
            "full": self.entered,
        }
        return min(saved, least[recompute])

    def beside(self, recompute: str, remade: str) -> int:
        """The most that is held beside while it is at work, with what is computed once more."""
        return self.working[remade] + self.saved[remade] - self.kept(recompute, remade)


def kept(stage: StageProgram, weights: Container[fx.Node]) -> Kept:
    """What a rank's program of one piece holds. weights: the nodes of its backward graph that only gradients of parameters need."""
    graph, base = stage.forward, bases(stage.forward, {})
    bindings = _bindings(stage)
    arrived = {node for node, binding in bindings.items() if binding.kind == "edge"}
    returned = graph.output_node().args[0]
    assert isinstance(returned, (list, tuple))
    read = (base[node] for node in returned[len(stage.forward_outputs) :] if isinstance(node, fx.Node))
    every = [node for node in dict.fromkeys(read) if node.op == "call_function" or node in arrived]
    common = of_the_batch(stage)
    by_autograd = [node for node in every if node not in common]
    apart = {node for node, binding in bindings.items() if binding.kind in ("edge", "parameter")}
    core = _core(graph, by_autograd, base, apart)
    lasting = {"none": by_autograd, "kernels": [node for node in by_autograd if node in core or not _is_inside(node, base)], "all": []}
    saved = {
        level: [node for node in _remade(by_autograd, stays, base) if node.op == "call_function" or node in arrived]
        for level, stays in lasting.items()
    }
    chosen = _chosen(graph)
    products = [node for node in graph.nodes if name_of(node.target) in WEIGHED]
    values, made = saved_values(stage), [node for node in every if node.op == "call_function"]
    working, fused = _working(stage, made, values), _working_fused(stage, [node for node in saved["all"] if node.op == "call_function"])
    return Kept(
        saved={level: _bytes(nodes) for level, nodes in saved.items()},
        shared=_bytes(node for node in every if node in common),
        entered=_bytes({_entrance(node, base) for nodes in saved.values() for node in nodes if _root(node, base) in arrived}),
        core=_bytes(core),
        made=_bytes(products),
        attended=_bytes(node for node in graph.nodes if _is_attention(node)),
        chosen=_bytes(chosen),
        needed=_bytes(_needed(graph, chosen, by_autograd, base)),
        late=_late(stage, weights, values),
        working=dict.fromkeys(LEVELS, working) | {"all": fused},
        cached=dict.fromkeys(LEVELS, max(0, _reserved(stage, made, values) - working)) | {"all": 0},
    )


def _bindings(stage: StageProgram) -> dict[fx.Node, Binding]:
    return dict(zip((node for node in stage.forward.nodes if node.op == "placeholder"), stage.forward_inputs, strict=True))


def of_the_batch(stage: StageProgram) -> set[fx.Node]:
    """The forward graph's nodes that are made of nothing but the batch and buffers, random numbers aside: equal pieces share them."""
    found = {node for node, binding in _bindings(stage).items() if binding.kind in ("crossing", "buffer")}
    for node in stage.forward.nodes:
        if node.op == "call_function" and found.issuperset(node.all_input_nodes) and not is_random(node.target):
            found.add(node)
    return found


def _entrance(node: fx.Node, base: dict[fx.Node, fx.Node]) -> fx.Node:
    """What a rank keeps of a value that is its gathered form."""
    while _is_gather(node):
        node = base[node.all_input_nodes[0]]
    return node


def _root(node: fx.Node, base: dict[fx.Node, fx.Node]) -> fx.Node:
    """What a value is made from by collectives alone: what comes in may have to be summed or gathered."""
    while node.target in COLLECTIVES:
        node = base[node.all_input_nodes[0]]
    return node


def _chosen(graph: fx.Graph) -> list[fx.Node]:
    """What the alternate policy keeps: of the products with weights the first, third, …, fused attention, and what is reduced and scattered
    (torchtitan, distributed/activation_checkpoint.py, `_op_sac_save_list`)."""
    products = [node for node in graph.nodes if name_of(node.target) in WEIGHED]
    always = [node for node in graph.nodes if _is_attention(node) or COLLECTIVES.get(node.target) == "reduce_scatter"]
    return products[::2] + always


def _is_attention(node: fx.Node) -> bool:
    return node.op == "call_function" and name_of(node.target).lstrip("_").startswith(_ATTENTION)


def _bytes(nodes: Iterable[fx.Node]) -> int:
    return sum(tensor_bytes(node.meta.get("val")) for node in nodes)


# -- while a pass runs ---------------------------------------------------------------------------------------------------------------------


def _working(stage: StageProgram, made: Collection[fx.Node], saved: Passed) -> int:
    """The most beside what is kept, each value freed at its last use."""
    forward = most_bytes(requests(stage.forward)) - _bytes(made)
    backward = most_bytes(requests(stage.backward, lambda node: saved.sizes.get(node, 0), saved.aliases))
    return max(0, forward, backward)


def _working_fused(stage: StageProgram, made: Collection[fx.Node]) -> int:
    """The same where no value inside a chain of fused kernels reaches memory."""
    forward, backward = stage.forward, stage.backward
    sent = list(forward.output_node().args[0])[: len(stage.forward_outputs)]  # type: ignore[arg-type]
    ends = {*made, *(node for node in sent if isinstance(node, fx.Node))}
    ahead = most_bytes(requests(forward, unwritten=_unwritten(fused_traffic(forward, ends)), keeps=ends)) - _bytes(made)
    return max(0, ahead, most_bytes(requests(backward, unwritten=_unwritten(fused_traffic(backward)))))


def _unwritten(traffic: Mapping[fx.Node, tuple[int, int]]) -> set[fx.Node]:
    return {node for node, (_, written) in traffic.items() if not written}


def _reserved(stage: StageProgram, made: Collection[fx.Node], saved: Passed) -> int:
    """The most that the allocator has taken from the device beside what is kept, when one has run after the other."""
    allocator = CachingAllocator()
    blocks: dict[Hashable, Block] = {}
    forward, backward = stage.forward, stage.backward
    base = bases(forward, {})
    left = list(forward.output_node().args[0])[len(stage.forward_outputs) :]  # type: ignore[arg-type]
    takers = [node for node in backward.nodes if node.op == "placeholder"]
    owners: dict[Hashable, fx.Node] = {taker: base[node] for node, taker in zip(left, takers, strict=False)}
    asked = (requests(forward, keeps=made), requests(backward, lambda node: saved.sizes.get(node, 0), saved.aliases))
    for owner, nbytes in chain(*asked):
        if nbytes > 0:
            blocks[owner] = allocator.take(nbytes)
        elif (block := blocks.pop(owners.get(owner, owner), None)) is not None:
            allocator.give(block)
    return allocator.reserved_bytes - _bytes(made)


def _late(stage: StageProgram, weights: Container[fx.Node], saved: Passed) -> int:
    base = bases(stage.backward, saved.aliases)
    read = {base[each] for node in stage.backward.nodes if node in weights for each in node.all_input_nodes if each not in weights}
    return sum(saved.sizes.get(node, 0) if node.op == "placeholder" else tensor_bytes(node.meta.get("val")) for node in read)


# -- what is made again --------------------------------------------------------------------------------------------------------------------


def _core(graph: fx.Graph, saved: list[fx.Node], base: dict[fx.Node, fx.Node], apart: Container[fx.Node]) -> list[fx.Node]:
    """What lies between attention's two products: made from the first or from nothing, and read by the second.

    apart: inputs that attention is not made of: parameters and what comes in.
    """
    products = {
        node for node in graph.nodes if name_of(node.target) == "bmm" and all(base[each] not in apart for each in node.all_input_nodes)
    }
    inside: set[fx.Node] = set()
    for node in graph.nodes:
        known = all(each in products or each in inside for each in node.all_input_nodes)
        if node not in apart if node.op == "placeholder" else is_fused_kernel(node) and known:
            inside.add(node)
    leads: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if is_fused_kernel(node) and any(user in products or user in leads for user in node.users):
            leads.add(node)
    scores = {base[node] for node in inside & leads}
    return [node for node in saved if node in scores]


def _needed(graph: fx.Graph, chosen: list[fx.Node], saved: list[fx.Node], base: dict[fx.Node, fx.Node]) -> list[fx.Node]:
    """Of the chosen, those that are kept or that anything kept is made from."""
    kept_nodes, picked = set(saved), set(chosen)
    leads: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op != "output" and (base[node] in kept_nodes or any(user in leads and user not in picked for user in node.users)):
            leads.add(node)
    return [node for node in chosen if node in leads]


def _is_inside(node: fx.Node, base: dict[fx.Node, fx.Node]) -> bool:
    """Whether a value is gathered, or lies inside a fused kernel: no random mask, and nothing but elementwise operators read it."""
    if _is_gather(node):
        return True
    readers = [user for each in [node, *_views(node, base)] for user in each.users if base[user] is not node and user.op != "output"]
    return "keep" not in name_of(node.target) and all(is_fused_kernel(user) for user in readers)


def _views(node: fx.Node, base: dict[fx.Node, fx.Node]) -> list[fx.Node]:
    found = [user for user in node.users if base[user] is base[node] and user.op != "output"]
    return found + [view for each in found for view in _views(each, base)]


def _remade(kept_nodes: Iterable[fx.Node], stays: Container[fx.Node], base: dict[fx.Node, fx.Node]) -> dict[fx.Node, None]:
    """Without the values that chains of elementwise operators and gathers make again from what is kept, or from no more bytes than they
    take themselves. stays: what is not made again."""
    found = dict.fromkeys(kept_nodes)
    for node in list(found):
        sources = None if node in stays else _sources(node, base)
        if sources is None:
            continue
        new = [each for each in sources if each not in found and each.op != "placeholder"]
        if _bytes(new) <= tensor_bytes(node.meta.get("val")) and node not in sources:
            del found[node]
            found |= dict.fromkeys(sources)
    return found


def _sources(node: fx.Node, base: dict[fx.Node, fx.Node]) -> set[fx.Node] | None:
    """What a chain of elementwise operators and gathers that ends at `node` reads; None where the node is none of them."""
    if not _is_again(node):
        return None
    found: set[fx.Node] = set()
    pending, seen = [node], {node}
    while pending:
        for parent in {base[each] for each in pending.pop().all_input_nodes} - seen:
            seen.add(parent)
            if _is_again(parent):
                pending.append(parent)
            else:
                found.add(parent)
    return found


def _is_again(node: fx.Node) -> bool:
    return is_fused_kernel(node) or _is_gather(node)


def _is_gather(node: fx.Node) -> bool:
    return COLLECTIVES.get(node.target) == "all_gather"  # type: ignore[call-overload]
