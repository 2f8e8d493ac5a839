"""The lease of a run: who may claim it. It ends by the server's clock, nobody else's."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import secrets
import socket

from ...messages import codec
from ...messages.control import Lease as LeaseMessage
from ...messages.control import Sender
from ...messages.errors import BusUnavailable, Fenced, RunBusy, SequenceConflict, StreamMissing
from ...messages.subjects import LEASE_STREAM, LEASE_SUBJECTS, Subjects
from .base import Bus, Record, StreamConfig

log = logging.getLogger("sparsecast.bus")

CONFIG = StreamConfig(
    name=LEASE_STREAM,
    subjects=(LEASE_SUBJECTS,),
    max_messages_per_subject=1,
    message_ttl=True,
    description="sparsecast: who holds which run",
)


async def holder_of(bus: Bus, run: str, *, timeout_s: float) -> LeaseMessage | None:
    """Who holds a run now; None: nobody."""
    subject = Subjects(run).lease
    try:
        newest = await bus.last(LEASE_STREAM, subject, timeout_s=timeout_s)
    except StreamMissing:
        return None
    return (
        None
        if newest is None or not newest.data
        else codec.decode_lease(newest.data, subject=subject)
    )


class Lease:
    """One holder's lease of a run: acquire it, renew it well before `lease_s` is over, release it.

    `lease_s` is rounded up to whole seconds, at least 1. The lease alone proves nothing: it lets a
    second trainer be refused politely. That only one can speak is the journal's compare-and-set.
    """

    def __init__(
        self,
        bus: Bus,
        run: str,
        holder: Sender,
        *,
        lease_s: float,
        host: str | None = None,
        pid: int | None = None,
    ) -> None:
        self._bus = bus
        self._run = run
        self._subject = Subjects(run).lease
        self._ttl_s = max(1, math.ceil(lease_s))
        self._message = LeaseMessage(
            holder=holder,
            host=socket.gethostname() if host is None else host,
            pid=os.getpid() if pid is None else pid,
            lease_s=float(self._ttl_s),
        )
        self._sequence = 0
        # A message id that was used before would be taken for stored, though it was purged since.
        self._life = f"lease-{secrets.token_hex(8)}"
        self._count = 0
        #: The epoch that is claimed under this lease; named when the lease turns out to be lost.
        self.epoch = 0
        #: How often the lease ran out and was taken again before anybody else took it.
        self.lapses = 0

    @property
    def held(self) -> bool:
        """Whether the last that we heard of the lease is that it is ours."""
        return self._sequence > 0

    async def acquire(self, timeout_s: float) -> int:
        """Take the lease and return its sequence. RunBusy names the holder if it is alive.

        BusUnavailable at the deadline.
        """
        deadline = asyncio.get_running_loop().time() + timeout_s
        while True:
            await self._bus.ensure_stream(CONFIG, timeout_s=self._left(deadline))
            try:
                return await self._put(0, deadline)
            except StreamMissing:
                continue  # dropped between the two requests
            except SequenceConflict:
                newest = await self._newest(deadline)
            if newest is None:
                continue  # it ran out between the two requests
            found = codec.decode_lease(newest.data, subject=self._subject)
            if found.holder != self._message.holder:
                raise RunBusy(self._run, _name(found), lease_s=found.lease_s)
            return await self._extend(newest.sequence, deadline)

    async def renew(self, timeout_s: float) -> int:
        """Give the lease its full time again and return its new sequence.

        A lease that ran out unseen (a broker that was away, a process that was stopped) is taken
        again if nobody has it; whether somebody had it meanwhile, the journal's compare-and-set
        tells. Fenced names the holder if another trainer has it. StreamMissing: the bus has
        forgotten; BusUnavailable at the deadline: try again.
        """
        deadline = asyncio.get_running_loop().time() + timeout_s
        return await self._extend(self._sequence, deadline)

    async def release(self, timeout_s: float) -> None:
        """Give the lease back, if it is still ours. Idempotent."""
        sequence, self._sequence = self._sequence, 0
        if not sequence:
            return
        try:
            # A successor's lease has a higher sequence, which this leaves alone.
            await self._bus.purge(
                LEASE_STREAM,
                subject=self._subject,
                before_sequence=sequence + 1,
                timeout_s=timeout_s,
            )
        except StreamMissing:
            log.debug("the lease of run %s went with its stream", self._run)

    async def _extend(self, sequence: int, deadline: float) -> int:
        lapsed = False
        while True:
            try:
                taken = await self._put(sequence, deadline)
            except SequenceConflict:
                newest = await self._newest(deadline)
            else:
                if lapsed:
                    log.warning("the lease of run %s had run out; taken again", self._run)
                    self.lapses += 1
                return taken
            if newest is None:
                lapsed, sequence = True, 0
                continue
            found = codec.decode_lease(newest.data, subject=self._subject)
            if found.holder != self._message.holder:
                self._sequence = 0
                raise Fenced(self._run, self.epoch, f"the lease is held by {_name(found)}")
            # An earlier renewal of ours was stored after its deadline.
            sequence = newest.sequence

    async def _put(self, expected: int, deadline: float) -> int:
        self._count += 1
        self._sequence = await self._bus.append(
            LEASE_STREAM,
            self._subject,
            codec.encode(self._message),
            message_id=f"{self._life}-{self._count}",
            expected_subject_sequence=expected,
            ttl_s=self._ttl_s,
            timeout_s=self._left(deadline),
        )
        return self._sequence

    async def _newest(self, deadline: float) -> Record | None:
        return await self._bus.last(LEASE_STREAM, self._subject, timeout_s=self._left(deadline))

    def _left(self, deadline: float) -> float:
        left_s = deadline - asyncio.get_running_loop().time()
        if left_s <= 0:
            raise BusUnavailable(self._bus.url, f"the lease of run {self._run} took too long")
        return left_s


def _name(lease: LeaseMessage) -> str:
    return f"{lease.holder.name} (pid {lease.pid} on {lease.host})"
