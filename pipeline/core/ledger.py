"""What became of each announced version: who has applied and verified it, and until when it is
waited for. Changes here when a round's metrics do.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field

from ...messages.control import Sender, Tags

#: How many settled rounds are remembered, for waits that come late.
HISTORY = 256


@dataclass(slots=True)
class RoundRecord:
    """What happened to one announced version. Times: seconds on the driver's clock, 0 for never."""

    base_version: int
    version: int
    published_at: float
    nbytes: int
    dense_nbytes: int
    changed: int
    numel: int
    encoding: str
    digest: int
    diff_us: int
    encode_us: int
    step: int | None
    tags: Tags | None
    sealed_at: float = 0.0
    announced_at: float = 0.0
    went_at: float = 0.0
    received_at: float = 0.0
    window: int = 0
    transport: str = "log"
    attempt: int = 0
    members: tuple[Sender, ...] = ()
    #: Members that have staged it through the window.
    received: tuple[Sender, ...] = ()
    #: When each member had applied and verified it, by the driver's clock.
    applied: dict[str, float] = field(default_factory=dict)
    verified: dict[str, float] = field(default_factory=dict)


@dataclass(slots=True)
class Ledger:
    """The rounds that are over, by version: first open, while members still verify; then settled.

    A round settles when every member that is waited for has verified it or is gone, and at the
    latest `settle_s` after its last receipt.
    """

    settle_s: float
    _open: OrderedDict[int, RoundRecord] = field(default_factory=OrderedDict)
    #: Names that an open record still waits for.
    _awaited: dict[int, set[str]] = field(default_factory=dict)
    _settled: OrderedDict[int, RoundRecord] = field(default_factory=OrderedDict)
    #: The version of the newest record, and who holds and has proven a later one already: its round
    #: may end when they have left.
    _newest: int = -1
    _early: dict[str, tuple[int, int | None]] = field(default_factory=dict)

    def __len__(self) -> int:
        """How many rounds have not settled."""
        return len(self._open)

    def add(self, record: RoundRecord, awaited: Iterable[str]) -> None:
        """A round is over; these names have still to verify it."""
        self._open[record.version] = record
        self._awaited[record.version] = set(awaited)
        self._newest = record.version
        early, self._early = self._early, {}
        for name, (version, verified) in early.items():
            self.advanced(name, version, verified, record.received_at)

    def at(self, version: int) -> RoundRecord | None:
        """The round that ended in `version`, while remembered."""
        return self._open.get(version) or self._settled.get(version)

    def bringing(self, version: int) -> RoundRecord | None:
        """The round that brought `version`, alone or merged with later ones, while remembered."""
        for records in (self._settled, self._open):
            for candidate in records.values():
                if candidate.base_version < version <= candidate.version:
                    return candidate
        return None

    def advanced(self, name: str, version: int, verified: int | None, now: float) -> None:
        """A member holds `version`, and has proven `verified`. The first time counts."""
        if version > self._newest:
            self._early[name] = version, verified
        for record in self._open.values():
            if record.version <= version:
                record.applied.setdefault(name, now)
            if verified is not None and record.version <= verified:
                record.verified.setdefault(name, now)
                self._awaited[record.version].discard(name)

    def gone(self, name: str) -> None:
        """Nothing is to be expected of this member any more."""
        for awaited in self._awaited.values():
            awaited.discard(name)

    def settle(self, now: float) -> list[RoundRecord]:
        """The rounds that everyone has verified, or that have had their time, in order."""
        over = [
            record
            for version, record in self._open.items()
            if not self._awaited[version] or now >= record.received_at + self.settle_s
        ]
        for record in over:
            del self._open[record.version], self._awaited[record.version]
            self._settled[record.version] = record
        while len(self._settled) > HISTORY:
            self._settled.popitem(last=False)
        return over

    def next_change(self) -> float | None:
        """When time alone will settle a round."""
        oldest = next(iter(self._open.values()), None)
        return None if oldest is None else oldest.received_at + self.settle_s
