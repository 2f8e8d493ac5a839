"""What a worker makes of the log: which version its weights are, and which entries it takes."""

from __future__ import annotations

from collections.abc import Sequence

from ..messages.control import Claim, LogEntry
from ..messages.errors import LogHole
from ..pipeline.core.commands import Fetch
from ..pipeline.log.base import reached, way


def chosen(entries: Sequence[LogEntry], claims: Sequence[Claim], fetch: Fetch) -> list[LogEntry]:
    """The entries, in the order to apply. LogHole: none lead there.

    `claims` are the run's as far as they matter, the oldest first and the one that is followed
    last: one old version may be of an earlier epoch.
    """
    claim, held = _claim(claims, fetch), fetch.held
    if held is not None and held < claim.version:
        held = None
    ours = _ours(entries, claim)
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
            for entry in _ours(entries, _claim(claims, fetch))
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


def _ours(entries: Sequence[LogEntry], claim: Claim) -> list[LogEntry]:
    # An entry of the same epoch may be of another trainer, whose journal was forgotten.
    writers = ("", claim.sender.incarnation)
    return [e for e in entries if e.epoch == claim.epoch and e.writer in writers]
