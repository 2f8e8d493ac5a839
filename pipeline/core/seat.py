"""A replica's seat in windows: opening, commitment, go, receive. Only the highest
(epoch, window) counts.
"""

from __future__ import annotations

from collections.abc import Callable

from ...messages import control as msg
from ...messages.control import Sender, Stamp
from . import commands as cmd
from . import events as ev
from .announced import Announced
from .commands import ReplicaCommand, Report
from .policy import Policy


class Seat:
    """One window, one commitment, one receive at a time. Methods return what is to be done."""

    def __init__(self, me: Sender, policy: Policy, announced: Announced) -> None:
        #: The attempt that we have promised to take part in, and until when.
        self.commitment: tuple[Stamp, float] | None = None
        self.receiving: Stamp | None = None
        self.opening: msg.Opening | None = None
        self._me = me
        self._policy = policy
        self._announced = announced
        #: The highest epoch and window that we were told of.
        self._seen = (0, 0)
        #: The window that is open at our end.
        self._inside: tuple[int, int] | None = None
        #: The last Go that we have followed.
        self._going: Stamp | None = None

    @property
    def coming(self) -> Stamp | None:
        """The attempt that is on its way to us, or may be soon."""
        if self.receiving is not None:
            return self.receiving
        return self.commitment[0] if self.commitment is not None else None

    def next_change(self) -> float | None:
        """When time alone will end our commitment."""
        return self.commitment[1] if self.commitment is not None else None

    # ---- windows

    def claimed(self, epoch: int) -> None:
        """A new epoch: no window of an earlier one counts."""
        self._seen = (epoch, 0)

    def asked(self, opening: msg.Opening, now: float) -> list[ReplicaCommand]:
        """The trainer wants to open a window: with us, or without."""
        at = _place(opening.stamp)
        if opening.stamp.epoch != self._announced.epoch or at <= self._seen:
            return []
        # Aborting the lower window first: two communicators at once could wait for each other.
        out = self.leave()
        self._seen = at
        if self._me in opening.members:
            self.opening = opening
            out.append(self._promise(opening.stamp, now))
        return out

    def opened(self, epoch: int, window: int) -> list[ReplicaCommand]:
        """Our end of a window is open."""
        opening = self.opening
        if opening is None or _place(opening.stamp) != (epoch, window):
            return []
        self._inside = (epoch, window)
        return [Report(msg.Opened(sender=self._me, stamp=opening.stamp))]

    def failed(self, epoch: int, window: int, reason: str) -> list[ReplicaCommand]:
        """Our end of a window did not open."""
        opening = self.opening
        if opening is None or _place(opening.stamp) != (epoch, window):
            return []
        told = Report(msg.Opened(sender=self._me, stamp=opening.stamp, error=reason))
        return [*self.leave(), told]

    def aborted(self, stamp: Stamp) -> list[ReplicaCommand]:
        """The trainer has broken a window off."""
        return self.leave() if _place(stamp) == self._seen else []

    def leave(self) -> list[ReplicaCommand]:
        """Break off whatever there is of a window; its number stays seen."""
        opening, self.opening = self.opening, None
        self.commitment = None
        self._inside = None
        self.receiving = None
        return [cmd.AbortWindow(opening.stamp.window)] if opening is not None else []

    # ---- commitments

    def prepare(
        self, stamp: Stamp, unable: Callable[[int], str | None], now: float
    ) -> list[ReplicaCommand]:
        """Commit to a version that is still being made, of whatever size; or say nothing."""
        if stamp.epoch != self._announced.epoch or _place(stamp) != self._inside:
            return []
        if stamp == self._going or stamp.version <= (self._announced.head or 0):
            return []  # Said twice, or late.
        if self.receiving is not None or unable(0) is not None:
            return []
        return [self._promise(stamp, now)]

    def commit(
        self, stamp: Stamp, unable: Callable[[int], str | None], now: float
    ) -> list[ReplicaCommand]:
        """Answer the call for an attempt: Ready, or why not.

        `unable` says why a patch of so many bytes could not be taken now, or None.
        """
        if stamp.epoch != self._announced.epoch or _place(stamp) != self._inside:
            return []
        if stamp == self._going:
            return []  # Said twice, and answered.
        announce = self._announced.announce(stamp.version)
        if announce is None:
            why: str | None = f"version {stamp.version} was not announced here"
        elif self.receiving is not None:
            why = f"still receiving {self.receiving}"
        else:
            why = unable(announce.nbytes)
        return [self._promise(stamp, now) if why is None else self._decline(stamp, why)]

    def tick(self, now: float) -> None:
        """A commitment ends by our own clock (rule 5)."""
        if self.commitment is not None and now >= self.commitment[1]:
            self.commitment = None

    def go(self, go: msg.Go, here: Callable[[int], bool], now: float) -> list[ReplicaCommand]:
        """All have committed: enter. `here` says whether a version is held or staged already."""
        stamp, opening = go.stamp, self.opening
        if opening is None or _place(stamp) != self._seen:
            return []  # Not a window of ours.
        if stamp == self._going:
            return []  # Said twice.
        promised, expires = self.commitment or (None, 0.0)
        if promised == stamp:
            self.commitment = None
        if promised != stamp or now >= expires:
            return [self._decline(stamp, "the commitment has run out")]
        self._going = stamp
        if stamp.attempt == 0:
            rank, size = opening.first_rank(self._me), opening.size
            roots = self._announced.roots
            open_s = self._policy.open_s
            return [
                cmd.OpenWindow(
                    stamp,
                    opening.kind,
                    rank,
                    size,
                    open_s,
                    tuple(range(roots)),
                    roots,
                    opening.classes,
                )
            ]
        # The journal's word, where it is here already.
        announce = self._announced.announce(stamp.version) or go.announce
        if announce is None or announce.version != stamp.version:
            return [self._decline(stamp, f"version {stamp.version} was not announced here")]
        self.receiving = stamp
        timeout_s = self._policy.send_deadline_s(announce.nbytes)
        return [cmd.Receive(stamp, announce, here(stamp.version), timeout_s, go.routes)]

    # ---- receives

    def received(self, stamp: Stamp) -> None:
        """A receive has completed, perhaps of an attempt that is over."""
        if self.receiving == stamp:
            self.receiving = None

    def receive_failed(self, event: ev.ReceiveFailed) -> list[ReplicaCommand]:
        """Nothing usable came. Refused bytes leave the window sound, all else leaves it broken."""
        stamp = Stamp(event.epoch, event.window, event.attempt, event.version)
        if self.receiving != stamp:
            return []
        self.receiving = None
        if event.corrupt:
            return [Report(msg.Received(sender=self._me, stamp=stamp, error=event.reason))]
        return [*self.leave(), self._decline(stamp, event.reason)]

    def _promise(self, stamp: Stamp, now: float) -> Report:
        expires_s = self._policy.commit_s
        self.commitment = (stamp, now + expires_s)
        return Report(msg.Ready(sender=self._me, stamp=stamp, expires_s=expires_s))

    def _decline(self, stamp: Stamp, why: str) -> Report:
        return Report(msg.NotReady(sender=self._me, stamp=stamp, reason=why))


def _place(stamp: Stamp) -> tuple[int, int]:
    return stamp.epoch, stamp.window
