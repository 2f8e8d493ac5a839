"""The JetStream tier of the log: entries in chunks on the run's log stream.

The chunks of an entry go first, then its index entry on a subject of its own; pruning goes the
other way round. So whoever finds an entry in the index finds its chunks, unless it was pruned
while it was read: that is a LogHole, and the reader starts again from the newest anchor.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from ...messages import codec
from ...messages.control import LogEntry
from ...messages.errors import (
    BusError,
    BusUnavailable,
    LogError,
    LogFull,
    LogHole,
    RemoteProtocolError,
    SparsecastError,
    StreamFull,
    StreamMissing,
)
from ...messages.manifest import Manifest
from ...messages.subjects import Subjects
from .base import Progress, Record, Streams, oldest_first, require_size, unheard
from .pieces import root_of

log = logging.getLogger("sparsecast.log")

CHUNK_NBYTES = 512 << 10
#: What the server counts besides the data: the headers of a chunk.
HEADERS_NBYTES = 1024
IN_FLIGHT = 8
#: What cleaning up after a failure may cost on top of the deadline.
DROP_S = 0.2
#: How long the server has for one answer: a lost one must not cost the deadline of the whole entry.
ANSWER_S = 5.0


@dataclass(frozen=True, slots=True)
class _StreamConfig:
    """The log stream, in the shape of the bus's StreamConfig (the log does not know the bus)."""

    name: str
    subjects: tuple[str, ...]
    description: str
    republish: tuple[str, str] | None = None
    max_messages: int = 0
    max_messages_per_subject: int = 0
    max_nbytes: int = 0
    duplicate_window_s: float = 120.0
    message_ttl: bool = False
    metadata: Mapping[str, str] = field(default_factory=dict)


class JetStreamLog:
    """The log of one run on JetStream: implements `Log`.

    Give it a connection of its own: the chunks of an anchor would delay a round's messages. What
    would be more than `quota_nbytes` in all is refused by the server (LogFull); None lifts what
    an earlier quota was.
    """

    #: It survives the death of any process; power loss as the server is configured.
    durable = True

    def __init__(self, streams: Streams, run: str, *, quota_nbytes: int | None = None) -> None:
        self._streams = streams
        self._quota_nbytes = quota_nbytes
        #: Whether the stream has its bound.
        self._limited = False
        self._subjects = Subjects(run)
        self._stream = self._subjects.log_stream
        self._storing = asyncio.Lock()
        #: Where the chunks of what was stored here begin in the stream, by name.
        self._begins: dict[str, int] = {}
        #: Whether other roots of the same trainer store in the stream too, and whether what dead
        #: ones of this root have left is gone.
        self._shared = self._swept = False

    @property
    def chunk_nbytes(self) -> int:
        """The size of a chunk: what the server takes, at most 512 KiB."""
        return max(1, min(CHUNK_NBYTES, self._streams.max_payload - HEADERS_NBYTES))

    # ---- writing

    async def store(
        self, entry: LogEntry, payload: bytes | memoryview, *, timeout_s: float
    ) -> None:
        """Store an entry, whole or not at all, within `timeout_s` (LogError).

        The number of chunks is filled in here. Storing the same name again replaces nothing and
        is no error. The stream is made if it is not there.
        """
        view = require_size(entry, payload)
        try:
            async with asyncio.timeout(timeout_s), self._storing:
                answer_s = min(timeout_s, ANSWER_S)
                if entry.roots > 1:
                    self._shared = True
                    if not self._swept:
                        await self._drop_orphans(entry, answer_s)
                        self._swept = True
                try:
                    await self._store(entry, view, timeout_s)
                except StreamFull:
                    if not await self._drop_orphans(entry, answer_s):
                        raise
                    await self._store(entry, view, timeout_s)
        except TimeoutError:
            raise LogError(
                f"log entry {entry.name!r} ({entry.nbytes} bytes) was not stored within "
                f"{timeout_s:g} s"
            ) from None
        except StreamFull as exc:
            raise LogFull(
                f"log entry {entry.name!r} ({entry.nbytes} bytes) was not stored: {exc}; give the "
                "run a larger quota (Policy.quota_nbytes), or keep less (keep_nbytes)"
            ) from exc
        except BusError as exc:
            raise LogError(f"log entry {entry.name!r} was not stored: {exc}") from exc

    async def _store(self, entry: LogEntry, view: memoryview, timeout_s: float) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        timeout_s = min(timeout_s, ANSWER_S)
        state = await self._streams.ensure_stream(self._config(), timeout_s=timeout_s)
        if state.created or not self._limited:
            quota = self._quota_nbytes
            await self._streams.limit_stream(self._stream, quota, timeout_s=timeout_s)
            self._limited = True
        chunks, index = self._chunks(entry), self._subjects.log_entry(entry.name)
        async for _ in self._streams.read(self._stream, index, timeout_s=timeout_s):
            return
        sequences: list[int] = []
        while not sequences or sequences != sorted(sequences):
            # What an attempt that died half-way has left would be counted as chunks of this one;
            # and what was sent again after a broken connection may be stored out of order.
            await self._streams.purge(self._stream, subject=chunks, timeout_s=timeout_s)
            # The server remembers message ids of purged messages too: each attempt has its own.
            attempt = f"{entry.name}-{secrets.token_hex(4)}"
            try:
                sequences = await self._append_chunks(chunks, attempt, view, deadline)
            except BaseException:
                await self._drop(chunks)
                raise
            if sequences == sorted(sequences):
                # From here on the index entry may be there, whatever comes back: its chunks stay.
                stored = msgspec.structs.replace(entry, chunks=len(sequences))
                last = await self._append(index, codec.encode(stored), attempt, deadline)
                sequences.append(last)
        self._begins[entry.name] = sequences[0]

    async def _append(self, subject: str, data: bytes, message_id: str, deadline: float) -> int:
        """Append, asking again with the same id while answers are lost and there is time."""
        loop = asyncio.get_running_loop()
        while True:
            until = min(deadline, loop.time() + ANSWER_S)
            try:
                return await self._streams.append(
                    self._stream,
                    subject,
                    data,
                    message_id=message_id,
                    timeout_s=max(0.05, until - loop.time()),
                )
            except BusUnavailable:
                if loop.time() < until or until >= deadline:
                    raise

    async def _append_chunks(
        self, subject: str, attempt: str, view: memoryview, deadline: float
    ) -> list[int]:
        """Append all chunks, some at a time; their sequences in the order of the chunks."""
        size = self.chunk_nbytes
        starts = range(0, view.nbytes, size)
        sequences = [0] * len(starts)
        todo = iter(enumerate(starts))

        async def append_some() -> None:
            for number, start in todo:
                chunk = bytes(view[start : start + size])
                sequences[number] = await self._append(
                    subject, chunk, f"{attempt}-{number}", deadline
                )

        flying = [asyncio.ensure_future(append_some()) for _ in range(IN_FLIGHT)]
        try:
            await asyncio.gather(*flying)
        finally:
            for task in flying:
                task.cancel()
            await asyncio.gather(*flying, return_exceptions=True)
        return sequences

    async def _drop(self, subject: str) -> None:
        """Drop what a failed attempt has stored, if the server can be reached; else it is swept."""
        try:
            async with asyncio.timeout(DROP_S):
                await self._streams.purge(self._stream, subject=subject, timeout_s=DROP_S)
        except (SparsecastError, TimeoutError) as exc:
            log.debug("chunks on %s are left for the next prune: %s", subject, exc)

    # ---- reading

    async def entries(self, *, timeout_s: float) -> list[LogEntry]:
        """Every entry that is there, oldest first; none if there is no log yet (LogError)."""
        index = self._subjects.log_index_all
        found: dict[str, LogEntry] = {}
        try:
            async for record in self._read(index, timeout_s):
                try:
                    entry = codec.decode_entry(record.data, subject=record.subject)
                except RemoteProtocolError as exc:
                    log.warning("passed over in the log: %s", exc)
                    continue
                found.setdefault(entry.name, entry)
        except StreamMissing:
            return []
        except BusError as exc:
            raise LogError(f"the log of run {self._subjects.run!r} cannot be read: {exc}") from exc
        return oldest_first(list(found.values()))

    async def load(
        self, entry: LogEntry, *, timeout_s: float, progress: Progress | None = None
    ) -> bytearray:
        """The bytes of an entry, their size and number of chunks checked (LogError, LogHole).

        LogHole if the entry is not there (any more), whole: start again from the entries.
        `progress` hears of each chunk.
        """
        hear = progress or unheard
        payload = bytearray(entry.nbytes)
        chunks = filled = 0
        try:
            if entry.nbytes:
                async for record in self._read(self._chunks(entry), timeout_s):
                    chunks += 1
                    begin, filled = filled, filled + len(record.data)
                    if filled > entry.nbytes:
                        break
                    payload[begin:filled] = record.data
                    hear(filled)
            else:
                hear(0)
        except StreamMissing as exc:
            raise LogHole(f"{exc}", version=entry.version) from exc
        except BusError as exc:
            raise LogError(f"log entry {entry.name!r} cannot be read: {exc}") from exc
        found = f"{chunks} chunk(s) and {filled} bytes"
        if filled < entry.nbytes:
            raise LogHole(
                f"entry {entry.name!r} has {found} of {entry.nbytes}: pruned, or lost",
                version=entry.version,
            )
        if filled > entry.nbytes or chunks != (entry.chunks or chunks):
            raise LogError(
                f"log entry {entry.name!r} has {found}; its index says {entry.chunks} and "
                f"{entry.nbytes}"
            )
        return payload

    async def _read(self, subject: str, timeout_s: float) -> AsyncIterator[Record]:
        """Read a subject within `timeout_s` in all."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        answer_s = min(timeout_s, ANSWER_S)
        async for record in self._streams.read(self._stream, subject, timeout_s=answer_s):
            yield record
            if loop.time() > deadline:
                raise LogError(f"{subject} was not read within {timeout_s:g} s")

    # ---- retention

    async def prune(self, drop: Sequence[LogEntry], *, timeout_s: float) -> None:
        """Drop these entries: the index entry of each goes first, then its chunks. LogError."""
        try:
            async with asyncio.timeout(timeout_s):
                timeout_s = min(timeout_s, ANSWER_S)
                for entry in drop:
                    for subject in (self._subjects.log_entry(entry.name), self._chunks(entry)):
                        await self._streams.purge(
                            self._stream, subject=subject, timeout_s=timeout_s
                        )
                    self._begins.pop(entry.name, None)
                await self._sweep(timeout_s)
        except TimeoutError:
            raise LogError(f"pruning the log took more than {timeout_s:g} s") from None
        except StreamMissing:
            return
        except BusError as exc:
            raise LogError(
                f"the log of run {self._subjects.run!r} cannot be pruned: {exc}"
            ) from exc

    async def _sweep(self, timeout_s: float) -> None:
        """Drop chunks without an entry, which a trainer that died while it stored has left.

        They lie before everything kept; where that begins, only who stored it knows. Chunks of
        other roots may lie there too, whose entries are still to come.
        """
        if self._shared:
            return
        kept = {entry.name for entry in await self.entries(timeout_s=timeout_s)}
        if kept and kept <= self._begins.keys():
            await self._streams.purge(
                self._stream,
                before_sequence=min(self._begins[name] for name in kept),
                timeout_s=timeout_s,
            )

    async def _drop_orphans(self, storing: LogEntry, timeout_s: float) -> bool:
        """Drop all chunks without an entry, wherever they lie; whether there were any. Nothing else
        of this root may be stored meanwhile: the trainer that holds the run does it where room is
        short, or before the first of its pieces."""
        kept = {self._chunks(entry) for entry in await self.entries(timeout_s=timeout_s)}
        chunks = self._subjects.log_chunks_all
        try:
            found = await self._streams.subjects(self._stream, chunks, timeout_s=timeout_s)
        except StreamMissing:
            return False
        prefix = chunks.removesuffix(">")
        orphans = [
            subject
            for subject in found
            if subject not in kept
            and root_of(subject.removeprefix(prefix)) % storing.roots == storing.root
        ]
        for subject in orphans:
            await self._streams.purge(self._stream, subject=subject, timeout_s=timeout_s)
        return bool(orphans)

    async def manifest(self, manifest_hash: str, *, timeout_s: float) -> Manifest | None:
        """None: it stores bytes, and the names are in the journal."""
        return None

    def _chunks(self, entry: LogEntry) -> str:
        return self._subjects.log_chunks(entry.name)

    def _config(self) -> _StreamConfig:
        return _StreamConfig(
            name=self._stream,
            subjects=(self._subjects.log_all,),
            description=f"sparsecast: patches and anchors of run {self._subjects.run}",
        )
