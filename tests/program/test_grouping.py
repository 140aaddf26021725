"""Rows in the order of their experts: the same numbers as row by row, with fewer rows moved."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

from shardwise._torch import make_fx
from shardwise.capture.experts import expert_mm
from shardwise.program.grouping import group_rows
from shardwise.program.joint import JointGraph
from shardwise.program.trace import Tracer

_ops = torch.ops.shardwise
EXPERTS, ROWS, WIDTH, INNER = 5, 23, 6, 8


def tensors(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Rows, two matrices for each expert, the rows' experts (some have none, one expert has no row), and their shares."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    expert = torch.randint(-1, EXPERTS - 1, (ROWS,), generator=draw)
    return normal(ROWS, WIDTH), normal(EXPERTS, WIDTH, 2 * INNER), normal(EXPERTS, INNER, WIDTH), expert, normal(ROWS, 1)


def block(x: Tensor, up: Tensor, down: Tensor, expert: Tensor, share: Tensor) -> Tensor:
    gate, other = expert_mm(x, up, expert).chunk(2, -1)
    return expert_mm(nn.functional.silu(gate) * other, down, expert) * share


def square(result: Tensor) -> Tensor:
    return result.square().sum()


def square_of_sum(result: Tensor) -> Tensor:
    return result.sum(0).square().sum()


def with_gradients(function: Callable[..., Tensor], loss: Callable[[Tensor], Tensor] = square) -> Callable[..., tuple[Tensor, ...]]:
    def both(x: Tensor, up: Tensor, down: Tensor, expert: Tensor, share: Tensor) -> tuple[Tensor, ...]:
        leaves = [each.detach().requires_grad_() for each in (x, up, down, share)]
        with torch.enable_grad():
            result = function(*leaves[:3], expert, leaves[3])
            return result.detach(), *torch.autograd.grad(loss(result), leaves)

    return both


def graph_of(function: Callable[..., tuple[Tensor, ...]]) -> fx.Graph:
    graph = make_fx(function, tracing_mode="fake")(*tensors()).graph
    for node in list(graph.nodes):
        if node.target is torch.ops.aten.detach.default:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    return graph


def mode_of(graph: fx.Graph):
    return next(iter(graph.nodes)).meta["val"].fake_mode


def changed(graph: fx.Graph) -> set[fx.Node]:
    """Groups its rows; the nodes that it has since."""
    before = set(graph.nodes)
    renamed = group_rows(graph, set(before), mode_of(graph), ())
    graph.output_node().args = fx.node.map_arg(graph.output_node().args, lambda node: renamed.get(node, node))
    graph.lint()
    return set(graph.nodes) - before


def run(graph: fx.Graph, seed: int) -> tuple[Tensor, ...]:
    found: tuple[Tensor, ...] = fx.Interpreter(fx.GraphModule({}, graph)).run(*tensors(seed))
    return found


def picked(graph: fx.Graph) -> int:
    """Rows' elements that are moved, by the products that do so or before and after them."""
    moved = 0
    for node in graph.nodes:
        if node.target is torch.ops.aten.index_select.default and node.meta["val"].ndim > 1:
            moved += node.meta["val"].numel()
        elif node.target is _ops.expert_mm.default and node.args[-1] is not True:
            moved += node.args[0].meta["val"].numel() + node.meta["val"].numel()
        elif node.target is _ops.expert_outer.default and node.args[-1] is not True:
            moved += sum(each.meta["val"].numel() for each in node.args[:2])
    return moved


class TestProducts:
    @pytest.mark.parametrize("seed", range(5))
    def test_of_grouped_rows_are_those_of_rows_in_any_order(self, seed):
        x, weight, _, expert, _ = tensors(seed)
        order = _ops.expert_order(expert, EXPERTS)
        gradient = torch.randn(ROWS, weight.shape[2], dtype=torch.float64)
        wanted = torch.stack(
            [row @ weight[number] if number >= 0 else row.new_zeros(weight.shape[2]) for row, number in zip(x, expert, strict=True)]
        )
        torch.testing.assert_close(_ops.expert_mm(x, weight, expert), wanted)
        torch.testing.assert_close(_ops.expert_mm(x[order], weight, expert[order], True), wanted[order])
        outer = torch.stack([x[expert == number].T @ gradient[expert == number] for number in range(EXPERTS)])
        torch.testing.assert_close(_ops.expert_outer(x, gradient, expert, EXPERTS), outer)
        torch.testing.assert_close(_ops.expert_outer(x[order], gradient[order], expert[order], EXPERTS, True), outer)
        for grouped, inputs in ((False, (x, gradient, expert)), (True, (x[order], gradient[order], expert[order]))):
            into = torch.ones_like(outer)
            _ops.expert_outer_into(into, *inputs, True, grouped)
            torch.testing.assert_close(into, 1 + outer)
            _ops.expert_outer_into(into, *inputs, False, grouped)
            torch.testing.assert_close(into, outer)

    def test_order(self):
        assert _ops.expert_order(torch.tensor([2, -1, 0, 2, 7, 0]), 3).tolist() == [2, 5, 0, 3, 1, 4]


def cut_along_rows(x: Tensor, up: Tensor, down: Tensor, expert: Tensor, share: Tensor) -> Tensor:
    """What is done between the products mixes rows."""
    made = expert_mm(x, up, expert)[:, :INNER]
    return expert_mm(torch.cat([made[1:], made[:1]]), down, expert) * share


def by_another(x: Tensor, up: Tensor, down: Tensor, expert: Tensor, share: Tensor) -> Tensor:
    """Each product with experts of its own."""
    return expert_mm(expert_mm(x, up, expert)[:, :INNER], down, (expert + 1) % EXPERTS) * share


def read_between(x: Tensor, up: Tensor, down: Tensor, expert: Tensor, share: Tensor) -> Tensor:
    """What is between the products is read by others, and reads others."""
    made = expert_mm(x, up, expert)[:, :INNER] * share
    return expert_mm(made.tanh(), down, expert) + made.sum(0)[:WIDTH] + made.flip(0)[:, :WIDTH]


def in_other_types(x: Tensor, up: Tensor, down: Tensor, expert: Tensor, share: Tensor) -> Tensor:
    """With what lies between the products in another dtype, and half of it unused."""
    made = expert_mm(x, up, expert).float()[:, INNER:].tanh()
    return expert_mm(made.double(), down, expert) * share


def of_fewer(x: Tensor, up: Tensor, down: Tensor, expert: Tensor, share: Tensor) -> Tensor:
    """The first product lacks the matrices of two experts."""
    return expert_mm(expert_mm(x, up[:-2], expert)[:, :INNER].tanh(), down, expert) * share


def by_halves(x: Tensor, up: Tensor, down: Tensor, expert: Tensor, share: Tensor) -> Tensor:
    """One half goes on to the next product, the other to what mixes rows."""
    gate, other = expert_mm(x, up, expert).chunk(2, -1)
    return expert_mm(gate.tanh(), down, expert) * share + other.flip(0)[:, :WIDTH]


class TestGraphs:
    @pytest.mark.parametrize("function", [block, cut_along_rows, by_another, read_between, in_other_types, of_fewer, by_halves])
    @pytest.mark.parametrize("backward", [False, True])
    def test_compute_the_same(self, function, backward):
        graph = graph_of(with_gradients(function) if backward else lambda *args: (function(*args),))
        wanted = [run(graph, seed) for seed in range(4)]
        before = picked(graph)
        changed(graph)
        assert picked(graph) <= before
        for seed, values in enumerate(wanted):
            for found, each in zip(run(graph, seed), values, strict=True):
                torch.testing.assert_close(found, each, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("function", [block, in_other_types])
    def test_a_block_brings_rows_in_order_and_back_once_each_way(self, function):
        """In, out, the result's gradient, that of what came in; its shares' gradient reads what went out."""
        graph = graph_of(with_gradients(function, square_of_sum))
        changed(graph)
        assert picked(graph) == 4 * ROWS * WIDTH
        products = [node for node in graph.nodes if node.target in (_ops.expert_mm.default, _ops.expert_outer.default)]
        assert len(products) == 6 and all(node.args[-1] is True for node in products)
        assert sum(node.target is _ops.expert_order.default for node in graph.nodes) == 1

    def test_what_is_random_stays_in_its_place(self):
        def dropped(x, up, down, expert, share):
            return (expert_mm(torch.bernoulli(expert_mm(x, up, expert)[:, :INNER].sigmoid()), down, expert) * share,)

        graph = graph_of(dropped)
        changed(graph)
        (drawn,) = (node for node in graph.nodes if node.target is torch.ops.aten.bernoulli.default)
        above = [node.target for node in drawn.all_input_nodes[0].all_input_nodes]
        assert torch.ops.shardwise.expert_mm.default not in above, "its input is in the order of before"

    def test_what_is_returned_alone_is_in_the_order_of_before(self):
        """Of a stage that begins and ends with a product; its graph is split before it has an output."""
        x, up, down, expert, _ = tensors()
        tracer = Tracer(device=torch.device("cpu"))
        joint, names = JointGraph(tracer=tracer), ("x", "up", "down", "expert")
        inputs = [
            joint.placeholder(name, tracer.tensor(each.shape, each.dtype), grad=name != "expert")
            for name, each in zip(names, (x, up, down, expert), strict=True)
        ]

        def chain(leaves):
            return expert_mm(expert_mm(leaves[0], leaves[1], leaves[3])[:, :INNER].tanh(), leaves[2], leaves[3])

        (result,) = joint.apply(chain, "chain", inputs, grad=True, module="")
        seed = joint.placeholder("seed", tracer.tensor(result.meta["val"].shape, torch.float64), forward=False)
        joint.backward([(result, seed)])
        halves = joint.split([result], [joint.cotangents[inputs[0]]])
        assert any(node.target is _ops.expert_order.default for node in halves.forward.nodes)
        leaf, gradient = x.clone().requires_grad_(), torch.randn(ROWS, WIDTH, dtype=torch.float64)
        wanted = chain([leaf, up, down, expert])
        given = dict(zip(names, (x, up, down, expert), strict=True))
        found, *saved = fx.Interpreter(fx.GraphModule({}, halves.forward)).run(*(given[name] for name in halves.forward_inputs))
        torch.testing.assert_close(found, wanted.detach())
        given["seed"] = gradient
        (back,) = fx.Interpreter(fx.GraphModule({}, halves.backward)).run(*saved, *(given[name] for name in halves.backward_inputs))
        torch.testing.assert_close(back, torch.autograd.grad(wanted, leaf, gradient)[0])

    def test_one_product_alone_is_left_as_it_is(self):
        graph = graph_of(lambda x, up, down, expert, share: (expert_mm(x, up, expert).tanh() * share,))
        assert not changed(graph)

    def test_new_nodes_belong_to_the_pass_of_what_they_move(self):
        graph = graph_of(with_gradients(block))
        nodes = list(graph.nodes)
        last = max(number for number, node in enumerate(nodes) if node.target is _ops.expert_mm.default and number < len(nodes) // 2)
        forward = set(nodes[: last + 1])
        known = set(forward)
        group_rows(graph, forward, mode_of(graph), ())
        for node in forward - known:
            assert all(parent in forward for parent in node.all_input_nodes)
        assert forward - known
