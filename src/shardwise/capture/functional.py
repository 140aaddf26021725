"""An exported program without in-place operators, its regions without gradient marked by `detach`.

torch's own functionalisation (`run_decompositions({})`) forgets where gradients were off. So before it, such regions are made part of
their surroundings with their meaning written out:

    result of an operator             detached
    view that is read outside         detached there: inside it must stay a view
    in-place operator on x            x.copy_(x with the new value and the old one's gradient), as autograd sees it

So is an in-place operator on `x.detach()`, or a view of it, which changes x behind autograd's back.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

__all__ = ["functional"]

aten = torch.ops.aten


def functional(exported: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The same program without in-place operators and vmap: changed buffers become results. High-level operators are kept."""
    if not any(_mutates(node) or _is_vmap(node) for node in _nodes(exported.graph_module)):
        return exported
    _open_regions(exported.graph_module)
    _write_through_detached(exported.graph_module.graph)
    return exported.run_decompositions({})


def _nodes(module: fx.GraphModule) -> Iterator[fx.Node]:
    for each in module.modules():
        if isinstance(each, fx.GraphModule):
            yield from each.graph.nodes


def _mutates(node: fx.Node) -> bool:
    target = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
        return False
    return bool(target._schema.is_mutable) or target is aten.batch_norm.default


def _is_vmap(node: fx.Node) -> bool:
    """Part of a `torch.vmap`, which exporting leaves in the program."""
    return node.op == "call_function" and getattr(node.target, "__module__", "") == "torch._functorch.predispatch"


def _region(node: fx.Node) -> tuple[str, fx.GraphModule, list[Any], bool] | None:
    """(attribute, body, arguments, whether gradients are on in it) of a call of a region."""
    name = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
    if name == "wrap_with_set_grad_enabled":
        enabled, body, arguments = node.args[0], node.args[1], list(node.args[2:])
    elif name == "wrap_with_autocast" and not node.args[2]:
        enabled, body, arguments = True, node.args[4], list(node.args[5:])
    else:
        return None
    assert isinstance(body, fx.Node) and isinstance(body.target, str), "a region's body is a submodule"
    module = node.graph.owning_module
    assert module is not None
    return body.target, module.get_submodule(body.target), arguments, bool(enabled)  # type: ignore[return-value]


def _open_regions(module: fx.GraphModule) -> None:
    """Puts the nodes of all regions in the place of their calls, the innermost last."""
    for node in list(module.graph.nodes):
        if (found := _region(node)) is None:
            continue
        attribute, body, arguments, enabled = found
        _open_regions(body)
        inside = _inline(module, node, attribute, body, arguments)
        if not enabled:
            _write_out(module.graph, inside)
    module.graph.eliminate_dead_code(lambda node: node.is_impure() or _is_vmap(node))
    module.recompile()


def _inline(module: fx.GraphModule, call: fx.Node, attribute: str, body: fx.GraphModule, arguments: list[Any]) -> list[fx.Node]:
    copies: dict[fx.Node, Any] = dict(zip((n for n in body.graph.nodes if n.op == "placeholder"), arguments, strict=True))
    inside: list[fx.Node] = []
    results: Any = ()
    with module.graph.inserting_before(call):
        for node in body.graph.nodes:
            if node.op == "output":
                results = fx.node.map_arg(node.args[0], copies.__getitem__)
            elif node.op == "get_attr":
                copies[node] = module.graph.get_attr(f"{attribute}.{node.target}")
                copies[node].meta = dict(node.meta)
            elif node.op == "call_function":
                copies[node] = module.graph.node_copy(node, copies.__getitem__)
                inside.append(copies[node])
    for user in list(call.users):
        user.replace_all_uses_with(results[user.args[1]])
        module.graph.erase_node(user)
    if call.users:
        call.replace_all_uses_with(results)
    module.graph.erase_node(call)
    return inside


def _write_out(graph: fx.Graph, inside: list[fx.Node]) -> None:
    """Detaches what the nodes of a region without gradient make."""
    region = set(inside)
    for node in inside:
        if _mutates(node) and node.target is not aten.batch_norm.default:
            _write_out_in_place(graph, node, region)
        elif isinstance(node.meta.get("val"), torch.Tensor):
            outside = {user for user in node.users if user not in region}
            _detach(graph, node, outside if _is_view(node) else set(node.users))


def _detach(graph: fx.Graph, node: fx.Node, users: set[fx.Node]) -> None:
    if not users or not node.meta["val"].is_floating_point():
        return
    with graph.inserting_after(node):
        detached = graph.call_function(aten.detach.default, (node,))
    detached.meta = dict(node.meta)
    for user in users:
        user.replace_input_with(node, detached)


def _write_through_detached(graph: fx.Graph) -> None:
    """x.detach().op_(…) as x.op_(…) in a region without gradient."""
    for node in list(graph.nodes):
        if not _mutates(node) or _out_of_place(node) is None or not isinstance(node.args[0], fx.Node):
            continue  # among them what writes to `out=`, not to its first argument
        views, source = [], node.args[0]
        while _is_view(source) and isinstance(source.args[0], fx.Node):
            views.append(source)
            source = source.args[0]
        if all(view.target is not aten.detach.default for view in views):
            continue
        with graph.inserting_before(node):
            for view in reversed(views):
                if view.target is not aten.detach.default and not _mutates(view):
                    copy = graph.node_copy(view)
                    copy.args = (source, *view.args[1:])
                    source = copy
        node.replace_input_with(node.args[0], source)
        if (changed := _write_out_in_place(graph, node, set())) is not None:
            _detach(graph, changed, set(changed.users))


def _write_out_in_place(graph: fx.Graph, node: fx.Node, region: set[fx.Node]) -> fx.Node | None:
    """x.op_(…): x keeps its gradient's way and gets the new value. Operators that write into arguments of other kinds are left."""
    old = node.args[0]
    plain = _out_of_place(node)
    if plain is None or not isinstance(old, fx.Node) or not isinstance(old.meta.get("val"), torch.Tensor):
        return None
    if not old.meta["val"].is_floating_point():
        return None

    def call(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        made = graph.call_function(target, args, kwargs)
        made.meta = dict(node.meta)
        region.add(made)
        return made

    with graph.inserting_before(node):
        before = call(aten.clone.default, old)
        frozen = call(aten.detach.default, before)
        arguments = fx.node.map_arg((node.args[1:], node.kwargs), lambda n: _frozen(n, call))
        value = call(plain, frozen, *arguments[0], **arguments[1])
        zero = call(aten.sub.Tensor, before, frozen)  # nothing, with the old value's gradient
        new = call(aten.add.Tensor, call(aten.detach.default, value), zero)
        copied = call(aten.copy_.default, old, new)
    node.replace_all_uses_with(copied)
    graph.erase_node(node)
    return copied


def _frozen(node: fx.Node, call: Any) -> fx.Node:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return node
    detached: fx.Node = call(aten.detach.default, node)
    detached.meta = dict(node.meta)
    return detached


def _out_of_place(node: fx.Node) -> Any:
    """`aten.add.Tensor` for a call of `aten.add_.Tensor`; None where there is no such operator."""
    target: Any = node.target
    name = target._schema.name.split("::")[1]
    packet = getattr(aten, name.rstrip("_"), None) if name.endswith("_") and target.namespace == "aten" else None
    return getattr(packet, target._overloadname, None) if packet is not None else None


def _is_view(node: fx.Node) -> bool:
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and any(r.alias_info is not None for r in target._schema.returns)
