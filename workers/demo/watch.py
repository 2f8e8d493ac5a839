"""The demo's ear on the bus: everything that its run says, gathered on a thread of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Self, TypeVar

from ...messages.codec import Message
from ...messages.metrics import Metric, TrainerMetrics
from ...pipeline.bus.base import Bus
from ...pipeline.bus.nats import connect
from ..board import Board, Snapshot
from ..connect import LoopThread
from ..top import follow
from .evidence import Evidence

T = TypeVar("T")


class Watch:
    """Listens to a run from entering the context to leaving it. Its methods are thread-safe."""

    def __init__(self, url: str, run: str) -> None:
        self._url = url
        self._run = run
        self._lock = threading.Lock()
        self._board = Board(run)
        self._evidence = Evidence()
        self._rounds: list[TrainerMetrics] = []
        self._bus: Bus | None = None

    def __enter__(self) -> Self:
        self._thread = LoopThread("sparsecast-watch")
        try:
            self._thread.call(self._start())
        except BaseException:
            self._thread.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            if self._bus is not None:
                self._thread.call(self._bus.close())
        finally:
            self._thread.stop()

    async def _start(self) -> None:
        self._bus = await connect(self._url, name="demo-watch", timeout_s=5.0)
        await follow(self._bus, self._run, self._hear)
        await self._bus.flush(5.0)

    def _hear(self, message: Message | Metric) -> None:
        now = time.monotonic()
        with self._lock:
            self._board.hear(message, now)
            self._evidence.hear(message, now)
            if isinstance(message, TrainerMetrics):
                self._rounds.append(message)

    def snapshot(self) -> Snapshot:
        """How the run stands now."""
        with self._lock:
            return self._board.snapshot(time.monotonic())

    def rounds(self) -> list[TrainerMetrics]:
        """The trainer's metrics of every round so far."""
        with self._lock:
            return list(self._rounds)

    def ask(self, question: Callable[[Evidence], T]) -> T:
        """Put a question to the evidence so far."""
        with self._lock:
            return question(self._evidence)
