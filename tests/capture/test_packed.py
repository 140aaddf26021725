"""Packed sequences, kept padded with their lengths: the model's own numbers, gradients and shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from shardwise.capture.export import capture
from shardwise.capture.opaque import Opaque
from shardwise.capture.recurrent import recurrent
from shardwise.errors import CaptureError
from shardwise.verify.verify import verify

LENGTHS = torch.tensor([3, 7, 1, 5])


class Sequences(nn.Module):
    def __init__(self, kind: Callable[..., nn.Module], code: Callable[..., Tensor]) -> None:
        super().__init__()
        self.net, self.head, self.code = kind(), nn.Linear(10, 3), code

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        return self.code(self, x, lengths)


def both_ends(self: Sequences, x: Tensor, lengths: Tensor) -> Tensor:
    out, (h, c) = self.net(pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False))
    padded, again = pad_packed_sequence(out, batch_first=True, padding_value=0.5)
    return self.head(padded).square().sum() + (h * c).sum() + (again.to(x) * padded[:, 0, 0]).sum()


def given_states(self: Sequences, x: Tensor, lengths: Tensor) -> Tensor:
    packed = pack_padded_sequence(x.transpose(0, 1), LENGTHS.tolist(), enforce_sorted=False)
    out, h = self.net(packed, x[:, :1, :5].transpose(0, 1).repeat(4, 1, 1))
    padded, _ = pad_packed_sequence(out, total_length=9)
    return self.head(padded).tanh().sum() + h.square().sum()


def not_through_a_layer(self: Sequences, x: Tensor, lengths: Tensor) -> Tensor:
    packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    packed = PackedSequence(nn.functional.dropout(packed.data, 0.0), *packed[1:])
    padded, _ = pad_packed_sequence(packed, batch_first=True)
    return padded.square().sum() + self.head(self.net(packed)[1]).sum()


CASES: dict[str, tuple[Callable[..., nn.Module], Callable[..., Tensor]]] = {
    "lstm": (lambda: nn.LSTM(6, 5, 2, batch_first=True, bidirectional=True), both_ends),
    "gru": (lambda: nn.GRU(6, 5, 2, bidirectional=True), given_states),
    "rnn": (lambda: nn.RNN(6, 10, batch_first=True), not_through_a_layer),
}


def made(name: str, longest: int = 7) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    return Sequences(*CASES[name]).double(), {"x": torch.randn(4, longest, 6, dtype=torch.float64), "lengths": LENGTHS.clone()}


@pytest.mark.parametrize("name", CASES)
def test_numbers_are_the_models_own(name: str) -> None:
    model, batch = made(name)
    graph = capture(model, batch)
    assert not graph.kept and not any(isinstance(op.target, Opaque) for op in graph.ops)
    assert sum(op.target is recurrent for op in graph.ops) == 1
    assert torch.nn.utils.rnn.pack_padded_sequence.__kwdefaults__ is None  # as it was
    state = {n: each.detach().clone().requires_grad_() for n, each in model.named_parameters()} | graph.constants
    loss, own = graph.run(state, batch)[graph.loss], model(**batch)
    torch.testing.assert_close(loss, own, rtol=1e-13, atol=1e-13)
    names = list(graph.parameters)
    found, wanted = (
        torch.autograd.grad(loss, [state[n] for n in names]),
        torch.autograd.grad(own, [dict(model.named_parameters())[n] for n in names]),
    )
    for each, mine, theirs in zip(names, found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-13, msg=each)


@pytest.mark.parametrize("layout", ["dp=2", "tp=2,pp=2"])
def test_split(layout: str) -> None:
    model, batch = made("lstm")
    assert verify(model, batch, cluster="local:4" if "," in layout else "local:2", layout=layout, dtype=torch.float64, processes=False).ok


def test_dropout_between_layers() -> None:
    torch.manual_seed(0)
    model = Sequences(lambda: nn.LSTM(6, 5, 3, batch_first=True, bidirectional=True, dropout=1e-9), both_ends).double()
    graph = capture(model, made("lstm")[1])
    assert sum(op.target is recurrent for op in graph.ops) == 3
    assert sum("dropout" in op.name for op in graph.ops) == 2


def test_a_batch_whose_longest_sample_is_shorter_is_refused() -> None:
    model, batch = made("lstm")
    graph = capture(model, batch)
    ((_, found),) = graph.wrong_checks({}, {**batch, "lengths": LENGTHS.clamp(max=6)})
    assert found == 6
    with pytest.raises(CaptureError, match=r"pad_packed_sequence makes as many steps as the longest sample has, 7 of 8.*total_length"):
        capture(*made("lstm", longest=8))
    capture(*made("gru", longest=8))  # total_length is given


def test_other_readers_of_the_rows_are_kept() -> None:
    class Reads(nn.Module):
        def forward(self, x: Tensor, lengths: Any) -> Tensor:
            return pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False).data.mean()

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.reads = nn.Linear(6, 6), Reads()

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            return self.reads(self.linear(x), lengths)

    graph = capture(Outer().double(), made("rnn")[1])
    assert "reads the rows of a packed sequence" in graph.kept["reads"]
