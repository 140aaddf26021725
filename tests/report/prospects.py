"""Layouts for many devices made by hand: quick to simulate and to draw."""

from __future__ import annotations

from shardwise.cluster.specs import machines
from shardwise.report.layouts import Point
from shardwise.report.placement import Sizes
from shardwise.report.prospect import Choice, Prospect
from shardwise.simulate.profile import EdgeProfile, Profile, StageProfile
from shardwise.simulate.simulator import Mesh, simulate_profile

__all__ = ["LIMIT_BYTES", "prospect"]

LIMIT_BYTES = 73.6e9
LAYOUT = "dp=16,tp=8,pp=8,microbatches=96,microbatch=1,schedule=interleaved,chunks=2,zero=1"


def stage(first: bool) -> StageProfile:
    forward = 0.012 if first else 0.01
    seconds = {
        "prelude": (0.0001, 0.0),
        "forward": (forward, 0.003),
        "backward": (2 * forward, 0.003),
        "reduce": (0.0, 0.05),
        "update": (0.02, 0.0),
    }
    kinds = {"parameters": 3, "gradients": 6, "optimizer": 9, "transient": 2, "runtime": 1}
    memory = {name: size * 10**9 for name, size in kinds.items()}
    return StageProfile(seconds=seconds, memory=memory, saved_bytes=900_000_000, reduces=["dp"], parameters=11 * 10**9)


def prospect(cluster: str, *, dp: int, tp: int, pp: int, chunks: int = 1, microbatches: int = 8) -> Prospect:
    """With 300 layouts, of which every tenth does not fit."""
    stages = pp * chunks
    edges = [
        EdgeProfile(name=f"h→{at}", source=at - 1, target=at, nbytes=33_554_432, transfer_s=0.0007, requires_grad=True)
        for at in range(1, stages)
    ]
    profile = Profile(stages=[stage(at == 0) for at in range(stages)], edges=edges, cores=None)
    schedule = "interleaved" if chunks > 1 else "1f1b"
    mesh = Mesh(dp=dp, tp=tp, pp=pp, chunks=chunks, microbatches=microbatches, schedule=schedule)
    simulation = simulate_profile(profile, mesh)
    step_s, peak = simulation.step_time_s, max(simulation.memory_bytes)
    points = [
        Point(
            layout=f"dp={dp},tp={tp},pp={pp},zero={number % 4},<b>={number}",
            seconds=step_s * (1 + number / 30),
            memory_bytes=int(LIMIT_BYTES * 1.3) if number % 10 == 0 else peak + number * 10**7,
            kind="does not fit" if number % 10 == 0 else "estimated",
        )
        for number in range(1, 301)
    ]
    points.append(Point(layout=LAYOUT, seconds=step_s, memory_bytes=peak, kind="chosen"))
    choices = [
        Choice(layout=LAYOUT, seconds=step_s * (1 + n / 50), memory_bytes=peak, use=0.5 - n / 100, bubble=0.1, runs=n % 2 == 1)
        for n in range(20)
    ]
    return Prospect(
        model="gpt3-<175b>",
        machines=machines(cluster),
        words=[f"dp {dp}", f"tp {tp}", f"pp {pp}", "zero 1"],
        sizes=Sizes(dp=dp, cp=1, tp=tp, pp=pp, chunks=chunks),
        mesh=mesh,
        profile=profile,
        simulation=simulation,
        global_batch=1536,
        limit_bytes=LIMIT_BYTES,
        use=0.49,
        choices=choices,
        points=points,
        tokens=2048,
        dollars=12.3,
        what_if=[("rank 0 computes 1.3 times as long", "1.5 s, 17 % longer")],
        explanation=["It is <so> because"],
    )
