"""The actions that a rank performs, one after the other, in a step.

PRELUDE · FORWARD m of stage s · BACKWARD m of stage s · WEIGHT m of stage s · SEND/RECV edge m (peer) · SEND_GRAD/RECV_GRAD edge m (peer) ·
POST/POST_GRAD edge m (peer) · REDUCE · UPDATE

Where a schedule splits the backward pass, BACKWARD is the part that makes the inputs' gradients and WEIGHT the part that makes the
parameters' gradients. RECV waits for a message; POST before it only begins to receive, so that the sender need not wait for this rank.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property

__all__ = ["COMPUTES", "Action", "Kind", "Message"]

Message = tuple[str, int, bool]
"""What a transfer carries, the same on both sides: edge, microbatch, whether it is a gradient."""


class Kind(StrEnum):
    """What an action does."""

    PRELUDE = "prelude"
    FORWARD = "forward"
    BACKWARD = "backward"
    WEIGHT = "weight"
    SEND = "send"
    RECV = "recv"
    SEND_GRAD = "send_grad"
    RECV_GRAD = "recv_grad"
    POST = "post"
    POST_GRAD = "post_grad"
    REDUCE = "reduce"
    UPDATE = "update"


COMPUTES = (Kind.FORWARD, Kind.BACKWARD, Kind.WEIGHT)  # of one stage and one microbatch
_OF_GRADIENTS = (Kind.SEND_GRAD, Kind.RECV_GRAD, Kind.POST_GRAD)


@dataclass(frozen=True, kw_only=True)
class Action:
    """kind; the microbatch and the stage it belongs to; for transfers the edge's name and the other rank. proves: of a receive, what this
    rank had sent to the other one and that one has, as it waited for it before it sent this."""

    kind: Kind
    microbatch: int = -1
    edge: str = ""
    peer: int = -1
    stage: int = -1
    proves: tuple[Message, ...] = field(default=(), compare=False)

    @property
    def sends(self) -> bool:
        return self.kind in (Kind.SEND, Kind.SEND_GRAD)

    @property
    def receives(self) -> bool:
        return self.kind in (Kind.RECV, Kind.RECV_GRAD)

    @property
    def posts(self) -> bool:
        return self.kind in (Kind.POST, Kind.POST_GRAD)

    @cached_property
    def message(self) -> Message:
        """Of a transfer."""
        return self.edge, self.microbatch, self.kind in _OF_GRADIENTS

    def __str__(self) -> str:
        words = [self.kind.value]
        if self.microbatch >= 0:
            words.append(str(self.microbatch))
        if self.edge:
            words.append(f"{self.edge} {'to' if self.sends else 'from'} rank {self.peer}")
        elif self.stage >= 0:
            words.append(f"of stage {self.stage}")
        return " ".join(words)
