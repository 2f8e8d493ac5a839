"""A simulated engine: real weights behind the real guard, on simulated threads.

Simulated threads share one real one, which must never block. Whoever would have to wait at the
guard leaves with WouldBlock instead, and `call` lets it try again when the guard has changed, or
its patience is over: the code in between is the real one.
"""

import asyncio
import contextvars
import ctypes
import hashlib
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch

from sparsecast.workers.engine import PauseMode
from sparsecast.workers.guard import Guard

from .loop import Process

T = TypeVar("T")

THREAD: contextvars.ContextVar[int] = contextvars.ContextVar("thread", default=0)


def fingerprint(tensors: Mapping[str, torch.Tensor]) -> str:
    """The bits of a whole state, by another way than the digest that is under test."""
    found = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(tensors.items()):
        whole = tensor.contiguous()
        found.update(name.encode())
        found.update(ctypes.string_at(whole.data_ptr(), whole.nbytes))
    return found.hexdigest()


class WouldBlock(BaseException):
    """A simulated thread has to wait at the guard; not an Exception, so that nothing answers it."""

    def __init__(self, deadline: float) -> None:
        super().__init__(deadline)
        self.deadline = deadline
        self.writer = False


class _Condition(threading.Condition):
    def __init__(self, notified: Callable[[], None]) -> None:
        super().__init__()
        self._notified = notified

    def notify_all(self) -> None:
        super().notify_all()
        self._notified()


class SimGuard(Guard):
    """The guard on simulated threads. `on_version` hears of every version that is served."""

    def __init__(self, process: Process, on_version: Callable[[int | None], None]) -> None:
        self._served: int | None = None
        self._hear: Callable[[int | None], None] = lambda version: None
        super().__init__(clock=process.clock, thread=THREAD.get)
        self._hear = on_version
        self._changed = _Condition(self._wake)
        self._sleepers: list[asyncio.Future[None]] = []
        #: Until when each simulated thread waits at the guard, from its first try on.
        self._patience: dict[int, float] = {}

    @property
    def _version(self) -> int | None:
        return self._served

    @_version.setter
    def _version(self, version: int | None) -> None:
        self._served = version
        self._hear(version)

    def _wait_until(self, deadline: float) -> bool:
        deadline = self._patience.setdefault(THREAD.get(), deadline)
        if self._clock() >= deadline:
            return False
        raise WouldBlock(deadline)

    def _begin_writing(self, thread: int, timeout_s: float) -> None:
        try:
            super()._begin_writing(thread, timeout_s)
        except WouldBlock as wait:
            wait.writer = True
            raise

    def _wake(self) -> None:
        sleepers, self._sleepers = self._sleepers, []
        for sleeper in sleepers:
            if not sleeper.done():
                sleeper.set_result(None)

    async def call(self, thread: int, function: Callable[[], T]) -> T:
        """Call a function as a simulated thread, as often as the guard makes it wait."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                token = THREAD.set(thread)
                try:
                    return function()
                except WouldBlock as wait:
                    blocked = wait
                finally:
                    THREAD.reset(token)
                sleeper: asyncio.Future[None] = loop.create_future()
                self._sleepers.append(sleeper)
                # A writer that waits keeps new readers out, as it does while it sleeps for real.
                self._writers_waiting += blocked.writer
                try:
                    await asyncio.wait({sleeper}, timeout=blocked.deadline - self._clock() + 1e-6)
                finally:
                    self._writers_waiting -= blocked.writer
        finally:
            self._patience.pop(thread, None)


class SimEngine:
    """Implements `Engine`: a mapping of tensors. It fails when it is told to."""

    def __init__(
        self,
        process: Process,
        weights: Mapping[str, torch.Tensor],
        on_version: Callable[[int | None], None],
    ) -> None:
        self.weights = {name: tensor.clone() for name, tensor in weights.items()}
        self.fail_next = False
        self._guard = SimGuard(process, on_version)

    def tensors(self) -> Mapping[str, torch.Tensor]:
        return self.weights

    def guard(self) -> SimGuard:
        return self._guard

    def pause(self, mode: PauseMode, *, timeout_s: float = 30.0) -> None:
        """Nothing runs here by itself."""

    def resume(self) -> None:
        """Nothing runs here by itself."""

    def after_apply(self, version: int, changed: Sequence[str]) -> None:
        """Fails once if it was told to: the weights are written, and not served."""
        if self.fail_next:
            self.fail_next = False
            raise RuntimeError("the engine lost its cache")

    def move(self) -> None:
        """Give every tensor new storage, and wreck the old one."""
        for name, tensor in list(self.weights.items()):
            self.weights[name] = tensor.clone()
            tensor.view(-1).view(torch.uint8).zero_()
