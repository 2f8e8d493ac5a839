"""The one driver loop: event → core → commands → tasks → events.

Runs on one event loop. A command either ends at once or becomes a task whose result is the next
event; a Tick comes at the core's next deadline. Clock, executor, bus, log and windows come from
outside (`Ports`), so that a simulation runs this very code.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from ..messages import codec
from ..messages.control import WindowKind
from ..messages.errors import BusError, RemoteProtocolError, WaitTimeout, WindowError
from ..messages.subjects import Subjects
from ..pipeline.bus.base import Bus, Message
from ..pipeline.core import commands as cmd
from ..pipeline.core import events as ev
from ..pipeline.log.base import Log
from ..pipeline.windows.base import WindowFactory, WindowSpec
from .ends import Ends, places_of

log = logging.getLogger("sparsecast.driver")

E = TypeVar("E")
C = TypeVar("C")
T = TypeVar("T")
E_in = TypeVar("E_in", contravariant=True)
C_out = TypeVar("C_out", covariant=True)

#: How many of the last events are kept, to be told with a failure.
TRACE = 64


def decoded(message: Message, kinds: tuple[type[Any], ...], log: logging.Logger) -> Any | None:
    """What a control message says, if it is of these kinds; else None, and a line in the log."""
    try:
        said = codec.decode(message.data, subject=message.subject)
    except RemoteProtocolError as exc:
        log.warning("ignored: %s", exc)
        return None
    if isinstance(said, kinds):
        return said
    log.warning("ignored: a %s on %s", type(said).__name__, message.subject)
    return None


class Core(Protocol[E_in, C_out]):
    """What the driver asks of a state machine."""

    def handle(self, event: E_in, now: float) -> Sequence[C_out]:
        """Take one event; what is to be done, in order."""

    def next_deadline(self) -> float | None:
        """When the next Tick is due, on the clock of `now`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ports:
    """Everything that a driver needs from outside; a simulation replaces all of it."""

    bus: Bus
    log: Log
    windows: WindowFactory
    #: The kinds of window that this process can open, best first.
    kinds: tuple[WindowKind, ...]
    #: Monotonic seconds, and Unix seconds.
    clock: Callable[[], float]
    wall: Callable[[], float]
    #: run(function, *args): call it on a thread that is not the loop's and always the same, one
    #: call at a time, in order.
    run: Callable[..., Awaitable[Any]]
    #: aside(function, *args, timeout_s=…): call it on a thread that no round waits for, one call
    #: at a time; TimeoutError.
    aside: Callable[..., Awaitable[Any]]
    #: A fresh random token.
    token: Callable[[], str]
    #: Let go of what was opened for this driver: connections, threads, an embedded broker.
    close: Callable[[], Awaitable[None]]
    #: Where windows carry payloads to or from, as torch names it.
    device: str = "cpu"
    #: The GPU that this is, by its UUID (windows.gpu_identity); "" for none.
    gpu: str = ""


class Driver(Generic[E, C]):
    """Feeds a core with events and performs what it asks for.

    `perform(command)` returns None (done) or a coroutine that ends in the next event, or in None.
    `on_change` is called after every event, `on_error` once, with what broke the core or a command
    that must not fail; the driver takes no further events then.
    """

    def __init__(
        self,
        core: Core[E, C],
        perform: Callable[[C], Coroutine[Any, Any, E | None] | None],
        *,
        tick: E,
        clock: Callable[[], float],
        on_change: Callable[[], None],
        on_error: Callable[[Exception], None],
    ) -> None:
        self._core = core
        self._perform = perform
        self._tick = tick
        self._clock = clock
        self._on_change = on_change
        self._on_error = on_error
        self._events: deque[E] = deque()
        self._trace: deque[tuple[float, E]] = deque(maxlen=TRACE)
        self._handling = False
        self._stopped = False
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def post(self, event: E) -> None:
        """Give an event to the core. On the loop's thread."""
        if self._stopped:
            return
        self._events.append(event)
        if self._handling:
            return
        self._handling = True
        try:
            while self._events and not self._stopped:
                self._step(self._events.popleft())
        finally:
            self._handling = False
        self._arm()
        self._on_change()

    def spawn(self, coroutine: Coroutine[Any, Any, E | None]) -> None:
        """Run a coroutine whose result, if any, is an event."""
        task = asyncio.get_running_loop().create_task(self._run(coroutine))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        # A task that is cancelled before its first step leaves its coroutine unawaited.
        task.add_done_callback(lambda _: coroutine.close())

    async def stop(self) -> None:
        """Take no more events; cancel what still runs and wait for it."""
        self._stopped = True
        if self._timer is not None:
            self._timer.cancel()
        tasks = [task for task in self._tasks if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _step(self, event: E) -> None:
        now = self._clock()
        if event is not self._tick:
            self._trace.append((now, event))
        try:
            for command in self._core.handle(event, now):
                coroutine = self._perform(command)
                if coroutine is not None:
                    self.spawn(coroutine)
        except Exception as exc:
            self._break(exc)

    async def _run(self, coroutine: Coroutine[Any, Any, E | None]) -> None:
        try:
            event = await coroutine
        except asyncio.CancelledError:
            raise
        except Exception as exc:
            self._break(exc)
            return
        if event is not None:
            self.post(event)

    def _break(self, exc: Exception) -> None:
        if self._stopped:
            return
        self._stopped = True
        trace = "\n".join(f"  {at:.4f} {event}" for at, event in self._trace)
        log.error("the driver broke: %r; its last events were\n%s", exc, trace, exc_info=exc)
        self._on_error(exc)
        self._on_change()

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        deadline = self._core.next_deadline()
        if deadline is None or self._stopped:
            return
        loop = asyncio.get_running_loop()
        # A timer may fire a little early by the core's clock: never arm it for less than a
        # moment, or an early tick would spin.
        delay = max(deadline - self._clock(), 0.0005)
        self._timer = loop.call_later(delay, self.post, self._tick)


class Outbox:
    """Sends control messages and metrics in the order in which they were put.

    What the bus will not take is dropped and logged: control messages are repeated by the
    protocol, and a metric is not worth a wait.
    """

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._queue: asyncio.Queue[tuple[str, bytes]] = asyncio.Queue()
        self._dropped = 0
        self._task = asyncio.get_running_loop().create_task(self._send())

    def put(self, subject: str, data: bytes) -> None:
        """Send this after everything that was put before."""
        self._queue.put_nowait((subject, data))

    async def close(self, timeout_s: float) -> None:
        """Send what is left, within the deadline, and end."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._queue.join()
                await self._bus.flush(timeout_s)
        except (TimeoutError, BusError) as exc:
            why = str(exc) or f"not within {timeout_s:g} s"
            log.warning("closing before the bus had the last messages: %s", why)
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _send(self) -> None:
        while True:
            subject, data = await self._queue.get()
            try:
                await self._bus.publish(subject, data)
            except BusError as exc:
                if not self._dropped:
                    log.warning("not sent, nor what follows: %s", exc)
                self._dropped += 1
            else:
                if self._dropped:
                    log.warning("the bus takes messages again; %d were not sent", self._dropped)
                self._dropped = 0
            finally:
                self._queue.task_done()


class Windows:
    """The windows of this process that are open or opening, by number."""

    def __init__(self, ports: Ports, subjects: Subjects) -> None:
        self._ports = ports
        self._subjects = subjects
        self._windows: dict[int, Ends] = {}

    def __getitem__(self, window: int) -> Ends | None:
        return self._windows.get(window)

    async def open(self, command: cmd.OpenWindow) -> ev.WindowOpened | ev.WindowFailed:
        """Open this process's ends of a window, and keep them."""
        stamp = command.stamp
        prefix = self._subjects.window(stamp.epoch, stamp.window)
        places = places_of(command)
        specs = [
            WindowSpec(
                kind=command.kind,
                prefix=prefix + place.suffix,
                epoch=stamp.epoch,
                window=stamp.window,
                rank=place.rank,
                size=place.size,
                device=self._ports.device,
            )
            for place in places
        ]
        try:
            made = [self._ports.windows(spec, self._ports.bus) for spec in specs]
            ends = self._windows[stamp.window] = Ends(places, made)
            await ends.open(command.timeout_s)
        except WindowError as exc:
            return ev.WindowFailed(stamp.epoch, stamp.window, exc.reason)
        return ev.WindowOpened(stamp.epoch, stamp.window)

    async def abort(self, window: int) -> None:
        """Break one off; nothing happens if it is not here."""
        await self._end(window, lambda found: found.abort())

    async def close(self, window: int) -> None:
        """Leave an idle one in order."""
        await self._end(window, lambda found: found.close())

    async def _end(self, window: int, end: Callable[[Ends], Awaitable[None]]) -> None:
        found = self._windows.get(window)
        if found is not None:
            # Forgotten afterwards: if this is cancelled, abort_all() waits for what it began.
            await end(found)
            # A new epoch counts from one again: its window may have this number by now.
            if self._windows.get(window) is found:
                del self._windows[window]

    async def abort_all(self) -> None:
        """Break off whatever is left."""
        for window in list(self._windows):
            await self.abort(window)


class Changes:
    """Lets coroutines wait until a condition on the core's state holds."""

    def __init__(self) -> None:
        self._waiters: set[asyncio.Future[None]] = set()

    def notify(self) -> None:
        """Something changed: let every waiter look again. On the loop's thread."""
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)

    async def until(
        self,
        condition: Callable[[], T | None],
        timeout_s: float,
        *,
        what: str,
        why: Callable[[], str],
    ) -> T:
        """Return the first result of `condition` that is not None, or raise WaitTimeout."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    found = condition()
                    if found is not None:
                        return found
                    waiter: asyncio.Future[None] = loop.create_future()
                    self._waiters.add(waiter)
                    try:
                        await waiter
                    finally:
                        self._waiters.discard(waiter)
        except TimeoutError:
            raise WaitTimeout(what, timeout_s, why()) from None
