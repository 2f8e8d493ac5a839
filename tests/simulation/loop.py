"""Virtual time: an event loop that never sleeps, and simulated processes that live on it.

When nothing is ready the clock jumps to the next timer, so an hour of protocol takes as long as
its callbacks do. All simulated processes share this one thread; what a process has scheduled is
told by its context, so a process can be frozen (SIGSTOP: everything waits and comes late) or
killed (SIGKILL: nothing of it runs again). Nothing depends on addresses or on the wall clock.

A loop that makes no way ends with Stuck: nothing is left that could wake it, callbacks run and time
hardly passes, or a bound of virtual time or of callbacks is reached.
"""

import asyncio
import contextvars
import heapq
import itertools
import math
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

CURRENT: contextvars.ContextVar["Process | None"] = contextvars.ContextVar("process", default=None)

T = TypeVar("T")

#: So many callbacks within a second of virtual time are no progress; the busiest has some 1,300.
SPIN = 20_000


class Stuck(Exception):
    """The simulation would wait for ever, or run for ever at one moment."""


class Hung(KeyboardInterrupt):
    """One callback does not return; no Exception, so that it ends the loop from inside a task."""


class Gone(Exception):
    """The process has ended that was asked to do something."""


class Process:
    """One simulated process: what runs in its context lives, freezes and dies with it."""

    def __init__(self, loop: "VirtualLoop", name: str, *, clock_offset_s: float = 0.0) -> None:
        self.loop = loop
        self.name = name
        self.clock_offset_s = clock_offset_s
        self.frozen = False
        self.dead = False
        #: Called when it is killed or has ended: its sockets break, as a kernel would see to.
        self.on_exit: list[Callable[[], None]] = []
        self._late: list[asyncio.Handle] = []
        self.context = contextvars.copy_context()
        self.context.run(CURRENT.set, self)
        loop.processes.append(self)

    def __repr__(self) -> str:
        return f"<{self.name}{' dead' if self.dead else ' frozen' if self.frozen else ''}>"

    def clock(self) -> float:
        """Its own monotonic clock, in seconds: no two processes agree on where it starts."""
        return self.loop.time() + self.clock_offset_s

    def spawn(self, coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run a coroutine as a part of this process."""
        return self.loop.create_task(coroutine, context=self.context.copy())

    def call_at(self, when: float, callback: Callable[..., None], *args: Any) -> None:
        """Run a callback as a part of this process, at this time of the loop."""
        self.loop.call_at(when, callback, *args, context=self.context)

    def freeze(self) -> None:
        """Nothing of it runs until thaw()."""
        self.frozen = True

    def thaw(self) -> None:
        """What should have run meanwhile runs now, late, in its order."""
        self.frozen = False
        late, self._late = self._late, []
        self.loop._ready.extend(late)  # type: ignore[attr-defined]

    def kill(self) -> None:
        """Nothing of it runs again."""
        if self.dead:
            return
        self.dead = True
        for exit_ in list(self.on_exit):
            exit_()

    async def ask(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Have it do something, as somebody else; Gone if it ends before that is done.

        Nothing of a process that has ended runs again: its task alone would never be done.
        """
        if self.dead:
            coroutine.close()
            raise Gone(f"{self.name} has ended")
        task = self.spawn(coroutine)
        end: asyncio.Future[None] = self.loop.create_future()

        def ended() -> None:
            if not end.done():
                end.set_result(None)

        self.on_exit.append(ended)
        try:
            await asyncio.wait({task, end}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self.on_exit.remove(ended)
        if not task.done():
            raise Gone(f"{self.name} ended meanwhile")
        return task.result()

    def admit(self, handle: asyncio.Handle) -> bool:
        """Whether a callback may run now; else it is kept for later, or for the burial."""
        if self.frozen or self.dead:
            self._late.append(handle)
            return False
        return True

    def bury(self) -> None:
        """The simulation is over: let what is left of it run, to be cancelled in order.

        Left to the garbage collector, coroutines end in any order, inside of each other.
        """
        self.dead = False
        self.thaw()


class _Handle(asyncio.Handle):
    def _run(self) -> None:
        process = self._context.get(CURRENT)  # type: ignore[attr-defined]
        if not self._cancelled and (process is None or process.admit(self)):  # type: ignore[attr-defined]
            super()._run()  # type: ignore[misc]


class _TimerHandle(asyncio.TimerHandle):
    def _run(self) -> None:
        process = self._context.get(CURRENT)  # type: ignore[attr-defined]
        if not self._cancelled and (process is None or process.admit(self)):  # type: ignore[attr-defined]
            super()._run()  # type: ignore[misc]


class _Future(asyncio.Future[Any]):
    """Hashes by its number: the order of a set of futures must not depend on addresses."""

    def __init__(self, number: int, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop=loop)
        self._number = number

    def __hash__(self) -> int:
        return self._number


class _Task(asyncio.Task[Any]):
    def __init__(self, number: int, *args: Any, **kwargs: Any) -> None:
        self.number = number
        super().__init__(*args, **kwargs)

    def __hash__(self) -> int:
        return self.number


class VirtualLoop(asyncio.BaseEventLoop):
    """The loop. `run_until_complete` it; `time()` is virtual, in seconds.

    Stuck after `limit_s` of virtual time, or after `limit_steps` callbacks.
    """

    def __init__(
        self, start: float = 1000.0, *, limit_s: float = math.inf, limit_steps: float = math.inf
    ) -> None:
        super().__init__()
        self._now = start
        self._began = start
        self._limit_s = limit_s
        self._limit_steps = limit_steps
        self.steps = 0
        self._numbers = itertools.count(1)
        #: By their time; of the same time those run first that were set first.
        self._timers: list[tuple[float, int, _TimerHandle]] = []
        #: Since when callbacks are counted, and how many there had been.
        self._since = (start, 0)
        #: A context that is no process's.
        self.bare_context = contextvars.Context()
        self.processes: list[Process] = []
        #: What the loop was told of: exceptions that nobody fetched, callbacks that raised.
        self.complaints: list[str] = []
        self.set_exception_handler(self._complain)
        self.set_task_factory(_make_task)

    def time(self) -> float:
        return self._now

    def _run_once(self) -> None:
        # In place of the one that asks a selector, and orders timers by calls of Python.
        timers, ready = self._timers, self._ready  # type: ignore[attr-defined]
        while timers and timers[0][2].cancelled():
            heapq.heappop(timers)
        if not ready and not self._stopping:  # type: ignore[attr-defined]
            if not timers:
                raise Stuck("nothing is ready and no timer is set")
            self._now = max(self._now, timers[0][0])
        self._require_progress()
        due = self._now + self._clock_resolution  # type: ignore[attr-defined]
        while timers and timers[0][0] < due:
            ready.append(heapq.heappop(timers)[2])
        for _ in range(len(ready)):  # what these make ready waits for the next turn
            handle = ready.popleft()
            if not handle.cancelled():
                handle._run()

    def _require_progress(self) -> None:
        since, steps = self._since
        passed_s, ran = self._now - since, self.steps - steps
        if passed_s >= 1.0 or ran > SPIN:
            # Stuck or not: the end of the simulation still has to run on this loop.
            self._since = (self._now, self.steps)
        if passed_s < 1.0 and ran > SPIN:
            raise Stuck(f"{ran} callbacks ran and {passed_s:g} s passed: something spins")
        if self.time() - self._began > self._limit_s:
            raise Stuck(f"no end after {self._limit_s:g} s of virtual time")
        if self.steps > self._limit_steps:
            raise Stuck(f"no end after {self._limit_steps} callbacks")

    def number(self) -> int:
        """The next number: what is made earlier has a lower one."""
        return next(self._numbers)

    def create_future(self) -> asyncio.Future[Any]:
        return _Future(self.number(), self)

    def call_soon(self, callback, *args, context=None):  # type: ignore[no-untyped-def]
        handle = _Handle(callback, args, self, context)
        self._ready.append(handle)  # type: ignore[attr-defined]
        self.steps += 1
        return handle

    def call_soon_threadsafe(self, callback, *args, context=None):  # type: ignore[no-untyped-def]
        return self.call_soon(callback, *args, context=context)

    def call_at(self, when, callback, *args, context=None):  # type: ignore[no-untyped-def]
        timer = _TimerHandle(when, callback, args, self, context)
        heapq.heappush(self._timers, (when, self.number(), timer))
        return timer

    def run_in_executor(self, executor, func, *args):  # type: ignore[no-untyped-def]
        """At once and in no time: a thread of the caller's, which nothing here may wait for."""
        future = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as exc:
            future.set_exception(exc)
        return future

    def finish(self, timeout_s: float = 60.0) -> None:
        """End every task that is left, of the dead as well, so that nothing is left to complain."""
        self.set_exception_handler(lambda loop, context: None)
        self._limit_s, self._limit_steps = self.time() - self._began + 2 * timeout_s, math.inf
        for process in self.processes:
            process.bury()

        async def end() -> None:
            left = [task for task in asyncio.all_tasks(self) if task is not asyncio.current_task()]
            for task in left:
                task.cancel()
            if left:
                await asyncio.wait(left, timeout=timeout_s)
            if any(not task.done() for task in left):
                raise Stuck(f"not to be cancelled: {[t for t in left if not t.done()][:3]}")

        self.run_until_complete(end())
        self.close()

    def _complain(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        self.complaints.append(f"{context.get('message')}: {context.get('exception')!r}")

    def _process_events(self, event_list: list[Any]) -> None:
        pass

    def _write_to_self(self) -> None:
        pass


def _make_task(loop, coro, **kwargs):  # type: ignore[no-untyped-def]
    return _Task(loop.number(), coro, loop=loop, **kwargs)
