"""`shardwise layouts`: which layouts of a known model would be best on a cluster, costed from a few of its blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table

from shardwise import presets
from shardwise.capture.export import capture
from shardwise.cluster.model import Cluster
from shardwise.errors import ModelError
from shardwise.planner.scale import Found, ScaleSearch
from shardwise.planner.uneven import Placed, kinds_of, search_unlike

__all__ = ["Outlook", "outlook"]

_SAMPLES = 4  # of the captured batch: the largest microbatch that is tried


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """found: layouts that fit, fastest first; global_batch: samples of a step; flops: of a step, forward and backward, without
    recomputation; peak: of all devices, flop/s."""

    model: str
    cluster: Cluster
    global_batch: int
    found: list[Found]
    flops: float
    peak: float

    def use(self, each: Found) -> float:
        """Share of the devices' peak that the model's own arithmetic takes (model flops utilisation)."""
        return self.flops / (each.seconds * self.peak)

    def table(self, shown: int = 10) -> Table:
        """The first layouts. batches: microbatches × samples; 1f1b×4: interleaved, 4 stages a rank; again: what the backward pass
        recomputes; peak: share of the devices' that the model's arithmetic takes."""
        table = Table("dp", "tp", "pp", "batches", "order", "zero", "again", "step", "peak", "waits", "memory", "runs", box=None)
        for each in self.found[:shown]:
            scheme = each.scheme
            table.add_row(
                *map(str, (scheme.dp, scheme.tp, scheme.pp)),
                f"{scheme.microbatches}×{each.samples}",
                scheme.schedule if scheme.chunks == 1 else f"1f1b×{scheme.chunks}",
                str(scheme.zero),
                scheme.recompute,
                f"{each.seconds:.3g} s",
                f"{100 * self.use(each):.0f} %",
                "" if each.bubble is None else f"{100 * each.bubble:.0f} %",
                f"{each.memory_bytes / 1e9:.3g} GB",
                "yes" if each.runs else "no",
            )
        return table

    def places(self) -> str:
        """Who does what in the first layout, a line for each kind of device; "" where all are alike."""
        first = self.found[0] if self.found else None
        return "\n".join(first.places) if isinstance(first, Placed) else ""

    def as_json(self) -> dict[str, Any]:
        """For programs: seconds, bytes, shares."""
        return {
            "model": self.model,
            "cluster": self.cluster.name,
            "global_batch": self.global_batch,
            "layouts": [
                {
                    "layout": str(each),
                    "step_time_s": each.seconds,
                    "simulated": each.step_time_s is not None,
                    "model_flops_utilisation": self.use(each),
                    "memory_bytes": each.memory_bytes,
                    "runs": each.runs,
                    **({"places": list(each.places)} if isinstance(each, Placed) else {}),
                }
                for each in self.found
            ],
        }


def outlook(
    name: str, cluster: Cluster, global_batch: int | None = None, sequence: int | None = None, *, runnable: bool = False
) -> Outlook:
    """The layouts of a preset on devices of the catalog, in bfloat16 with float32 gradients and states.

    runnable: only those that the runtime can run. ModelError for a model that is no preset or whose layers are not all alike.
    """
    preset = presets.describe(name)
    if not preset.depth or preset.period != 1 or len(preset.depth) != 1 or preset.layers is None or preset.shallow is None:
        raise ModelError(f"{preset.name} has no single run of equal layers, which this needs; use shardwise plan with a smaller cluster")
    layers = min(preset.layers, preset.shallow)
    model, batch = presets.build(name, layers=layers, batch_size=_SAMPLES, sequence=sequence)
    graph = capture(model.to(torch.bfloat16).train(), batch)
    repeated = preset.layers - preset.first_layers
    counts = (preset.first_layers, repeated) if preset.first_layers > 1 else (repeated,)
    search = ScaleSearch(
        graph=graph, counts=counts, cluster=cluster, global_batch=global_batch or preset.batch_size, only_runnable=runnable
    )
    found = search_unlike(search) if len(kinds_of(cluster)) > 1 else search.search()
    machines = cluster.machines
    peak = machines.peak_flops("bfloat16") if machines else cluster.ranks * cluster.rates.matmul_of("bfloat16").cubes_flops.values[-1]
    flops = search.flops() if found else 0.0
    return Outlook(model=preset.name, cluster=cluster, global_batch=search.global_batch, found=found, flops=flops, peak=peak)
