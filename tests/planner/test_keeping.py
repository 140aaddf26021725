"""What pieces keep for the backward pass: against the published formula, and against what torch's autograd keeps when it runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.clusters import made_up
from tests.models import Example, gpt2, llama
from torch import Tensor, nn

from shardwise.capture.export import capture
from shardwise.cluster.model import Cluster
from shardwise.planner.compose import Scheme, compose
from shardwise.planner.keeping import Kept
from shardwise.planner.pieces import Outline, PieceCost
from shardwise.planner.twins import TwinLayout, split_twin
from shardwise.program.trace import Tracer

SEQUENCE, SAMPLES, WIDTH, HEADS, VOCABULARY = 1024, 2, 2048, 16, 4096
VALUE = SEQUENCE * SAMPLES * WIDTH  # sbh
SCORES = HEADS * SEQUENCE**2 * SAMPLES  # as²b


class Block(nn.Module):
    """As Megatron-LM computes it where attention is not fused, with dropout after the softmax and after both halves."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.query, self.key, self.value, self.mix = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + F.dropout(self.mix(self.attend(self.norm1(x))), 0.1)
        return x + F.dropout(self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh")), 0.1)

    def attend(self, x: Tensor) -> Tensor:
        query, key, value = (part(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (self.query, self.key, self.value))
        hidden = torch.ones(SEQUENCE, SEQUENCE, dtype=torch.bool, device=x.device).triu(1)
        scores = (query @ key.transpose(-1, -2) * (WIDTH // HEADS) ** -0.5).masked_fill(hidden, -1e4)
        return (F.dropout(torch.softmax(scores, -1), 0.1) @ value).transpose(1, 2).flatten(2)


class Gpt(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.blocks, self.head = (
            nn.Embedding(VOCABULARY, WIDTH),
            nn.ModuleList(Block() for _ in range(3)),
            nn.Linear(WIDTH, VOCABULARY),
        )

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(x).float().flatten(0, 1), tokens.flatten())


def pieces(example: Example, *, tp: int = 1, sequence_parallel: bool = True) -> tuple[Outline, Sequence[PieceCost]]:
    model, batch = example
    graph = capture(model.to(torch.bfloat16).train(), batch)
    return split_twin(graph, (), TwinLayout(tp=tp, sequence_parallel=sequence_parallel), CLUSTER, Tracer(device=torch.device("cpu")))


def gpt() -> Example:
    with torch.device("meta"):
        return Gpt(), {"tokens": torch.empty(SAMPLES, SEQUENCE, dtype=torch.int64)}


@pytest.fixture(scope="module")
def block() -> Kept:
    return pieces(gpt())[1][1].held


CLUSTER = Cluster.parse("a100-80g:1x8")
STATISTICS = 2 * 2 * 4 * SEQUENCE * SAMPLES  # mean and deviation of two norms, at most in float32: not in the formula


def test_a_block_keeps_what_the_formula_says(block: Kept) -> None:
    """Korthikanti et al. 2022, equation 1: sbh·(34 + 5as/h) bytes."""
    formula = 34 * VALUE + 5 * SCORES
    assert formula <= block.kept("none", "none") <= formula + STATISTICS


def test_without_attentions_core_it_keeps_what_the_formula_says(block: Kept) -> None:
    """The same, table 2: 34·sbh."""
    assert 34 * VALUE <= block.kept("attention", "none") <= 34 * VALUE + STATISTICS


def test_computing_all_again_keeps_the_blocks_input(block: Kept) -> None:
    """The same: 2·sbh."""
    assert block.kept("full", "none") == 2 * VALUE
    assert block.beside("full", "none") >= block.kept("none", "none") - 2 * VALUE, "it is all there again while its gradients are computed"


@pytest.mark.parametrize("ranks", [2, 4])
def test_blocks_split_over_tensor_ranks_keep_what_the_formulas_say(ranks: int) -> None:
    """Equations 2 and 4: sbh·(10 + 24/t + 5as/ht); where the sequence is split, too, all by t: what was gathered is gathered again."""
    whole = pieces(gpt(), tp=ranks, sequence_parallel=False)[1][1].held
    formula = VALUE * 10 + (VALUE * 24 + SCORES * 5) / ranks
    assert formula <= whole.kept("none", "none") <= formula + STATISTICS
    assert whole.kept("full", "none") == 2 * VALUE
    split = pieces(gpt(), tp=ranks)[1][1].held
    formula = (34 * VALUE + 5 * SCORES) / ranks
    one = 2 * VALUE * (1 - 1 / ranks)  # of four values the solver may gather one before its norm: within its tolerance that costs nothing
    assert formula <= split.kept("none", "kernels") <= formula + STATISTICS + one
    assert split.kept("none", "none") - split.kept("none", "kernels") >= one, "autograd keeps what was gathered"
    assert split.kept("full", "kernels") == 2 * VALUE / ranks


def test_every_second_product_is_kept(block: Kept) -> None:
    """query, value and up are the first, third and fifth of six products; a compiler keeps of them what it needs."""
    assert block.kept("alternate", "none") == 2 * VALUE + (2 + 2 + 8) * VALUE
    _, costs = pieces(llama(layers=3, hidden=64, samples=2, sequence=32))
    eager, compiled = (costs[1].held.kept("alternate", remade) for remade in ("none", "all"))
    assert eager - compiled == 2 * 32 * 64 * 2, "the last product's result is in the next block's input"


def test_fused_kernels_keep_what_they_read(block: Kept) -> None:
    """A Llama's block: input, norm, query, key, value, attention; input, norm; gate, up and their product of twice the width."""
    hidden, sequence, samples = 64, 32, 2
    held = pieces(llama(layers=3, hidden=hidden, samples=samples, sequence=sequence, key_heads=4))[1][1].held
    value = 2 * hidden * sequence * samples
    statistics = 2 * value / 2  # at most: of norms and of attention's softmax in float32
    assert 8 * value + 3 * 2 * value <= held.kept("none", "kernels") <= 8 * value + 3 * 2 * value + statistics
    assert held.kept("none", "none") >= held.kept("none", "kernels") + 2 * value, "autograd keeps the gate's activation, too"
    assert block.kept("none", "kernels") == block.kept("none", "none"), "attention that is not fused and dropout keep all"


@pytest.mark.parametrize("make", [lambda: gpt2(layers=3), lambda: llama(layers=3)])
def test_as_much_is_kept_as_by_autograd(make: Callable[[], Example]) -> None:
    """All pieces together against the bytes that torch's own autograd saves in a real forward pass."""
    model, batch = make()
    shape, costs = split_twin(capture(model.train(), batch), (), TwinLayout(), made_up(1), Tracer(device=torch.device("cpu")))
    lasting = {each.untyped_storage().data_ptr() for each in (*model.parameters(), *model.buffers(), *batch.values())}
    found: dict[int, int] = {}

    def pack(value: Tensor) -> Tensor:
        if value.untyped_storage().data_ptr() not in lasting:
            found[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        output: Any = model(**batch)
    del output
    predicted = sum(cost.held.kept("none", "none") * piece.count for piece, cost in zip(shape.pieces, costs, strict=True))
    assert predicted == pytest.approx(
        sum(found.values()), rel=0.08
    )  # grouped keys are kept once for each query where no kernel groups them


def test_a_compiled_loss_keeps_logits_in_16_bits_alone() -> None:
    """In turn autograd keeps their float32 logarithms, beside which two more float32 values stand while the gradient is made."""
    tail = pieces(gpt())[1][2].held
    logits = SAMPLES * SEQUENCE * VOCABULARY
    assert tail.kept("none", "none") == pytest.approx(4 * logits + 2 * VALUE, rel=0.01)
    assert tail.beside("none", "none") == pytest.approx(8 * logits, rel=0.1)
    assert tail.kept("none", "all") == pytest.approx(2 * logits + 2 * VALUE, rel=0.01)
    assert tail.beside("none", "all") <= 2 * logits + WIDTH * VOCABULARY * 2 + 4 * VALUE, "the gradients of logits and of the table"


@pytest.fixture(scope="module")
def deep() -> tuple[Outline, Sequence[PieceCost]]:
    model, batch = gpt()
    graph = capture(model.to(torch.bfloat16).train(), batch)
    return split_twin(graph, (22,), TwinLayout(), CLUSTER, Tracer(device=torch.device("cpu")))


def memory(deep: tuple[Outline, Sequence[PieceCost]], **scheme: Any) -> dict[str, int]:
    return compose(*deep, Scheme(**scheme), CLUSTER).stages[0].memory


def test_stages_count_their_ends_as_blocks_where_only_so_they_are_equal(deep: tuple[Outline, Sequence[PieceCost]]) -> None:
    """22 blocks on 8 stages: 2, 3, …, 3, 2 (Qi et al. 2023, section 5: "the first and last pipeline stages have one fewer layer")."""
    profile = compose(*deep, Scheme(pp=8, microbatches=8, even=True, remade="none"), CLUSTER)
    saved = [stage.saved_bytes for stage in profile.stages]
    assert saved[1:7] == saved[1:2] * 6
    assert saved[0] == pytest.approx(saved[1] * 2 / 3, rel=0.05)


def test_numbers_take_the_bytes_that_are_said(deep: tuple[Outline, Sequence[PieceCost]]) -> None:
    plain = memory(deep)
    numbers = plain["parameters"] // 2
    assert (plain["gradients"], plain["optimizer"]) == (4 * numbers, 12 * numbers)
    fsdp = memory(deep, dp=4, zero=3, copied=False)
    assert fsdp["parameters"] == 0 and fsdp["optimizer"] == 12 * numbers // 4 and fsdp["gradients"] == 4 * numbers // 4
    halves = memory(deep, dp=4, zero=1, gradient_bytes=2, step_bytes=8, bucket_bytes=1000)
    assert halves["gradients"] == 2 * numbers and halves["optimizer"] == 20 * numbers // 4 and halves["gathered"] == 1000
    assert memory(deep, bucket_bytes=1000)["gathered"] == 0, "nothing is reduced on one rank"


def test_divided_parameters_are_whole_while_they_are_used(deep: tuple[Outline, Sequence[PieceCost]]) -> None:
    first, block, last = (cost.parameters for cost in deep[1])
    assert memory(deep, dp=4, zero=3)["gathered"] == 2 * 2 * (first + last + block)


def test_what_is_sent_is_held_where_said(deep: tuple[Outline, Sequence[PieceCost]]) -> None:
    held, freed = (compose(*deep, Scheme(pp=2, keeps_sent=keeps), CLUSTER).stages for keeps in (True, False))
    assert held[0].saved_bytes - freed[0].saved_bytes == pytest.approx(2 * VALUE, rel=0.1)
    assert held[1].saved_bytes == freed[1].saved_bytes


def test_the_weights_part_reads_inputs_and_gradients_of_products(deep: tuple[Outline, Sequence[PieceCost]]) -> None:
    """Qi et al. 2023, table 1: 32·sbh of each block between the two parts; their attention makes queries, keys and values at once."""
    late = deep[1][1].held.late
    assert 32 * VALUE <= late <= 34 * VALUE + 12 * VALUE


def test_a_tied_table_is_held_once() -> None:
    graph = capture(*gpt2(layers=3))
    shape, costs = split_twin(graph, (), TwinLayout(), CLUSTER, Tracer(device=torch.device("cpu")))
    table = 256 * 64
    held = sum(parameter.numel() for parameter in gpt2(layers=3)[0].parameters())
    assert costs[2].tied == {0: table}
    assert compose(shape, costs, Scheme(), CLUSTER).stages[0].parameters == held
    halves = compose(shape, costs, Scheme(pp=2), CLUSTER).stages
    assert sum(stage.parameters for stage in halves) == held + table, "each of two stages has its own"
