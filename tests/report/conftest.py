"""A plan made by hand: two stages of dp 1 × tp 2, quick to simulate, with names that must be escaped."""

from __future__ import annotations

import pytest

from shardwise.planner.plan import Candidate, Plan, Prediction
from shardwise.report import Measured
from shardwise.simulate.profile import EdgeProfile, Profile, StageProfile
from shardwise.simulate.simulator import Simulation, simulate_profile

MEMORY = {"parameters": 4_000_000, "gradients": 4_000_000, "optimizer": 8_000_000, "buffers": 0, "saved": 3_000_000, "transient": 500_000}


def stage(modules: list[str]) -> StageProfile:
    seconds = {
        "prelude": (0.0001, 0.0),
        "forward": (0.01, 0.002),
        "backward": (0.02, 0.002),
        "reduce": (0.0, 0.001),
        "update": (0.003, 0.0),
    }
    return StageProfile(seconds=seconds, memory=MEMORY, reduces=["tp"], modules=modules, parameters=2_000_000)


def edge(source: int, target: int) -> EdgeProfile:
    return EdgeProfile(name=f"h<{source}>", source=source, target=target, nbytes=131072, transfer_s=0.0005, requires_grad=True)


@pytest.fixture
def plan() -> Plan:
    layout = "dp=1,tp=2,pp=2,microbatches=2,schedule=1f1b"
    unpredicted = Plan(
        model="Evil<script>alert(1)</script>",
        fingerprint="0",
        cluster="local:4",
        backend="gloo",
        ranks=4,
        dp=1,
        tp=2,
        pp=2,
        microbatches=2,
        schedule="1f1b",
        global_batch=16,
        optimizer="adamw",
        stages=["embed:aten.embedding.default:0", "layers.1:aten.linear.default:0"],
        operators={
            "embed:aten.embedding.default:0": "I",
            "layers.*:aten.linear.default:0": "n blocks=3",
            "layers.*.out:aten.linear.default:0": "k",
            ":aten.silu.default:0": "d2",
        },
        parameters={"embed.weight": "S(1)", "layers.*.weight": "S(0, blocks=3)", "layers.*.out.weight": "S(1)", "norm<b>.weight": "I"},
        profile=Profile(stages=[stage(["embed", "layers.0"]), stage(["layers.1 … 3", "<i>head"])], edges=[edge(0, 1)], cores=2),
        predicted=Prediction(step_time_s=0.1, memory_bytes=[1] * 4, limit_bytes=25_000_000),
        considered=[
            Candidate(layout=layout, estimate_s=0.09, step_time_s=0.1, memory_bytes=19_500_000),
            Candidate(layout=layout.replace("microbatches=2", "microbatches=4"), estimate_s=0.1, step_time_s=0.12, memory_bytes=18_000_000),
            Candidate(layout="dp=4,tp=1,pp=1,microbatches=1,schedule=1f1b", note="needs 3 < 4 GB"),
        ],
        explanation=["It is <so> because"],
    )
    simulation = simulate_profile(unpredicted.profile, unpredicted.mesh)
    predicted = unpredicted.predicted.model_copy(update={"step_time_s": simulation.step_time_s, "memory_bytes": simulation.memory_bytes})
    return unpredicted.model_copy(update={"predicted": predicted})


@pytest.fixture
def simulation(plan: Plan) -> Simulation:
    return simulate_profile(plan.profile, plan.mesh)


@pytest.fixture
def measured(simulation: Simulation) -> Measured:
    """A run that took what was predicted."""
    return Measured(
        step_time_s=simulation.step_time_s * 1.1,
        step_times_s=[simulation.step_time_s * 1.1] * 3,
        memory_bytes=[size + 1_000_000 for size in simulation.memory_bytes],
        timeline=simulation.timeline,
        losses=[5.0, 4.0, 3.5],
        same_numbers=2e-14,
    )
