"""A plan from a file against the options given beside it: one that says otherwise would have no effect, and is refused."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from shardwise.capture.precision import Precision
from shardwise.cluster.model import Cluster
from shardwise.errors import PlanError
from shardwise.planner.layout import Layout
from shardwise.planner.plan import Plan, Random

__all__ = ["Asked"]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a command was told beside --plan; None: nothing."""

    cluster: str | None = None
    layout: str | None = None
    global_batch: int | None = None
    random: Random | None = None
    precision: Precision | None = None

    def check(self, plan: Plan, path: Path) -> None:
        """Raises PlanError for the first option that the plan contradicts; LayoutError and ClusterError for one that cannot be read."""
        if self.cluster is not None and (name := _cluster_name(self.cluster)) != plan.cluster:
            raise _contradiction(path, f"is for the cluster {plan.cluster}", f"--cluster says {name}")
        pinned = Layout.parse(self.layout)
        for field in fields(pinned):
            wanted, planned = getattr(pinned, field.name), getattr(plan, field.name)
            if field.name == "table":
                wanted = wanted.splitlines() or None
            if wanted is not None and wanted != planned:
                raise _contradiction(path, f"says {field.name}={planned}", f"--layout says {field.name}={wanted}")
        if self.global_batch is not None and self.global_batch != plan.global_batch:
            raise _contradiction(path, f"is for a global batch of {plan.global_batch}", f"--global-batch says {self.global_batch}")
        if self.random is not None and self.random != plan.random:
            raise _contradiction(path, f"says random={plan.random!r}", f"--random says {self.random}")
        if self.precision is not None and self.precision != plan.precision:
            raise _contradiction(path, f"says precision={plan.precision!r}", f"--precision says {self.precision}")


def _cluster_name(spec: str) -> str:
    """As plans name it. This machine is not measured for that."""
    return spec if spec.startswith("local:") else Cluster.parse(spec).name


def _contradiction(path: Path, planned: str, wanted: str) -> PlanError:
    return PlanError(f"{path} {planned}, {wanted}: leave the option out, or leave --plan out to plan anew")
