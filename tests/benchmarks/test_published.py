"""Rows are predicted from their own figures: what they change changes the prediction as it must."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from benchmarks.published import Predictor, summarise
from benchmarks.published_rows import Row, read_table

from benchmarks import published

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


def test_bounds_are_those_of_the_command() -> None:
    assert (published._BOUND, published._FILE_BOUND, published._EXPRESSED) == (0.08, 0.15, 0.9)
