"""The gate of a generation loop: how pause() of an engine meets the requests that are running."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from ..messages.errors import WaitTimeout
from .engine import PauseMode

_POLL_S = 0.02


class Gate:
    """Between a generation thread, which asks before each token, and whoever pauses it.

    Requests that come while the gate is paused, in whatever mode, start after resume().
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._mode: PauseMode | None = None
        self._aborts = 0
        self._running = 0
        self._stepping = 0

    @property
    def mode(self) -> PauseMode | None:
        """How generation is paused now, or None."""
        return self._mode

    def pause(self, mode: PauseMode, *, timeout_s: float) -> None:
        """Pause; returns when no forward runs ("keep"), or no request ("abort", "wait").

        WaitTimeout if that takes longer; the gate stays paused.
        """
        deadline = time.monotonic() + timeout_s
        with self._changed:
            self._mode = mode
            if mode == "abort":
                self._aborts += 1
            self._changed.notify_all()
            while self._stepping if mode == "keep" else self._running:
                remaining = deadline - time.monotonic()
                if remaining <= 0 or not self._changed.wait(remaining):
                    raise WaitTimeout(
                        f'pause("{mode}")', timeout_s, f"{self._running} request(s) still run"
                    )

    def resume(self) -> None:
        """Open the gate."""
        with self._changed:
            self._mode = None
            self._changed.notify_all()

    @contextmanager
    def request(
        self, cancelled: Callable[[], bool]
    ) -> Iterator[Callable[[], AbstractContextManager[bool]]]:
        """One request, from its start to its end, on a generation thread.

        Yields `step`: each forward runs inside `with step() as go`, which waits while the gate is
        frozen; `go` is False when the request is to end as aborted, without that forward. A request
        that is cancelled before it could start is told so by its first step().
        """
        with self._changed:
            started = self._wait_while(lambda: self._mode is not None, cancelled)
            ticket = self._aborts
            self._running += 1

        @contextmanager
        def step() -> Iterator[bool]:
            with self._changed:
                thawed = self._wait_while(
                    lambda: self._mode == "keep" and self._aborts == ticket, cancelled
                )
                go = started and thawed and self._aborts == ticket
                # Counted before the lock is let go: pause("keep") must not return in between.
                self._stepping += go
            try:
                yield go
            finally:
                with self._changed:
                    self._stepping -= go
                    self._changed.notify_all()

        try:
            yield step
        finally:
            with self._changed:
                self._running -= 1
                self._changed.notify_all()

    def _wait_while(self, blocked: Callable[[], bool], cancelled: Callable[[], bool]) -> bool:
        """Sleep while `blocked`; False once cancelled. Called with the condition held."""
        while not cancelled():
            if not blocked():
                return True
            self._changed.wait(_POLL_S)
        return False
