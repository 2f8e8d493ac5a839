"""The helper that other tests rest on: it must not lose an error, nor leave a process behind."""

import asyncio
import os
import signal
import time

import pytest

from spawn import KILLED, Context, Processes, ProcessesFailed, spawn


def _add(context: Context, number: int) -> tuple[int, int, int]:
    import torch

    return context.rank, context.rank + number, torch.get_num_threads()


async def _add_on_a_loop(context: Context, number: int) -> tuple[int, str]:
    await context.meeting("all here")
    return context.rank + number, type(asyncio.get_running_loop()).__module__


def _fail_at_one(context: Context) -> None:
    if context.rank == 1:
        raise LookupError("nothing on the shelf")
    context.wait("never", timeout_s=60)


def _hang_at_one(context: Context) -> None:
    if context.rank == 1:
        _hang_here()


def _hang_here() -> None:
    time.sleep(60)


def _die_at_one(context: Context) -> None:
    if context.rank == 1:
        os.kill(os.getpid(), signal.SIGSEGV)


def _wait_for_parent(context: Context) -> int:
    context.mark("working")
    context.wait("go on", rank=-1)
    return os.getpid()


def _pids(processes: Processes, size: int) -> list[int]:
    return [processes.pid(rank) for rank in range(size)]


def _alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_results_come_by_rank() -> None:
    """Three processes, one torch thread each, return what they computed in the order of ranks."""
    assert spawn(3, _add, 10, timeout_s=30) == [(0, 10, 1), (1, 11, 1), (2, 12, 1)]


def test_coroutines_run_on_uvloop_and_meet() -> None:
    """An async target gets a loop of its own, and a barrier lets all ranks pass together."""
    assert spawn(2, _add_on_a_loop, 5, timeout_s=30) == [(5, "uvloop"), (6, "uvloop")]


def test_a_traceback_reaches_the_parent_at_once() -> None:
    """One rank raises while the other waits for it: the parent has the text and does not wait."""
    started = time.monotonic()
    with pytest.raises(ProcessesFailed, match="nothing on the shelf") as caught:
        spawn(2, _fail_at_one, timeout_s=60)
    assert time.monotonic() - started < 30
    assert "in _fail_at_one" in caught.value.failures[1]
    assert "was still running" in caught.value.failures[0]


def test_a_process_that_outlives_its_time_is_killed_and_named() -> None:
    """One rank sleeps on: it is named with the line where it sleeps, and no process is left."""
    with Processes(2, _hang_at_one, timeout_s=4) as processes:
        pids = _pids(processes, 2)
        with pytest.raises(ProcessesFailed, match=r"did not end within 4 s") as caught:
            processes.results()
    assert "_hang_here" in caught.value.failures[1]
    assert 0 not in caught.value.failures
    assert not any(_alive(pid) for pid in pids)


def test_a_process_that_dies_is_told_from_one_that_returns() -> None:
    """A segmentation fault says nothing on the pipe: the parent names the signal."""
    with pytest.raises(ProcessesFailed) as caught:
        spawn(2, _die_at_one, timeout_s=30)
    assert caught.value.failures == {1: "died without a word: SIGSEGV"}


def test_kill_stop_and_resume() -> None:
    """The parent kills one rank on purpose, holds another still, and lets it go on."""
    with Processes(3, _wait_for_parent, timeout_s=30) as processes:
        processes.wait("working")
        processes.kill(1)
        processes.stop(2)
        processes.mark("go on")
        time.sleep(0.3)
        assert _alive(processes.pid(2))
        processes.resume(2)
        results = processes.results()
        pids = _pids(processes, 3)
    assert results == [pids[0], KILLED, pids[2]]
    assert not any(_alive(pid) for pid in pids)


def test_waiting_for_a_mark_ends_when_it_can_no_more_come() -> None:
    """The parent waits for a mark of a rank that has failed: it gets the traceback instead."""
    with (
        Processes(2, _fail_at_one, timeout_s=30) as processes,
        pytest.raises(ProcessesFailed, match="nothing on the shelf"),
    ):
        processes.wait("never", rank=1)
