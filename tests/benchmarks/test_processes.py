"""A benchmark's processes tell why they fail, never hang and never stay behind."""

import os
import time

import psutil
import pytest
from benchmarks.processes import Child, ChildFailed, receive


def echo(pipe):
    pipe.send(pipe.recv())
    time.sleep(60)


def raise_error(pipe):
    raise ValueError("the reason")


def die(pipe):
    os._exit(7)


def start_a_child(pipe):
    grandchild = os.fork()
    if grandchild == 0:
        time.sleep(60)
    pipe.send(grandchild)
    time.sleep(60)


@pytest.fixture
def start():
    children = []

    def starter(target):
        children.append(Child(target.__name__, target))
        return children[-1]

    yield starter
    for child in children:
        child.end()


def test_answers_come_in_the_order_of_the_children(start):
    children = [start(echo), start(echo)]
    children[1].send("second")
    children[0].send("first")
    assert receive(children, 10, "an echo") == ["first", "second"]


def test_an_error_is_raised_with_its_traceback(start):
    with pytest.raises(ChildFailed, match=r"(?s)raise_error failed:.*ValueError: the reason"):
        receive([start(echo), start(raise_error)], 10, "an answer")


def test_a_death_is_told(start):
    with pytest.raises(ChildFailed, match=r"die: the process ended \(exit code 7\)"):
        receive([start(die)], 10, "an answer")


def test_silence_ends_in_a_time_out_that_names_the_silent(start):
    with pytest.raises(ChildFailed, match=r"no answer from echo within 0\.1 s while waiting for: step 3"):
        receive([start(echo)], 0.1, "step 3")


def test_end_leaves_no_grandchild(start):
    child = start(start_a_child)
    grandchild = receive([child], 10, "the grandchild's pid")[0]
    child.end()
    deadline = time.monotonic() + 5
    while _runs(grandchild) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not _runs(grandchild)


def _runs(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
