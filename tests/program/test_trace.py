"""What a trace leaves behind."""

from __future__ import annotations

import gc

import torch
from torch import nn

from shardwise.planner.garbage import young_garbage_alone
from shardwise.program.trace import Tracer


def module_classes() -> int:
    found: set[type] = set()
    waiting: list[type] = [nn.Module]
    while waiting:
        more = set(waiting.pop().__subclasses__()) - found
        found |= more
        waiting += more
    return len(found)


def test_kept_traces_keep_no_classes_alive() -> None:
    """Torch makes a class for each module that it traces, and each trace sets attributes of nn.Module: the more classes, the slower."""
    tracer = Tracer(device=torch.device("cpu"))
    gc.collect()
    before = module_classes()
    for number in range(40):
        tracer.forward(
            lambda tensors, number=number: tensors[0] * number, ("times", number), [tracer.tensor((2, 3), torch.float32)], [True]
        )
    gc.collect()
    assert len(tracer.known) == 40
    assert module_classes() <= before + 1


def test_planning_collectsyoung_garbage_alone() -> None:
    was = gc.get_threshold()
    with young_garbage_alone():
        young, middle, _ = gc.get_threshold()
        assert gc.isenabled() and young > was[0] and middle > 1 << 20
    assert gc.get_threshold() == was
