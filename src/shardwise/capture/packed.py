"""Packed sequences (`pack_padded_sequence`) kept padded, with their lengths beside them, while a model is captured.

    pack_padded_sequence(x, lengths)    the rows of x [t, n, f], padding and all, and the lengths
    LSTM, GRU, RNN of that              shardwise.recurrent with lengths: it packs inside, and gives zeros beyond each length
    dropout of that                     dropout of x
    pad_packed_sequence                 x, filled beyond each length; without total_length, t must be the longest length: a check

Whatever else reads the rows would read padding, and is not followed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils import rnn

from shardwise.capture.recurrent import recurrent

__all__ = ["Packed"]

_KINDS = {torch._VF.lstm: "lstm", torch._VF.gru: "gru", torch._VF.rnn_tanh: "rnn_tanh", torch._VF.rnn_relu: "rnn_relu"}
_PAD = torch._VF._pad_packed_sequence
_DESCRIBES = frozenset({"dim", "size", "__get__"})


@dataclass(frozen=True)
class _Rows:
    """x: [t, n, features]; lengths: int64 [n]; filled: whether x is zero beyond them."""

    data: Tensor
    x: Tensor
    lengths: Tensor
    filled: bool


@dataclass
class Packed:
    """The packed sequences of a model under way, by their rows."""

    known: dict[int, _Rows] = field(default_factory=dict)

    @contextmanager
    def packing(self) -> Iterator[None]:
        """Inside, `pack_padded_sequence` makes such rows, under whatever name it was imported."""
        shared: Any = rnn.pack_padded_sequence
        code, defaults = shared.__code__, shared.__kwdefaults__
        shared.__code__, shared.__kwdefaults__ = _handing_over.__code__, {"_pack": self._pack}
        try:
            yield
        finally:
            shared.__code__, shared.__kwdefaults__ = code, defaults

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What becomes of a call that reads rows; NotImplemented of any other call."""
        given = [self.known[id(each)] for each in (*args, *kwargs.values()) if id(each) in self.known]
        if not given:
            return NotImplemented
        rows = given[0]
        if func in _KINDS:
            return self._recurrent(_KINDS[func], rows, *args[2:])
        if func is _PAD:
            return _padded(rows, *args[2:])
        if func is F.dropout:
            return self._rows(F.dropout(rows.x, *args[1:], **kwargs), rows.lengths, filled=rows.filled)
        if getattr(func, "__name__", "") in _DESCRIBES:
            return func(*args, **kwargs)
        raise RuntimeError("it reads the rows of a packed sequence, whose number depends on the data")

    def _pack(self, x: Tensor, lengths: Any, batch_first: bool) -> rnn.PackedSequence:
        x = x.transpose(0, 1) if batch_first else x
        data = self._rows(x, torch.as_tensor(lengths, dtype=torch.int64), filled=False)
        return rnn.PackedSequence(data, torch.tensor([x.shape[1]]), None, None)

    def _rows(self, x: Tensor, lengths: Tensor, *, filled: bool) -> Tensor:
        data = x.flatten(0, 1)
        self.known[id(data)] = _Rows(data, x, lengths, filled)
        return data

    def _recurrent(
        self, kind: str, rows: _Rows, hx: Any, weights: Sequence[Tensor], biases: bool, layers: int, rate: float, trains: bool, both: bool
    ) -> tuple[Tensor, ...]:
        x, states = rows.x, list(hx) if kind == "lstm" else [hx]
        apart = layers if rate and trains else 1  # with dropout between layers, one after the other
        each, ways = len(weights) // apart, states[0].shape[0] // apart
        found = []
        for part in range(apart):
            own = [state[part * ways : (part + 1) * ways] for state in states] if apart > 1 else states
            constants = (kind, biases, layers // apart, both, False)
            x, *last = recurrent(x, own, list(weights[part * each : (part + 1) * each]), rows.lengths, *constants)
            found.append(last)
            x = F.dropout(x, rate) if part < apart - 1 else x
        return self._rows(x, rows.lengths, filled=True), *(torch.cat(last) if apart > 1 else last[0] for last in zip(*found, strict=True))


def _padded(rows: _Rows, batch_first: bool, value: float, total: int) -> tuple[Tensor, Tensor]:
    x, (t, n) = rows.x, rows.x.shape[:2]
    if total == 1 and torch.compiler.is_exporting():  # of one batch size for all steps: total_length was not given
        torch.ops.shardwise.expect(rows.lengths.max(), float(t))
    elif 1 < total < t:
        raise RuntimeError(f"it pads sequences of {t} steps to total_length={total}")
    if value or not rows.filled:
        inside = torch.arange(t, device=x.device)[:, None] < rows.lengths.to(x.device)
        x = torch.where(inside.reshape(t, n, *(1 for _ in x.shape[2:])), x, value)
    if total > t:
        x = F.pad(x, (0, 0) * (x.dim() - 1) + (0, total - t), value=value)
    return x.transpose(0, 1) if batch_first else x, rows.lengths


def _handing_over(
    input: Tensor,  # noqa: A002 (torch's name)
    lengths: Any,
    batch_first: bool = False,
    enforce_sorted: bool = True,
    *,
    _pack: Callable[..., Any],
) -> Any:
    return _pack(input, lengths, batch_first)
