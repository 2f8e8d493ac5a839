"""When the log is asked for what rounds have not brought: one fetch at a time, with back-offs."""

from __future__ import annotations

from dataclasses import dataclass

from .policy import Policy


@dataclass(slots=True)
class CatchUp:
    """The clock of fetches. Two things hold them back: a log that has nothing yet, which the
    trainer's Stored ends, and weights that fail again and again, which only a proof ends.
    """

    policy: Policy
    under_way: bool = False
    #: Why the log gave nothing the last time; "" if it did, or was not asked.
    trouble: str = ""
    #: Whether it had no way, not for the first time: it may have been asked too early then.
    hole: bool = False
    _at: float = 0.0
    _failures: int = 0
    _held_back_until: float = 0.0
    #: Resyncs and refused applies since the last state that was proven.
    _setbacks: int = 0

    @property
    def due(self) -> float:
        """When the log may be asked."""
        return max(self._at, self._held_back_until)

    def claimed(self, now: float) -> None:
        """A new epoch, a new log: it may be asked at once."""
        self._at = self._held_back_until = now
        self._failures = self._setbacks = 0
        self.trouble, self.hole = "", False

    def announced(self, now: float) -> None:
        """A version is new: its round may still bring it; the log is asked a little later."""
        self._at = max(self._at, now + self.policy.retry_s)

    def stored(self, now: float) -> None:
        """The trainer says that the log has more."""
        self._at = min(self._at, now)

    def found(self, now: float) -> None:
        """The log gave something that is of use."""
        self._failures = 0
        self.trouble, self.hole = "", False
        self._at = max(self._at, now)

    def failed(self, now: float, trouble: str, *, hole: bool = False) -> None:
        """The log gave nothing that is."""
        self.trouble, self.hole = trouble, hole and self._failures > 0
        self._at = now + self.policy.retry_s * 2.0 ** min(self._failures, 4)
        self._failures += 1

    def set_back(self, now: float) -> None:
        """Ask the log again: at once the first time, then ever later. An anchor is a full copy."""
        pause = self.policy.retry_s * (2.0 ** min(self._setbacks, 8) - 1.0)
        self._setbacks += 1
        self._held_back_until = now + min(pause, self.policy.backoff_max_s)
        self._at = now

    def proven(self) -> None:
        """The weights are right: what went wrong before is forgotten."""
        self._setbacks = 0
