"""A thread that runs functions one after the other, for coroutines."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class Lane:
    """One daemon thread that runs functions one after the other, for coroutines of any loop.

    What was cancelled before its turn is left out; what runs, runs to its end. Not an executor:
    those are joined when the interpreter ends, and a generator that hangs would keep the process
    for ever.
    """

    def __init__(self, name: str) -> None:
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    async def run(self, function: Callable[[], T]) -> T:
        """Call it there and return its result, or raise its error."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def finish(result: T | None, error: BaseException | None) -> None:
            if future.done():  # cancelled: nobody waits any more
                return
            if error is not None:
                future.set_exception(error)
            else:
                # No error: the result is the work's own, None if that is what it returns.
                future.set_result(result)  # type: ignore[arg-type]

        def call() -> None:
            if future.cancelled():
                return
            result, error = None, None
            try:
                result = function()
            except BaseException as exc:
                error = exc
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(finish, result, error)

        self._calls.put(call)
        return await future

    def stop(self) -> None:
        """Let the thread end after what it does now."""
        self._calls.put(None)

    async def ended(self, timeout_s: float) -> bool:
        """Whether the thread has ended, after stop(), within `timeout_s`."""
        await asyncio.to_thread(self._thread.join, timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            call()
