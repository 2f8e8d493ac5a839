"""The journal of a run: who claimed it, and every update that was announced, in one order.

The trainer appends by compare-and-set on the stream's last sequence, so that only one trainer at
a time can speak. Members hear what the stream accepted on its republished subject, and fill from
the stream what they did not hear.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable
from dataclasses import dataclass

from ...messages import codec
from ...messages.control import Announce, Claim
from ...messages.errors import RemoteProtocolError, SequenceConflict
from ...messages.subjects import Subjects
from .base import Bus, StreamConfig, Subscription
from .follow import Follower, GapHandler, JournalHandler, decode

log = logging.getLogger("sparsecast.bus")

#: Claims, and announcements, that it keeps: a claim must outlast the announcements of its epoch,
#: for without one a successor would begin at version 0 again.
KEPT = 65_536
#: How often a member looks for a journal that it does not know of yet, and at one that is silent.
MISSING_POLL_S = 1.0
SILENT_POLL_S = 5.0


@dataclass(frozen=True, slots=True)
class JournalState:
    """What a trainer finds when it opens the journal.

    `last_sequence` is no newer than `claim` and `announce`: appending there fails if either is
    not the newest any more.
    """

    created: bool
    nonce: str
    last_sequence: int
    claim: Claim | None
    announce: Announce | None

    @property
    def head(self) -> int | None:
        """The highest version that was claimed or announced; None before the first claim."""
        if self.claim is None:
            return None
        if self.announce is None or self.announce.stamp.epoch != self.claim.epoch:
            return self.claim.version
        return max(self.claim.version, self.announce.version)


class Journal:
    """The journal stream of one run."""

    def __init__(self, bus: Bus, run: str) -> None:
        self._bus = bus
        self._subjects = Subjects(run)
        self._stream = self._subjects.journal_stream

    async def open(self, timeout_s: float) -> JournalState:
        """Make the journal or find it there (trainer). BusUnavailable at the deadline."""
        subjects, loop = self._subjects, asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        config = StreamConfig(
            name=self._stream,
            subjects=(subjects.announce_all,),
            republish=(subjects.announce_all, subjects.announced_all),
            max_messages_per_subject=KEPT,
            description=f"sparsecast: claims and announcements of run {subjects.run}",
            metadata={"nonce": secrets.token_hex(8)},
        )
        state = await self._bus.ensure_stream(config, timeout_s=timeout_s)
        claim = await self._newest(subjects.announce_claim, Claim, deadline)
        announce = await self._newest(subjects.announce_update, Announce, deadline)
        return JournalState(
            created=state.created,
            nonce=state.metadata.get("nonce", ""),
            last_sequence=state.last_sequence,
            claim=claim if isinstance(claim, Claim) else None,
            announce=announce if isinstance(announce, Announce) else None,
        )

    async def _newest(
        self, subject: str, kind: type[Claim] | type[Announce], deadline: float
    ) -> Claim | Announce | None:
        loop = asyncio.get_running_loop()
        newest = await self._bus.last(
            self._stream, subject, timeout_s=max(0.05, deadline - loop.time())
        )
        if newest is None:
            return None
        try:
            return decode(newest.data, subject, kind)
        except RemoteProtocolError as exc:
            log.warning("journal %s, message %d: %s", self._stream, newest.sequence, exc)
        found: Claim | Announce | None = None
        async for record in self._bus.read(
            self._stream, subject, timeout_s=max(0.05, deadline - loop.time())
        ):
            try:
                found = decode(record.data, subject, kind)
            except RemoteProtocolError:
                continue
        return found

    async def claim(self, timeout_s: float) -> Claim | None:
        """The newest claim, if it holds one. BusError; StreamMissing if there is no journal."""
        deadline = asyncio.get_running_loop().time() + timeout_s
        newest = await self._newest(self._subjects.announce_claim, Claim, deadline)
        return newest if isinstance(newest, Claim) else None

    async def claims(self, timeout_s: float) -> list[Claim]:
        """Every claim that it holds, the oldest first. BusError."""
        subject = self._subjects.announce_claim
        found: list[Claim] = []
        async for record in self._bus.read(self._stream, subject, timeout_s=timeout_s):
            try:
                claim = decode(record.data, subject, Claim)
            except RemoteProtocolError as exc:
                log.warning("journal %s, message %d: %s", self._stream, record.sequence, exc)
                continue
            if isinstance(claim, Claim):
                found.append(claim)
        return found

    async def append(
        self,
        message: Claim | Announce,
        *,
        message_id: str,
        expected_sequence: int,
        expected_message_id: str = "",
        timeout_s: float,
    ) -> int:
        """Append to the journal and return the sequence, if `expected_sequence` is its last.

        `expected_message_id` is the id of what was appended there: a journal that was made anew
        may have come to the same sequence by another trainer's words.
        SequenceConflict: another trainer has spoken (what we find there being our own message is
        success). StreamMissing: the bus has forgotten the run. BusUnavailable: try again with the
        same `message_id`.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        subject = (
            self._subjects.announce_claim
            if isinstance(message, Claim)
            else self._subjects.announce_update
        )
        data = codec.encode(message)
        try:
            return await self._bus.append(
                self._stream,
                subject,
                data,
                message_id=message_id,
                expected_sequence=expected_sequence,
                expected_message_id=expected_message_id,
                timeout_s=timeout_s,
            )
        except SequenceConflict:
            newest = await self._bus.last(
                self._stream, subject, timeout_s=max(0.5, deadline - loop.time())
            )
            # A message of ours carries our incarnation and its stamp: nobody else's is equal.
            if newest is not None and newest.data == data and newest.sequence > expected_sequence:
                return newest.sequence
            raise

    async def follow(
        self,
        handler: JournalHandler,
        *,
        timeout_s: float = 5.0,
        on_gap: GapHandler | None = None,
        on_garbage: Callable[[RemoteProtocolError, int], None] | None = None,
        missing_poll_s: float = MISSING_POLL_S,
        silent_poll_s: float = SILENT_POLL_S,
    ) -> Subscription:
        """Hear the newest claim, the newest announcement after it, and whatever comes (members).

        `handler(message, sequence)` is called in the order of the stream, once for each message. If
        the journal was made anew, it begins again, with claim and newest announcement. The journal
        need not exist yet. What
        was missed while the connection was down, or dropped, is read from the stream (`on_gap`).
        What cannot be decoded is logged and passed over (`on_garbage`). BusUnavailable if the
        server has not taken the subscription by the deadline.
        """
        follower = Follower(
            self._bus, self._subjects, handler, on_gap, on_garbage, missing_poll_s, silent_poll_s
        )
        await follower.start(timeout_s)
        return follower
