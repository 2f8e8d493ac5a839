"""Ready and go with a deadline: the one pattern by which anyone ever enters a collective.

Opening a window and every attempt of a round are exchanges: members commit; when all have, all
enter; each reports how it went. The machine decides and says why; it sends nothing itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum

from ...messages.control import Announce, Piece, Sender, Stamp
from ...messages.errors import LocalProtocolError


class Phase(Enum):
    """Where an exchange is."""

    GATHERING = "gathering"
    WORKING = "working"
    DONE = "done"
    FAILED = "failed"


@dataclass(slots=True)
class Exchange:
    """One stamp's way from asking to done or failed. Times are the caller's clock, in seconds."""

    stamp: Stamp
    members: tuple[Sender, ...]
    began: float
    ready_s: float
    work_s: float
    #: What it brings; None: the window itself.
    announce: Announce | None = None
    #: What of it goes to each class of the window from each root; empty: all of it.
    routes: tuple[tuple[Piece, ...], ...] = ()
    #: Once so many have committed the others have `straggler_s` left; None: all of `ready_s`.
    quorum: int | None = None
    straggler_s: float = 0.0
    phase: Phase = Phase.GATHERING
    #: Members whose silence or refusal made it fail: the next try goes without them.
    left_out: tuple[Sender, ...] = ()
    #: What members reported: None is well, a text is what they refused.
    reports: dict[Sender, str | None] = field(default_factory=dict)
    went: float | None = None
    ended: float | None = None
    _ready: set[Sender] = field(default_factory=set)
    #: Why it has ended; "" while it has not.
    _why: str = ""
    #: When the quorum had committed.
    _quorum_at: float | None = None
    _local: bool = False

    @property
    def reason(self) -> str:
        """Why it is where it is, in words."""
        if self._why:
            return self._why
        if self.phase is Phase.GATHERING:
            return (
                self._explained(self._ready, "ready") if self._ready else "nobody has answered yet"
            )
        if not self.reports:
            return f"all {len(self.members)} are ready"
        return self._explained(set(self.reports), "through")

    @property
    def deadline(self) -> float | None:
        """When `tick` has something to decide, or None once the exchange is over."""
        if self.phase is Phase.GATHERING:
            return min(self.began + self.ready_s, self._impatient_at)
        if self.phase is Phase.WORKING:
            assert self.went is not None
            return self.went + self.work_s
        return None

    @property
    def _impatient_at(self) -> float:
        """When whoever has not committed although the quorum has is left out."""
        if self._quorum_at is None:
            return math.inf
        return max(self._quorum_at, self.began) + self.straggler_s

    @property
    def opening(self) -> bool:
        """Whether it is to open its window, rather than to bring a version through it."""
        return self.stamp.attempt == 0

    @property
    def over(self) -> bool:
        """Whether it is done or failed."""
        return self.phase in (Phase.DONE, Phase.FAILED)

    def ready(self, member: Sender, now: float) -> bool:
        """A member has committed; True if that was the last one: say go, and enter."""
        if self.phase is not Phase.GATHERING or member not in self.members:
            return False
        self._ready.add(member)
        if len(self._ready) == len(self.members):
            self.phase = Phase.WORKING
            self.went = now
            return True
        if self.quorum is not None and self._quorum_at is None and len(self._ready) >= self.quorum:
            self._quorum_at = now
        return False

    def refuse(self, member: Sender, why: str, now: float) -> None:
        """A member will not or cannot take part (any more)."""
        if self.over or member not in self.members:
            return
        if self.phase is Phase.WORKING and member in self.reports:
            return
        # Inside the collective a dead peer makes sound ones fail as well: nobody is blamed there,
        # and whoever is dead fails to commit to the next try.
        blamed = (member,) if self.phase is Phase.GATHERING else ()
        self._fail(f"{member.name} is out: {why}", blamed, now)

    def report(self, member: Sender, error: str | None, now: float) -> None:
        """A member is through: `error` None, or what it refused (its window is sound)."""
        if self.phase is not Phase.WORKING or member not in self.members:
            return
        self.reports.setdefault(member, error)
        self._settle(now)

    def local(self, error: str | None, now: float) -> None:
        """This side is through with its own part, or failed at it."""
        if self.over:
            return
        if self.phase is not Phase.WORKING:
            raise LocalProtocolError(f"{self.stamp}: local result while {self.phase.value}")
        if error is not None:
            self._fail(f"the trainer's side failed: {error}", (), now)
            return
        self._local = True
        self._settle(now)

    def tick(self, now: float) -> None:
        """Decide what the deadline decides."""
        deadline = self.deadline
        if deadline is None or now < deadline:
            return
        if self.phase is Phase.GATHERING:
            missing = tuple(m for m in self.members if m not in self._ready)
            when = f"within {self.ready_s:g} s"
            if now >= self._impatient_at:
                when = f"{self.straggler_s:g} s after {self.quorum} others were"
            self._fail(f"{_names(missing)} not ready {when}", missing, now)
            return
        missing = tuple(m for m in self.members if m not in self.reports)
        # Where our own side is stuck too, a dead peer may be holding up sound ones.
        blamed = missing if self._local else ()
        where = _names(missing) if missing else "the trainer's side"
        self._fail(f"{where} not through within {self.work_s:g} s", blamed, now)

    def _settle(self, now: float) -> None:
        if self._local and len(self.reports) == len(self.members):
            self.phase = Phase.DONE
            self.ended = now
            refused = [m for m, error in self.reports.items() if error is not None]
            self._why = f"refused by {_names(tuple(refused))}" if refused else "all are through"

    def _fail(self, reason: str, left_out: tuple[Sender, ...], now: float) -> None:
        self.phase = Phase.FAILED
        self._why = reason
        self.left_out = left_out
        self.ended = now

    def _explained(self, have: set[Sender], what: str) -> str:
        missing = tuple(m for m in self.members if m not in have)
        waiting = f", waiting for {_names(missing)}" if missing else ", waiting for the trainer"
        return f"{len(have)}/{len(self.members)} {what}{waiting}"


def _names(members: tuple[Sender, ...]) -> str:
    return ", ".join(sorted(member.name for member in members))
