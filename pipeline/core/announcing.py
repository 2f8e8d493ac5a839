"""What the trainer has asked of the journal and has no answer to: an announcement, or the run
anew (rule 11). Asked again until the answer comes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, assert_never

from ...messages.control import Announce, Stamp
from . import commands as cmd
from .events import AnnounceFailed


@dataclass(slots=True)
class Announcing:
    """One question at a time, repeated `retry_s` after each failure."""

    retry_s: float
    #: The announcement that the journal has not confirmed yet: the next one waits for it, since
    #: it has to name the place of this one there.
    pending: Announce | None = None
    #: The epoch at which the run is being claimed anew.
    reclaiming: int | None = None
    retry_at: float | None = None
    #: An announcement given up with its epoch, whose outcome is still to come.
    _orphan: int | None = None

    def append(self, announce: Announce) -> cmd.Append:
        """Ask for an announcement to be stored."""
        self.pending = announce
        return cmd.Append(announce)

    def asks(self, stamp: Stamp) -> bool:
        """Whether the announcement under this very stamp is unanswered."""
        return self.pending is not None and self.pending.stamp == stamp

    def confirmed(self, version: int) -> bool:
        """The journal has stored it; False if that was not asked for (any more)."""
        if self.pending is None or self.pending.version != version:
            return False
        self.pending = None
        return True

    def failed(self, event: AnnounceFailed, now: float) -> Literal["fenced", "lost"] | None:
        """The journal has not; None if that ends nothing."""
        if self.reclaiming is not None:
            return None
        ours = self.pending is not None and self.pending.version == event.version
        match event.cause:
            case "fenced":
                return "fenced" if ours else None
            case "lost":
                # The keeper of the lease may find it out before an append that is still under
                # way: what that one says later is of the stream that is gone.
                if event.version == self._orphan:
                    self._orphan = None
                    return None
                return "lost"
            case "unavailable":
                if ours:
                    self.retry_at = now + self.retry_s
                return None
            case _:
                assert_never(event.cause)

    def drop(self) -> None:
        """The epoch is over, or the trainer is: the announcement is given up."""
        self.pending = None

    def reclaim(self, epoch: int) -> cmd.Reclaim:
        """Ask for the run anew; the announcement is given up with its epoch."""
        if self.pending is not None:
            self._orphan = self.pending.version
        self.pending = None
        self.reclaiming = epoch
        self.retry_at = None
        return cmd.Reclaim(epoch)

    def reclaim_failed(self, now: float) -> None:
        """The run could not be claimed anew yet."""
        if self.reclaiming is not None:
            self.retry_at = now + self.retry_s

    def claimed(self) -> None:
        """A new epoch has begun."""
        self.reclaiming = None
        self.retry_at = None

    def retry(self, now: float) -> cmd.Append | cmd.Reclaim | None:
        """What is to be asked again, if it is time."""
        if self.retry_at is None or now < self.retry_at:
            return None
        self.retry_at = None
        if self.reclaiming is not None:
            return cmd.Reclaim(self.reclaiming)
        return cmd.Append(self.pending) if self.pending is not None else None
