"""What a replica has heard of the journal in this epoch: the claim, the announcements, and the
digest of each version, which is all that proves anything.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field

from ...messages.control import Announce, Claim
from .events import LogItem

#: How many announcements are remembered: their digests prove what the log brings.
HISTORY = 1024


@dataclass(slots=True)
class Announced:
    """The claim that is followed, and what was announced under it."""

    claim: Claim | None = None
    #: The newest announced version of this epoch.
    head: int | None = None
    digests: OrderedDict[int, int] = field(default_factory=OrderedDict)
    _announces: OrderedDict[int, Announce] = field(default_factory=OrderedDict)

    @property
    def epoch(self) -> int:
        """The epoch of the claim; 0 before the first."""
        return self.claim.epoch if self.claim is not None else 0

    @property
    def roots(self) -> int:
        """How many ranks the trainer sends from."""
        return max(len(self.claim.roots), 1) if self.claim is not None else 1

    def outranks(self, claim: Claim) -> bool:
        """Whether a claim is to be refused: lower epochs are, and what was said twice."""
        if self.claim is None or claim.epoch > self.epoch:
            return False
        # One journal never holds two claims of one epoch: another trainer's is of a new
        # journal, made by someone who could not know ours. It hears our epoch if it is lower.
        return claim.epoch < self.epoch or claim.sender == self.claim.sender

    def claimed(self, claim: Claim) -> None:
        """A new epoch: what an earlier one announced is void."""
        self.claim = claim
        self.head = claim.version
        self._announces.clear()
        self.digests.clear()
        self.digests[claim.version] = claim.digest

    def announced(self, announce: Announce) -> None:
        """An update of this epoch is on its way."""
        self._announces[announce.version] = announce
        self.digests[announce.version] = announce.digest
        self._forget()

    def logged(self, items: Iterable[LogItem]) -> None:
        """What the log says of its entries."""
        for item in items:
            # What was announced counts before what the log says of itself.
            self.digests.setdefault(item.version, item.digest)
        self._forget()

    def announce(self, version: int) -> Announce | None:
        """The announcement that made this version, while remembered."""
        return self._announces.get(version)

    def shown_by(self, digest: int) -> tuple[int, ...]:
        """The versions that weights of this digest are, in order."""
        return tuple(sorted(v for v, known in self.digests.items() if known == digest))

    def _forget(self) -> None:
        while len(self._announces) > HISTORY:
            self._announces.popitem(last=False)
        while len(self.digests) > HISTORY:
            self.digests.popitem(last=False)
