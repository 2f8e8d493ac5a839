"""What a trainer has in the log: every announced patch, merged ones, an anchor now and then."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ..messages.control import LogEntry
from ..messages.errors import BusError, LogError, LogFull, LogHole, PatchError, SettingsError
from ..messages.manifest import Manifest
from ..pipeline.core import events as ev
from ..pipeline.core.policy import Policy
from ..pipeline.delta import Patch, merge
from ..pipeline.log.base import way
from ..pipeline.log.pieces import each, whole
from ..pipeline.log.retention import leading, needless, spare
from ..pipeline.log.spans import spans
from .driver import Ports
from .entries import Origin, describe, intact, read
from .leading import RankSilent
from .outgoing import Outgoing

log = logging.getLogger("sparsecast.publisher")

#: Patches are merged several at a time, for each merge passes over every tensor that they name: as
#: many as have so many bytes for each byte of the weights.
AT_ONCE = 1.0

#: What may go wrong with what is in the log already; the run goes on without it.
_Trouble = (LogError, BusError, PatchError, RuntimeError, MemoryError, OSError)


class Archive:
    """Stores kept patches and anchors, merges patches, and drops what that makes needless.

    `tell(reason)` hears of the first failure of a series. SettingsError: the quota is too small for
    these weights.
    """

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
        #: The newest version that is stored, and the newest that was looked at for spans to merge.
        self._stored = self._merged = 0
        self._merging = False
        #: The newest anchor that was read back from the log as it was stored.
        self._proven = ""
        self._pruning = asyncio.Lock()
        #: What goes wrong just now, of merging and pruning.
        self._failing: set[str] = set()
        least = 2 * self._anchor_nbytes
        if policy.quota_nbytes is not None and policy.quota_nbytes < least:
            model_nbytes = sum(manifest.nbytes for manifest in self._manifests)
            raise SettingsError(
                f"Policy.quota_nbytes is {policy.quota_nbytes}: the log of a model of "
                f"{model_nbytes} bytes needs {least}, since an anchor stays until the next one is "
                "there"
            )
        #: Whether the quota leaves no room for patches before the next anchor.
        self._crowded = False

    async def store(self, versions: tuple[int, ...], epoch: int) -> ev.LogStored | ev.LogFailed:
        """Store these kept versions as one entry, and let go of them."""
        try:
            if await self._fits(versions, epoch):
                entry, patch = await self._ports.run(self._outgoing.entry, versions, epoch)
                await self._put(entry, patch)
                self._crowded = False
        except (LogError, BusError) as exc:
            self._crowded = self._crowded or isinstance(exc, LogFull)
            return ev.LogFailed(versions[-1], str(exc))
        self._stored = versions[-1]
        await self._ports.run(self._outgoing.release, versions[-1])
        return ev.LogStored(versions[-1])

    def due(self, version: int) -> bool:
        """Whether an anchor is due at this version, and none is on its way."""
        late = self._crowded or version - self._last_anchor >= self._policy.anchor_every
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
                except (LogError, BusError, RankSilent, RuntimeError, MemoryError) as exc:
                    if isinstance(exc, LogFull):
                        await self._make_room(began)
                    if failures == 0:
                        self._tell(f"an anchor: {exc}")
                    failures += 1
                    await asyncio.sleep(self._policy.retry_s * 2.0 ** min(failures, 6))
                    continue
                self._crowded = False
                if await self._prune(began):
                    self._last_anchor = max(self._last_anchor, entry.version)
                    return
                failures += 1
                await asyncio.sleep(self._policy.retry_s * 2.0 ** min(failures, 6))
        finally:
            self._on_their_way -= 1

    async def mend(self, epoch: Callable[[], int]) -> None:
        """Store another anchor if the one that leads to the newest version is damaged or gone."""
        if self._on_their_way:
            return
        began, log, timeout_s = epoch(), self._ports.log, self._policy.store_s
        self._on_their_way += 1
        try:
            entries = await log.entries(timeout_s=timeout_s)
            anchor = leading(entries, epoch=began, writer=self._outgoing.writer)
            damage = "no anchor in the log leads to the newest version"
            if anchor is not None:
                self._proven = ""
                damage = await self._damage(anchor)
            if not damage:
                return  # it is the member that cannot read it
            self._tell(f"{damage}; a member needs one, and another is stored")
            if anchor is not None:
                # Its name may be the new one's, and readers would take it.
                async with self._pruning:
                    await log.prune([anchor], timeout_s=timeout_s)
        except _Trouble as exc:
            self._failed("mending", exc)
            return
        finally:
            self._on_their_way -= 1
        self._failing.discard("mending")
        await self.anchor(epoch)

    async def _fits(self, versions: tuple[int, ...], epoch: int) -> bool:
        """Whether there is room for these versions as one entry, before there is one: other ranks
        store their pieces of it from then on. False where an anchor has them; else LogFull."""
        if self._most_nbytes is None:
            return True
        joined = await self._ports.run(self._outgoing.join, versions)
        nbytes = joined * len(self._manifests)  # if all ranks have about as much
        if await self._has_room(nbytes, epoch):
            return True
        if self._last_anchor < versions[-1]:
            raise LogFull(
                f"{nbytes} bytes more would leave no room for the next anchor in the run's quota "
                f"of {self._policy.quota_nbytes} bytes (Policy.quota_nbytes); "
                "an anchor is taken now"
            )
        return False

    async def _has_room(self, nbytes: int, epoch: int) -> bool:
        """Whether so many bytes leave room for the next anchor in the run's quota."""
        most = self._most_nbytes
        if most is None:
            return True
        held = await self._ports.log.entries(timeout_s=self._policy.store_s)
        # What is not ours to drop never makes room: an anchor would not help.
        writers = ("", self._outgoing.writer)
        ours = [e for e in held if e.epoch < epoch or (e.epoch == epoch and e.writer in writers)]
        return sum(entry.nbytes for entry in ours) + nbytes <= most

    @property
    def _most_nbytes(self) -> int | None:
        """What the log may hold beside the next anchor, within its quota."""
        quota = self._policy.quota_nbytes
        return None if quota is None else quota - self._anchor_nbytes

    @property
    def _anchor_nbytes(self) -> int:
        """What an anchor takes at most, all of its pieces together."""
        return sum(roomy(manifest.nbytes) for manifest in self._manifests)

    @property
    def _manifests(self) -> list[Manifest]:
        """The tensors in whose coordinates each root's patches are, in the order of the roots."""
        roots = self._outgoing.roots
        return [layout.local for layout in roots] if roots else [self._outgoing.manifest]

    async def _make_room(self, epoch: int) -> None:
        """Drop what has to go before an anchor fits: a trainer has died between an anchor and its
        prune, or the quota is smaller than it was."""
        most, log = self._most_nbytes, self._ports.log
        if most is None:
            return
        timeout_s, writer = self._policy.store_s, self._outgoing.writer
        try:
            entries = await log.entries(timeout_s=timeout_s)
            drop = spare(entries, epoch=epoch, writer=writer, nbytes=most)
            if drop:
                self._tell(f"{len(drop)} entries go, so that an anchor has room in the quota")
                await log.prune(drop, timeout_s=timeout_s)
        except _Trouble as exc:
            self._failed("pruning", exc)

    @property
    def mergeable(self) -> bool:
        """Whether versions were stored since spans were looked for, and nothing is merged now."""
        every = self._policy.merge_every
        news = self._stored // every > self._merged // every
        return news and not self._merging and 1 < every <= self._policy.anchor_every

    async def merge(self, epoch: Callable[[], int]) -> None:
        """Merge the patches of every span that is complete by now, and drop what that covers.

        Behind everything else: read, merged and stored one at a time, beside the torch thread, with
        no more in memory than the merged patch and some more (`AT_ONCE`). Each span is tried once.
        Gives up when another epoch has begun.
        """
        began = epoch()
        while epoch() == began and self.mergeable:
            after, self._merged = self._merged, self._stored
            self._merging = True
            try:
                news = await self._merge(after, began, lambda: epoch() == began)
            except LogHole as exc:
                log.debug("not merged, it was pruned meanwhile: %s", exc)
                continue
            except _Trouble as exc:
                self._failed("merging", exc)
                continue
            finally:
                self._merging = False
            self._failing.discard("merging")
            if news and not await self._prune(began) and not self._on_their_way:
                await self.anchor(epoch)

    async def _merge(self, after: int, epoch: int, going: Callable[[], bool]) -> bool:
        """Merge the spans that the versions above `after` have completed; whether any was."""
        policy, news = self._policy, False
        line = (epoch, self._outgoing.writer, len(self._manifests))
        entries = await self._ports.log.entries(timeout_s=policy.store_s)
        ours = [
            entry
            for entry in entries
            if (entry.epoch, entry.writer, entry.roots) == line and entry.base_version is not None
        ]
        found = spans(ours, after=after, every=policy.merge_every, longest=policy.anchor_every)
        for begin, end in found:
            until = [entry for entry in ours if entry.version <= end]
            parts = way(until, epoch=epoch, held=begin, target=end)
            merged = await self._joined(parts, going) if len(parts) > 1 else None
            if merged is None or not going():
                continue
            if await self._has_room(sum(entry.nbytes for entry, _ in merged), epoch):
                for entry, payload in merged:
                    await self._ports.log.store(entry, payload, timeout_s=policy.store_s)
                ours += whole([entry for entry, _ in merged])
                news = True
        return news

    async def _joined(
        self, parts: Sequence[LogEntry], going: Callable[[], bool]
    ) -> list[tuple[LogEntry, memoryview]] | None:
        """These entries as one, or as a piece of each root, whose chains are merged one after the
        other; None if that is no smaller than they are, or than an anchor."""
        manifests = self._manifests
        chains = zip(*(each(part) for part in parts), strict=True)
        found: list[tuple[LogEntry, memoryview]] = []
        nbytes, dense_nbytes = 0, sum(manifest.nbytes for manifest in manifests)
        for chain, manifest in zip(chains, manifests, strict=True):
            patch: Patch | None = None
            for batch in _batches(chain, AT_ONCE * manifest.nbytes):
                read_in: list[bytes | bytearray] = []
                for part in batch:
                    if not going():
                        return None
                    read_in.append(await self._ports.log.load(part, timeout_s=self._policy.store_s))
                patch = await self._aside(_join, patch, batch, read_in, manifest)
                if nbytes + patch.nbytes >= dense_nbytes:
                    return None
            assert patch is not None
            nbytes += patch.nbytes
            found.append(await self._aside(_described, patch, chain[-1], len(parts)))
        return found if nbytes < sum(part.nbytes for part in parts) else None

    async def _aside(self, function: Callable[..., Any], *args: Any) -> Any:
        timeout_s = self._policy.store_s
        try:
            return await self._ports.aside(function, *args, timeout_s=timeout_s)
        except TimeoutError:
            raise LogError(f"it took more than {timeout_s:g} s (Policy.store_s)") from None

    async def _put(self, entry: LogEntry, patch: Patch) -> None:
        beside = self._outgoing.beside.pop(entry.name, [])
        # Copied on the torch thread: an anchor would hold the event loop up for long.
        payload = await self._ports.run(self._outgoing.wire, patch)
        await self._ports.log.store(entry, payload, timeout_s=self._policy.store_s)
        try:
            await asyncio.gather(*map(asyncio.wrap_future, beside))
        except RankSilent as exc:
            raise LogError(str(exc)) from exc

    async def _prune(self, epoch: int) -> bool:
        """Drop what the policy does not keep and nobody needs any more, once the anchor that is to
        lead to the newest version was read back. False if it is damaged: another one is needed.
        """
        timeout_s, log = self._policy.store_s, self._ports.log
        writer = self._outgoing.writer
        async with self._pruning:
            try:
                entries = await log.entries(timeout_s=timeout_s)
                drop = needless(
                    entries,
                    epoch=epoch,
                    writer=writer,
                    versions=self._policy.keep_versions,
                    nbytes=self._keep_nbytes,
                )
                if drop:
                    gone = {entry.name for entry in drop}
                    left = [entry for entry in entries if entry.name not in gone]
                    anchor = leading(left, epoch=epoch, writer=writer)
                    assert anchor is not None
                    damage = await self._damage(anchor)
                    if damage:
                        self._failed("pruning", f"{damage}; all stays, another anchor is stored")
                        # Its name may be the new one's, and readers would take it.
                        await log.prune([anchor], timeout_s=timeout_s)
                        return False
                    await log.prune(drop, timeout_s=timeout_s)
            except _Trouble as exc:
                # The next anchor's turn drops what this one left.
                self._failed("pruning", exc)
            else:
                self._failing.discard("pruning")
        return True

    @property
    def _keep_nbytes(self) -> int | None:
        """What the log may keep: there has to be room for the next anchor in its quota."""
        keep, most = self._policy.keep_nbytes, self._most_nbytes
        known = [nbytes for nbytes in (keep, most) if nbytes is not None]
        return min(known, default=None)

    async def _damage(self, anchor: LogEntry) -> str:
        """Why an anchor cannot be had from the log as it was stored; "" if it can. Read once."""
        if anchor.name == self._proven:
            return ""
        timeout_s, log = self._policy.store_s, self._ports.log
        try:
            for piece in each(anchor):
                data = await log.load(piece, timeout_s=timeout_s)
                await self._aside(intact, data, piece)
        except PatchError as exc:
            return f"log entry {anchor.name!r} is damaged: {exc}"
        except LogError as exc:
            # A tier that finds an entry damaged lists it no more; else it may be had later.
            listed = {entry.name for entry in await log.entries(timeout_s=timeout_s)}
            if anchor.name in listed and not isinstance(exc, LogHole):
                raise
            return str(exc)
        self._proven = anchor.name
        return ""

    def _failed(self, what: str, why: Exception | str) -> None:
        if what not in self._failing:
            self._failing.add(what)
            self._tell(f"{what}: {why}")


def roomy(nbytes: int) -> int:
    """What an anchor of weights of so many bytes takes in a log at most, with all around it."""
    return nbytes + nbytes // 50 + (1 << 16)


def _batches(parts: Sequence[LogEntry], nbytes: float) -> Iterator[list[LogEntry]]:
    """The parts in their order, as many at a time as have so many bytes, or one."""
    batch: list[LogEntry] = []
    for part in parts:
        if batch and sum(one.nbytes for one in batch) + part.nbytes > nbytes:
            yield batch
            batch = []
        batch.append(part)
    yield batch


def _join(
    before: Patch | None,
    batch: Sequence[LogEntry],
    read_in: Sequence[bytes | bytearray],
    manifest: Manifest,
) -> Patch:
    """What was merged so far and these entries, by their bytes (PatchError). In host memory, on any
    thread."""
    pairs = zip(batch, read_in, strict=True)
    patches = [read(intact(data, entry), entry, manifest).patch for entry, data in pairs]
    return merge(patches if before is None else [before, *patches], manifest=manifest)


def _described(patch: Patch, last: LogEntry, merged: int) -> tuple[LogEntry, memoryview]:
    """The entry of a merged patch that ends where `last` does, of the same root, and its bytes."""
    several = last.roots > 1
    entry = describe(
        patch,
        last.epoch,
        last.digest,
        last.step,
        last.tags,
        last.writer,
        merged=merged,
        origin=Origin(last.root, last.roots, last.layout, last.whole) if several else None,
    )
    return entry, patch.buffer.numpy().data
