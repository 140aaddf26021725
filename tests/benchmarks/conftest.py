"""The benchmarks are no part of the installed package: tests find them beside `tests/`."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.clusters import made_up

from shardwise.cluster.model import Cluster

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


@pytest.fixture
def made_up_machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is measured; torch has as many threads afterwards as before."""
    threads = torch.get_num_threads()
    monkeypatch.setattr(Cluster, "parse", lambda spec: spec if isinstance(spec, Cluster) else made_up(int(spec.removeprefix("local:"))))
    yield
    torch.set_num_threads(threads)
