"""Which kinds of window may be opened when, after some that did not open."""

from __future__ import annotations

from dataclasses import dataclass, field

from ...messages.control import WindowKind
from .policy import Policy


@dataclass(slots=True)
class Openings:
    """Openings that failed with nobody to blame: a few tries, then a rest.

    Where the kind is free (`window="auto"`) it rests alone and the next best is opened; the last
    resort, or the only kind allowed, is tried ever more rarely.
    """

    policy: Policy
    #: Nothing is opened before.
    resume_at: float = 0.0
    _failures: int = 0
    #: Kinds that did not open, until when they rest, and how often that has been so.
    _resting: dict[WindowKind, float] = field(default_factory=dict)
    _rests: dict[WindowKind, int] = field(default_factory=dict)

    def reset(self) -> None:
        """A new epoch: the tries count anew, what rests does so on."""
        self._failures = 0

    def usable(self, kinds: tuple[WindowKind, ...], now: float) -> tuple[WindowKind, ...]:
        """Those that do not rest."""
        return tuple(kind for kind in kinds if self._resting.get(kind, 0.0) <= now)

    def opened(self, kind: WindowKind) -> None:
        """A window of this kind is open: what was held against it is forgotten."""
        self._failures = 0
        self._rests.pop(kind, None)

    def failed(self, kind: WindowKind, now: float) -> None:
        """A window did not open, and nobody in particular is to blame."""
        self._failures += 1
        before = self._rests.get(kind, 0)
        # What has been given up before gets one try at a time: each holds rounds up for open_s.
        if self._failures < (1 if before else self.policy.attempts):
            return
        self._failures = 0
        self._rests[kind] = before + 1
        if self.policy.window == "auto" and kind != "bus":
            self._resting[kind] = now + self.policy.backoff_max_s
        else:
            pause = self.policy.backoff_s * 2.0 ** min(before, 16)
            self.resume_at = now + min(pause, self.policy.backoff_max_s)
