"""The preflight: good programs pass, and each way of spoiling them is told by a message that names it."""

from __future__ import annotations

import re
import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.models import gpt2, llama, mlp
from tests.program.support import Built, build, copied_graph, copied_programs, only_stage
from torch import fx

from shardwise.errors import CheckError
from shardwise.program.actions import Action, Kind
from shardwise.program.check import check_memory, check_own, check_programs
from shardwise.program.lower import Cut
from shardwise.program.program import Program
from shardwise.sharding.collectives import COLLECTIVES
from shardwise.sharding.types import I, R, Shard

Programs = dict[int, Program]


@pytest.fixture(scope="module")
def tensor_and_stages() -> Built:
    """Collectives, edges and a tied parameter: ranks 0, 1 are stage 0, ranks 2, 3 stage 1."""
    return build(gpt2(layers=1), "dp=1,tp=2,pp=2,microbatches=2,schedule=1f1b")


@pytest.fixture(scope="module")
def data() -> Built:
    return build(mlp(), "dp=2,tp=1,pp=2,microbatches=4,schedule=1f1b")


@pytest.fixture(scope="module")
def chunks() -> Built:
    """Ranks 0 and 1 have stages 0, 3 and 1, 2; the backward pass is in two parts."""
    return build(gpt2(layers=1), "dp=1,tp=1,pp=2,microbatches=2,schedule=zb-v")


def check(built: Built, programs: Programs, cut: Cut | None = None) -> None:
    check_programs(programs, built.applied.assignment, cut or built.applied.cut, built.choose)


def said(built: Built, programs: Programs, cut: Cut | None = None) -> str:
    with pytest.raises(CheckError) as caught:
        check(built, programs, cut)
    return str(caught.value)


def index_of(program: Program, kind: Kind, microbatch: int = 0) -> int:
    return next(i for i, action in enumerate(program.actions) if action.kind is kind and action.microbatch == microbatch)


def test_good_programs_pass_and_fast(tensor_and_stages: Built, data: Built, chunks: Built) -> None:
    for built in (tensor_and_stages, data, chunks):
        started = time.perf_counter()
        check(built, built.programs)
        assert time.perf_counter() - started < 0.2
        for program in built.programs.values():
            check_own(program, built.applied.assignment, built.applied.cut)


# -- operators -----------------------------------------------------------------------------------------------------------------------------


def test_an_operator_in_no_stage(data: Built) -> None:
    cut = data.applied.cut
    lost = next(op for op in data.graph.ops if op in cut.stage_of)
    without = {op: stage for op, stage in cut.stage_of.items() if op is not lost}
    assert said(data, data.programs, Cut(stage_of=without, prelude=cut.prelude)) == f"{lost.key} is in no stage; there are stages 0 to 1"


def test_an_operator_twice(tensor_and_stages: Built) -> None:
    cut = tensor_and_stages.applied.cut
    twice = next(iter(cut.stage_of))
    message = said(tensor_and_stages, tensor_and_stages.programs, Cut(stage_of=cut.stage_of, prelude=cut.prelude | {twice}))
    assert message.startswith(f"{twice.key} is in stage 0 and in the prelude too")


def test_an_operator_that_reads_from_a_later_stage(data: Built) -> None:
    cut = data.applied.cut
    first = next(op for op in data.graph.ops if op in cut.stage_of)
    message = said(data, data.programs, Cut(stage_of=dict(cut.stage_of) | {first: 1}, prelude=cut.prelude))
    assert re.search(r"in stage 0 reads \S+, which stage 1 makes", message)


def test_a_stage_without_operators(data: Built) -> None:
    cut = data.applied.cut
    moved = {op: 2 * stage for op, stage in cut.stage_of.items()}
    assert said(data, data.programs, Cut(stage_of=moved, prelude=cut.prelude)) == "stage 1 of 3 has no operators"


# -- parameters ----------------------------------------------------------------------------------------------------------------------------


def test_a_part_left_out(tensor_and_stages: Built) -> None:
    programs = copied_programs(tensor_and_stages.programs)
    lost = only_stage(programs[1]).parameters.pop(3)
    assert said(tensor_and_stages, programs) == f"rank 1 holds no part of parameter {lost.name}, which stage 0 reads"


def test_a_rank_without_a_program(tensor_and_stages: Built) -> None:
    programs = copied_programs(tensor_and_stages.programs)
    del programs[3]
    assert said(tensor_and_stages, programs) == "rank 3 of 4 has no program"


def test_a_program_in_the_wrong_place(tensor_and_stages: Built) -> None:
    programs = copied_programs(tensor_and_stages.programs)
    programs[0], programs[1] = programs[1], programs[0]
    assert "rank 0 must be at {'dp': 0, 'cp': 0, 'tp': 0, 'pp': 0}, its program is rank 1's" in said(tensor_and_stages, programs)


def spoil_part(built: Built, rank: int, change: Any) -> tuple[str, str]:
    """The message when the first split weight of a rank is changed, and the weight's name."""
    programs = copied_programs(built.programs)
    parts = only_stage(programs[rank]).parameters
    at = next(i for i, part in enumerate(parts) if isinstance(part.type["tp"], Shard) and len(part.shape) == 2 and len(part.stages) == 1)
    parts[at] = change(parts[at])
    return said(built, programs), parts[at].name


def test_a_part_of_another_size(tensor_and_stages: Built) -> None:
    message, name = spoil_part(tensor_and_stages, 1, lambda part: replace(part, local=(part.local[0] - 1, *part.local[1:])))
    assert re.search(rf"rank 1 holds \[\d+, \d+\] of {name} \[\d+, \d+\]; as .* it must hold \[\d+, \d+\]", message)


def test_a_part_of_another_dtype(tensor_and_stages: Built) -> None:
    message, name = spoil_part(tensor_and_stages, 1, lambda part: replace(part, dtype=torch.float16))
    assert re.search(rf"rank 1 holds a part of {name} as float16 .* the model has float32", message)


def test_a_part_of_another_type(tensor_and_stages: Built) -> None:
    message, name = spoil_part(tensor_and_stages, 1, lambda part: replace(part, type=dict(part.type) | {"tp": I}))
    assert re.search(rf"rank 1 keeps {name} as .*I on tp, the assignment says .*S\(", message)


def test_a_gradient_that_is_not_reduced(data: Built) -> None:
    programs = copied_programs(data.programs)
    parts = only_stage(programs[0]).parameters
    assert parts[0].type["dp"] == R and parts[0].reduce == ("dp",)
    parts[0] = replace(parts[0], reduce=())
    assert f"rank 0 sums the gradient of {parts[0].name} over no axis" in (message := said(data, programs))
    assert message.endswith("it is pending over dp")


def test_a_tie_that_is_forgotten(tensor_and_stages: Built) -> None:
    programs = copied_programs(tensor_and_stages.programs)
    parts = only_stage(programs[2]).parameters
    at = next(i for i, part in enumerate(parts) if len(part.stages) == 2)
    parts[at] = replace(parts[at], stages=(1,))
    assert said(tensor_and_stages, programs) == f"rank 2 ties {parts[at].name} between stages [1]; its operators are in stages [0, 1]"


def test_parts_that_leave_a_hole(data: Built) -> None:
    """Both the assignment and the programs say that dp splits a parameter, but both ranks stand at its first place."""
    from shardwise.program.check import _tiles

    value = next(iter(data.graph.parameters.values()))
    members = [data.programs[0], data.programs[0]]
    part = replace(only_stage(members[0]).parameters[0], type={"dp": Shard(0), "mb": R, "tp": I})
    with pytest.raises(
        CheckError, match=rf"hold {value.numel // 2} of the {value.numel} elements of {value.name}: rank 0 \[0:\d+, 0:\d+\]"
    ):
        _tiles(value, [part, part], members, data.applied.assignment.mesh, 0)
    other = replace(part, type={"dp": R, "mb": R, "tp": I})
    with pytest.raises(CheckError, match="overlapping, unlike parts"):
        _tiles(value, [part, other], [data.programs[0], data.programs[1]], data.applied.assignment.mesh, 0)


# -- actions -------------------------------------------------------------------------------------------------------------------------------


def test_an_action_dropped(data: Built) -> None:
    programs = copied_programs(data.programs)
    del programs[1].actions[index_of(programs[1], Kind.BACKWARD, 2)]
    never, grid = said(data, programs).split(":\n")
    assert never == "rank 1 never performs `backward 2 of stage 0`, one of 4 microbatches" and grid.endswith("R U [end]")


def test_an_action_twice(data: Built) -> None:
    programs = copied_programs(data.programs)
    programs[1].actions.insert(3, programs[1].actions[index_of(programs[1], Kind.FORWARD, 0)])
    twice, grid = said(data, programs).split(":\n")
    assert twice == "rank 1 performs `forward 0 of stage 0` twice" and re.fullmatch(r"  rank 1 +P F0 F0→3 \[F0\] .* …", grid)


def test_a_microbatch_too_many(data: Built) -> None:
    programs = copied_programs(data.programs)
    programs[0].actions.insert(-2, Action(kind=Kind.FORWARD, microbatch=4, stage=0))
    assert said(data, programs).startswith("rank 0 performs `forward 4 of stage 0`, but there are 4 microbatches:\n  rank 0   … ")


def test_no_update_at_the_end(data: Built) -> None:
    programs = copied_programs(data.programs)
    programs[0].actions.pop()
    assert said(data, programs).startswith("rank 0 does not begin with the prelude and end with reduce and update")


def test_a_receive_dropped(data: Built) -> None:
    programs = copied_programs(data.programs)
    lost = programs[2].actions.pop(index_of(programs[2], Kind.RECV, 1))
    assert said(data, programs).startswith(f"rank 2 performs `forward 1 of stage 1` before it has {lost.edge} of microbatch 1:\n")


def test_a_backward_before_its_forward(data: Built) -> None:
    programs = copied_programs(data.programs)
    actions = programs[3].actions
    forward, backward = index_of(programs[3], Kind.FORWARD, 0), index_of(programs[3], Kind.BACKWARD, 0)
    actions[forward], actions[backward] = actions[backward], actions[forward]
    message = said(data, programs)
    assert message.startswith("rank 3 performs `backward 0 of stage 1` before `forward 0 of stage 1`:\n") and "[B0]" in message


def test_a_send_dropped(data: Built) -> None:
    programs = copied_programs(data.programs)
    lost = programs[0].actions.pop(index_of(programs[0], Kind.SEND, 1))
    assert said(data, programs).startswith(f"rank 0 never sends or reads {lost.edge} of microbatch 1:\n")


def test_two_receives_swapped_draw_the_schedule(data: Built) -> None:
    programs = copied_programs(data.programs)
    actions = programs[2].actions
    first, second = index_of(programs[2], Kind.RECV, 0), index_of(programs[2], Kind.RECV, 1)
    actions.insert(first, actions.pop(second))
    message = said(data, programs)
    assert message.startswith("4 of 4 ranks would wait for ever")
    assert "rank 2 (stage 1) stands at `recv" in message and "rank 0 (stage 0) stands at `send" in message
    drawn = [line for line in message.splitlines() if re.match(r"  rank \d +\S", line) and "[" in line and "stands" not in line]
    assert len(drawn) == 4 and "[F0→2]" in drawn[0] and "[F1←0]" in drawn[2]
    assert drawn[0].index("[") == drawn[2].index("["), "the marks stand under each other"
    assert max(map(len, message.splitlines())) <= 140


def test_a_transfer_to_the_wrong_rank(data: Built) -> None:
    programs = copied_programs(data.programs)
    at = index_of(programs[0], Kind.SEND, 0)
    programs[0].actions[at] = replace(programs[0].actions[at], peer=9)
    assert said(data, programs).endswith("to rank 9`, but there are 4 ranks")
    programs[0].actions[at] = replace(programs[0].actions[at], peer=3)
    assert "would wait for ever" in said(data, programs)


# -- ranks with several stages, and a backward pass in two parts ---------------------------------------------------------------------------


def index_at(program: Program, kind: Kind, microbatch: int, stage: int) -> int:
    return program.actions.index(Action(kind=kind, microbatch=microbatch, stage=stage))


def test_a_weights_part_dropped(chunks: Built) -> None:
    programs = copied_programs(chunks.programs)
    del programs[0].actions[index_at(programs[0], Kind.WEIGHT, 1, 3)]
    never, grid = said(chunks, programs).split(":\n")
    assert never == "rank 0 never performs `weight 1 of stage 3`, one of 2 microbatches" and grid.endswith("R U [end]")


def test_a_weights_part_before_its_backward(chunks: Built) -> None:
    programs = copied_programs(chunks.programs)
    actions = programs[1].actions
    actions.insert(index_at(programs[1], Kind.BACKWARD, 0, 2), actions.pop(index_at(programs[1], Kind.WEIGHT, 0, 2)))
    message = said(chunks, programs)
    assert message.startswith("rank 1 performs `weight 0 of stage 2` before `backward 0 of stage 2`:\n  rank 1   … ")
    assert " [W0.1] B0.1 " in message


def test_a_stage_before_the_one_that_it_reads_on_the_same_rank(chunks: Built) -> None:
    programs = copied_programs(chunks.programs)
    actions = programs[1].actions
    assert programs[1].local_edges, "between stages 1 and 2"
    actions.insert(index_at(programs[1], Kind.FORWARD, 0, 1), actions.pop(index_at(programs[1], Kind.FORWARD, 0, 2)))
    assert re.match(r"rank 1 performs `forward 0 of stage 2` before it has \S+→2 of microbatch 0:\n.*\[F0\.1\]", said(chunks, programs))


def test_an_action_of_another_ranks_stage(chunks: Built) -> None:
    programs = copied_programs(chunks.programs)
    at = index_at(programs[0], Kind.FORWARD, 0, 0)
    programs[0].actions[at] = replace(programs[0].actions[at], stage=1)
    assert said(chunks, programs).startswith("rank 0 performs `forward 0 of stage 1`, but it has stages 0, 3:\n")


def test_a_weights_part_where_the_backward_pass_is_whole(data: Built) -> None:
    programs = copied_programs(data.programs)
    programs[0].actions.insert(-2, Action(kind=Kind.WEIGHT, microbatch=0, stage=0))
    assert said(data, programs).startswith("rank 0 performs `weight 0 of stage 0`, but the backward pass is whole there:\n")


def test_kept_values_that_differ(chunks: Built) -> None:
    programs = copied_programs(chunks.programs)
    stage = programs[1].stages[2]
    assert stage.weight is not None
    stage.weight = copied_graph(stage.weight)
    first = next(iter(stage.weight.nodes))
    first.meta["val"] = first.meta["val"].to(torch.float64)
    assert re.match(r"rank 1, stage 2: kept value 0 is .* where it is made, float64 .* where it is read", said(chunks, programs))
    stage.kept += 1
    assert re.match(r"rank 1, stage 2: the backward graph keeps \d+ values, the weight graph takes \d+ of \d+", said(chunks, programs))


def test_stages_on_other_ranks_than_rank_0_thinks(chunks: Built) -> None:
    programs = copied_programs(chunks.programs)
    programs[1].placement = (0, 1, 0, 1)
    assert said(chunks, programs) == (
        "rank 1 has stages 1, 2 and says that the stages are on the pipeline's ranks [0, 1, 0, 1]; "
        "rank 0 says [0, 1, 1, 0], and there are 4 stages"
    )


def test_a_post_of_what_is_not_sent(data: Built) -> None:
    programs = copied_programs(data.programs)
    at = next(i for i, action in enumerate(programs[2].actions) if action.posts)
    programs[2].actions[at] = replace(programs[2].actions[at], microbatch=9)
    assert "would wait for ever" in (message := said(data, programs)) and "[(F9←0)]" in message


# -- edges ---------------------------------------------------------------------------------------------------------------------------------


def test_an_edge_with_two_shapes(data: Built) -> None:
    programs = copied_programs(data.programs)
    edge = programs[2].edges[0]
    programs[2].edges[0] = replace(edge, shape=(edge.shape[0] + 1, *edge.shape[1:]))
    message = said(data, programs)
    assert message.startswith(f"edge {edge.name}: rank 0 has it as float32 {list(edge.shape)} from stage 0 to 1, rank 2 as float32 [")


def test_an_edge_that_is_wrong_on_both_sides(data: Built) -> None:
    programs = copied_programs(data.programs)
    for program in programs.values():
        program.edges[0] = replace(program.edges[0], dtype=torch.float16)
    message = said(data, programs)
    assert re.match(r"edge \S+ on rank 0 is float16 \[.*\]; \S+ is sent as float32 \[", message)


def test_an_edge_left_out(data: Built) -> None:
    programs = copied_programs(data.programs)
    for program in programs.values():
        program.edges.clear()
        program.actions = [action for action in program.actions if not action.edge]
    assert re.search(r"before it has|has no edge", said(data, programs))


def test_a_graph_that_makes_another_dtype(data: Built) -> None:
    programs = copied_programs(data.programs)
    stage = only_stage(programs[0])
    stage.forward = copied_graph(stage.forward)
    at = next(i for i, binding in enumerate(stage.forward_outputs) if binding.kind == "edge")
    node = stage.forward.output_node().args[0][at]  # type: ignore[index]
    node.meta["val"] = node.meta["val"].to(torch.float64)  # type: ignore[union-attr]
    assert re.search(r"edge \S+: rank 0 makes float64 .*, the edge is float32", said(data, programs)) or "saved value" in said(
        data, programs
    )


# -- collectives ---------------------------------------------------------------------------------------------------------------------------


def spoil_collective(built: Built, kind: str, change: Any) -> str:
    """The message when the first such collective of the last rank's forward graph is changed."""
    programs = copied_programs(built.programs)
    stage = only_stage(programs[3])
    stage.forward = copied_graph(stage.forward)
    change(next(node for node in stage.forward.nodes if COLLECTIVES.get(node.target) == kind))
    return said(built, programs)


def given_as(change: Any) -> Any:
    """Changes what a collective is given."""

    def changed(node: fx.Node) -> None:
        source = node.all_input_nodes[0]
        source.meta["val"] = change(source.meta["val"])

    return changed


def test_a_collective_of_another_dtype(tensor_and_stages: Built) -> None:
    message = spoil_collective(tensor_and_stages, "all_reduce", given_as(lambda tensor: tensor.double()))
    assert message.startswith("two ranks meet in unlike collectives")
    assert "all_reduce of float32" in message and "all_reduce of float64" in message
    assert message.count("[F0]") == 2


def test_a_collective_of_another_shape(tensor_and_stages: Built) -> None:
    assert "unlike collectives" in spoil_collective(tensor_and_stages, "all_reduce", given_as(lambda tensor: tensor[:1]))


def test_a_part_that_a_collective_does_not_expect(tensor_and_stages: Built) -> None:
    message = spoil_collective(
        tensor_and_stages, "all_gather", given_as(lambda tensor: tensor.repeat_interleave(2, 1).repeat_interleave(2, 0))
    )
    assert re.match(r"rank 3 gives \d+ elements to \w+ over tp:2,3, which expects \d+ of it", message)


@pytest.mark.parametrize(("at", "value"), [(2, "sum"), (3, "exchange")])
def test_a_collective_with_another_operation_or_implementation(tensor_and_stages: Built, at: int, value: str) -> None:
    message = spoil_collective(tensor_and_stages, "all_reduce", lambda node: node.update_arg(at, value))
    assert "unlike collectives" in message and "(native, max)" in message and value in message


def test_a_collective_left_out(tensor_and_stages: Built) -> None:
    def change(node: fx.Node) -> None:
        node.replace_all_uses_with(node.all_input_nodes[0])
        node.graph.erase_node(node)

    assert "unlike collectives" in spoil_collective(tensor_and_stages, "all_reduce", change)


def test_a_collective_of_a_foreign_group(tensor_and_stages: Built) -> None:
    message = spoil_collective(tensor_and_stages, "all_reduce", lambda node: node.update_arg(1, "tp:0,1"))
    assert message == "rank 3 calls all_reduce over tp:0,1, of which it is no member"


def test_a_reduction_of_other_parameters(data: Built) -> None:
    """A frozen parameter on one rank only: the flat messages would differ in length."""
    programs = copied_programs(data.programs)
    parts = only_stage(programs[1]).parameters
    parts[0] = replace(parts[0], requires_grad=False)
    message = said(data, programs)
    assert "two ranks meet in unlike collectives" in message and "in `reduce`" in message


# -- the boundary between the halves, and memory -------------------------------------------------------------------------------------------


def test_saved_values_that_differ(data: Built) -> None:
    programs = copied_programs(data.programs)
    stage = only_stage(programs[3])
    stage.backward = copied_graph(stage.backward)
    first = next(iter(stage.backward.nodes))
    first.meta["val"] = first.meta["val"].to(torch.float64)
    assert re.match(r"rank 3: saved value 0 is .* where it is made, float64 .* where it is read", said(data, programs))


def test_memory_that_does_not_fit() -> None:
    check_memory([10, 20], [10, 20])
    check_memory([10, 20], [None, None])
    with pytest.raises(CheckError, match=r"rank 1 needs 3 GB, it has 2 GB; plan again with more tp or pp"):
        check_memory([1_000_000_000, 3_000_000_000], [1_500_000_000, 2_000_000_000])


def test_uneven_parts_choose_one_implementation() -> None:
    """Vocabulary 255 over 2 ranks: ranks chose implementations by their own part's bytes, and waited for each other for ever."""
    model, batch = llama(layers=1)
    model.resize_token_embeddings(255)
    batch = {name: tensor.clamp(max=254) for name, tensor in batch.items()}
    built = build((model, batch), "dp=1,tp=2,pp=1,microbatches=1,schedule=1f1b")
    from shardwise.program.build import build_programs

    def choose(kind: str, message: int, ranks: int) -> str:
        seen.append((kind, message))
        return "native" if (message // 4) % 2 else "exchange"

    seen: list[tuple[str, int]] = []
    programs = build_programs(built.applied.assignment, built.applied.cut, "1f1b", choose, device=torch.device("cpu"))
    check_programs(programs, built.applied.assignment, built.applied.cut, choose)
    assert seen
