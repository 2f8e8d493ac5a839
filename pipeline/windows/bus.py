"""The window over NATS: the payload as chunks, for workers that no collective reaches.

Rank 0 publishes chunks on `<prefix>.chunk`; every other rank acknowledges on `<prefix>.ack.<rank>`
what it has in staging, and rank 0 keeps a bounded number of bytes ahead of the slowest. Core NATS
keeps the order of one publisher and delivers at most once: a gap is a loss, and ends the window.
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections import deque

import torch

from ...messages.errors import SparsecastError, WindowTimeout, WindowUnavailable
from .base import Behind, Courier, Received, Subscription, WindowSpec
from .lifecycle import GRACE_S, Deadline, Lifecycle
from .rendezvous import Rendezvous

CHUNK_NBYTES = 512 << 10
#: How far rank 0 may be ahead of the slowest rank: below the server's and the client's limits of
#: pending bytes (64 MiB), beyond which they call a rank a slow consumer and drop its messages.
IN_FLIGHT_NBYTES = 8 << 20
_ACK_NBYTES = 1 << 20

#: Ahead of every chunk: magic, epoch, window, round, attempt, nbytes of the payload, offset.
_HEADER = struct.Struct("<8sQQQQQQ")
_MAGIC = b"spchunk1"
#: An acknowledgement: round, bytes in staging.
_ACK = struct.Struct("<QQ")


class BusWindow(Lifecycle):
    """One rank's end of a bus window.

    A payload may be empty: then one chunk without data travels.
    """

    def __init__(self, spec: WindowSpec, courier: Courier) -> None:
        super().__init__(spec, courier)
        self._rendezvous = Rendezvous(spec, courier)
        self._subscription: Subscription | None = None
        #: Rounds so far: an attempt's number may come again with the next version.
        self._round = 0
        self._acked = dict.fromkeys(range(1, spec.size), 0)
        self._chunks: deque[bytes] = deque()
        self._pending_nbytes = 0
        self._overrun: str | None = None
        self._news = asyncio.Event()

    async def _meet(self, deadline: Deadline) -> None:
        if self._courier.max_payload <= _HEADER.size:
            raise WindowUnavailable(
                self._spec.label, f"the broker takes {self._courier.max_payload} bytes a message"
            )
        prefix = self._spec.prefix
        if self._spec.rank == 0:
            self._subscription = await self._courier.subscribe(f"{prefix}.ack.*", self._heard_ack)
        else:
            self._subscription = await self._courier.subscribe(
                f"{prefix}.chunk", self._heard_chunk, pending_nbytes=4 * IN_FLIGHT_NBYTES
            )
        # Before anyone can know that this rank is there, the server must know that it listens:
        # a chunk published earlier would be lost.
        await self._courier.flush(deadline.remaining_s)
        await self._rendezvous.start()
        await self._rendezvous.meet(f"rank-{self._spec.rank}", deadline)

    # ---- rank 0

    async def _send(self, payload: torch.Tensor, attempt: int, deadline: Deadline) -> None:
        self._round += 1
        for rank in self._acked:
            self._acked[rank] = 0
        data = payload.numpy().data
        nbytes = len(data)
        step = min(CHUNK_NBYTES, self._courier.max_payload - _HEADER.size)
        subject = f"{self._spec.prefix}.chunk"
        for offset in range(0, nbytes or 1, step):
            end = min(offset + step, nbytes)
            await self._until_acked(end - IN_FLIGHT_NBYTES, nbytes, deadline)
            header = self._header(attempt, nbytes, offset)
            await self._courier.publish(subject, b"".join((header, data[offset:end])))
            # publish() may return without giving the loop a turn, in which acknowledgements come
            # in and the client writes to its socket.
            await asyncio.sleep(0)
        if deadline.passed:
            raise self._timeout(nbytes, deadline)
        await self._courier.flush(deadline.remaining_s)

    async def _until_acked(self, floor: int, nbytes: int, deadline: Deadline) -> None:
        while min(self._acked.values()) < floor:
            self._news.clear()
            try:
                async with asyncio.timeout(deadline.remaining_s):
                    await self._news.wait()
            except TimeoutError:
                raise self._timeout(nbytes, deadline) from None

    def _timeout(self, nbytes: int, deadline: Deadline) -> WindowTimeout:
        rank = min(self._acked, key=self._acked.__getitem__)
        return WindowTimeout(
            self._spec.label,
            f"not sent within {deadline.timeout_s:g} s: rank {rank} acknowledged "
            f"{self._acked[rank]} of {nbytes} bytes",
        )

    def _heard_ack(self, message: Received) -> None:
        rank = message.subject.rpartition(".")[2]
        if len(message.data) != _ACK.size or not rank.isascii() or not rank.isdecimal():
            return  # none of ours
        number, nbytes = _ACK.unpack(message.data)
        if number == self._round and int(rank) in self._acked:
            self._acked[int(rank)] = max(self._acked[int(rank)], nbytes)
            self._news.set()

    # ---- the other ranks

    async def _receive(
        self, staging: torch.Tensor, attempt: int, deadline: Deadline, behind: Behind | None
    ) -> None:
        self._round += 1
        room = staging.numpy().data
        filled, acked = -1, 0  # -1: even an empty payload has one chunk
        while filled < len(room):
            chunk = await self._next_chunk(max(filled, 0), len(room), deadline)
            offset = self._check(chunk, attempt, len(room))
            if offset is None or offset < max(filled, 0) or (filled == 0 == offset):
                continue  # of an earlier round, or a duplicate
            if offset > max(filled, 0):
                raise self._error(f"the chunk at {max(filled, 0)} of {len(room)} bytes was lost")
            data = memoryview(chunk)[_HEADER.size :]
            filled = offset + len(data)
            room[offset:filled] = data
            if filled - acked >= _ACK_NBYTES:
                acked = filled
                await self._courier.publish(
                    f"{self._spec.prefix}.ack.{self._spec.rank}", _ACK.pack(self._round, acked)
                )

    async def _next_chunk(self, filled: int, nbytes: int, deadline: Deadline) -> bytes:
        while not self._chunks:
            if self._overrun is not None:
                raise self._error(self._overrun)
            self._news.clear()
            try:
                async with asyncio.timeout(deadline.remaining_s):
                    await self._news.wait()
            except TimeoutError:
                raise WindowTimeout(
                    self._spec.label,
                    f"{filled} of {nbytes} bytes came within {deadline.timeout_s:g} s",
                ) from None
        chunk = self._chunks.popleft()
        self._pending_nbytes -= len(chunk)
        return chunk

    def _heard_chunk(self, message: Received) -> None:
        if self._overrun is not None:
            return
        self._pending_nbytes += len(message.data)
        if self._pending_nbytes > 2 * IN_FLIGHT_NBYTES:
            self._overrun = "rank 0 sends faster than this rank acknowledges"
            self._chunks.clear()
        else:
            self._chunks.append(message.data)
        self._news.set()

    def _check(self, chunk: bytes, attempt: int, nbytes: int) -> int | None:
        """The offset of a chunk of this round, None for one of an earlier round; WindowError."""
        if len(chunk) < _HEADER.size or chunk[:8] != _MAGIC:
            raise self._error(f"a message of {len(chunk)} bytes came that is no chunk")
        _, epoch, window, number, its_attempt, its_nbytes, offset = _HEADER.unpack_from(chunk)
        if (epoch, window) == (self._spec.epoch, self._spec.window) and number < self._round:
            return None
        found = (epoch, window, number, its_attempt, its_nbytes)
        if found != (self._spec.epoch, self._spec.window, self._round, attempt, nbytes):
            raise self._error(
                f"rank 0 sends attempt {its_attempt} of {epoch}.{window}, {its_nbytes} bytes, its "
                f"round {number}; this rank expects attempt {attempt} of {self._spec.epoch}."
                f"{self._spec.window}, {nbytes} bytes, round {self._round}"
            )
        if offset + len(chunk) - _HEADER.size > nbytes or (nbytes and len(chunk) == _HEADER.size):
            raise self._error(
                f"a chunk of {len(chunk) - _HEADER.size} bytes at {offset} of {nbytes} came"
            )
        return int(offset)

    def _header(self, attempt: int, nbytes: int, offset: int) -> bytes:
        spec = self._spec
        return _HEADER.pack(_MAGIC, spec.epoch, spec.window, self._round, attempt, nbytes, offset)

    # ---- the end

    async def _break(self) -> None:
        # What runs copies on this very thread: cancelled, it touches nobody's memory again.
        if self._running is not None:
            self._running.cancel()
        await self._give_up(f"the window was aborted ({self._dead or 'on request'})")

    async def _leave(self) -> None:
        await self._give_up("the window was closed")

    async def _give_up(self, reason: str) -> None:
        await self._rendezvous.stop(reason)
        subscription, self._subscription = self._subscription, None
        if subscription is not None:
            # An error here: the connection is gone, and the subscription with it.
            with contextlib.suppress(SparsecastError, TimeoutError):
                await asyncio.wait_for(subscription.unsubscribe(), GRACE_S)
        self._chunks.clear()
