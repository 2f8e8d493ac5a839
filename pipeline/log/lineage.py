"""Which versions of a run its entries make again, across epochs.

The entries of one epoch lead from its anchors on. A claim that went on from the state of an earlier
epoch says so by its digest: what made that state leads to the claim's version as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...messages.control import Claim, LogEntry


@dataclass(frozen=True, slots=True)
class Step:
    """A version that can be made again: by `entry`, applied to what `before` makes (None: anything,
    the entry is an anchor). `nbytes`: of all entries on the way."""

    version: int
    digest: int
    entry: LogEntry
    before: Step | None
    nbytes: int

    @property
    def way(self) -> list[LogEntry]:
        """The entries, in the order to apply, from nothing."""
        found: list[LogEntry] = []
        step: Step | None = self
        while step is not None:
            found.append(step.entry)
            step = step.before
        return found[::-1]


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
        reached = _reached(entries, claim, by_digest.get(claim.digest))
        for version, step in reached.items():
            by_digest[step.digest] = step
            if version < end:
                made[version] = step
    return made


def _reached(entries: Sequence[LogEntry], claim: Claim, start: Step | None) -> dict[int, Step]:
    """The versions of one claim; `start` makes the claim's own, if an earlier epoch does."""
    writers = ("", claim.sender.incarnation)
    ours = [e for e in entries if e.epoch == claim.epoch and e.writer in writers]
    reached = {} if start is None else {claim.version: start}
    # Every entry leads upwards: in the order of versions each is final when it is stepped from.
    for entry in sorted(ours, key=lambda e: e.version):
        before: Step | None = None
        if entry.base_version is not None:
            bases = [v for v in reached if entry.base_version <= v < entry.version]
            if not bases:
                continue
            before = min((reached[v] for v in bases), key=lambda step: step.nbytes)
        nbytes = entry.nbytes + (before.nbytes if before is not None else 0)
        known = reached.get(entry.version)
        if known is None or nbytes < known.nbytes:
            reached[entry.version] = Step(entry.version, entry.digest, entry, before, nbytes)
    return reached
