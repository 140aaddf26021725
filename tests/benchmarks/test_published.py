"""Rows are predicted from their own figures: what they change changes the prediction as it must."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from benchmarks.published import Prediction, Predictor, summarise
from benchmarks.published_experts import expert_ranks, routing_of
from benchmarks.published_frameworks import Holding, holding_of
from benchmarks.published_rows import Row, read_table, schedule_of

from benchmarks import published, published_experts
from shardwise.cost.routing import Routing
from shardwise.planner import twins
from shardwise.planner.apply import analyse

MODEL = {"layers": 8, "hidden": 1024, "heads": 16, "kv_heads": 16, "ffn": 4096, "vocab": 51200, "seq_len": 1024, "arch": "gpt"}
LAYOUT = {"n_gpus": 8, "tp": 2, "pp": 2, "dp": 2, "cp": 1, "ep": 1, "virtual_stages": 1, "micro_batch": 2, "global_batch": 32}
REST = {"zero_fsdp": "none", "recompute": "none", "sequence_parallel": False, "precision": "bf16", "measured": {"iter_time_s": 0.1}}


def rows(tmp_path: Path, *changes: dict[str, Any]) -> tuple[Row, ...]:
    document = {
        "source": {"title": "made up", "year": 2024},
        "hardware": {"gpu": "NVIDIA A100-SXM4-80GB", "gpus_per_node": 8},
        "notes": "",
        "rows": [{"id": f"made:{number}", "model": MODEL, **LAYOUT, **REST, **change} for number, change in enumerate(changes)],
    }
    path = tmp_path / "made.json"
    path.write_text(json.dumps(document))
    return read_table(path).rows


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return Predictor()


def seconds(predictor: Predictor, row: Row) -> float:
    found = predictor.predict(row, 2024)
    assert found.step_s is not None, found.reason
    return found.step_s


def test_more_work_takes_longer(tmp_path: Path, predictor: Predictor) -> None:
    plain, again, twice = rows(tmp_path, {}, {"recompute": "full"}, {"global_batch": 64})
    first = seconds(predictor, plain)
    assert 1.2 * first < seconds(predictor, again) < 1.4 * first, "a forward pass more is a third"
    assert 1.7 * first < seconds(predictor, twice) < 2 * first, "all but the pipeline's fill is doubled"


def test_eight_bit_products_are_faster_only_where_there_are_such(tmp_path: Path, predictor: Predictor) -> None:
    sixteen, eight = rows(tmp_path, {}, {"precision": "fp8"})
    assert seconds(predictor, eight) >= 0.99 * seconds(predictor, sixteen), "an A100 has none"


def test_memory_falls_with_what_is_divided(tmp_path: Path, predictor: Predictor) -> None:
    whole, divided, again = rows(tmp_path, {}, {"zero_fsdp": "ZeRO-1"}, {"recompute": "full"})
    first = predictor.predict(whole, 2024).memory_bytes
    assert first is not None
    for each in (divided, again):
        found = predictor.predict(each, 2024).memory_bytes
        assert found is not None and found < first


def test_what_is_not_said_is_a_range(tmp_path: Path, predictor: Predictor) -> None:
    (row,) = rows(tmp_path, {"recompute": None})
    found = predictor.predict(row, 2024)
    assert found.low_s is not None and found.high_s is not None and found.step_s is not None
    assert found.low_s <= found.step_s <= found.high_s and found.low_s < found.high_s


def test_a_summary_counts_and_gives_reasons(tmp_path: Path, predictor: Predictor) -> None:
    good, bad = rows(tmp_path, {}, {"model": {"arch": "resnet cnn"}})
    result = summarise("made", [predictor.predict(good, 2024), predictor.predict(bad, 2024)])
    assert (result.rows, result.expressed, len(result.reasons)) == (2, 1, 1)
    assert result.error == pytest.approx(abs(seconds(predictor, good) / 0.1 - 1))


def test_rows_that_ran_out_of_memory_are_counted_where_they_are_said_to_fit(tmp_path: Path, predictor: Predictor) -> None:
    oom = {"measured": {"oom": True}}
    small, large = rows(tmp_path, oom, oom | {"micro_batch": 256, "global_batch": 512})
    found = [predictor.predict(row, 2024) for row in (small, large)]
    assert [each.fits for each in found] == [True, False]
    result = summarise("made", found)
    assert (result.overfull, result.out_of_memory, result.error) == (1, 2, None)


def test_what_is_printed_of_memory_is_compared(tmp_path: Path, predictor: Predictor) -> None:
    (row,) = rows(tmp_path, {"measured": {"iter_time_s": 0.1, "peak_mem_gb": 10}})
    assert row.memory_counts == "allocated"
    device, reserved, allocated = (
        predictor.predict(replace(row, memory_counts=counts), 2024).memory_bytes or 0 for counts in ("device", "reserved", "allocated")
    )
    assert device - reserved > 1.6e9, "the context and the communicators of tp, dp and pp"
    assert reserved > allocated
    assert summarise("made", [predictor.predict(row, 2024)]).memory == pytest.approx(abs(allocated / 10e9 - 1))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, Holding()),
        ({"precision": "fp16"}, Holding(gradient_bytes=2)),
        ({"zero_fsdp": "ZeRO-1", "precision": "fp16"}, Holding(gradient_bytes=2, step_bytes=8, bucket_bytes=10**9, keeps_sent=True)),
        ({"zero_fsdp": "distributed optimizer"}, Holding()),
        ({"framework": "maxtext", "zero_fsdp": "FSDP"}, Holding(copied=False, remade="all")),
        ({"framework": "llm-foundry", "zero_fsdp": "FSDP"}, Holding(copied=False, remade="none")),
        (
            {"framework": "torchtitan", "zero_fsdp": "FSDP2 (ZeRO-3)", "compile": True, "where": "llama3_h100_202412.md"},
            Holding(copied=False, remade="blocks", over_context=True),
        ),
        (
            {"framework": "torchtitan", "zero_fsdp": "FSDP2 (ZeRO-3)", "compile": True, "date": "2025-06-01"},
            Holding(copied=False, remade="all", over_context=True),
        ),
    ],
)
def test_frameworks_hold_what_they_are_known_to(tmp_path: Path, change: dict[str, Any], expected: Holding) -> None:
    (row,) = rows(tmp_path, change)
    assert holding_of(row, 2024) == expected


def test_bounds_are_those_of_the_command() -> None:
    bounds = (published._BOUND, published._FILE_BOUND, published._EXPRESSED, published._MEMORY_BOUND)
    assert bounds == (0.08, 0.15, 0.9, 0.08)


MIXTURE = MODEL | {"arch": "qwen3 moe", "hidden": 4096, "seq_len": 4096, "kv_heads": 4, "experts": 16, "topk": 4, "moe_ffn": 1024}
DIVIDED = {"model": MIXTURE, "tp": 1, "pp": 1, "dp": 16, "ep": 16, "n_gpus": 16}


def routing(row: Row, year: int) -> Routing:
    found = routing_of(row, year)
    assert found is not None
    return found


def test_what_a_row_says_of_routing_counts(tmp_path: Path, predictor: Predictor) -> None:
    """A token sent once to each node is faster than a row for each expert, and hidden it is faster still."""
    every, once, hidden = rows(
        tmp_path,
        DIVIDED | {"dispatcher": "A2A"},
        DIVIDED | {"dispatcher": "DeepEP"},
        DIVIDED | {"dispatcher": "DeepEP", "note": "+1f1b a2a overlap"},
    )
    assert seconds(predictor, hidden) < seconds(predictor, once) < seconds(predictor, every)


@pytest.mark.parametrize(
    ("words", "dispatch", "overlapped"),
    [
        ({"dispatcher": "DeepEP"}, "tokens", False),
        ({"dispatcher": "A2A"}, "rows", False),
        ({"kernel": "TE + HybridEP", "note": "overlap moe comm"}, "tokens", True),
        ({"dispatcher": "DeepEP", "note": "+1f1b a2a overlap"}, "tokens", True),
        ({"note": "DualPipe"}, "rows", True),
        ({"schedule": "DualPipe"}, "rows", True),
    ],
)
def test_routing_is_read_from_a_row_s_words(tmp_path: Path, words: dict[str, str], dispatch: str, overlapped: bool) -> None:
    (row,) = rows(tmp_path, DIVIDED | words)
    found = routing(row, 2024)
    assert (found.dispatch, found.overlapped, found.experts, found.chosen) == (dispatch, overlapped, 16, 4)


def test_routing_sends_tokens_once_since_software_does(tmp_path: Path) -> None:
    (row,) = rows(tmp_path, DIVIDED)
    assert [routing(row, year).dispatch for year in (2024, 2025)] == ["rows", "tokens"]


def test_a_host_that_counts_rows_bounds_small_layers_alone(tmp_path: Path, predictor: Predictor) -> None:
    """Both passes of a layer take three times what the host takes to launch one, if the device is faster; more of the work takes longer."""
    small = {"hidden": 512, "ffn": 1024, "moe_ffn": 512, "seq_len": 256}
    tiny, large = rows(tmp_path, DIVIDED | {"model": MIXTURE | small}, DIVIDED)
    layers, microbatches = 8, LAYOUT["global_batch"] // (16 * LAYOUT["micro_batch"])
    least = 3 * published_experts._LAUNCH_S * layers * microbatches
    assert least < seconds(predictor, tiny) < 1.2 * least < seconds(predictor, large)


def test_the_host_sorts_what_several_experts_of_a_rank_are_sent(tmp_path: Path) -> None:
    """There and back, once for each sender and expert; with one expert a rank, or tokens sent once, there is nothing to sort."""
    several, one, once = rows(
        tmp_path,
        DIVIDED | {"ep": 8, "dispatcher": "A2A"},
        DIVIDED | {"ep": 16, "dispatcher": "A2A"},
        DIVIDED | {"ep": 8, "dispatcher": "DeepEP"},
    )
    assert routing(one, 2025).launch_s == routing(once, 2025).launch_s == published_experts._LAUNCH_S
    assert routing(several, 2025).launch_s == pytest.approx(published_experts._LAUNCH_S + 2 * 16 * published_experts._CHUNK_S)


def test_recomputation_that_is_not_said_is_what_memory_wants(tmp_path: Path) -> None:
    (row,) = rows(tmp_path, {"recompute": None})
    less, more = (Prediction(row=row, step_s=t, memory_bytes=m, least_bytes=m, room_bytes=80.0) for t, m in ((3.0, 100.0), (4.0, 50.0)))
    between = published._chosen([less, more])
    assert between.step_s == pytest.approx(3.4) and between.memory_bytes == 80.0
    assert published._chosen([replace(less, room_bytes=120.0), more]).step_s == 3.0
    assert published._chosen([replace(less, room_bytes=40.0), replace(more, room_bytes=40.0)]).step_s == 4.0


def test_more_expert_ranks_than_there_are_are_as_many_as_can_be(tmp_path: Path) -> None:
    (row,) = rows(tmp_path, DIVIDED | {"ep": 64})
    assert expert_ranks(row) == 16


def test_the_last_year_of_a_source_and_a_release_say_what_its_software_could_do(tmp_path: Path) -> None:
    rack = {"gpu": "GB200 (NVL72)", "precision": "mxfp8"}
    old, new, hopper, sixteen = rows(
        tmp_path,
        DIVIDED | rack | {"release": "26.04.01"},
        DIVIDED | rack | {"release": "26.06"},
        DIVIDED | {"gpu": "NVIDIA H100-SXM5-80GB", "precision": "fp8", "release": "26.06"},
        DIVIDED | rack | {"release": "26.06", "precision": "bf16"},
    )
    assert [published_experts._is_free_of_counts(row, 2025) for row in (old, new, hopper, sixteen)] == [False, True, False, False]


def test_rows_on_their_way_in_eight_bits_are_read_from_a_row_s_words(tmp_path: Path) -> None:
    sixteen, eight = rows(tmp_path, DIVIDED, DIVIDED | {"note": "DeepEP, FP8 dispatch"})
    assert (routing(sixteen, 2025).there_bits, routing(eight, 2025).there_bits) == (None, 8)


def test_dropped_tokens_are_not_counted(tmp_path: Path) -> None:
    counted, dropped = rows(tmp_path, DIVIDED, DIVIDED | {"model": MIXTURE | {"name": "mixture (tokendrop)"}})
    assert routing(dropped, 2025).launch_s == routing(counted, 2025).launch_s / 2


def test_schedules_and_stages_are_those_that_can_be_run(tmp_path: Path) -> None:
    """Where a row leaves the stages of a rank out there are as few as its schedule has."""
    cases = {
        (None, 1): ("1f1b", 1),
        (None, 4): ("interleaved", 4),
        ("1F1B", 4): ("interleaved", 4),
        ("1F1B-I", None): ("interleaved", 2),
        ("ZB-1p", 1): ("zb-h1", 1),
        ("ZB-H2", 1): ("zb-2p", 1),
        ("ZBVZeroBubble", None): ("zb-v", 2),
        ("GPipe", 4): ("gpipe", 1),
        ("DualPipe", 1): ("1f1b", 1),
    }
    read = rows(tmp_path, *({"schedule": name, "virtual_stages": chunks} for name, chunks in cases))
    assert [schedule_of(row.layout) for row in read] == list(cases.values())
    (alone,) = rows(tmp_path, {"pp": 1, "dp": 4, "virtual_stages": 3})
    assert schedule_of(alone.layout) == ("1f1b", 1)


def test_messages_between_stages_cost_time_where_ranks_wait_for_them(tmp_path: Path, predictor: Predictor) -> None:
    """Megatron-LM computed nothing meanwhile until 2022; its scatter/gather made the messages as many times shorter as there are tensor
    ranks (Narayanan et al. 2021, section 4.1)."""
    interleaved = {"virtual_stages": 2, "n_gpus": 8, "dp": 1, "pp": 4, "tp": 2, "gpus_per_node": 2}
    whole, parts = rows(tmp_path, interleaved | {"where": "scatter/gather OFF"}, interleaved | {"where": "scatter/gather ON"})

    def step(row: Row, year: int) -> float:
        return predictor.predict(row, year).step_s or 0

    assert step(parts, 2024) < step(parts, 2021) < step(whole, 2021)


def test_schedules_that_validate_later_are_timed_from_step_to_step(tmp_path: Path, predictor: Predictor) -> None:
    """Qi et al. 2023, section 4: no rank waits for the others at a step's end, so the next step's first forwards fill its last gap."""
    (row,) = rows(tmp_path, {"schedule": "ZB-2p", "pp": 4, "dp": 1})
    waits, carries_on = (seconds(predictor, replace(row, framework=name)) for name in ("torchtitan", "megatron"))
    assert carries_on < 0.97 * waits


def test_a_device_without_bfloat16_computes_in_float16_where_a_row_says_nothing(tmp_path: Path, predictor: Predictor) -> None:
    """A V100's other products are in float32, eight times slower."""
    volta = {"gpu": "NVIDIA V100-SXM2-32GB"}
    silent, said = rows(tmp_path, volta | {"precision": None}, volta | {"precision": "fp16"})
    assert seconds(predictor, silent) == pytest.approx(seconds(predictor, said), rel=0.05)


def test_splits_of_one_model_share_its_analysis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    analysed = []
    monkeypatch.setattr(twins, "analyse", lambda graph, mode: analysed.append(graph) or analyse(graph, mode))
    predictor = Predictor()
    times = [seconds(predictor, row) for row in rows(tmp_path, {"tp": 1, "dp": 4}, {"tp": 2}, {"tp": 4, "dp": 1})]
    assert len(set(times)) == 3 and len(predictor.costs) == 3
    assert len(analysed) == len(predictor.twins) == 1
