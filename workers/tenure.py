"""A trainer's hold on its run: the lease keeps others polite, the journal keeps them out."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Callable, Coroutine
from typing import Any, TypeAlias, TypeVar

from ..messages import codec
from ..messages.control import Announce, Claim, Sender
from ..messages.errors import (
    BusError,
    Fenced,
    LogError,
    RunBusy,
    SequenceConflict,
    SparsecastError,
    StreamMissing,
    WaitTimeout,
)
from ..pipeline.bus.journal import Journal, JournalState
from ..pipeline.bus.lease import Lease
from ..pipeline.core import events as ev
from ..pipeline.core.policy import Policy
from .driver import Ports
from .leading import RankSilent
from .outgoing import Outgoing, Past

log = logging.getLogger("sparsecast.publisher")

T = TypeVar("T")

#: What a run goes on from, as its journal stands; None: from the trainer's own weights.
Recalling: TypeAlias = Callable[[JournalState], Coroutine[Any, Any, Past | None]]

#: How often a claim is tried while the holder before, whose lease is over, goes on announcing.
CLAIMS = 5


class Tenure:
    """Claims a run, appends to its journal, renews its lease."""

    def __init__(
        self, run: str, me: Sender, ports: Ports, outgoing: Outgoing, policy: Policy
    ) -> None:
        self._run = run
        self._me = me
        self._ports = ports
        self._outgoing = outgoing
        self._policy = policy
        self._journal = Journal(ports.bus, run)
        self._lease = Lease(
            ports.bus,
            run,
            me,
            host=socket.gethostname(),
            pid=os.getpid(),
            lease_s=policy.lease_s,
        )
        self._sequence = 0
        #: The message id of the last that we have put into the journal; "": not known.
        self._last_id = ""
        #: The epoch of the newest claim.
        self.epoch = 0

    async def reserve(self) -> None:
        """Take the lease. RunBusy, BusUnavailable."""
        await self._lease.acquire(timeout_s=self._policy.bus_s)

    async def claim(self, recall: Recalling) -> ev.Claimed:
        """Claim the reserved run, above whatever was announced on it before. RunBusy,
        BusUnavailable, and what `recall` raises.

        The claim's version has the contents that `recall` gives, or None: those of our own weights.
        Whoever holds them knows by the digest, whatever they were called; holders of anything else,
        of a version that was announced and is void among it, see that they have to resync (rule 2).
        """
        for _ in range(CLAIMS):
            state = await self._journal.open(timeout_s=self._policy.bus_s)
            if state.claim is not None and state.head is not None:
                epoch, version = state.claim.epoch + 1, state.head + 1
            else:
                epoch, version = await self._first()
            digest = await self._held_over(self._begin(recall, state, version))
            try:
                await self._append_claim(epoch, version, digest, state)
            except SequenceConflict:
                continue  # whoever held the run has not noticed yet, and announced once more
            return ev.Claimed(epoch, version)
        raise RunBusy(self._run, "that still announces in it", lease_s=self._policy.lease_s)

    async def _first(self) -> tuple[int, int]:
        """Epoch and version of a run that the journal knows nothing of: 1 and 0, or above all that
        the log has where the bus alone has forgotten (a directory, say). No number is given twice.
        """
        try:
            entries = await self._ports.log.entries(timeout_s=self._policy.store_s)
        except (LogError, BusError) as exc:
            log.warning("whether the log knows older versions of the run is not known: %s", exc)
            return 1, 0
        if not entries:
            return 1, 0
        return max(e.epoch for e in entries) + 1, max(e.version for e in entries) + 1

    async def announce(self, announce: Announce) -> ev.Announced | ev.AnnounceFailed:
        """Store an announcement in the journal, behind all that this trainer has said."""
        version = announce.version
        message_id = f"{self._me.incarnation}-{announce.stamp.epoch}-{version}"
        try:
            sequence = await self._journal.append(
                announce,
                message_id=message_id,
                expected_sequence=self._sequence,
                expected_message_id=self._last_id,
                timeout_s=self._policy.bus_s,
            )
        except SequenceConflict as exc:
            return await self._conflicted(version, exc)
        except StreamMissing as exc:
            return ev.AnnounceFailed(version, "lost", str(exc))
        except BusError as exc:
            return ev.AnnounceFailed(version, "unavailable", str(exc))
        if announce.stamp.epoch == self.epoch:
            # Else of a journal that is gone: it may answer late.
            self._sequence, self._last_id = sequence, message_id
        return ev.Announced(version)

    async def reclaim(self, epoch: int) -> ev.Claimed | ev.ReclaimFailed | ev.LeaseLost:
        """The bus has lost its memory: claim the run anew at what is published."""
        try:
            try:
                await self._lease.renew(timeout_s=self._policy.bus_s)
            except (Fenced, StreamMissing):
                await self._lease.acquire(timeout_s=self._policy.bus_s)
            state = await self._journal.open(timeout_s=self._policy.bus_s)
            held = state.claim
            if held is not None and held.sender != self._me:
                return ev.LeaseLost(f"trainer {held.sender.incarnation} has the run now")
            if held is not None:
                # Only the lease was lost, or an earlier try was stored although it failed here.
                epoch = max(epoch, held.epoch + 1)
            version, digest = await self._ports.run(self._outgoing.begin)
            await self._append_claim(epoch, version, digest, state)
        except (SequenceConflict, Fenced) as exc:
            return ev.LeaseLost(str(exc))
        except (BusError, LogError, RankSilent, WaitTimeout) as exc:
            return ev.ReclaimFailed(str(exc))
        except SparsecastError as exc:
            return ev.LeaseLost(str(exc))
        return ev.Claimed(epoch, version)

    async def keep(self, forgotten: Callable[[ev.AnnounceFailed], None]) -> ev.LeaseLost:
        """Renew the lease until it is lost. `forgotten` hears of it if the bus lost the stream."""
        while True:
            await asyncio.sleep(self._policy.lease_s / 4)
            try:
                await self._lease.renew(timeout_s=self._policy.bus_s)
            except Fenced as exc:
                return ev.LeaseLost(exc.reason)
            except StreamMissing as exc:
                forgotten(ev.AnnounceFailed(self._outgoing.version, "lost", str(exc)))
            except BusError as exc:
                # It may run out meanwhile and a successor may take the run: the journal's
                # compare-and-set decides.
                log.warning("the lease was not renewed: %s", exc)

    async def _begin(self, recall: Recalling, state: JournalState, version: int) -> int:
        digest: int
        _, digest = await self._ports.run(self._outgoing.begin, version, await recall(state))
        return digest

    async def _held_over(self, work: Coroutine[Any, Any, T]) -> T:
        """Keep the lease while `work` lasts, which may be longer. RunBusy if it is another's."""
        task = asyncio.ensure_future(work)
        try:
            while not (await asyncio.wait([task], timeout=self._policy.lease_s / 4))[0]:
                await self._renewed()
        finally:
            task.cancel()
            await asyncio.wait([task])
        return task.result()

    async def _renewed(self) -> None:
        try:
            await self._lease.renew(timeout_s=self._policy.bus_s)
        except Fenced as exc:
            holder = f"that took it meanwhile ({exc.reason})"
            raise RunBusy(self._run, holder, lease_s=self._policy.lease_s) from exc
        except BusError as exc:
            # The journal's compare-and-set decides whether anybody had the run meanwhile.
            log.warning("the lease was not renewed: %s", exc)

    async def release(self) -> None:
        """Give the lease back, so that a successor need not wait for its end."""
        try:
            await self._lease.release(timeout_s=1.0)
        except SparsecastError as exc:
            log.debug("the lease runs out by itself: %s", exc)

    async def _append_claim(
        self, epoch: int, version: int, digest: int, state: JournalState
    ) -> None:
        self.epoch = self._lease.epoch = epoch
        claim = Claim(
            sender=self._me,
            epoch=epoch,
            version=version,
            digest=digest,
            manifest=self._outgoing.manifest,
            nonce=self._ports.token() if state.claim is None else state.claim.nonce,
            heartbeat_s=self._policy.heartbeat_s,
            roots=tuple(map(codec.pack_layout, self._outgoing.roots)),
        )
        message_id = f"{self._me.incarnation}-{epoch}-claim"
        self._sequence = await self._journal.append(
            claim,
            message_id=message_id,
            expected_sequence=state.last_sequence,
            timeout_s=self._policy.bus_s,
        )
        self._last_id = message_id

    async def _conflicted(self, version: int, conflict: SequenceConflict) -> ev.AnnounceFailed:
        """Whose words are in our way: another trainer's, or late ones of our own?"""
        try:
            state = await self._journal.open(timeout_s=self._policy.bus_s)
        except BusError as exc:
            return ev.AnnounceFailed(version, "unavailable", str(exc))
        if state.claim is None:
            return ev.AnnounceFailed(version, "lost", "its journal is empty")
        last = state.announce
        if state.claim.sender != self._me or (last is not None and last.sender != self._me):
            reason = f"the journal moved on without us ({conflict})"
            return ev.AnnounceFailed(version, "fenced", reason)
        # An append of before the run was claimed anew may arrive after the new claim.
        self._sequence, self._last_id = state.last_sequence, ""
        return ev.AnnounceFailed(version, "unavailable", f"late words of our own ({conflict})")
