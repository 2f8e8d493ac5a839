"""Blocking work on threads that may hang: a deadline holds all the same."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class Abandoned(Exception):
    """Nobody waits for this work any more."""


class Threads:
    """Runs so many functions at a time, each on a daemon thread, for coroutines of one loop.

    Not an executor: its threads are joined when the interpreter ends, and a disk that hangs would
    keep the process for ever. A thread that hangs keeps its place, so that they do not pile up.
    """

    def __init__(self, name: str, at_once: int) -> None:
        self._name = name
        self._places = asyncio.Semaphore(at_once)

    async def run(self, function: Callable[[Callable[[], None]], T], *, timeout_s: float) -> T:
        """Its result, or TimeoutError; it also waits for a place.

        The function is given one to call between its steps, and before the last: it raises
        Abandoned once nobody waits.
        """
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(timeout_s):
            await self._places.acquire()
            future: asyncio.Future[T] = loop.create_future()
            abandoned = threading.Event()

            def go_on() -> None:
                if abandoned.is_set():
                    raise Abandoned

            def finish(result: T | None, error: BaseException | None) -> None:
                self._places.release()
                if future.done():
                    return
                if error is not None:
                    future.set_exception(error)
                else:
                    future.set_result(result)  # type: ignore[arg-type]  # T may be None

            def work() -> None:
                result, error = None, None
                try:
                    result = function(go_on)
                except BaseException as exc:
                    error = exc
                with contextlib.suppress(RuntimeError):  # the loop has ended
                    loop.call_soon_threadsafe(finish, result, error)

            try:
                threading.Thread(target=work, name=self._name, daemon=True).start()
            except RuntimeError as exc:
                self._places.release()
                raise OSError(errno.EAGAIN, str(exc)) from exc
            try:
                return await future
            finally:
                abandoned.set()
