"""A window whose operations run on a thread and need no task: what becomes of them.

The thread's work is played; nothing here depends on what a kind of window does on it.
"""

import asyncio
import gc
import threading
import time
from typing import Any

import pytest
import torch

from sparsecast.messages.errors import (
    LocalProtocolError,
    WindowAborted,
    WindowError,
    WindowTimeout,
)
from sparsecast.pipeline.windows.base import WindowSpec
from sparsecast.pipeline.windows.lane import Lane
from sparsecast.pipeline.windows.lifecycle import Deadline, Lifecycle
from sparsecast.pipeline.windows.nccl import NcclWindow

BYTES = torch.zeros(4, dtype=torch.uint8)


class Threaded(Lifecycle):
    """Its send blocks a thread until `go` is set, or abort() comes; `fails` is its end then."""

    _in_caller = True

    def __init__(self, fails: Exception | None = None) -> None:
        super().__init__(WindowSpec("nccl", "p", 1, 1, 0, 2), None)  # type: ignore[arg-type]
        self.go = threading.Event()
        self.fails = fails
        self.at_work = threading.Event()
        self.callers: list[asyncio.Task[Any] | None] = []
        self.lane = Lane("threaded")

    async def _meet(self, deadline: Deadline) -> None:
        await self.lane.run(lambda: None)

    async def _send(self, payload: torch.Tensor, attempt: int, deadline: Deadline) -> None:
        self.callers.append(asyncio.current_task())
        await self.lane.submit(lambda: self._work(deadline))

    def _work(self, deadline: Deadline) -> None:
        self.at_work.set()
        try:
            while not self.go.wait(0.005):
                if self._aborted:
                    raise RuntimeError("broken off")
                if deadline.passed:
                    raise TimeoutError("nobody came")
            if self.fails is not None:
                raise self.fails
        finally:
            self.at_work.clear()

    async def _receive(
        self, staging: torch.Tensor, attempt: int, deadline: Deadline, behind: object
    ) -> None:
        raise NotImplementedError

    async def _break(self) -> None:
        await self.lane.stop(lambda: None, 5)

    async def _leave(self) -> None:
        await self.lane.stop(lambda: None, 5)


async def _opened(fails: Exception | None = None) -> Threaded:
    window = Threaded(fails)
    await window.open(5)
    return window


async def _at_work(window: Threaded) -> None:
    assert await asyncio.to_thread(window.at_work.wait, 5)


async def test_rounds_come_to_an_end_in_their_caller() -> None:
    """Some rounds one after the other: each over when its call returns, and no task made for it."""
    window = await _opened()
    window.go.set()
    for attempt in range(3):
        await window.send(BYTES, attempt=attempt, timeout_s=5)
    assert window.callers == [asyncio.current_task()] * 3
    await window.close()
    with pytest.raises(WindowError, match="closed before"):
        await window.send(BYTES, attempt=4, timeout_s=5)


async def test_a_cancelled_caller_leaves_the_thread_at_work_until_abort() -> None:
    """The caller is cancelled: its memory is still in use, so nothing but abort() is taken, and
    abort() returns when the thread is done with it."""
    window = await _opened()
    sending = asyncio.ensure_future(window.send(BYTES, attempt=1, timeout_s=30))
    await _at_work(window)
    sending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await sending
    assert window.at_work.is_set()
    with pytest.raises(WindowError, match=r"the caller of send was cancelled; abort it"):
        await window.send(BYTES, attempt=2, timeout_s=5)
    await window.close()  # not whole any more: the same as abort()
    assert not window.at_work.is_set()


async def test_a_cancelled_caller_is_cancelled_though_abort_came_first() -> None:
    """abort(), and in the same turn the caller's task is cancelled: it ends as cancelled, so that
    whoever cancelled it is not kept waiting for more."""
    window = await _opened()
    sending = asyncio.ensure_future(window.send(BYTES, attempt=1, timeout_s=30))
    await _at_work(window)
    aborting = asyncio.ensure_future(window.abort())
    await asyncio.sleep(0)
    sending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await sending
    await aborting
    assert not window.at_work.is_set()


async def test_abort_ends_an_operation_and_waits_for_it() -> None:
    """abort() while the thread works: the caller gets WindowAborted, whatever the thread says."""
    window = await _opened()
    sending = asyncio.ensure_future(window.send(BYTES, attempt=1, timeout_s=30))
    await _at_work(window)
    started = time.monotonic()
    await window.abort()
    assert sending.done()
    assert not window.at_work.is_set()
    assert time.monotonic() - started < 3
    with pytest.raises(WindowAborted, match="aborted during send"):
        await sending


@pytest.mark.parametrize(
    ("fails", "kind", "text"),
    [
        (RuntimeError("CUDA error"), WindowError, r"send failed: CUDA error"),
        (None, WindowTimeout, r"send not within 0\.1 s: nobody came"),
    ],
    ids=["failed", "late"],
)
async def test_an_error_is_named_and_the_window_is_dead(
    fails: Exception | None, kind: type[WindowError], text: str
) -> None:
    """The thread's work fails, or its deadline passes: an error of the window; no more rounds."""
    window = await _opened(fails)
    if fails is not None:
        window.go.set()
    with pytest.raises(kind, match=text):
        await window.send(BYTES, attempt=1, timeout_s=0.1)
    with pytest.raises(WindowError, match="dead: "):
        await window.send(BYTES, attempt=2, timeout_s=5)
    await window.abort()


async def test_two_rounds_at_a_time_are_refused() -> None:
    """A second call while the first one runs: refused, and the first is not harmed."""
    window = await _opened()
    sending = asyncio.ensure_future(window.send(BYTES, attempt=1, timeout_s=5))
    await _at_work(window)
    with pytest.raises(LocalProtocolError, match="one round at a time"):
        await window.send(BYTES, attempt=2, timeout_s=5)
    window.go.set()
    await sending
    await window.send(BYTES, attempt=3, timeout_s=5)
    await window.close()


async def test_a_stuck_call_costs_the_deadline() -> None:
    """A call to the GPU does not return at all: the caller gets its error, and what the thread
    says in the end is heard by nobody and complained of by nobody."""
    complaints: list[dict[str, Any]] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: complaints.append(context))
    window = NcclWindow(WindowSpec("nccl", "p", 1, 1, 0, 2, "cuda:0"), None)  # type: ignore[arg-type]
    free = threading.Event()

    def stuck() -> None:
        assert free.wait(20)
        raise RuntimeError("the GPU came free")

    started = time.monotonic()
    with pytest.raises(WindowTimeout, match=r"no call to the GPU returned within 0\.1 s"):
        await window._run(stuck, Deadline(0.1))
    assert time.monotonic() - started < 3
    free.set()
    await window._lane.stop(lambda: None, 5)
    gc.collect()
    assert complaints == []
