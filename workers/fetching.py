"""Which entries of the log a worker takes for what its core asks for."""

from __future__ import annotations

from collections.abc import Sequence

from ..messages.control import Claim, LogEntry
from ..messages.errors import LogHole
from ..pipeline.core.commands import Fetch
from ..pipeline.log.base import way


def chosen(entries: Sequence[LogEntry], claims: Sequence[Claim], fetch: Fetch) -> list[LogEntry]:
    """The entries, in the order to apply. LogHole: none lead there.

    `claims` are the run's as far as they matter, the oldest first and the one that is followed
    last: one old version may be of an earlier epoch.
    """
    claim, held = claims[-1], fetch.held
    if fetch.reach == "exact":
        began = [one for one in claims if one.version <= fetch.target]
        if not began:
            reason = f"the journal knows no epoch that had version {fetch.target}"
            raise LogHole(reason, version=fetch.target)
        claim = began[-1]
        if held is not None and held < claim.version:
            held = None
    # An entry of the same epoch may be of another trainer, whose journal was forgotten.
    writers = ("", claim.sender.incarnation)
    ours = [e for e in entries if e.epoch == claim.epoch and e.writer in writers]
    newest = max((entry.version for entry in ours), default=0)
    try:
        most = max(newest, fetch.target) if fetch.reach == "newest" else fetch.target
        until = [entry for entry in ours if entry.version <= most]
        return way(until, epoch=claim.epoch, held=held, target=most)
    except LogHole:
        if fetch.reach == "exact":
            raise
        return way(ours, epoch=claim.epoch, held=held, target=fetch.target)
