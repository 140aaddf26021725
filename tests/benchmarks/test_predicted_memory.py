"""Predicted peaks against those of real ranks."""

import json
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
from benchmarks.predicted_memory import LAYOUTS, Row, main
from benchmarks.workloads import Workload
from tests.clusters import made_up

from benchmarks import predicted_memory
from shardwise.cluster.model import Cluster

MIB = 2**20


def _in_a_new_process(arguments: list[str]) -> int:
    """Ranks fork from it: their sizes are not compared with what the tests' own process holds."""
    shape = Workload(family="gpt2", layers=2, hidden=128, ffn=512, heads=4, vocabulary=4096, sequence=64)  # some 20 MiB a rank
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predicted_memory, "SMALL", {"gpt2": shape})
        patch.setattr(Cluster, "parse", lambda spec: spec if isinstance(spec, Cluster) else made_up(int(spec.removeprefix("local:"))))
        return main(arguments)


def test_ranks_take_steps_and_their_peaks_are_compared(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.json"
    case = ["--case", "gpt2", "2", "pp=2,microbatches=2,schedule=1f1b"]
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        given = ["--small", *case, "--steps", "2", "--json", str(path), "--check", "--bound", "0"]
        assert pool.submit(_in_a_new_process, given).result() == 1
    (row,) = json.loads(path.read_text())
    assert row["chosen"] == "pp=2,microbatches=2,1f1b" and len(row["predicted_bytes"]) == len(row["measured_bytes"]) == 2
    assert all(MIB < each < 300 * MIB for each in row["measured_bytes"] + row["predicted_bytes"])
    assert "2 ranks: off by" in capfd.readouterr().out


@pytest.mark.parametrize(("bound", "code"), [("0.05", 1), ("0.1", 0)])
def test_the_bound_is_each_ranks(bound: str, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def measured(workload: object, family: str, ranks: int, layout: str, steps: int) -> Row:
        assert steps == 14
        found = [100 * MIB, 107 * MIB] if (family, ranks) == ("vit", 4) else [100 * MIB]
        predicted = [100.0 * MIB] * len(found)
        return Row(family=family, ranks=ranks, layout=layout, chosen="pp=2", predicted_bytes=predicted, measured_bytes=found)

    monkeypatch.setattr(predicted_memory, "_measured", measured)
    assert main(["--check", "--bound", bound]) == code
    out = capsys.readouterr().out
    assert f"{len(LAYOUTS) + 1} ranks: off by 0.3% in the mean, -6.5% to +0.0%" in out and f"{len(LAYOUTS)} within 5%" in out


@pytest.mark.parametrize("case", [("gpt3", "2", "-"), ("gpt2", "two", "-")])
def test_a_case_that_means_nothing(case: tuple[str, str, str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--case", *case])
    assert f"--case {case[0]} {case[1]}" in capsys.readouterr().err
