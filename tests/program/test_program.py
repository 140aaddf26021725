"""What a program says of itself: readable Python, its saved values, its reductions."""

from __future__ import annotations

import re

import pytest
import torch
from tests.models import gpt2, mlp
from tests.program.support import Built, build, only_stage

from shardwise.program.actions import Kind
from shardwise.program.build import rank_of
from shardwise.program.program import Program, code
from shardwise.program.reductions import reductions
from shardwise.simulate.memory import memory_use


@pytest.fixture(scope="module")
def tensor_and_stages() -> Built:
    return build(gpt2(layers=1), "dp=1,tp=2,pp=2,microbatches=2,schedule=1f1b")


@pytest.fixture(scope="module")
def data() -> Built:
    return build(mlp(), "dp=2,tp=1,pp=1,microbatches=2,schedule=1f1b")


def test_a_printed_program_is_python_with_its_collectives(tensor_and_stages: Built) -> None:
    for rank, program in tensor_and_stages.programs.items():
        text = str(program)
        assert text.startswith(f"# rank {rank}: {program.where}")
        compile(text, "program", "exec")
        assert text.count("def forward(") == 3, "prelude, forward, backward"
        assert "torch.ops.shardwise." in text and f"'tp:{2 * (rank // 2)},{2 * (rank // 2) + 1}'" in text
        assert "#   forward 0" in text and "#   backward 1" in text and "#   reduce" in text
        assert re.search(r"#   (send|recv) 0 \S+ (to|from) rank \d", text)


def test_ranks_are_numbered_stage_by_stage() -> None:
    found = [rank_of(stage, d, t, 2, 3) for stage in range(2) for d in range(2) for t in range(3)]
    assert found == list(range(12))
    axes = [(stage, d, c, t) for stage in range(2) for d in range(2) for c in range(2) for t in range(3)]
    assert [rank_of(stage, d, t, 2, 3, c=c, cp=2) for stage, d, c, t in axes] == list(range(24))


def test_actions_of_a_rank(data: Built) -> None:
    kinds = [action.kind for action in data.programs[0].actions]
    assert kinds == [Kind.PRELUDE, Kind.FORWARD, Kind.BACKWARD, Kind.FORWARD, Kind.BACKWARD, Kind.REDUCE, Kind.UPDATE]


def test_saved_values_and_parameters_add_up(data: Built) -> None:
    """An MLP saves its input, what is before each activation and after it; nothing of the parameters, which are kept anyway."""
    program = data.programs[0]
    outputs = list(only_stage(program).forward.output_node().args[0])  # type: ignore[arg-type]
    assert len(outputs) == len(only_stage(program).forward_outputs) + only_stage(program).saved
    use = memory_use(program, "adamw")
    count = sum(p.numel for p in data.graph.parameters.values())
    assert (use.parameters, use.gradients, use.optimizer) == (4 * count, 4 * count, 8 * count)
    rows, wide = 8 // 2 // 2, 256
    least, most = 4 * rows * (2 * wide), 4 * rows * (64 + 6 * wide + 2 * 10)
    assert least <= use.saved <= most
    assert memory_use(program, "sgd").optimizer == 0


def test_microbatches_in_flight_are_saved_together() -> None:
    whole = build(mlp(), "dp=1,tp=1,pp=2,microbatches=4,schedule=gpipe")
    one_by_one = build(mlp(), "dp=1,tp=1,pp=2,microbatches=4,schedule=1f1b")
    last_gpipe, last_1f1b = memory_use(whole.programs[1], "adamw").saved, memory_use(one_by_one.programs[1], "adamw").saved
    assert last_gpipe == 4 * last_1f1b > 0


def test_reductions_cover_every_gradient_once(data: Built, tensor_and_stages: Built) -> None:
    for program in (*data.programs.values(), *tensor_and_stages.programs.values()):
        found = [parameter.name for each in reductions(program) for parameter in each.parameters]
        trained = [part.name for part in program.parameters if part.requires_grad]
        assert sorted(found) == sorted(trained)
        assert sum(each.nbytes for each in reductions(program)) == sum(4 * torch.Size(p.local).numel() for p in program.parameters)


def test_groups_of_reductions(data: Built, tensor_and_stages: Built) -> None:
    assert {group for each in reductions(data.programs[1]) for group in each.groups} == {"dp:0,1"}
    tied = [each for each in reductions(tensor_and_stages.programs[3]) if any(group.startswith("tie:") for group in each.groups)]
    assert [[p.name for p in each.parameters] for each in tied] == [["transformer.wte.weight"]]
    assert tied[0].groups[-1] == "tie:1,3"


def test_large_gradients_travel_in_several_messages(data: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shardwise.program.reductions.BUCKET_BYTES", 100_000)
    first, second = (reductions(program) for program in data.programs.values())
    assert len(first) > 1
    assert [[p.name for p in each.parameters] for each in first] == [[p.name for p in each.parameters] for each in second]
    assert first[0].parameters[0].name.startswith("net.6"), "those of the last layers are there first"


def test_code_of_a_graph(data: Built) -> None:
    program: Program = data.programs[0]
    text = code(only_stage(program).forward)
    assert "torch.ops.aten." in text and text.lstrip().startswith("def forward(self")
