"""Rule 3, the trainer's share: an announced version is kept until it is safe, else merged into
the next. Here is which versions are not stored yet, and which are on their way into the log.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(slots=True)
class Safekeeping:
    """Announced versions on their way into the log: one entry at a time, with a back-off."""

    retry_s: float
    #: What the log holds.
    stored: int = 0
    #: Announced versions that it does not hold, in order, and those handed to it just now.
    unsafe: tuple[int, ...] = ()
    storing: tuple[int, ...] = ()
    _store_at: float = 0.0
    _failures: int = 0

    def reset(self, version: int) -> None:
        """A new epoch: its anchor is in the log at `version`, and holds what came before."""
        self.stored = version
        self.unsafe = self.storing = ()
        self._store_at = 0.0
        self._failures = 0

    def announced(self, version: int) -> None:
        """The round of a version is over: it is to be stored."""
        self.unsafe = (*self.unsafe, version)

    def merged(self, base_version: int, version: int) -> None:
        """A patch from base to version was taken: what it has taken along is not kept alone."""
        taken = range(base_version + 1, version)
        self.unsafe = tuple(v for v in self.unsafe if v in self.storing or v not in taken)

    def mergeable(self, with_everyone: Callable[[int], bool]) -> tuple[int, ...]:
        """Announced versions that are neither stored nor with everyone, to take along."""
        waiting = tuple(v for v in self.unsafe if v not in self.storing)
        for at, version in enumerate(waiting):
            if not with_everyone(version):
                # With all that follow it: a merged patch has no holes.
                return waiting[at:]
        return ()

    @property
    def due(self) -> float | None:
        """When the next entry may be stored, or None while there is none or one is under way."""
        return self._store_at if self.unsafe and not self.storing else None

    def store(self, now: float) -> tuple[int, ...]:
        """The versions to store now, merged into one entry; none if it is not time."""
        if self.due is None or now < self.due:
            return ()
        self.storing = self.unsafe
        return self.storing

    def confirmed(self, version: int) -> bool:
        """The log has everything up to `version`; True if that is news."""
        if version not in self.storing:
            return False  # Of an epoch that is over.
        self.storing = ()
        self._failures = 0
        self.unsafe = tuple(v for v in self.unsafe if v > version)
        news = version > self.stored
        self.stored = max(self.stored, version)
        return news

    def failed(self, version: int, now: float) -> bool:
        """The log could not store what it was given; True if it is the first time in a row."""
        if version not in self.storing:
            return False  # Of an epoch that is over.
        # They were merged to be stored, and are kept as one: a log that fails for long must not
        # cost memory for each of them.
        self.unsafe = tuple(v for v in self.unsafe if v not in self.storing[:-1])
        self.storing = ()
        self._store_at = now + self.retry_s * 2.0 ** min(self._failures, 6)
        self._failures += 1
        return self._failures == 1
