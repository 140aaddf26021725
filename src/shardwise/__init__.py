"""shardwise: runs an ordinary single-device PyTorch model split over many devices, with the same numbers."""

from shardwise.api import parallelize, plan
from shardwise.cluster.model import Cluster
from shardwise.errors import (
    BatchError,
    CaptureError,
    CheckError,
    ClusterError,
    DataError,
    LayoutError,
    ModelError,
    OutOfMemory,
    PlanError,
    RankFailed,
    RuleError,
    ShardwiseError,
    ShardwiseWarning,
    TransferError,
    VerifyError,
    WeightsError,
)
from shardwise.planner.plan import Infeasible, Plan, simulate
from shardwise.sharding.declare import declare_rule
from shardwise.verify.verify import verify

__all__ = [
    "BatchError",
    "CaptureError",
    "CheckError",
    "Cluster",
    "ClusterError",
    "DataError",
    "Infeasible",
    "LayoutError",
    "ModelError",
    "OutOfMemory",
    "Plan",
    "PlanError",
    "RankFailed",
    "RuleError",
    "ShardwiseError",
    "ShardwiseWarning",
    "TransferError",
    "VerifyError",
    "WeightsError",
    "declare_rule",
    "parallelize",
    "plan",
    "simulate",
    "verify",
]
