"""A thread for what blocks: one thing after the other, and never the event loop's own thread."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import ctypes
import logging
import queue
import threading
import time
import traceback
from collections.abc import Callable
from typing import TypeVar

_T = TypeVar("_T")

log = logging.getLogger("sparsecast.windows")

#: A sleep so short that its core does not go to sleep as well.
_NAP_S = 0.00003
#: linux/prctl.h; its unit is the nanosecond.
_PR_SET_TIMERSLACK = 29


#: How long the interpreter's end waits for what still runs: where ranks are gone, gloo gives up on
#: one after the other, on each after the time that a window has to open.
_END_S = 30.0
#: What runs on some lane.
_at_work: set[Callable[[], bool]] = set()


@atexit.register
def _let_end() -> None:
    """A daemon thread that comes back from foreign code once the interpreter has ended is unwound
    there, and std::terminate aborts the process."""
    until = time.monotonic() + _END_S
    while _at_work and time.monotonic() < until:
        time.sleep(0.01)


class Lane:
    """A daemon thread that runs one thing after the other; started with the first."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._jobs: queue.SimpleQueue[Callable[[], bool]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._alert_until = 0.0

    async def run(self, job: Callable[[], _T]) -> _T:
        """Run `job` on the thread. If the caller is cancelled, `job` runs on."""
        return await self.submit(job)

    def submit(self, job: Callable[[], _T]) -> asyncio.Future[_T]:
        """The same without a task; the future belongs to the caller, who may settle or cancel it:
        `job` runs on all the same."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name=self._name, daemon=True)
            self._thread.start()
        return self._submit(job, last=False)

    def alert(self, seconds: float) -> None:
        """Be quick with what is submitted within the next seconds: a thread that sleeps deeply
        takes a few tenths of a millisecond to wake up."""
        self._alert_until = time.monotonic() + seconds
        self._jobs.put(lambda: True)

    async def stop(self, job: Callable[[], None], timeout_s: float) -> None:
        """Run `job` after what runs now, then end the thread; waits for it up to `timeout_s`."""
        if self._thread is None:
            return
        await asyncio.wait({self._submit(job, last=True)}, timeout=timeout_s)

    def _submit(self, job: Callable[[], _T], *, last: bool) -> asyncio.Future[_T]:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[_T] = loop.create_future()

        def settle(result: _T | None, error: Exception | None) -> None:
            if future.done():
                return
            if error is not None:
                future.set_exception(error)
                future.exception()  # marked as seen: nobody may be waiting any more
            else:
                # No error: the result is the work's own, None if that is what it returns.
                future.set_result(result)  # type: ignore[arg-type]

        def run() -> bool:
            result: _T | None = None
            error: Exception | None = None
            try:
                result = job()
            except Exception as exc:
                _forget(exc)
                error = exc
            try:
                loop.call_soon_threadsafe(settle, result, error)
            except RuntimeError:
                return False  # the loop was closed: nobody is left to work for
            return not last

        self._jobs.put(run)
        return future

    def _work(self) -> None:
        goes_on = True
        while goes_on:
            job = self._next()
            _at_work.add(job)
            try:
                goes_on = job()
            finally:
                _at_work.discard(job)

    def _next(self) -> Callable[[], bool]:
        while time.monotonic() < self._alert_until:
            with contextlib.suppress(queue.Empty):
                return self._jobs.get(timeout=_NAP_S)
        return self._jobs.get()


def sharpen_sleeps() -> None:
    """Let short sleeps of the calling thread end when they should: Linux adds up to 50 µs."""
    try:
        ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1000, 0, 0, 0)
    except (OSError, AttributeError) as exc:
        log.debug("sleeps of a window's thread stay coarse: %s", exc)


def _forget(error: BaseException | None) -> None:
    """Clear the frames that an error remembers: whoever keeps it would keep what they hold, such
    as a collective's work, and with it sockets and memory."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
