"""An archive over a log in memory that fails, or gives other bytes, as it is told."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from runs import QUICK, step, weights
from sparsecast import LogError
from sparsecast.messages.control import LogEntry
from sparsecast.pipeline.core import events as ev
from sparsecast.pipeline.log.base import oldest_first
from sparsecast.pipeline.log.memory import MemoryLog
from sparsecast.workers.archive import Archive
from sparsecast.workers.choice import Choice
from sparsecast.workers.outgoing import Outgoing

POLICY = replace(QUICK, retry_s=0.01, anchor_every=2, keep_versions=1)


class FailingLog(MemoryLog):
    """A log that fails as often as it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.failing_stores = 0
        self.failing_prunes = 0
        self.anchors_refused = False
        self.failing_loads = 0
        #: What happens to an entry before its bytes are given, and which were.
        self.before_load: Callable[[LogEntry], None] = lambda entry: None
        self.loaded: list[str] = []
        self.stored: list[str] = []

    async def store(
        self, entry: LogEntry, payload: bytes | memoryview, *, timeout_s: float
    ) -> None:
        """Keep an entry, or fail."""
        if self.failing_stores or (self.anchors_refused and entry.base_version is None):
            self.failing_stores = max(self.failing_stores - 1, 0)
            raise LogError("no room on the disk")
        self.stored.append(entry.name)
        await super().store(entry, payload, timeout_s=timeout_s)

    async def load(self, entry: LogEntry, **options: Any) -> bytes:
        """The bytes of an entry, or fail."""
        self.loaded.append(entry.name)
        self.before_load(entry)
        if self.failing_loads:
            self.failing_loads -= 1
            raise LogError("cannot be read")
        return await super().load(entry, **options)

    def flip(self, name: str) -> None:
        """Change one bit of an entry."""
        entry, data = self._held[name]
        self._held[name] = entry, data[:-1] + bytes([data[-1] ^ 1])

    async def prune(self, drop: Sequence[LogEntry], *, timeout_s: float) -> None:
        """Drop these, or fail."""
        if self.failing_prunes:
            self.failing_prunes -= 1
            raise LogError("denied")
        await super().prune(drop, timeout_s=timeout_s)


class Stand:
    """An archive over a log in memory."""

    def __init__(self, **policy: Any) -> None:
        self.log = FailingLog()
        self.trained = weights()
        self.outgoing = Outgoing(Choice(self.trained), clock=lambda: 1.0)
        self.told: list[str] = []
        self.epoch = 1
        self.ports: Any = SimpleNamespace(log=self.log, run=self._run, aside=self._aside)
        self.archive = Archive(
            self.ports, self.outgoing, replace(POLICY, **policy), self.told.append
        )
        self.failures: list[Exception] = []

    @property
    def names(self) -> list[str]:
        """What the log holds, oldest first."""
        entries = oldest_first([entry for entry, _ in self.log._held.values()])
        return [entry.name for entry in entries]

    async def _run(self, function: Any, *args: Any) -> Any:
        if self.failures:
            raise self.failures.pop()
        return function(*args)

    async def _aside(self, function: Any, *args: Any, timeout_s: float) -> Any:
        async with asyncio.timeout(timeout_s):
            await asyncio.sleep(0)
        return function(*args)

    async def anchor(self) -> None:
        """Store an anchor of what is published."""
        async with asyncio.timeout(5):
            await self.archive.anchor(lambda: self.epoch)

    async def merge(self) -> None:
        """Merge what there is to merge."""
        async with asyncio.timeout(10):
            await self.archive.merge(lambda: self.epoch)

    async def publish(self, share: float = 0.02, times: int = 1) -> int:
        """Make a version, or several that are stored as one, and store its patch."""
        for _ in range(times):
            step(self.trained, self.outgoing.version, share)
            self.outgoing.publish(None, None)
        self.outgoing.take(())
        stored = await self.archive.store((self.outgoing.version,), self.epoch)
        assert isinstance(stored, ev.LogStored)
        return stored.version
