"""What every window does alike: open once, one operation at a time, end once.

    new ── open ──▶ opening ──▶ open ◀──▶ busy
                       │          │         │ error
                       ▼          ▼         ▼
                 abort or close ─▶ ended ◀─ dead

A kind of window fills in `_meet`, `_send`, `_receive`, `_break` and `_leave`.
"""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Coroutine
from typing import TYPE_CHECKING, Any, ClassVar

from ...messages.errors import (
    LocalProtocolError,
    SparsecastError,
    WindowAborted,
    WindowError,
    WindowTimeout,
)
from .base import Behind, Courier, WindowSpec

if TYPE_CHECKING:
    import torch

#: How long an operation that was broken off, or ran past its deadline, may take to end.
GRACE_S = 5.0


class Deadline:
    """A point on the monotonic clock, `timeout_s` from now."""

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._at_s = time.monotonic() + timeout_s

    @property
    def remaining_s(self) -> float:
        """Seconds left; 0 when it has passed."""
        return max(0.0, self._at_s - time.monotonic())

    @property
    def passed(self) -> bool:
        """Whether no time is left."""
        return time.monotonic() >= self._at_s


class Lifecycle(ABC):
    """The states of a window; see base.Window for what each method promises."""

    #: Where payload and staging may lie.
    _places: ClassVar[tuple[str, ...]] = ("cpu",)
    #: Whether an operation needs no task of its own, since all that touches memory runs on a thread
    #: and, if the caller is cancelled, on until `_break`. It spares turns of a busy event loop.
    _in_caller: ClassVar[bool] = False

    def __init__(self, spec: WindowSpec, courier: Courier) -> None:
        if not (spec.size >= 2 and 0 <= spec.rank < spec.size):
            raise LocalProtocolError(
                f"window {spec.label} cannot have rank {spec.rank} of {spec.size} ranks"
            )
        self._spec = spec
        self._courier = courier
        self._opening: asyncio.Task[None] | None = None
        self._running: asyncio.Future[None] | None = None
        self._ending: asyncio.Task[None] | None = None
        self._aborted = False
        self._dead: str | None = None

    @property
    def spec(self) -> WindowSpec:
        """Which window this is, and which rank in it."""
        return self._spec

    # ---- what a kind of window fills in

    @abstractmethod
    async def _meet(self, deadline: Deadline) -> None:
        """Open. On an error `_break` follows."""

    @abstractmethod
    async def _send(self, payload: torch.Tensor, attempt: int, deadline: Deadline) -> None: ...

    @abstractmethod
    async def _receive(
        self, staging: torch.Tensor, attempt: int, deadline: Deadline, behind: Behind | None
    ) -> None: ...

    @abstractmethod
    async def _break(self) -> None:
        """Make whatever runs end, by an error, and give up what the window holds."""

    @abstractmethod
    async def _leave(self) -> None:
        """Give up what an idle window holds."""

    # ---- the contract

    async def open(self, timeout_s: float) -> None:
        """Meet the other ranks; a second call waits for the first."""
        self._check_alive()
        if self._opening is None:
            deadline = Deadline(timeout_s)
            self._opening = self._start(self._meet(deadline), deadline, "open")
        await asyncio.shield(self._opening)

    async def send(self, payload: torch.Tensor, *, attempt: int, timeout_s: float) -> None:
        """Rank 0: send `payload` to all other ranks."""
        self._check_operation(payload, is_root=True)
        deadline = Deadline(timeout_s)
        await self._operate(self._send(payload, attempt, deadline), deadline, "send")

    async def receive(
        self,
        staging: torch.Tensor,
        *,
        attempt: int,
        timeout_s: float,
        behind: Behind | None = None,
    ) -> None:
        """Other ranks: fill `staging`."""
        self._check_operation(staging, is_root=False)
        deadline = Deadline(timeout_s)
        work = self._receive(staging, attempt, deadline, behind)
        await self._operate(work, deadline, "receive")

    def alert(self, seconds: float) -> None:
        """Be quick with what comes within the next seconds: what has no thread of its own is."""
        del seconds

    async def abort(self) -> None:
        """Break the window off."""
        if self._ending is None:
            self._aborted = True
            self._ending = asyncio.ensure_future(self._end_by_force())
        await asyncio.shield(self._ending)

    async def close(self) -> None:
        """Leave; a window that is not idle and whole is broken off instead."""
        if self._ending is None:
            idle = self._opening is None or self._opening.done()
            if self._dead is not None or not idle or self._running is not None:
                return await self.abort()
            self._ending = asyncio.ensure_future(self._leave())
        await asyncio.shield(self._ending)

    # ---- inside

    def _error(self, reason: str) -> WindowError:
        return WindowError(self._spec.label, reason)

    def _check_alive(self) -> None:
        if self._aborted:
            raise WindowAborted(self._spec.label, "aborted before")
        if self._ending is not None:
            raise self._error("closed before")
        if self._dead is not None:
            raise self._error(f"dead: {self._dead}; abort it and open a new one")

    def _check_operation(self, tensor: torch.Tensor, *, is_root: bool) -> None:
        self._check_alive()
        if (self._spec.rank == 0) is not is_root:
            raise LocalProtocolError("rank 0 sends, the other ranks receive")
        if self._opening is None or not self._opening.done():
            raise self._error("not open yet")
        if self._running is not None:
            raise LocalProtocolError(f"window {self._spec.label} is busy: one round at a time")
        # Strided memory sent as if it were contiguous arrives as other bytes, without an error.
        if str(tensor.dtype) != "torch.uint8" or tensor.dim() != 1 or not tensor.is_contiguous():
            raise LocalProtocolError(
                "a window carries 1-d contiguous uint8 tensors, "
                f"not {tensor.dtype} of shape {list(tensor.shape)}"
            )
        if tensor.device.type not in self._places:
            raise LocalProtocolError(
                f"a tensor on {tensor.device} cannot go through window {self._spec.label}: "
                "copy it to host memory first"
            )

    async def _operate(
        self, work: Coroutine[Any, Any, None], deadline: Deadline, what: str
    ) -> None:
        if self._in_caller:
            running = self._running = asyncio.get_running_loop().create_future()
            operation: Awaitable[None] = self._guard(work, deadline, what, in_caller=True)
        else:
            running = self._running = self._start(work, deadline, what)
            operation = asyncio.shield(running)
        try:
            await operation
        except asyncio.CancelledError:
            # The operation runs on and holds the memory: nothing may follow it but abort().
            self._dead = self._dead or f"the caller of {what} was cancelled"
            raise
        finally:
            if self._in_caller:
                self._finished(running)
                running.set_result(None)

    def _start(
        self, work: Coroutine[Any, Any, None], deadline: Deadline, what: str
    ) -> asyncio.Task[None]:
        bounded = _bounded(work, deadline.timeout_s + 2 * GRACE_S)
        task = asyncio.ensure_future(self._guard(bounded, deadline, what))
        task.add_done_callback(self._finished)
        return task

    def _finished(self, task: asyncio.Future[None]) -> None:
        if task is self._running and self._dead is None:
            self._running = None
        if task.done() and not task.cancelled():
            task.exception()  # marked as seen: a cancelled caller does not fetch it

    async def _guard(
        self,
        work: Coroutine[Any, Any, None],
        deadline: Deadline,
        what: str,
        *,
        in_caller: bool = False,
    ) -> None:
        """Run `work`, name its errors by the window's, and let none outlive abort()."""
        label = self._spec.label
        try:
            await work
            if self._aborted:
                raise WindowAborted(label, f"aborted during {what}")
        except (
            TimeoutError,
            asyncio.CancelledError,
            SparsecastError,
            RuntimeError,
            OSError,
        ) as exc:
            cancelled = in_caller and isinstance(exc, asyncio.CancelledError)
            if self._aborted and not cancelled:
                self._dead = "aborted"
                raise WindowAborted(label, f"aborted during {what}") from exc
            error: BaseException = exc
            if isinstance(exc, WindowError | asyncio.CancelledError | LocalProtocolError):
                pass
            elif isinstance(exc, TimeoutError) or deadline.passed:
                reason = f"{what} not within {deadline.timeout_s:g} s: {exc}".rstrip(": ")
                error = WindowTimeout(label, reason)
            else:
                error = WindowError(label, f"{what} failed: {exc}")
            self._dead = str(getattr(error, "reason", error))
            if error is exc:
                raise
            raise error from exc
        except Exception as exc:
            # A fault of our own: what the other ranks are doing now is unknown.
            self._dead = f"{what} failed: {exc!r}"
            raise

    async def _end_by_force(self) -> None:
        if self._opening is not None:
            self._opening.cancel()  # nobody's memory is in it: it may be left behind
        await self._break()
        running = [task for task in (self._opening, self._running) if task and not task.done()]
        if running:
            await asyncio.wait(running, timeout=GRACE_S)
        self._dead = self._dead or "aborted"


async def _bounded(work: Coroutine[Any, Any, None], timeout_s: float) -> None:
    """A backstop: every kind of window keeps the deadline itself."""
    async with asyncio.timeout(timeout_s):
        await work
