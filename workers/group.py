"""The hands of all ranks of one worker, as those of one: its first rank leads.

What a replica's core asks of a worker every rank does, each with its own window end, staging and
weights; the first one hears from all of them, and tells the core one thing. The version that
readers see is the first rank's: an apply holds its guard until every rank has written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, TypeVar

from ..messages import codec
from ..messages.control import Claim, LogEntry, Stamp, WindowKind, added
from ..messages.errors import EngineError, LogError, ManifestMismatch, SparsecastError, brief
from ..messages.layout import Layout, require_whole
from ..pipeline.core import commands as cmd
from ..pipeline.core import events as ev
from ..pipeline.core.policy import Policy
from ..pipeline.log.base import Progress
from .hands import Hands
from .incoming import Unwritten
from .leading import Leading, RankSilent
from .together import Together, first_of

T = TypeVar("T")

#: A worker joins again with every heartbeat until it is welcome.
TOLD_NBYTES = 1 << 18


class Group:
    """Does what `Hands` does, on every rank: `mine` are the first rank's, which holds `layout`."""

    def __init__(self, mine: Hands, leading: Leading, layout: Layout, policy: Policy) -> None:
        self._mine = mine
        self._leading = leading
        self._ranks = Together(leading, policy)
        self._layout = layout
        self._policy = policy
        #: What is compared just now; an earlier comparison that still waits for a rank gives up.
        self._proving: Claim | None = None

    def common(self, kinds: tuple[WindowKind, ...]) -> tuple[WindowKind, ...]:
        """Those of the first rank's kinds of window that every rank can open."""
        others = [fellow.kinds for fellow in self._leading.fellows]
        return tuple(kind for kind in kinds if all(kind in theirs for theirs in others))

    def gpus(self, mine: str) -> tuple[str, ...]:
        """The GPU of each rank, the first one's first."""
        return (mine, *(fellow.gpu for fellow in self._leading.fellows))

    def silent(self) -> str | None:
        """Which ranks are silent, in words; None: none is."""
        return self._leading.silent()

    # ---- windows

    async def open(self, command: cmd.OpenWindow) -> ev.WindowOpened | ev.WindowFailed:
        """Open every rank's end of a window."""
        return await self._ranks.open(self._mine.open, command)

    async def abort(self, window: int) -> None:
        """Break a window off on every rank."""
        await self._ranks.everywhere(partial(self._mine.abort, window), "abort", window)

    async def close(self, window: int) -> None:
        """Leave an idle window in order, on every rank."""
        await self._ranks.everywhere(partial(self._mine.close, window), "close", window)

    async def alert(self, stamp: Stamp) -> None:
        """A round is about to come."""
        await self._ranks.everywhere(partial(self._mine.alert, stamp), "alert", stamp)

    async def receive(self, command: cmd.Receive) -> ev.Staged | ev.ReceiveFailed:
        """Receive a payload on every rank: it is staged on all, or dropped."""
        stamp, failed = command.stamp, None
        timeout_s = command.timeout_s + self._policy.store_s
        try:
            mine = partial(self._mine.receive, command)
            found = await self._ranks.all(mine, "receive", command, timeout_s, hurry=True)
        except SparsecastError as exc:
            identity = (stamp.epoch, stamp.window, stamp.attempt, stamp.version)
            failed = ev.ReceiveFailed(*identity, brief(exc), corrupt=False)
        else:
            failures = [event for event in found.values() if isinstance(event, ev.ReceiveFailed)]
            # A window that broke on one rank is broken, whatever others refused.
            failed = min(failures, key=lambda event: event.corrupt, default=None)
        if failed is None:
            return ev.Staged(stamp, command.announce)
        if not command.scratch:
            await self.drop((stamp.version,))
        return failed

    # ---- staging and weights

    async def take(self, entry: LogEntry, *, timeout_s: float, progress: Progress) -> None:
        """Load an entry of the log, check it, and stage it, on every rank or on none."""
        mine = partial(self._mine.take, entry, timeout_s=timeout_s, progress=progress)
        try:
            await self._ranks.all(mine, "take", entry, timeout_s + self._policy.bus_s)
        except BaseException as exc:
            await self.drop((entry.version,))
            if isinstance(exc, RankSilent):
                raise LogError(str(exc)) from None
            raise

    async def drop(self, versions: tuple[int, ...] | None) -> None:
        """Forget staged patches (None: all)."""
        await self._ranks.everywhere(partial(self._mine.drop, versions), "drop", versions)

    async def prove(self, claim: Claim) -> ev.Proved | ev.Unfit:
        """Compare every rank's weights with a claim's manifest; their digests add up.

        Waits for silent ranks: what they hold has to be seen."""
        self._proving = claim
        try:
            require_whole([self._layout, *self._leading.layouts], claim.manifest)
            mine = partial(self._mine.prove, claim)
            found = await self._ranks.patiently(
                mine, "prove", claim, while_=lambda: self._proving is claim
            )
        except ManifestMismatch as exc:
            return ev.Unfit(claim.epoch, exc.difference)
        except SparsecastError as exc:
            return ev.Unfit(claim.epoch, brief(exc))
        unfit = first_of(ev.Unfit, found)
        if unfit is not None:
            return unfit
        digests = [event.digest for event in found.values()]
        total = -1 if -1 in digests else added(digests)
        return ev.Proved(claim.epoch, claim.manifest.hash, total)

    async def hold(self, version: int) -> None:
        """Serve the weights, as they stand, as `version`."""
        await self._ranks.everywhere(partial(self._mine.hold, version), "hold", version)

    async def quarantine(self, reason: str) -> None:
        """Serve nothing until the next apply has committed."""
        await self._ranks.everywhere(partial(self._mine.quarantine, reason), "quarantine", reason)

    async def apply(self, versions: tuple[int, ...]) -> ev.AppliedHere | ev.ApplyFailed:
        """Apply staged versions on every rank, the others within the first one's hold of the guard;
        its version flips when all have written."""
        silent = self.silent()
        if silent is not None:
            return ev.ApplyFailed(silent, torn=False, waiting=True)
        if not self._leading.ranks:
            return await self._mine.apply(versions)
        return await self._mine.apply(versions, partial(self._together, versions))

    def _together(self, versions: tuple[int, ...], begin: Callable[[], None]) -> None:
        """Have the others write. On the torch thread, within the guard: `begin` says that something
        may be written by now."""
        ended = [
            _outcome(future)
            for future in self._leading.order("apply", versions, self._policy.store_s)
        ]
        failed = [end for end in ended if not isinstance(end, ev.AppliedHere)]
        if not failed:
            return
        refused = [end for end in failed if isinstance(end, ev.ApplyFailed) and not end.torn]
        reason = failed[0].reason if isinstance(failed[0], ev.ApplyFailed) else brief(failed[0])
        if len(refused) == len(ended):
            raise Unwritten(reason, waiting=all(end.waiting for end in refused))
        begin()
        raise EngineError(reason)

    async def digest(self, version: int) -> ev.Digested | ev.DigestFailed:
        """The digest of the whole state: the shares of the ranks add up. Waits for silent ranks."""
        try:
            found = await self._ranks.patiently(
                partial(self._mine.digest, version), "digest", version
            )
        except SparsecastError as exc:
            return ev.DigestFailed(version, brief(exc))
        failed = first_of(ev.DigestFailed, found)
        if failed is not None:
            return failed
        total = added(event.digest for event in found.values())
        return ev.Digested(version, total, max(event.verify_us for event in found.values()))


def told(layouts: Sequence[Layout]) -> tuple[tuple[bytes, ...], tuple[int, ...]]:
    """What a worker tells of what its ranks hold: their layouts, packed, and how many bytes of
    published tensors that is. Nothing where it would be too large to be said again and again."""
    packed = tuple(map(codec.pack_layout, layouts))
    if sum(map(len, packed)) > TOLD_NBYTES:
        return (), ()
    return packed, tuple(map(_held_nbytes, layouts))


def _held_nbytes(layout: Layout) -> int:
    itemsize = {spec.name: spec.itemsize for spec in layout.tensors}
    return sum(math.prod(part.shape) * itemsize[part.local] for part in layout.parts)


def _outcome(future: Future[Any]) -> Any:
    """What came of an order, or what was raised."""
    try:
        return future.result()
    except SparsecastError as exc:
        return exc


#: What a replica works with: one rank's hands, or those of all ranks of a worker.
AnyHands = Hands | Group
