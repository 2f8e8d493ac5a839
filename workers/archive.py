"""What a trainer puts into the log: every announced patch, and an anchor now and then."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from ..messages.control import LogEntry
from ..messages.errors import BusError, LogError
from ..pipeline.core import events as ev
from ..pipeline.core.policy import Policy
from ..pipeline.delta import Patch
from ..pipeline.log.retention import needless
from .driver import Ports
from .outgoing import Outgoing


class Archive:
    """Stores kept patches and anchors; `tell(reason)` hears of the first failure of a series."""

    def __init__(
        self, ports: Ports, outgoing: Outgoing, policy: Policy, tell: Callable[[str], None]
    ) -> None:
        self._ports = ports
        self._outgoing = outgoing
        self._policy = policy
        self._tell = tell
        #: Below any version until there is one.
        self._last_anchor = -policy.anchor_every
        self._on_their_way = 0

    async def store(self, versions: tuple[int, ...], epoch: int) -> ev.LogStored | ev.LogFailed:
        """Store these kept versions as one entry, and let go of them."""
        try:
            entry, patch = await self._ports.run(self._outgoing.entry, versions, epoch)
            await self._put(entry, patch)
        except (LogError, BusError) as exc:
            return ev.LogFailed(versions[-1], str(exc))
        await self._ports.run(self._outgoing.release, entry.version)
        return ev.LogStored(entry.version)

    def due(self, version: int) -> bool:
        """Whether an anchor is due at this version, and none is on its way."""
        late = version - self._last_anchor >= self._policy.anchor_every
        # Where patches fit and anchors do not, they would pile up, each with its full copy.
        return late and not self._on_their_way

    async def anchor(self, epoch: Callable[[], int]) -> None:
        """Put a full copy into the log, trying until it is there, and drop what it makes needless.

        Gives up when another epoch has begun: that one stores an anchor of its own.
        """
        began, failures = epoch(), 0
        self._on_their_way += 1
        try:
            while epoch() == began:
                try:
                    entry, patch = await self._ports.run(self._outgoing.anchor, began)
                    await self._put(entry, patch)
                except (LogError, BusError, RuntimeError, MemoryError) as exc:
                    if failures == 0:
                        self._tell(f"an anchor: {exc}")
                    failures += 1
                    await asyncio.sleep(self._policy.retry_s * 2.0 ** min(failures, 6))
                    continue
                self._last_anchor = max(self._last_anchor, entry.version)
                await self._prune(began)
                return
        finally:
            self._on_their_way -= 1

    async def _put(self, entry: LogEntry, patch: Patch) -> None:
        # Copied on the torch thread: an anchor would hold the event loop up for long.
        payload = await self._ports.run(self._outgoing.wire, patch)
        await self._ports.log.store(entry, payload, timeout_s=self._policy.store_s)

    async def _prune(self, epoch: int) -> None:
        """Drop what the policy does not keep and nobody needs any more."""
        timeout_s, log = self._policy.store_s, self._ports.log
        try:
            drop = needless(
                await log.entries(timeout_s=timeout_s),
                epoch=epoch,
                writer=self._outgoing.writer,
                versions=self._policy.keep_versions,
                nbytes=self._policy.keep_nbytes,
            )
            if drop:
                await log.prune(drop, timeout_s=timeout_s)
        except (LogError, BusError) as exc:
            # The next anchor's turn drops what this one left.
            self._tell(f"pruning: {exc}")
