"""Predicted bytes against what really lives while a program's graphs run."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.alone import Living, alone
from tests.clusters import made_up
from tests.models import Example, gpt2, llama, mlp, unet
from tests.program.support import build
from torch import Tensor, fx

from shardwise.capture.export import capture
from shardwise.capture.state import state_of as whole_state_of
from shardwise.cluster.rates import IMPLEMENTATIONS
from shardwise.cost.heap import Heap
from shardwise.cost.memory import most_bytes, requests, tensor_bytes
from shardwise.planner.apply import apply_plan
from shardwise.planner.layout import Layout
from shardwise.planner.search import search
from shardwise.program import reductions
from shardwise.program.build import build_programs
from shardwise.program.program import Program, StageProgram
from shardwise.runtime.executor import Executor
from shardwise.runtime.gradients import Gradients
from shardwise.runtime.graphs import callable_of
from shardwise.runtime.job import batch_part
from shardwise.runtime.optimizer import prefer_fused
from shardwise.runtime.parameters import Parameters
from shardwise.runtime.transport import Distributed
from shardwise.runtime.weights import own_part
from shardwise.simulate.memory import RUNTIME_BYTES, memory_use
from shardwise.simulate.messages import Messages
from shardwise.simulate.passes import Passed, Passes, kept_values, placeholders, saved_values
from shardwise.simulate.requests import step_requests

WITHIN = 0.02
STEP_WITHIN = 0.04
CPU = torch.device("cpu")


def stage_of(example: Example) -> StageProgram:
    """The only rank's stage."""
    model, batch = example
    graph = capture(model, batch)
    plan = search(graph, made_up(1), Layout.parse("microbatches=1"), "adamw", "model")
    applied = apply_plan(plan, graph)  # type: ignore[arg-type]
    programs = build_programs(applied.assignment, applied.cut, "1f1b", lambda *_: "native", device=torch.device("cpu"))
    return programs[0].stages[0]


def filled(node: fx.Node) -> Tensor:
    meta = node.meta["val"]
    if meta.is_floating_point():
        return torch.rand(meta.shape, dtype=meta.dtype)
    return torch.ones(meta.shape, dtype=meta.dtype) if meta.dtype is torch.bool else torch.zeros(meta.shape, dtype=meta.dtype)


def most_after(graph: fx.Graph, passed: Passed) -> int:
    """The most that a graph holds beside what was passed to it, which it frees."""
    return most_bytes(requests(graph, lambda node: passed.sizes.get(node, 0), passed.aliases))


EXAMPLES: dict[str, Callable[[], Example]] = {
    "mlp": lambda: mlp(samples=256),
    "gpt2": lambda: gpt2(layers=2, sequence=64),
    "llama": lambda: llama(layers=2, sequence=64),
    "unet": unet,
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_bytes_are_those_that_live(name: str) -> None:
    stage = stage_of(EXAMPLES[name]())
    inputs = [filled(node) for node in placeholders(stage.forward)]
    with torch.no_grad():
        forward = Living()
        forward.ignore(inputs)
        with forward:
            results = callable_of(stage.forward)(list(inputs))
        assert forward.peak_bytes == pytest.approx(most_bytes(requests(stage.forward)), rel=WITHIN)

        saved = results[len(stage.forward_outputs) :]
        del results
        lasting = {tensor.untyped_storage()._cdata for tensor in inputs}
        own = [tensor for tensor in saved if tensor.untyped_storage()._cdata not in lasting]
        held = sum({tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in own}.values())
        assert held == pytest.approx(saved_values(stage).nbytes, rel=WITHIN)

        backward = Living(own)
        assert backward.start_bytes == held
        seeds = [filled(node) for node in placeholders(stage.backward)[stage.saved :]]
        backward.ignore([*inputs, *seeds])
        given = [*saved, *seeds]
        del saved, own
        with backward:
            callable_of(stage.backward)(given)
    predicted = most_after(stage.backward, saved_values(stage))
    assert backward.peak_bytes - held == pytest.approx(predicted, rel=WITHIN, abs=WITHIN * held)


def split_stage(example: Example) -> StageProgram:
    """The last of two stages, in a schedule that splits the backward pass."""
    model, batch = example
    graph = capture(model, batch)
    plan = search(graph, made_up(2), Layout.parse("dp=1,tp=1,pp=2,microbatches=2,schedule=zb-h1"), "adamw", "model")
    applied = apply_plan(plan, graph)  # type: ignore[arg-type]
    programs = build_programs(applied.assignment, applied.cut, plan.tables, lambda *_: "native", device=torch.device("cpu"))  # type: ignore[union-attr]
    return programs[1].stages[1]


@pytest.mark.parametrize("name", ["mlp", "gpt2", "llama"])
def test_bytes_that_live_between_the_parts_of_a_backward_pass(name: str) -> None:
    stage = split_stage(EXAMPLES[name]())
    saved, kept = saved_values(stage), kept_values(stage, saved_values(stage))
    assert stage.weight is not None
    inputs = [filled(node) for node in placeholders(stage.forward)]
    lasting = [tensor for tensor, binding in zip(inputs, stage.forward_inputs, strict=True) if binding.kind != "edge"]
    seeds = [filled(node) for node in placeholders(stage.backward)[stage.saved :]]
    others = {tensor.untyped_storage()._cdata for tensor in [*lasting, *seeds]}
    with torch.no_grad():
        saved_tensors = callable_of(stage.forward)(list(inputs))[len(stage.forward_outputs) :]
        del inputs
        left = lived_through(stage.backward, [*saved_tensors, *seeds], others, saved, saved_tensors)[len(stage.backward_outputs) :]
        del saved_tensors
        lived_through(stage.weight, left, others, kept, left)


def lived_through(graph: fx.Graph, given: list[Tensor], others: set[int], passed: Passed, passed_on: list[Tensor]) -> list[Any]:
    """Runs a graph, which empties both lists, and compares what lives with what is predicted; its results. others: somebody else's."""
    own = [tensor for tensor in passed_on if tensor.untyped_storage()._cdata not in others]
    living = Living(own)
    living.ignored |= others
    held = living.start_bytes
    assert held == pytest.approx(passed.nbytes, rel=WITHIN)
    del own
    inputs = list(given)
    given.clear()
    passed_on.clear()
    with living:
        results = callable_of(graph)(inputs)
    assert living.peak_bytes - held == pytest.approx(most_after(graph, passed), rel=WITHIN, abs=WITHIN * held)
    return results


STEPS: dict[str, str] = {
    "nothing divided": "dp=2,microbatches=1",
    "zero 1": "dp=2,microbatches=2,zero=1",
    "zero 2": "dp=2,microbatches=2,zero=2",
    "zero 3": "dp=2,microbatches=1,zero=3",
    "selective": "dp=2,microbatches=1,recompute=selective",
    "full": "dp=2,microbatches=1,recompute=full",
    "zero 3, full": "dp=2,microbatches=1,zero=3,recompute=full",
}


class Watched(Distributed):
    """Torch leaves the mode for what goes on inside an operator of a graph; here it is looked at, too."""

    def __init__(self, living: Living) -> None:
        super().__init__()
        self.living = living

    def begin_all_gather(self, *arguments: Any) -> tuple[Tensor, Callable[[], object]]:
        with self.living:
            return super().begin_all_gather(*arguments)

    def begin_reduce_scatter(self, *arguments: Any) -> tuple[Tensor, Callable[[], object]]:
        with self.living:
            return super().begin_reduce_scatter(*arguments)


def choose(impl: str) -> Callable[[str, int, int], str]:
    return lambda kind, nbytes, ranks: impl if impl in IMPLEMENTATIONS[kind] else "native"


@pytest.mark.parametrize("impl", ["native", "exchange", "all_reduce"])
@pytest.mark.parametrize("name", STEPS)
def test_a_whole_step_takes_what_is_predicted(name: str, impl: str) -> None:
    """The first rank's parameters, gradients, states, activations and messages, in the second of two steps of AdamW."""
    example = gpt2(layers=3, hidden=96, samples=8, sequence=64)
    assert_predicted(example, f"tp=1,pp=1,{STEPS[name]}", impl)


WIDE: dict[str, str] = {
    "two ranks": "dp=2,microbatches=2",
    "four ranks": "dp=4,microbatches=1",
    "zero 1": "dp=4,microbatches=1,zero=1",
    "zero 1, in groups": "dp=4,microbatches=1,zero=1,shard=2",
    "zero 3": "dp=4,microbatches=1,zero=3",
    "two stages": "dp=2,pp=2,microbatches=2",
    "two stages, backward in two parts": "dp=2,pp=2,microbatches=2,schedule=zb-h1",
    "two stages on each": "dp=2,pp=2,chunks=2,microbatches=2,schedule=interleaved",
    "one stage beside the next": "dp=2,pp=2,chunks=2,microbatches=4,schedule=zb-v",
}


@pytest.mark.parametrize("impl", ["native", "exchange"])
@pytest.mark.parametrize("name", WIDE)
def test_messages_of_a_wide_model(name: str, impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They take up to a third of a rank: few samples, and several buckets of which two are under way."""
    monkeypatch.setattr(reductions, "BUCKET_BYTES", 2**18)
    assert_predicted(mlp(hidden=128, samples=8), f"{'' if 'pp' in WIDE[name] else 'pp=1,'}tp=1,{WIDE[name]}", impl)


def assert_predicted(example: Example, layout: str, impl: str) -> None:
    living = Living()
    program = two_steps(example, layout, impl, living, Watched(living))
    use = memory_use(program, "adamw")
    assert living.peak_bytes == pytest.approx(use.total - use.runtime, rel=STEP_WITHIN)


def two_steps(example: Example, layout: str, impl: str, living: Living, transport: Distributed, rank: int = 0) -> Program:
    """A rank's program, after two steps of AdamW that it took alone."""
    built = build(example, layout)
    programs = build_programs(built.applied.assignment, built.applied.cut, built.plan.tables, choose(impl), device=CPU)
    program = programs[rank]
    model, batch = example
    whole = whole_state_of(model, built.graph)
    mine = batch_part(built.graph, built.plan, program, batch, CPU)
    living.ignore([*whole.values(), *mine.values(), *batch.values()])
    with alone(rank), living:
        parts = [*program.parameters, *program.buffers]
        state = {part.name: own_part(whole[part.name], part, program, CPU).clone() for part in parts}
        gradients = Gradients(program, transport, CPU)
        parameters = Parameters(program, state, {}, gradients.parts, transport)
        optimizer = prefer_fused(torch.optim.AdamW([parameter for _, parameter in parameters.trained], lr=0.0))
        executor = Executor(program, state, gradients, transport, CPU)

        def update() -> None:
            optimizer.step()
            parameters.gather()

        for step in range(2):
            executor.step(mine, step, update)
    return program


class Sender(Distributed):
    """Counts how many of the tensors that were sent are still held when the next one is. known: as of a backend that tells what arrived."""

    def __init__(self, *, known: bool) -> None:
        super().__init__()
        self.known, self.sent, self.most = known, [], 0

    def send(self, x: Tensor, peer: int) -> Any:
        self.sent.append(weakref.ref(x))
        self.most = max(self.most, sum(each() is not None for each in self.sent))
        work = super().send(x, peer)
        return SimpleNamespace(wait=work.wait, is_completed=lambda: self.known)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(("known", "most"), [(True, 1), (False, 2)])
def test_what_was_sent_is_freed_when_it_is_known_to_have_arrived(rank: int, known: bool, most: int) -> None:
    """By the backend's word, or since something came that was sent later: two microbatches are in flight in the first of two stages."""
    transport = Sender(known=known)
    program = two_steps(mlp(samples=8), "dp=1,tp=1,pp=2,microbatches=8", "native", Living(), transport, rank)
    assert sum(action.sends for action in program.actions) == 8 == len(transport.sent) // 2
    assert transport.most == most


@pytest.mark.parametrize("impl", ["native", "exchange"])
@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("name", ["two ranks", "four ranks", "zero 1", "zero 1, in groups"])
def test_messages_under_way_take_just_what_is_predicted(name: str, impl: str, early: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """early: begun one after the other, during the backward pass; else all are sent when it has ended."""
    monkeypatch.setattr(reductions, "BUCKET_BYTES", 2**18)
    built = build(mlp(hidden=128), f"tp=1,pp=1,{WIDE[name]}")
    programs = build_programs(built.applied.assignment, built.applied.cut, built.plan.tables, choose(impl), device=CPU)
    messages, asked = Messages(program=programs[0]), []
    living = Living()
    with alone(), living:
        gradients = Gradients(programs[0], Distributed(), CPU)
        start = living.now_bytes()
        assert len(gradients.pending) > 2  # so that the oldest is waited for
        for number in range(len(gradients.pending) if early else 0):
            gradients.start(number)
            asked += messages.begin(number)
            assert living.now_bytes() - start == messages.held_bytes
        living.peak_bytes = living.now_bytes()
        gradients.reduce()
    held = messages.held_bytes
    assert living.peak_bytes - start == held + max(0, most_bytes(messages.reduce()))
    assert held == sum(nbytes for _, nbytes in asked)
    assert living.now_bytes() == start and messages.held_bytes == 0


def test_kinds_add_up() -> None:
    model, batch = gpt2(layers=1)
    graph = capture(model, batch)
    plan = search(graph, made_up(2), Layout.parse("tp=2"), "adamw", "model")
    applied = apply_plan(plan, graph)  # type: ignore[arg-type]
    programs = build_programs(applied.assignment, applied.cut, "1f1b", lambda *_: "native", device=torch.device("cpu"))
    for program in programs.values():
        use = memory_use(program, "adamw")
        assert sum(use.by_kind().values()) == use.total
        assert use.gradients == use.parameters and use.optimizer == 2 * use.parameters
        assert memory_use(program, "sgd").total == use.total - use.optimizer
    whole = sum(value.nbytes for value in graph.parameters.values())
    kept = memory_use(programs[0], "adamw").parameters
    assert whole / 2 <= kept < 0.6 * whole


def test_bytes_of_tensors() -> None:
    a, b = torch.zeros(3, 4), torch.zeros(5, dtype=torch.int64)
    assert tensor_bytes(a) == 48 and tensor_bytes((a, [b])) == 88 and tensor_bytes(None) == 0


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("name", [*WIDE])
def test_all_that_a_step_takes_is_given_back_once(name: str, rank: int) -> None:
    """And played on the heap it takes no less than it holds."""
    program = build(mlp(), f"{'' if 'pp' in WIDE[name] else 'pp=1,'}tp=1,{WIDE[name]}").programs[rank]
    asked = step_requests(program, {number: Passes(stage=stage) for number, stage in program.stages.items()})
    held: dict[Hashable, int] = {}
    for who, nbytes in asked:
        if nbytes > 0:
            assert who not in held
            held[who] = nbytes
        else:
            assert held.pop(who) == -nbytes
    assert not held
    use, heap = memory_use(program, "adamw"), Heap()
    heap.play(asked)
    assert use.saved + use.transient == most_bytes(asked) <= heap.peak_bytes
    assert use.runtime >= RUNTIME_BYTES + heap.peak_bytes - most_bytes(asked)


def test_what_was_sent_counts_until_it_is_known_to_have_arrived() -> None:
    """The first of two stages, two microbatches in flight. It holds most in backward passes, when of what it has sent only the next
    microbatch's has no gradient yet; all eight are held in the last but one, if nothing tells that they arrived."""
    program = build(mlp(samples=8), "dp=1,tp=1,pp=2,microbatches=8,schedule=1f1b").programs[0]
    passes = {number: Passes(stage=stage) for number, stage in program.stages.items()}
    unknown = replace(program, actions=[replace(action, proves=()) for action in program.actions])
    (edge,) = program.edges
    assert most_bytes(step_requests(unknown, passes)) - most_bytes(step_requests(program, passes)) == (8 - 1) * edge.nbytes
