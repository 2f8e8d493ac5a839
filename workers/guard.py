"""The guard of a replica's weights: inside it the engine computes and the weights stand still.

All that decides who may touch the weights is in this file: readers share, one writer excludes, a
waiting writer goes before new readers, and weights that were half written are served to nobody.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from ..messages.errors import LocalProtocolError, ReplicaTorn, WaitTimeout


@dataclass(slots=True)
class _Hold:
    """One thread's hold on the weights: how often it entered, and since when."""

    depth: int
    since: float


class Fence(Protocol):
    """Orders what holders have queued on a device, and the host has not waited for.

    Of weights in host memory there is none. Readers need nothing on their way in: no version is
    served before commit() has seen its writes done.
    """

    def reader_leaves(self) -> None:
        """What this thread has queued until now comes before whatever the next writer queues."""

    def writer_enters(self) -> None:
        """What this thread queues from now on comes after all that readers have queued."""

    def writer_commits(self) -> None:
        """Return when all that this thread has queued is done; an error if that cannot be seen."""


class Writer:
    """What the holder of writing() does to the weights: begin_write(), write, commit(version)."""

    def __init__(self, guard: Guard) -> None:
        self._guard = guard
        self._began = False
        self._open = True

    def begin_write(self) -> None:
        """The next statement changes the weights: from here on only commit() keeps them served."""
        self._check("begin_write")
        self._began = True

    def commit(self, version: int | None) -> None:
        """The weights are whole, and are this version (None: whole, of a version not yet known).

        The version flips here, once the device has done what this thread queued: call it last,
        after engine.after_apply(). Heals a torn guard.
        """
        self._check("commit")
        if self._guard.fence is not None:
            self._guard.fence.writer_commits()
        self._began = False
        self._guard._version = version
        self._guard._torn = None

    def _check(self, call: str) -> None:
        if not self._open:
            raise LocalProtocolError(f"{call}() on a writer whose writing() block has ended")


class Guard:
    """A shared and exclusive lock around one replica's weights, with the version they hold.

    Thread-safe. A hold belongs to the thread that entered: the same thread may enter reading()
    again at any depth, also while a writer waits. asyncio tasks of one thread count as one holder,
    so a hold that spans an await lets the other tasks of that loop pass a waiting writer.

    On CUDA a holder may leave with kernels queued on its thread's current stream: the next writer's
    come after them. What it queued on other streams it has to join to that one before.

    `fence` is what orders them; a replica sets it once it knows where the weights lie.
    `clock` and `thread` (who is calling) are arguments so that a simulation can be both.
    """

    def __init__(
        self,
        version: int | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        thread: Callable[[], int] = threading.get_ident,
    ) -> None:
        self.fence: Fence | None = None
        self._clock = clock
        self._thread = thread
        self._changed = threading.Condition()
        self._version = version
        self._torn: str | None = None
        self._holds: dict[int, _Hold] = {}
        self._writer: int | None = None
        self._writers_waiting = 0

    # ---- what is known about it; each is true for the moment of the call

    @property
    def version(self) -> int | None:
        """The version that the weights hold; None while no digest has shown which."""
        return self._version

    @property
    def torn(self) -> str | None:
        """Why the weights are half written and not served, or None if they are whole."""
        return self._torn

    @property
    def readers(self) -> int:
        """How many threads are reading."""
        return len(self._holds)

    @property
    def oldest_reader_s(self) -> float:
        """For how long the eldest reader has been in, in seconds; 0.0 without readers."""
        with self._changed:
            return self._oldest_reader_s()

    def declare(self, version: int | None) -> None:
        """The weights, as they stand, are proven to be this version; None: that is to be shown.

        Does not heal a torn guard.
        """
        with self._changed:
            self._version = version

    def tear(self, reason: str) -> None:
        """The weights are found to be wrong: serve them to no new reader until the next commit."""
        with self._changed:
            self._torn = reason
            self._changed.notify_all()

    # ---- readers

    @contextmanager
    def reading(self, *, timeout_s: float = 60.0) -> Iterator[int | None]:
        """Hold the weights still, shared with other readers, and yield their version.

        Waits while a writer is in or waiting, unless this thread is already reading. ReplicaTorn
        if an apply failed half way (at once, and until a resync commits), WaitTimeout after
        `timeout_s`, LocalProtocolError inside writing() of the same thread.
        """
        thread = self._enter(timeout_s)
        try:
            yield self._version
        finally:
            self._leave(thread)

    @contextmanager
    def holding(self, version: int, *, timeout_s: float = 60.0) -> Iterator[bool]:
        """reading() for one version: yields True and holds the weights if they are that version.

        Yields False, holding nothing, if they are another one by now or torn: the digest of a
        version asks this for every slice, and gives up when the answer is no.
        """
        try:
            thread = self._enter(timeout_s)
        except ReplicaTorn:
            yield False
            return
        if self._version != version:
            self._release(thread)
            yield False
            return
        try:
            yield True
        finally:
            self._leave(thread)

    def _enter(self, timeout_s: float) -> int:
        thread = self._thread()
        with self._changed:
            hold = self._holds.get(thread)
            if hold is not None:
                hold.depth += 1
                return thread
            if self._writer == thread:
                raise LocalProtocolError("reading() inside writing() of the same thread")
            deadline = self._clock() + timeout_s
            while self._torn is None and (self._writer is not None or self._writers_waiting):
                if not self._wait_until(deadline):
                    state = "writes" if self._writer is not None else "waits for other readers"
                    raise WaitTimeout("reading the weights", timeout_s, f"a writer {state}")
            if self._torn is not None:
                raise ReplicaTorn(
                    f"the weights are not served: {self._torn}; they come back with the resync"
                )
            self._holds[thread] = _Hold(1, self._clock())
            return thread

    def _leave(self, thread: int) -> None:
        try:
            if self.fence is not None:
                self.fence.reader_leaves()
        finally:
            self._release(thread)

    def _release(self, thread: int) -> None:
        with self._changed:
            hold = self._holds[thread]
            hold.depth -= 1
            if not hold.depth:
                del self._holds[thread]
                self._changed.notify_all()

    # ---- the writer

    @contextmanager
    def writing(self, timeout_s: float) -> Iterator[Writer]:
        """Hold the weights alone; new readers wait from the call on.

        WaitTimeout if the readers have not left within `timeout_s` (nothing was changed, and
        readers pass again). If the block ends after begin_write() without commit(), by an
        exception or not, the guard is torn: readers are refused until a later writing() commits.
        """
        thread = self._thread()
        self._begin_writing(thread, timeout_s)
        writer = Writer(self)
        cause = "the writer left without commit()"
        try:
            if self.fence is not None:
                self.fence.writer_enters()
            yield writer
        except BaseException as exc:
            cause = f"{type(exc).__name__}: {exc}"
            raise
        finally:
            with self._changed:
                writer._open = False
                if writer._began:
                    self._torn = f"an apply on version {self._version} failed half way ({cause})"
                self._writer = None
                self._changed.notify_all()

    def _begin_writing(self, thread: int, timeout_s: float) -> None:
        with self._changed:
            if thread in self._holds or self._writer == thread:
                inside = "writing()" if self._writer == thread else "reading()"
                raise LocalProtocolError(f"writing() inside {inside} of the same thread")
            deadline = self._clock() + timeout_s
            self._writers_waiting += 1
            try:
                while self._holds or self._writer is not None:
                    if not self._wait_until(deadline):
                        raise WaitTimeout(
                            "exclusive hold of the weights", timeout_s, self._who_holds()
                        )
                self._writer = thread
            finally:
                self._writers_waiting -= 1
                if self._writer != thread:
                    # Readers that queued behind this writer would otherwise sleep on.
                    self._changed.notify_all()

    def _who_holds(self) -> str:
        if not self._holds:
            return "another writer holds them"
        return (
            f"{len(self._holds)} reader(s) hold them, "
            f"the eldest for {self._oldest_reader_s():.1f} s"
        )

    def _oldest_reader_s(self) -> float:
        now = self._clock()
        return max((now - hold.since for hold in self._holds.values()), default=0.0)

    def _wait_until(self, deadline: float) -> bool:
        """Sleep until something changed; False at the deadline. Called with the condition held."""
        remaining = deadline - self._clock()
        return remaining > 0 and self._changed.wait(min(remaining, threading.TIMEOUT_MAX))
