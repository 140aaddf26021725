"""Runs what may hang, crash or take for ever, and goes on without it.

Where that is safe it runs in a forked process, for an operator that is given strange numbers may write where it must not; elsewhere in a
thread.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from functools import lru_cache
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import torch

__all__ = ["Clock", "Trouble", "patient"]

PATIENCE_S = 20.0  # for one operator: far more than any needs, on a busy machine, too
_GRACE_S = 10.0  # for the one call that is under way when the time is over
_BEGIN_S = 5.0  # in which a forked process runs its first line, unless it hangs on a lock that another thread held when it was forked
_Found = TypeVar("_Found")

Clock = Callable[[], None]  # called between two runs of the operator; raises when the time is over


class Trouble(Exception):
    """It took too long, crashed or never returned."""


class _Overdue(Exception):
    """The time is over."""


def patient(work: Callable[[Clock], _Found]) -> _Found:
    """What `work` returns. Raises Trouble, and what `work` raises.

    `work` has none of the caller's modes (no gradients, fake tensors, devices), and random numbers of its own, the same each time. Its
    warnings are not shown.
    """
    if _may_fork():
        _warm()
        outcome = _in_process(work)
        if outcome is not None:
            return _result(outcome)
    return _result(_in_thread(work, PATIENCE_S + _GRACE_S))


def _may_fork() -> bool:
    return sys.platform == "linux" and not torch.cuda.is_initialized() and not multiprocessing.current_process().daemon


@lru_cache(maxsize=1)
def _warm() -> None:
    """Has torch load what it loads at the first backward pass, here once and not in every process."""

    def work(clock: Clock) -> None:
        one = torch.ones(1, requires_grad=True)
        torch.autograd.grad([one * 2], [one], [torch.ones(1)])

    _in_thread(work, _GRACE_S)


def _result(outcome: tuple[str, Any]) -> Any:
    kind, value = outcome
    if kind == "made":
        return value
    raise value


def _in_process(work: Callable[[Clock], Any]) -> tuple[str, Any] | None:
    """What a forked process makes of it; None when that hung before it began."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(work, theirs), daemon=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # a fork beside other threads: that it may hang is reckoned with
        process.start()
    theirs.close()
    try:
        if not ours.poll(_BEGIN_S) or ours.recv() != "begun":
            return None
        if not ours.poll(PATIENCE_S + 2 * _GRACE_S):
            return "failed", Trouble("it does not return")
        found: tuple[str, Any] = ours.recv()
        return found
    except EOFError:
        process.join()
        return "failed", Trouble(f"running it on small random tensors crashes ({_signal(process.exitcode)})")
    finally:
        process.kill()
        process.join()
        ours.close()


def _signal(code: int | None) -> str:
    return signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"


def _child(work: Callable[[Clock], Any], parent: Connection) -> None:
    parent.send("begun")
    faulthandler.disable()  # a crash is reported by us
    torch.set_num_threads(1)  # the threads that torch had are not here
    outcome = _in_thread(work, PATIENCE_S + _GRACE_S)
    try:
        parent.send(outcome)
    except Exception as error:  # an exception that cannot be sent
        parent.send(("failed", Trouble(f"{type(error).__name__}: {error}")))


def _in_thread(work: Callable[[Clock], Any], wait_s: float) -> tuple[str, Any]:
    """("made", result) or ("failed", exception); the thread is left behind if it hangs."""
    outcomes: list[tuple[str, Any]] = []
    end = time.monotonic() + PATIENCE_S

    def clock() -> None:
        if time.monotonic() > end:
            raise _Overdue

    def run() -> None:
        try:
            with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
                warnings.simplefilter("ignore")
                torch.default_generator.manual_seed(0)  # every rank finds the same
                outcomes.append(("made", work(clock)))
        except _Overdue:
            outcomes.append(("failed", Trouble(f"trying it takes more than {PATIENCE_S:.0f} s")))
        except Exception as error:
            outcomes.append(("failed", error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(wait_s)
    return outcomes[0] if outcomes else ("failed", Trouble("it does not return"))
