"""A member's reading of the journal: live where it can, from the stream where it must."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable

from ...messages import codec
from ...messages.control import Announce, Claim
from ...messages.errors import (
    PermissionDenied,
    RemoteProtocolError,
    SparsecastError,
    StreamMissing,
)
from ...messages.subjects import Subjects
from .base import Bus, Message, Record, Subscription

log = logging.getLogger("sparsecast.bus")

REQUEST_S = 2.0
#: How often a snapshot is taken anew because something was appended meanwhile.
SNAPSHOTS = 50
#: What was delivered lately, by which a duplicate is told from the first message of a new journal.
RECENT = 1024

JournalHandler = Callable[[Claim | Announce, int], None]
#: (first, last) of the sequences that came late: the live message was missed.
GapHandler = Callable[[int, int], None]


class Follower:
    """One member's reading of the journal; made by Journal.follow()."""

    def __init__(
        self,
        bus: Bus,
        subjects: Subjects,
        handler: JournalHandler,
        on_gap: GapHandler | None,
        on_garbage: Callable[[RemoteProtocolError, int], None] | None,
        missing_poll_s: float,
        silent_poll_s: float,
    ) -> None:
        self._bus = bus
        self._subjects = subjects
        self._stream = subjects.journal_stream
        self._handler = handler
        self._on_gap = on_gap
        self._on_garbage = on_garbage
        self._missing_poll_s = missing_poll_s
        self._silent_poll_s = silent_poll_s
        #: The last sequence that was delivered or passed over; 0: nothing is known.
        self._seen = 0
        self._recent: OrderedDict[int, int] = OrderedDict()
        #: Whether something may have been missed since the stream was last looked at.
        self._suspect = True
        self._complained = ""
        self._heard: asyncio.Queue[Message | None] = asyncio.Queue()
        self._subscription: Subscription | None = None
        self._task: asyncio.Task[None] | None = None
        self._ended = False

    async def start(self, timeout_s: float) -> None:
        """Subscribe, read what there is, and go on from there. BusUnavailable at the deadline."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        # Subscribe before reading: what comes in between waits in the queue.
        self._subscription = await self._bus.subscribe(self._subjects.announced_all, self._hear)
        try:
            await self._bus.flush(timeout_s)
            self._bus.on_state(self._connection_changed)
            await self._catch_up(max(0.05, deadline - loop.time()))
        except BaseException:
            await self.unsubscribe()
            raise
        self._task = loop.create_task(self._run(), name=f"journal of {self._subjects.run}")

    async def unsubscribe(self) -> None:
        """End it; no handler call starts afterwards. Idempotent."""
        self._ended = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        if self._subscription is not None:
            await self._subscription.unsubscribe()

    def _hear(self, message: Message) -> None:
        if (
            message.sequence == self._seen + 1
            and self._seen
            and not self._suspect
            and self._heard.empty()
        ):
            self._deliver(message.subject, message.sequence, message.data)
        else:
            self._heard.put_nowait(message)

    def _connection_changed(self, event: str, detail: str) -> None:
        dropped = event == "slow-consumer" and detail.startswith(self._subjects.announced_all[:-1])
        if not self._ended and (event == "reconnected" or dropped):
            self._suspect = True
            self._heard.put_nowait(None)

    async def _run(self) -> None:
        while True:
            poll_s = self._silent_poll_s
            if self._suspect or not self._seen:
                poll_s = self._missing_poll_s
            message: Message | None = None
            try:
                async with asyncio.timeout(poll_s):
                    message = await self._heard.get()
            except TimeoutError:
                self._suspect = True
            if message is not None:
                self._weigh(message)
            if self._suspect:
                await self._catch_up(REQUEST_S)

    def _weigh(self, message: Message) -> None:
        """Deliver a live message, or find that the stream has to be asked."""
        sequence = message.sequence
        if sequence is None:
            error = RemoteProtocolError("published past the journal", subject=message.subject)
            self._complain_of(error, 0)
        elif self._suspect:
            return  # the stream holds it too, and what may be missing before it
        elif sequence == self._seen + 1 and self._seen:
            self._deliver(message.subject, sequence, message.data)
        elif self._recent.get(sequence) != hash(message.data):
            # A gap, the first word of a journal that was made anew, or one that was passed over.
            self._suspect = True

    async def _catch_up(self, timeout_s: float) -> None:
        """Deliver what the stream holds and we have not heard; never raises one of our errors."""
        try:
            await self._read(timeout_s)
        except StreamMissing:
            self._suspect = False  # nothing to hear yet; the poll goes on
        except PermissionDenied as exc:
            self._suspect = False  # live messages are all that this client may have
            self._complain(exc)
        except SparsecastError as exc:
            self._complain(exc)
        else:
            self._complained = ""
            self._suspect = False

    async def _read(self, timeout_s: float) -> None:
        subjects, bus, stream = self._subjects, self._bus, self._stream
        newest = await bus.last(stream, subjects.announce_all, timeout_s=timeout_s)
        if newest is None:
            return
        if self._seen and not await self._is_known(newest, timeout_s):
            log.warning("journal %s was made anew", stream)
            self._seen = 0
            self._recent.clear()
        if self._seen:
            if newest.sequence > self._seen and self._on_gap is not None:
                self._on_gap(self._seen + 1, newest.sequence)
            start = self._seen + 1
            async for record in bus.read(
                stream, subjects.announce_all, start_sequence=start, timeout_s=timeout_s
            ):
                self._deliver(record.subject, record.sequence, record.data)
            return
        for _ in range(SNAPSHOTS):
            claim = await bus.last(stream, subjects.announce_claim, timeout_s=timeout_s)
            update = await bus.last(stream, subjects.announce_update, timeout_s=timeout_s)
            both = [record for record in (claim, update) if record is not None]
            again = await bus.last(stream, subjects.announce_all, timeout_s=timeout_s)
            if again is None or again.sequence == newest.sequence:
                break
            newest = again  # a claim may have come between the two answers
        else:
            return  # it never stood still: live messages or the next look will do
        after = claim.sequence if claim is not None else 0
        for record in both:
            if record.sequence >= after:
                self._deliver(record.subject, record.sequence, record.data)
        self._seen = max(self._seen, newest.sequence)
        self._remember(newest.sequence, newest.data)

    async def _is_known(self, newest: Record, timeout_s: float) -> bool:
        """Whether this is still the journal in which we saw message `_seen`."""
        if newest.sequence < self._seen:
            return False
        record: Record | None = newest
        if newest.sequence > self._seen:
            record = await self._bus.get(self._stream, self._seen, timeout_s=timeout_s)
        return record is not None and hash(record.data) == self._recent.get(self._seen)

    def _deliver(self, subject: str, sequence: int, data: bytes) -> None:
        if sequence <= self._seen:
            return
        self._seen = sequence
        self._remember(sequence, data)
        try:
            message = decode(data, subject)
        except RemoteProtocolError as exc:
            self._complain_of(exc, sequence)
            return
        try:
            self._handler(message, sequence)
        except Exception:
            log.exception("the handler of journal %s failed on message %d", self._stream, sequence)

    def _remember(self, sequence: int, data: bytes) -> None:
        self._recent[sequence] = hash(data)
        while len(self._recent) > RECENT:
            self._recent.popitem(last=False)

    def _complain_of(self, error: RemoteProtocolError, sequence: int) -> None:
        log.warning("journal %s, message %d: %s", self._stream, sequence, error)
        if self._on_garbage is not None:
            self._on_garbage(error, sequence)

    def _complain(self, error: SparsecastError) -> None:
        if str(error) != self._complained:
            self._complained = str(error)
            log.warning("journal %s cannot be read: %s", self._stream, error)


def decode(
    data: bytes, subject: str, kind: type[Claim] | type[Announce] | None = None
) -> Claim | Announce:
    """A message of the journal; RemoteProtocolError if it is none, or not of this `kind`."""
    message = codec.decode(data, subject=subject)
    if not isinstance(message, (Claim, Announce) if kind is None else kind):
        raise RemoteProtocolError(
            f"a {type(message).__name__} has no place in the journal", subject=subject
        )
    return message
