"""Which versions of a run its entries make again, across epochs.

The entries of one epoch lead from its anchors on. A claim that went on from the state of an earlier
epoch says so by its digest: what made that state leads to the claim's version as well.
"""

from __future__ import annotations

from collections.abc import Sequence

from ...messages.control import Claim, LogEntry
from .base import Step, reached


def under(claim: Claim, entries: Sequence[LogEntry]) -> list[LogEntry]:
    """The entries that were stored under a claim: one of the same epoch may be of another trainer,
    whose journal was forgotten."""
    writers = ("", claim.sender.incarnation)
    return [e for e in entries if e.epoch == claim.epoch and e.writer in writers]


def remakeable(
    entries: Sequence[LogEntry], claims: Sequence[Claim], announced: int
) -> dict[int, Step]:
    """Every version up to `announced` that entries make again, each by the fewest bytes.

    `claims` are those of the run's journal, of one manifest, the oldest first. What an epoch has
    stored at or above the next claim's version was never announced, and what no claim is known of
    does not count.
    """
    made: dict[int, Step] = {}
    by_digest: dict[int, Step] = {}
    for at, claim in enumerate(claims):
        end = claims[at + 1].version if at + 1 < len(claims) else announced + 1
        earlier = by_digest.get(claim.digest)
        steps = reached(under(claim, entries), None if earlier is None else claim.version, earlier)
        if earlier is not None:
            steps.setdefault(claim.version, earlier)
        for version, step in steps.items():
            by_digest[step.entry.digest] = step
            if version < end:
                made[version] = step
    return made
