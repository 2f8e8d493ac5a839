"""The real ports of a driver: NATS, the log, gloo and bus windows, one torch thread."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import threading
import time
import uuid
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import CancelledError, Future
from typing import Any, TypeVar

from ..messages.errors import Closed
from ..messages.manifest import Manifest
from ..pipeline.bus.nats import connect as connect_nats
from ..pipeline.log.base import Log, Tell
from ..pipeline.log.threads import Threads
from ..pipeline.windows import available_kinds, gpu_identity, open_window
from .driver import Ports
from .entries import PatchPayloads
from .lane import Lane
from .tiers import DEFAULT_LOG, open_log

log = logging.getLogger("sparsecast.driver")

T = TypeVar("T")

#: How long closing waits for the torch work that runs, and for coroutines to end.
END_S = 10.0


async def connect(
    url: str,
    *,
    run: str,
    name: str,
    device: str | Callable[[], str] = "cpu",
    tiers: Sequence[str | Log] = (DEFAULT_LOG,),
    manifest: Callable[[], Manifest | None] = lambda: None,
    tell: Tell = log.warning,
    quota_nbytes: int | None = None,
    timeout_s: float = 5.0,
) -> Ports:
    """Connect to the broker, twice: control, and bulk for the log. BusUnavailable at the deadline.

    A second connection keeps an anchor's chunks from delaying a round's messages. `device` is where
    windows carry payloads to or from; a function finds it out on the torch thread. `tiers` are the
    log's (see tiers.py), of which the broker takes no more than `quota_nbytes`; `manifest` is known
    to who stores anchors; `tell` hears of a tier that fails, on any thread.
    """
    async with contextlib.AsyncExitStack() as opened:
        bus = await connect_nats(url, name=name, timeout_s=timeout_s)
        opened.push_async_callback(bus.close)
        bulk = await connect_nats(url, name=f"{name}-bulk", timeout_s=timeout_s)
        opened.push_async_callback(bulk.close)
        # One thread: torch work of one replica or publisher never overlaps, and keeps its order.
        lane = Lane(f"sparsecast-{name}")
        opened.callback(lane.stop)
        found = device if isinstance(device, str) else await lane.run(device)
        kinds, gpu = available_kinds(found), gpu_identity(found)
        opened.pop_all()

    async def run_blocking(function: Callable[..., T], *args: Any) -> T:
        return await lane.run(functools.partial(function, *args))

    beside = Threads(f"sparsecast-{name}-aside", 1)

    async def aside(function: Callable[..., T], *args: Any, timeout_s: float) -> T:
        return await beside.run(lambda go_on: function(*args), timeout_s=timeout_s)

    async def close() -> None:
        lane.stop()
        await asyncio.gather(bus.close(), bulk.close())
        # Whoever has closed a replica may use its weights at once: no apply may still write.
        if not await lane.ended(END_S):
            log.error("torch work of %s did not end within %g s; it goes on", name, END_S)

    return Ports(
        bus=bus,
        log=open_log(
            tiers, bulk, run, PatchPayloads(manifest), tell=tell, quota_nbytes=quota_nbytes
        ),
        windows=open_window,
        kinds=kinds,
        clock=time.monotonic,
        wall=time.time,
        run=run_blocking,
        aside=aside,
        token=lambda: uuid.uuid4().hex[:16],
        close=close,
        device=found,
        gpu=gpu,
    )


class LoopThread:
    """An event loop (uvloop's where there is one) on a thread of its own, for synchronous faces."""

    def __init__(self, name: str) -> None:
        self._loop = _new_loop()
        self._submitting = threading.Lock()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The loop; only call_soon_threadsafe is for other threads."""
        return self._loop

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Run a coroutine there; it is cancelled when the loop ends. Closed after stop()."""
        with self._submitting:
            if self._stopped:
                coroutine.close()
                raise Closed("its event loop has ended")
            return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine there and wait for it; the coroutine bounds the wait.

        Closed if the loop ends meanwhile.
        """
        future = self.submit(coroutine)
        try:
            return future.result()
        except CancelledError:
            raise Closed("its event loop has ended") from None
        except BaseException:
            future.cancel()
            raise

    def stop(self, timeout_s: float = 5.0) -> None:
        """End the loop. Idempotent."""
        # Under the lock: what is submitted behind the loop's end would never run nor be cancelled.
        with self._submitting:
            if not self._stopped:
                self._stopped = True
                self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout_s)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            # Whoever waits for one of them in another thread would wait for ever.
            tasks = asyncio.all_tasks(self._loop)
            for task in tasks:
                task.cancel()
            if tasks:
                self._loop.run_until_complete(asyncio.wait(tasks, timeout=END_S))
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.close()


def _new_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ImportError:  # uvloop has no build for this platform
        return asyncio.new_event_loop()
    loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
    return loop
