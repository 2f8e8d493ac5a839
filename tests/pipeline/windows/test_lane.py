"""The thread that a window's blocking calls run on."""

import asyncio
import ctypes
import sys
import threading

import pytest

from sparsecast.pipeline.windows.lane import Lane, sharpen_sleeps

_PR_GET_TIMERSLACK = 30


def _slack_ns() -> int:
    return int(ctypes.CDLL(None).prctl(_PR_GET_TIMERSLACK, 0, 0, 0, 0))


@pytest.mark.skipif(sys.platform != "linux", reason="timer slack is Linux's")
async def test_only_the_thread_that_asks_sleeps_sharply() -> None:
    """A window looks every few microseconds whether the GPU is done; the process around it, whose
    sleeps may be put together to save power, keeps its own setting."""
    lane = Lane("sharp")
    before = _slack_ns()
    await lane.run(sharpen_sleeps)
    assert await lane.run(_slack_ns) == 1000
    assert _slack_ns() == before
    await lane.stop(lambda: None, 5)


async def test_a_job_runs_on_though_nobody_waits_for_it() -> None:
    """The caller is cancelled, which cancels the future it awaits: the job comes to its end, the
    next one gets its own result, and the thread ends when it is told to."""
    lane = Lane("alone")
    go, over = threading.Event(), threading.Event()

    def job() -> str:
        assert go.wait(5)
        over.set()
        return "late"

    future = lane.submit(job)
    future.cancel()
    following = lane.submit(lambda: "next")
    await asyncio.sleep(0.01)
    assert not following.done()
    go.set()
    assert await following == "next"
    assert over.is_set()
    assert future.cancelled()
    await lane.stop(lambda: None, 5)
    for thread in threading.enumerate():
        if thread.name == "alone":
            thread.join(5)
            assert not thread.is_alive()
