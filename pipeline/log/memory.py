"""The log in the memory of one process: for a trainer and workers that share it, and for tests."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

from ...messages.control import LogEntry
from ...messages.errors import LogError, LogHole
from ...messages.manifest import Manifest
from .base import Progress, oldest_first, require_size, unheard
from .pieces import pruned, whole
from .retention import needless


class MemoryLog:
    """A tier in memory, of at most `max_nbytes` bytes: implements `Log`, on any thread and loop.

    Publisher and Replica are given the same object. An entry that does not fit pushes out what the
    newest anchor makes needless, the oldest first, and is refused if that is not enough: a chain
    that someone needs is never broken to make room.
    """

    durable = False

    def __init__(self, max_nbytes: int = 1 << 30) -> None:
        self.max_nbytes = max_nbytes
        self._lock = threading.Lock()
        self._held: dict[str, tuple[LogEntry, bytes]] = {}

    async def store(
        self, entry: LogEntry, payload: bytes | memoryview, *, timeout_s: float
    ) -> None:
        """Keep a copy of the payload; LogError if there is no room for it."""
        data = bytes(require_size(entry, payload))
        with self._lock:
            if entry.name in self._held:
                return
            held = [other for other, _ in self._held.values()]
            drop = needless(whole([*held, entry]), epoch=entry.epoch, nbytes=1)
            pushed = [other for other in pruned(held, drop) if other.name != entry.name]
            room = self.max_nbytes - sum(other.nbytes for other in held)
            gone = []
            while room < entry.nbytes and pushed:
                gone.append(pushed.pop(0))
                room += gone[-1].nbytes
            if room < entry.nbytes:
                raise LogError(
                    f"log entry {entry.name!r} ({entry.nbytes} bytes) does not fit into memory: "
                    f"MemoryLog(max_nbytes={self.max_nbytes}) has no more that can go; raise it, "
                    "or store anchors more often (Policy.anchor_every)"
                )
            for other in gone:
                del self._held[other.name]
            self._held[entry.name] = entry, data

    async def entries(self, *, timeout_s: float) -> list[LogEntry]:
        """Every entry that is there, oldest first."""
        await asyncio.sleep(0)  # whoever asks again and again lets others on the loop go on
        with self._lock:
            return oldest_first([entry for entry, _ in self._held.values()])

    async def load(
        self, entry: LogEntry, *, timeout_s: float, progress: Progress | None = None
    ) -> bytes:
        """The bytes of an entry; LogHole if it is not there."""
        with self._lock:
            found = self._held.get(entry.name)
        if found is None:
            raise LogHole(f"entry {entry.name!r} is not in memory", version=entry.version)
        (progress or unheard)(entry.nbytes)
        return found[1]

    async def prune(self, drop: Sequence[LogEntry], *, timeout_s: float) -> None:
        """Drop these entries."""
        with self._lock:
            for entry in drop:
                self._held.pop(entry.name, None)

    async def manifest(self, manifest_hash: str, *, timeout_s: float) -> Manifest | None:
        """None: it holds bytes."""
        return None
