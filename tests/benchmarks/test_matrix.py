"""Which models the matrix verifies, and what it writes of them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from benchmarks.matrix import BEGIN, END, LAYOUTS, Entry

from benchmarks import matrix


def entry(family: str, name: str, *, shares: tuple[float, float] | None = (0.5, 0.5), **changed: str) -> Entry:
    """Verified in every layout, but for those in `changed`, by number."""
    cells = {layout: changed.get(f"layout{number}", "2e-16") for number, layout in enumerate(LAYOUTS)}
    why = [f"{layout}: failed: a reason" for layout, cell in cells.items() if cell == "no"]
    return Entry(family=family, name=name, cells=cells, shares=shares, notes=["net.1 whole"], why=why, seconds=3.0)


ENTRIES = [entry("decoders", "gpt2", layout1="4e-11"), entry("decoders", "llama", layout0="no"), entry("losses", "mse", shares=None)]


# -- which models ------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Two files of models in the place of ours."""
    (tmp_path / "second.py").write_text("from math import floor\n\ndef b(): ...\n\ndef a(): ...\n\ndef _helper(): ...\n\nclass C: ...\n")
    (tmp_path / "first.py").write_text("def alone(): ...\n\nTABLE = 3\n")
    (tmp_path / "_not.py").write_text("def hidden(): ...\n")
    monkeypatch.setattr(matrix, "MODELS", tmp_path)
    yield tmp_path
    for name in ("models_first", "models_second"):
        sys.modules.pop(name, None)


def test_models_are_the_public_functions_of_each_file_in_their_order(folder: Path) -> None:
    assert matrix.models([]) == [("first", "alone"), ("second", "b"), ("second", "a")]


@pytest.mark.parametrize(
    ("only", "found"),
    [
        (["second"], [("second", "b"), ("second", "a")]),  # a file
        (["al"], [("first", "alone")]),  # the beginning of a model
        (["first", "b"], [("first", "alone"), ("second", "b")]),
        (["nothing"], []),
    ],
)
def test_only_takes_beginnings_of_files_and_models(folder: Path, only: list[str], found: list[tuple[str, str]]) -> None:
    assert matrix.models(only) == found


def test_our_own_models_are_found() -> None:
    found = matrix.models(["decoders"])
    assert ("decoders", "gpt2") in found and all(family == "decoders" for family, _ in found)
    assert found == [("decoders", name) for name in dict.fromkeys(name for _, name in found)]


# -- what is written ---------------------------------------------------------------------------------------------------------------------


def test_the_table_has_a_row_for_each_model_and_a_heading_for_each_file() -> None:
    lines = matrix.table(ENTRIES).splitlines()
    columns = lines[0].count("|")
    assert all(line.count("|") == columns for line in lines)
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["**decoders**", "gpt2", "llama", "**losses**", "mse"]
    assert lines[3] == "| gpt2 | 2e-16 | 4e-11 | 2e-16 | 2e-16 | 2e-16 | 50% / 50% | net.1 whole |"
    assert lines[4].split("|")[2].strip() == "no"
    assert lines[6].split("|")[7].strip() == ""  # no shares


def test_the_summary_counts_models_and_takes_the_largest_error() -> None:
    text = matrix.summary(ENTRIES, [ENTRIES[0]], 90.0)
    assert text.startswith("2 of 3 models verified in all of tp=2, pp=2, dp=2, tp=2,pp=2, chosen on 4")
    assert "largest relative error 4.0e-11" in text
    assert "1 of 1 of them again on processes over gloo; 1.5 minutes" in text


def test_the_summary_of_nothing() -> None:
    assert matrix.summary([], [], 0.0).startswith("0 of 0 models verified")


def test_the_table_is_written_between_its_marks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix, "ROOT", tmp_path)
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    for _ in range(2):  # a second time over the first
        matrix.write(ENTRIES, [], 60.0)
        text = readme.read_text()
        assert text.startswith(f"before\n{BEGIN}\n2 of 3 models") and text.endswith(f"{END}\nafter\n")
        assert "old" not in text and text.count("| gpt2 |") == 1


def test_our_readme_has_the_marks_once() -> None:
    text = (matrix.ROOT / "README.md").read_text()
    assert text.count(BEGIN) == text.count(END) == 1 and text.index(BEGIN) < text.index(END)


@pytest.mark.parametrize(("shares", "splits"), [(None, True), ((0.55, 0.60), True), ((0.56, 0.5), False), ((0.5, 0.61), False)])
def test_a_rank_that_has_too_much_does_not_split(shares: tuple[float, float] | None, splits: bool) -> None:
    found = replace(entry("decoders", "gpt2", shares=shares), notes=[])
    assert found.splits is splits
    assert replace(found, notes=["net.1 whole"]).splits  # what is kept as one operator cannot be split


# -- a model -----------------------------------------------------------------------------------------------------------------------------

BROKEN = '''
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(x).square().mean()

def works():
    """A model."""
    return Net(), {"x": torch.randn(4, 4)}

def fails():
    """No model."""
    raise ValueError("no such model")
'''


def test_a_model_is_examined(folder: Path, made_up_machine: None) -> None:
    (folder / "first.py").write_text(BROKEN)
    found = matrix.examine("first", "works", ("dp=2",))
    assert found.ok and list(found.cells) == ["dp=2"] and float(found.cells["dp=2"]) < 1e-10
    assert found.shares is None and found.notes == []


def test_a_model_that_cannot_be_made_is_an_entry_too(folder: Path, made_up_machine: None, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "first.py").write_text(BROKEN)
    found = matrix.examine("first", "fails", ("dp=2", "tp=2"))
    assert not found.ok and found.cells == {"dp=2": "no", "tp=2": "no"} and found.why == ["ValueError: no such model"]
    assert "no such model" in capsys.readouterr().err  # with the traceback: it is no error of ours
