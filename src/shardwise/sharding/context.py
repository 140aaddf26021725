"""How the ranks of the context axis, each with a part of every sequence, do attention together, of which every query wants all keys.

    gather    each rank has its part of the queries, and all keys and values
    ring      each rank has its part of the queries; keys and values go round (`shardwise.sharding.rules.ring`)
    ulysses   each rank has some of the heads, with whole sequences: all-to-alls before and after (Jacobs et al., DeepSpeed-Ulysses, 2023)

Gathering is always possible. Heads can be divided where there are as many as ranks: of grouped queries those of the keys, else the query
heads of each of these, which takes whole keys and values. Where the tensor axis divides heads, too, each of its ranks' heads are divided,
so nothing moves along it:

    8 heads, cp=2, tp=2     cp 0: 0 1 · 4 5     cp 1: 2 3 · 6 7        tp 0: 0 1 | 2 3     tp 1: 4 5 | 6 7
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from shardwise.capture.graph import Op
from shardwise.sharding.rules.attention import is_attention, is_causal
from shardwise.sharding.rules.ring import around, ring_signature
from shardwise.sharding.signature import Choice, Signature

__all__ = ["ATTENTION", "WORDS", "Attention", "SharedAttention", "goes_round", "share_attention"]

Attention = Literal["gather", "ring", "ulysses"]
ATTENTION: tuple[Attention, ...] = get_args(Attention)

WORDS = {
    "gather": "keys and values are gathered",
    "ring": "keys and values go round",
    "ulysses": "heads are divided, between all-to-alls",
}


def goes_round(sig: Signature) -> bool:
    """Whether it is a signature of attention whose keys and values go round."""
    return sig.local is around


@dataclass(frozen=True, kw_only=True)
class SharedAttention:
    """choices: the operators done in the wanted way, and how the context axis splits them; signatures: how these may be split, where that
    is not how they may be alone; refused: those that are not done so, and why."""

    choices: dict[Op, Choice] = field(default_factory=dict)
    signatures: dict[Op, Signature] = field(default_factory=dict)
    refused: dict[Op, str] = field(default_factory=dict)

    def mirrored(self, cp: int) -> bool:
        """Whether so many ranks have a run from each end of every sequence: where some attention in a ring is causal, and no sequence is so
        short that a rank would have none."""
        lengths = [sig.sizes["q"] for op, sig in self.signatures.items() if is_causal(op)]
        return bool(lengths) and min(lengths) >= 2 * cp


def share_attention(
    kind: str, signatures: Mapping[Op, Signature], sequence: Mapping[Op, Choice], batch: Mapping[Op, Choice], *, cp: int, tp: int
) -> SharedAttention:
    """sequence, batch: which factor of each operator they are."""
    found = SharedAttention()
    for op, choice in sequence.items():
        if not is_attention(op) or choice.factor != "q" or kind == "gather":
            continue
        made = _heads(signatures[op], batch.get(op), cp, tp) if kind == "ulysses" else _ring(op, signatures[op], choice, cp)
        if isinstance(made, str):
            found.refused[op] = made
        elif isinstance(made, Choice):
            found.choices[op] = made
        else:
            found.choices[op], found.signatures[op] = choice, made
    return found


def _ring(op: Op, sig: Signature, choice: Choice, cp: int) -> Signature | str:
    """The signature of queries and keys that are split together; where they cannot be, why."""
    if choice != Choice("split", "q") or sig.sizes["q"] < cp:
        return "its tokens are not divided by themselves"
    return ring_signature(op, sig)


def _heads(sig: Signature, batch: Choice | None, cp: int, tp: int) -> Choice | str:
    """The split of the heads; where there is none, why."""
    query = sig.inputs[0]
    heads = query[-3] if len(query) > 2 else ()
    if not heads or (batch is not None and batch.factor in heads):
        return "its heads are no dim of their own"
    sizes = [sig.sizes[factor] for factor in heads]
    if sizes[0] % tp == 0:
        if sizes[0] // tp >= cp:
            return Choice("split", heads[0], blocks=tp)
        if sizes[-1] >= cp and len(sizes) > 1:
            return Choice("split", heads[-1])
    for factor, size in zip(heads, sizes, strict=True):
        if size >= cp:
            return Choice("split", factor)
    what = f"{sizes[0]} key heads with {sizes[1]} query heads each" if len(sizes) > 1 else f"{sizes[0]} heads"
    return f"it has {what}, of which {cp} ranks cannot have some each"
