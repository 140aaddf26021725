"""What can go wrong because of an input, a machine or a rank.

    ShardwiseError
    ├── CaptureError    the model cannot be turned into a graph
    │   └── ValuesNeeded    from shapes alone: its code depends on values
    ├── ModelError      a model specification names nothing that can be built
    ├── LayoutError     a layout contradicts itself or the devices
    ├── BatchError      a batch does not fit the plan
    ├── PlanError       a plan file is damaged, of another format, or for another model
    ├── ClusterError    a cluster description is wrong, or this machine cannot serve as one
    ├── RuleError       an operator has no sharding rule, or a rule is wrong
    ├── CheckError      the ranks' programs do not fit together: found before any of them starts
    ├── VerifyError     a model cannot be compared with itself
    ├── DataError       training data is missing, empty or too short
    ├── WeightsError    a file of weights is damaged, or is for another model
    ├── OutOfMemory     a rank could not get the memory that it asked for
    ├── NotFiniteError  a step's loss or gradients are infinite or not numbers
    ├── TransferError   a rank waited in vain for another one's message
    └── RankFailed      a rank died; carries that rank's own last error

    ShardwiseWarning    something was left out or done more slowly; what is computed is right all the same

A message says what, where, both numbers, and the way out. Our own bugs are `AssertionError`s, never one of these.
"""

from __future__ import annotations

__all__ = [
    "BatchError",
    "CaptureError",
    "CheckError",
    "ClusterError",
    "DataError",
    "LayoutError",
    "ModelError",
    "NotFiniteError",
    "OutOfMemory",
    "PlanError",
    "RankFailed",
    "RuleError",
    "ShardwiseError",
    "ShardwiseWarning",
    "TransferError",
    "ValuesNeeded",
    "VerifyError",
    "WeightsError",
]


class ShardwiseError(Exception):
    """Base of every error that a user can cause or cure."""


class ShardwiseWarning(UserWarning):
    """Something was left out or done more slowly than asked for; what is computed is right all the same."""


class CaptureError(ShardwiseError):
    """The model cannot be turned into a graph."""


class ValuesNeeded(CaptureError):
    """The model cannot be turned into a graph from shapes alone: its code depends on values."""


class ModelError(ShardwiseError):
    """A model specification names nothing that can be built."""


class LayoutError(ShardwiseError):
    """A layout contradicts itself or the devices."""


class BatchError(ShardwiseError):
    """A batch does not fit the plan."""


class PlanError(ShardwiseError):
    """A plan file is damaged, of another format, or for another model."""


class ClusterError(ShardwiseError):
    """A cluster description is wrong, or this machine cannot serve as one."""


class RuleError(ShardwiseError):
    """An operator has no sharding rule, or a rule is wrong."""


class CheckError(ShardwiseError):
    """The ranks' programs leave something out, disagree, would wait for each other for ever, or do not fit memory."""


class DataError(ShardwiseError):
    """Training data is missing, empty or too short."""


class WeightsError(ShardwiseError):
    """A file of weights is damaged, or is for another model."""


class OutOfMemory(ShardwiseError):
    """A rank could not get the memory that it asked for; says where, how much, and which plan would take less."""


class NotFiniteError(ShardwiseError):
    """A step's loss or gradients are infinite or not numbers; the optimizer has not seen them."""


class TransferError(ShardwiseError):
    """A rank waited in vain for another one's message."""


class RankFailed(ShardwiseError):
    """A rank died and took the job down.

    rank, ranks: which of how many; kind: the exception's class name, or the signal's; reason: its message;
    trace: the last lines of that rank's traceback, empty when it had no time to write one.
    """

    def __init__(self, *, rank: int, ranks: int, kind: str, reason: str, trace: str = "") -> None:
        self.rank, self.ranks, self.kind, self.reason, self.trace = rank, ranks, kind, reason, trace
        message = f"rank {rank} of {ranks} failed: {kind}: {reason}"
        super().__init__(f"{message}\n\nlast lines of rank {rank}:\n{trace}" if trace else message)

    def __reduce__(self) -> tuple[object, ...]:
        return _rank_failed, (self.rank, self.ranks, self.kind, self.reason, self.trace)


def _rank_failed(rank: int, ranks: int, kind: str, reason: str, trace: str) -> RankFailed:
    return RankFailed(rank=rank, ranks=ranks, kind=kind, reason=reason, trace=trace)


class VerifyError(ShardwiseError):
    """A model cannot be compared with itself: its numbers are others each time."""
