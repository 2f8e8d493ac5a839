"""What a trainer puts into the log: every announced patch, and an anchor now and then."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from ..messages.errors import BusError, LogError
from ..pipeline.core import events as ev
from ..pipeline.core.policy import Policy
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
        self._last_anchor = 0

    async def store(self, versions: tuple[int, ...], epoch: int) -> ev.LogStored | ev.LogFailed:
        """Store these kept versions as one entry, and let go of them."""
        try:
            entry, patch = await self._ports.run(self._outgoing.entry, versions, epoch)
            await self._ports.log.store(entry, patch.to_bytes(), timeout_s=self._policy.store_s)
        except (LogError, BusError) as exc:
            return ev.LogFailed(versions[-1], str(exc))
        await self._ports.run(self._outgoing.release, entry.version)
        return ev.LogStored(entry.version)

    def due(self, version: int) -> bool:
        """Whether an anchor is due at this version; it counts as begun then."""
        due = version - self._last_anchor >= self._policy.anchor_every
        if due:
            self._last_anchor = version
        return due

    async def anchor(self, epoch: Callable[[], int]) -> None:
        """Put a full copy into the log, as often as it takes, and drop what it makes needless.

        Gives up when another epoch has begun: that one stores an anchor of its own.
        """
        began, failures = epoch(), 0
        while epoch() == began:
            entry, patch = await self._ports.run(self._outgoing.anchor, began)
            try:
                await self._ports.log.store(entry, patch.to_bytes(), timeout_s=self._policy.store_s)
                await self._prune(began)
            except (LogError, BusError) as exc:
                if failures == 0:
                    self._tell(f"anchor {entry.version}: {exc}")
                failures += 1
                await asyncio.sleep(self._policy.retry_s * 2.0 ** min(failures, 6))
                continue
            self._last_anchor = max(self._last_anchor, entry.version)
            return

    async def _prune(self, epoch: int) -> None:
        """Keep the newest two anchors of this epoch and all that follows the older one."""
        entries = await self._ports.log.entries(timeout_s=self._policy.store_s)
        ours = [entry for entry in entries if entry.epoch == epoch]
        anchors = sorted(entry.version for entry in ours if entry.base_version is None)
        if not anchors:
            return
        oldest = anchors[-2:][0]
        keep = [entry for entry in ours if entry.version >= oldest]
        if len(keep) < len(entries):
            await self._ports.log.prune(keep, timeout_s=self._policy.store_s)
