"""What a worker takes from the log: which version its weights are, which entries lead on."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from ..messages.control import Claim, LogEntry
from ..messages.errors import BusError, LogError, LogHole, PatchError, brief
from ..pipeline.bus.journal import Journal
from ..pipeline.core import events as ev
from ..pipeline.core.commands import Fetch
from ..pipeline.core.policy import Policy
from ..pipeline.core.replica import ReplicaCore
from ..pipeline.log.base import reached, way
from ..pipeline.log.lineage import under
from .catching import Catching
from .driver import Ports
from .group import AnyHands

log = logging.getLogger("sparsecast.replica")


class Fetching:
    """Brings entries of the log into staging, for the core of one replica."""

    def __init__(
        self,
        core: ReplicaCore,
        ports: Ports,
        journal: Journal,
        hands: AnyHands,
        catching: Catching,
        policy: Policy,
    ) -> None:
        self._core = core
        self._ports = ports
        self._journal = journal
        self._hands = hands
        self._catching = catching
        self._policy = policy
        #: Entries whose bytes were not what they say.
        self._refused: set[str] = set()

    async def fetch(self, command: Fetch) -> ev.Fetched | ev.FetchFailed:
        """Stage the way from the log, as far as staging reaches."""
        claim = self._core.claim
        assert claim is not None
        catching, since = self._catching, self._ports.clock()
        items: list[ev.LogItem] = []
        try:
            entries = await self._ports.log.entries(timeout_s=self._policy.store_s)
            claims = await self._claims(command, claim)
            shown = shown_by(entries, claims, command)
            if shown is not None:
                return ev.Fetched(command.epoch, (), shown)
            found = self._around(entries, claims, command)
            catching.begin(command.held, found, since)
            nbytes = 0
            for entry in found:
                nbytes += entry.nbytes
                if items and nbytes > self._policy.staging_nbytes:
                    break
                await self._stage(entry)
                catching.staged(entry)
                items.append(
                    ev.LogItem(entry.base_version, entry.version, entry.digest, entry.nbytes)
                )
        except (LogError, BusError, PatchError, RuntimeError, MemoryError) as exc:
            # A hole is what a worker meets that is quicker than the log; the rest is trouble.
            level = logging.DEBUG if isinstance(exc, LogHole) else logging.WARNING
            log.log(level, "worker %s: the log gives nothing: %s", self._core.me.name, brief(exc))
            if not items:
                catching.broke_off(brief(exc))
                return ev.FetchFailed(command.epoch, brief(exc), isinstance(exc, LogHole))
            catching.loaded(0)  # of the one that failed: the next fetch begins with it
        if self._core.claim is not claim:
            await self._hands.drop(tuple(item.version for item in items))
            reason = "another claim came while the log was read"
            catching.broke_off(reason)
            return ev.FetchFailed(command.epoch, reason)
        if self._core.verified is not None:
            catching.verified(self._core.verified)  # a window may have been quicker
        return ev.Fetched(command.epoch, tuple(items))

    async def _claims(self, command: Fetch, claim: Claim) -> list[Claim]:
        """The claim that is followed, behind earlier ones where an old version is wanted."""
        if command.reach != "exact" or command.target >= claim.version:
            return [claim]
        claims = await self._journal.claims(timeout_s=self._policy.bus_s)
        return [*(one for one in claims if one.epoch < claim.epoch), claim]

    def _around(
        self, entries: list[LogEntry], claims: list[Claim], command: Fetch
    ) -> list[LogEntry]:
        """The way around what was refused; if none is left, all of it is tried again."""
        try:
            sound = [entry for entry in entries if entry.name not in self._refused]
            return chosen(sound, claims, command)
        except LogHole:
            self._refused.clear()
            return chosen(entries, claims, command)

    async def _stage(self, entry: LogEntry) -> None:
        try:
            await self._hands.take(
                entry, timeout_s=self._policy.store_s, progress=self._catching.loaded
            )
        except PatchError:
            self._refused.add(entry.name)
            raise


def chosen(entries: Sequence[LogEntry], claims: Sequence[Claim], fetch: Fetch) -> list[LogEntry]:
    """The entries, in the order to apply. LogHole: none lead there.

    `claims` are the run's as far as they matter, the oldest first and the one that is followed
    last: one old version may be of an earlier epoch.
    """
    claim, held = _claim(claims, fetch), fetch.held
    if held is not None and held < claim.version:
        held = None
    ours = under(claim, entries)
    newest = max((entry.version for entry in ours), default=0)
    try:
        most = max(newest, fetch.target) if fetch.reach == "newest" else fetch.target
        until = [entry for entry in ours if entry.version <= most]
        return way(until, epoch=claim.epoch, held=held, target=most)
    except LogHole:
        if fetch.reach == "exact":
            raise
        if fetch.reach == "nearest":
            beyond = [version for version in reached(ours, held) if version > fetch.target]
            most = min(beyond, default=fetch.target)
            ours = [entry for entry in ours if entry.version <= most]
        return way(ours, epoch=claim.epoch, held=held, target=fetch.target)


def shown_by(entries: Sequence[LogEntry], claims: Sequence[Claim], fetch: Fetch) -> int | None:
    """The newest version up to the one that is wanted which the log knows by the digest of weights
    that are no announced version, if it knows one: a worker that comes back need not start anew."""
    if fetch.digest is None:
        return None
    most = fetch.target if fetch.reach == "exact" else None
    return max(
        (
            entry.version
            for entry in under(_claim(claims, fetch), entries)
            if entry.digest == fetch.digest and (most is None or entry.version <= most)
        ),
        default=None,
    )


def _claim(claims: Sequence[Claim], fetch: Fetch) -> Claim:
    """The one whose epoch has what is wanted. LogHole."""
    if fetch.reach != "exact":
        return claims[-1]
    began = [claim for claim in claims if claim.version <= fetch.target]
    if not began:
        reason = f"the journal knows no epoch that had version {fetch.target}"
        raise LogHole(reason, version=fetch.target)
    return began[-1]
