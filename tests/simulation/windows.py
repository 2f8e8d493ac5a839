"""Simulated windows: collectives that need every rank, under deadlines, with faults.

A `Fabric` stands for the network and the machines between the ranks. What may go wrong goes wrong
there: an opening fails or hangs, a broadcast reaches nobody, or some, or brings flipped bits; a
rank that is gone is noticed by the others at once, or only at their deadlines.
"""

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from sparsecast.messages.errors import (
    LocalProtocolError,
    WindowAborted,
    WindowError,
    WindowTimeout,
)
from sparsecast.pipeline.windows.base import Courier, WindowSpec

from .loop import Process, VirtualLoop


@dataclass
class Faults:
    """The shares of operations that go wrong, each in its way."""

    open_fails: float = 0.0
    open_hangs: float = 0.0
    send_fails: float = 0.0
    send_hangs: float = 0.0
    #: Of one receiver: nothing comes; half of it and an error; all, with a bit flipped.
    loses: float = 0.0
    breaks: float = 0.0
    flips: float = 0.0
    #: Whether the others notice that a rank is gone, or wait out their deadlines.
    notices: float = 0.5


@dataclass
class _Round:
    """One broadcast: who has come, and what rank 0 brought."""

    payload: torch.Tensor | None = None
    attempt: int = 0
    arrived: dict[int, asyncio.Future[None]] = field(default_factory=dict)
    staging: dict[int, torch.Tensor] = field(default_factory=dict)


@dataclass
class _Meeting:
    """One window as the fabric sees it: its ranks, and the rounds by number."""

    size: int
    present: "dict[int, SimWindow]" = field(default_factory=dict)
    opening: dict[int, asyncio.Future[None]] = field(default_factory=dict)
    rounds: dict[int, _Round] = field(default_factory=dict)


class Fabric:
    """Every window of the simulation, by its prefix."""

    def __init__(self, loop: VirtualLoop, rng: random.Random) -> None:
        self.loop = loop
        self.rng = rng
        self.faults = Faults()
        self.counts: dict[str, int] = {}
        self._meetings: dict[str, _Meeting] = {}
        #: The last window of each process, and who hears of a process that is in two at once.
        self._latest: dict[Process, SimWindow] = {}
        self.on_second: Callable[[SimWindow, SimWindow], None] = lambda window, other: None

    def factory(self, process: Process) -> "Callable[[WindowSpec, Courier], SimWindow]":
        """What makes the windows of one process."""
        return lambda spec, courier: SimWindow(self, process, spec)

    def draw(self, share: float, what: str) -> bool:
        """Whether a fault happens now."""
        if share and self.rng.random() < share:
            self.counts[what] = self.counts.get(what, 0) + 1
            return True
        return False

    # ---- opening

    def enter(self, window: "SimWindow") -> asyncio.Future[None]:
        """A rank comes to the opening; the future ends when all are there."""
        spec = window.spec
        latest = self._latest.get(window.process)
        if latest is not None and not latest.ended:
            self.on_second(window, latest)
        self._latest[window.process] = window
        meeting = self._meetings.setdefault(spec.prefix, _Meeting(spec.size))
        future: asyncio.Future[None] = self.loop.create_future()
        if spec.rank in meeting.present:
            future.set_exception(WindowError(spec.label, f"rank {spec.rank} is there already"))
            return future
        meeting.present[spec.rank] = window
        meeting.opening[spec.rank] = future
        if self.draw(self.faults.open_fails, "window open failed"):
            self.loop.call_later(0.01, self.leave, window, "the network refused")
        elif self.draw(self.faults.open_hangs, "window open hung"):
            del meeting.opening[spec.rank]
        elif len(meeting.opening) == meeting.size:
            for rank in sorted(meeting.opening):
                self._settle(meeting.present[rank], meeting.opening[rank], None)
            meeting.opening.clear()
        return future

    def leave(self, window: "SimWindow", reason: str) -> None:
        """A rank is gone; the others notice, or do not."""
        meeting = self._meetings.get(window.spec.prefix)
        if meeting is None or meeting.present.get(window.spec.rank) is not window:
            return
        waiting = dict(meeting.opening)
        for exchange in meeting.rounds.values():
            waiting.update(exchange.arrived)
        del meeting.present[window.spec.rank]
        for rank, future in waiting.items():
            other = meeting.present.get(rank, window)
            if other is window or self.rng.random() < self.faults.notices:
                error = WindowError(
                    other.spec.label, reason if other is window else "a rank has gone"
                )
                self._settle(other, future, error)
        meeting.opening.pop(window.spec.rank, None)

    def _settle(
        self, window: "SimWindow", future: asyncio.Future[None], error: Exception | None
    ) -> None:
        def end() -> None:
            if future.done():
                return
            if error is None:
                future.set_result(None)
            else:
                future.set_exception(error)

        window.process.call_at(self.loop.time() + self.rng.uniform(0.0005, 0.01), end)

    # ---- broadcasting

    def join(
        self, window: "SimWindow", number: int, attempt: int, tensor: torch.Tensor
    ) -> asyncio.Future[None]:
        """A rank comes to a broadcast, with its payload or its staging."""
        spec = window.spec
        meeting = self._meetings[spec.prefix]
        exchange = meeting.rounds.setdefault(number, _Round())
        future: asyncio.Future[None] = self.loop.create_future()
        exchange.arrived[spec.rank] = future
        if spec.rank == 0:
            exchange.payload, exchange.attempt = tensor, attempt
        else:
            exchange.staging[spec.rank] = tensor
        if any(rank not in meeting.present for rank in range(meeting.size)):
            if self.rng.random() < self.faults.notices:
                self._settle(window, future, WindowError(spec.label, "a rank has gone"))
        elif len(exchange.arrived) == meeting.size:
            self._transfer(meeting, exchange, attempt)
            meeting.rounds.pop(number - 1, None)
        return future

    def _transfer(self, meeting: _Meeting, exchange: _Round, attempt: int) -> None:
        assert exchange.payload is not None
        faults, payload = self.faults, exchange.payload
        root = meeting.present[0]
        if self.draw(faults.send_fails, "send failed"):
            error = WindowError(root.spec.label, "the connection broke")
            self._settle(root, exchange.arrived[0], error)
            return
        if not self.draw(faults.send_hangs, "send hung"):
            # Completion at the root is not receipt.
            self._settle(root, exchange.arrived[0], None)
        for rank in sorted(exchange.staging):
            window, staging = meeting.present[rank], exchange.staging[rank]
            future, label = exchange.arrived[rank], window.spec.label
            if self.draw(faults.loses, "payload lost"):
                continue
            if exchange.attempt != attempt or staging.numel() != payload.numel():
                self._settle(window, future, WindowError(label, "the ranks disagree"))
            elif self.draw(faults.breaks, "payload cut"):
                half = payload.numel() // 2
                staging[:half] = payload[:half]
                self._settle(window, future, WindowError(label, "the connection broke"))
            else:
                window.process.call_at(
                    self.loop.time() + 0.0004, self._deliver, window, payload, staging
                )
                self._settle(window, future, None)

    def _deliver(self, window: "SimWindow", payload: torch.Tensor, staging: torch.Tensor) -> None:
        if window.ended:
            return
        staging.copy_(payload)
        if staging.numel() and self.draw(self.faults.flips, "bit flipped"):
            at = self.rng.randrange(staging.numel())
            staging[at] ^= 1 << self.rng.randrange(8)


class SimWindow:
    """One rank's end: implements `Window`."""

    def __init__(self, fabric: Fabric, process: Process, spec: WindowSpec) -> None:
        self.process = process
        self.ended = False
        self._fabric = fabric
        self._spec = spec
        self._opening: asyncio.Task[None] | None = None
        self._rounds = 0
        self._busy: asyncio.Future[None] | None = None
        self._dead: str | None = None
        process.on_exit.append(self._vanish)

    @property
    def spec(self) -> WindowSpec:
        return self._spec

    async def open(self, timeout_s: float) -> None:
        self._check()
        if self._opening is None:
            self._opening = asyncio.ensure_future(self._meet(timeout_s))
        await asyncio.shield(self._opening)

    async def _meet(self, timeout_s: float) -> None:
        await self._wait(self._fabric.enter(self), timeout_s, "open")

    async def send(self, payload: torch.Tensor, *, attempt: int, timeout_s: float) -> None:
        await self._operate(payload, attempt, timeout_s, root=True)

    def alert(self, seconds: float) -> None:
        """Nothing sleeps here."""

    async def receive(
        self, staging: torch.Tensor, *, attempt: int, timeout_s: float, behind: object = None
    ) -> None:
        await self._operate(staging, attempt, timeout_s, root=False)

    async def abort(self) -> None:
        self._end("aborted")
        await asyncio.sleep(self._fabric.rng.uniform(0.0, 0.05))

    async def close(self) -> None:
        if not self.ended:
            self._end("closed")
            await asyncio.sleep(0.001)

    # ---- inside

    def _check(self) -> None:
        if self.ended:
            raise WindowAborted(self._spec.label, "ended before")
        if self._dead is not None:
            raise WindowError(self._spec.label, f"dead: {self._dead}")

    async def _operate(
        self, tensor: torch.Tensor, attempt: int, timeout_s: float, *, root: bool
    ) -> None:
        self._check()
        if (self._spec.rank == 0) is not root:
            raise LocalProtocolError("rank 0 sends, the other ranks receive")
        if self._opening is None or not self._opening.done() or self._opening.exception():
            raise WindowError(self._spec.label, "not open yet")
        if self._busy is not None:
            raise LocalProtocolError(f"window {self._spec.label} is busy: one round at a time")
        if tensor.dtype != torch.uint8 or tensor.dim() != 1 or not tensor.is_contiguous():
            raise LocalProtocolError(f"a window does not carry {tensor.dtype}, {tensor.shape}")
        self._rounds += 1
        future = self._fabric.join(self, self._rounds, attempt, tensor)
        await self._wait(future, timeout_s, "send" if root else "receive")

    async def _wait(self, future: asyncio.Future[None], timeout_s: float, what: str) -> None:
        self._busy = future
        try:
            async with asyncio.timeout(timeout_s):
                await future
        except TimeoutError:
            self._dead = f"{what} not within {timeout_s:g} s"
            raise WindowTimeout(self._spec.label, self._dead) from None
        except BaseException as exc:
            self._dead = str(exc)
            raise
        finally:
            self._busy = None

    def _end(self, reason: str) -> None:
        if self.ended:
            return
        self.ended = True
        busy = self._busy
        self._fabric.leave(self, reason)
        if busy is not None and not busy.done():
            busy.set_exception(WindowAborted(self._spec.label, reason))

    def _vanish(self) -> None:
        self.ended = True
        self._fabric.leave(self, "its process is gone")

    def __repr__(self) -> Any:
        return f"<SimWindow {self._spec.label} rank {self._spec.rank} of {self._spec.size}>"
