"""Processes that answer over a pipe, never outlive their parent, and report their own error.

parent                    child
start(target, …)  ──────▶ target(pipe, …)
receive(timeout)  ◀────── pipe.send(value)        or the child's traceback, raised here as `ChildFailed`
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

import psutil

_PR_SET_PDEATHSIG = 1
_FORK = multiprocessing.get_context("fork")  # the parent has imported torch but never computed: a fork saves each child the import


class ChildFailed(RuntimeError):
    """A child ended, erred or did not answer in time."""


@dataclass(frozen=True)
class _Failure:
    text: str


class Child:
    """One process and the pipe to it."""

    def __init__(self, name: str, target: Callable[..., None], *arguments: object) -> None:
        self.name = name
        self._pipe, theirs = _FORK.Pipe()
        self._process = _FORK.Process(target=_run, args=(theirs, os.getpid(), target, arguments), name=name)
        self._process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        """Of the process."""
        assert self._process.pid is not None, "it was started"
        return self._process.pid

    def send(self, message: object) -> None:
        """Send a message to the child's pipe."""
        try:
            self._pipe.send(message)
        except OSError as error:
            raise ChildFailed(f"{self.name}: the process is gone ({error})") from error

    def end(self) -> None:
        """Kill the process and all that it started."""
        for process in _tree(self._process.pid):
            _kill(process)
        self._process.join(timeout=10)
        self._pipe.close()

    def _answer(self) -> Any:
        try:
            message = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join(timeout=1)
            raise ChildFailed(f"{self.name}: the process ended (exit code {self._process.exitcode})") from None
        if isinstance(message, _Failure):
            raise ChildFailed(f"{self.name} failed:\n{message.text}")
        return message


def receive(children: list[Child], timeout_s: float, what: str) -> list[Any]:
    """Return one message of each child, in their order; the first failure is raised as soon as it arrives."""
    deadline = time.monotonic() + timeout_s
    answers: dict[Connection, Any] = {}
    while len(answers) < len(children):
        waiting = {child._pipe: child for child in children if child._pipe not in answers}
        ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            names = ", ".join(child.name for child in waiting.values())
            raise ChildFailed(f"no answer from {names} within {timeout_s:g} s while waiting for: {what}")
        answers |= {pipe: waiting[pipe]._answer() for pipe in waiting if pipe in ready}
    return [answers[child._pipe] for child in children]


def _run(pipe: Connection, parent: int, target: Callable[..., None], arguments: tuple[object, ...]) -> None:
    _die_with(parent)
    try:
        target(pipe, *arguments)
    except BaseException:
        pipe.send(_Failure(traceback.format_exc()))
    finally:
        os._exit(0)  # threads of a process group may wait for a peer that is gone


def _die_with(parent: int) -> None:
    """Let the kernel kill this process when its parent ends; Ctrl-C is the parent's to handle."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _tree(pid: int | None) -> list[psutil.Process]:
    try:
        process = psutil.Process(pid)
        return [*process.children(recursive=True), process]
    except psutil.NoSuchProcess:
        return []


def _kill(process: psutil.Process) -> None:
    try:
        process.kill()
    except psutil.NoSuchProcess:
        return
