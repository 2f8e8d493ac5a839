"""The trainer's end of windows: the one that is open or being opened, and the exchange that is
under way in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import assert_never

from ...messages import control as msg
from ...messages.control import Announce, Piece, Sender, Stamp, WindowKind
from . import commands as cmd
from .commands import TrainerCommand
from .exchange import Exchange, Phase
from .membership import Membership
from .openings import Openings
from .policy import Policy
from .routing import Classes, routed

#: What members answer in an exchange.
Answer = msg.Ready | msg.NotReady | msg.Opened | msg.Received


@dataclass(frozen=True, slots=True)
class Window:
    """A communicator of one epoch over a fixed list of ranks: the trainer is 0, then come those of
    the members, of each as many as `ranks` says. `classes`: who receives the same, see routing.py;
    empty: all do."""

    epoch: int
    number: int
    kind: WindowKind
    members: tuple[Sender, ...]
    ranks: tuple[int, ...]
    classes: Classes = Classes()  # noqa: RUF009 - frozen

    def stamp(self, attempt: int = 0, version: int = 0) -> Stamp:
        """The stamp of an attempt in it; attempt 0 is its opening."""
        return Stamp(self.epoch, self.number, attempt, version)


class Windows:
    """One window and one exchange at a time. Methods return what is to be said and done."""

    def __init__(
        self,
        me: Sender,
        kinds: tuple[WindowKind, ...],
        policy: Policy,
        membership: Membership,
        *,
        roots: int = 1,
        nbytes: int = 0,
    ) -> None:
        #: How many ranks of the trainer send, and how many bytes of weights they publish.
        self.roots = roots
        self.nbytes = nbytes
        self.open: Window | None = None
        self.exchange: Exchange | None = None
        self.openings = Openings(policy)
        self._me = me
        self._kinds = kinds
        self._policy = policy
        self._membership = membership
        #: The window that the exchange under way is to open.
        self._next: Window | None = None
        #: The attempt that members were asked to prepare for, and until when who has committed to
        #: it counts as committed.
        self._prepared: Stamp | None = None
        self._early: dict[Sender, float] = {}
        self._count = 0

    # ---- which window

    def wanted(self, head: int, now: float) -> tuple[WindowKind | None, tuple[Sender, ...]]:
        """The kind and the members of the window that the membership calls for."""
        inside = frozenset(self.open.members) if self.open is not None else frozenset()
        return self._membership.fit(self.openings.usable(self._kinds, now), inside, head, now)

    def is_open(self, kind: WindowKind | None, members: tuple[Sender, ...]) -> bool:
        """Whether the open window is just that one."""
        return self.open is not None and (self.open.kind, self.open.members) == (kind, members)

    def ask(
        self,
        epoch: int,
        kind: WindowKind,
        members: tuple[Sender, ...],
        head: int,
        now: float,
        *,
        whole: bool = False,
    ) -> list[TrainerCommand]:
        """Ask members to commit to a new window, which they enter at version `head`. `whole`: all
        receive the same in it; a patch that was parted for another window is whole again."""
        out = self.leave("another window follows")
        self._count += 1
        known = [self._membership.get(member) for member in members]
        ranks = tuple(len(member.gpus) if member is not None else 1 for member in known)
        routing = "broadcast" if whole else self._policy.routing
        classes = routed(known, routing, kind, self.roots, self.nbytes)
        self._next = Window(epoch, self._count, kind, members, ranks, classes)
        stamp = self._next.stamp(version=head)
        self.exchange = Exchange(stamp, members, now, self._policy.ready_s, self._policy.open_s)
        if any(self._membership.struck(member) for member in members):
            # Who was put out before does not hold the others up again.
            self._hurry(self.exchange)
        opening = msg.Opening(
            sender=self._me,
            stamp=stamp,
            kind=kind,
            members=members,
            ranks=ranks,
            enters_at=head,
            classes=classes.of,
        )
        return [*out, cmd.Say(opening)]

    def leave(self, reason: str) -> list[TrainerCommand]:
        """Leave the idle window, if one is open: in order, if all of its members are there."""
        window, self.open = self.open, None
        if window is None:
            return []
        sound = all(self._membership.get(member) is not None for member in window.members)
        way = cmd.CloseWindow(window.number) if sound else cmd.AbortWindow(window.number)
        return [way, self._abort(window.stamp(), reason)]

    # ---- the exchange

    def stamp(self, epoch: int, version: int, attempt: int = 1) -> Stamp:
        """Of an attempt through the open window; without one, of the log alone."""
        if self.open is None:
            return Stamp(epoch, 0, 0, version)
        return self.open.stamp(attempt, version)

    def prepare(self, version: int) -> list[TrainerCommand]:
        """Ask members to commit to a version that is still being made."""
        assert self.open is not None
        self._prepared = self.open.stamp(1, version)
        self._early = {}
        return [cmd.Say(msg.Prepare(sender=self._me, stamp=self._prepared))]

    def early(self, message: Answer, now: float) -> None:
        """A member's word that is on no exchange: perhaps on the one that is being prepared."""
        if message.stamp != self._prepared:
            return
        match message:
            case msg.Ready(expires_s=expires_s):
                # To count later on it has to outlive the wait for the others; from the first time
                # that it was heard, since the same word may come twice.
                self._early.setdefault(message.sender, now + expires_s - self._policy.ready_s)
            case _:
                self._early.pop(message.sender, None)

    def attempt(
        self,
        stamp: Stamp,
        announce: Announce,
        now: float,
        routes: tuple[tuple[Piece, ...], ...] = (),
    ) -> list[TrainerCommand]:
        """Begin an attempt to bring a version through the open window; `routes` are of its classes,
        and without them each receives all."""
        window = self.open
        assert window is not None
        policy = self._policy
        exchange = self.exchange = Exchange(
            stamp,
            window.members,
            now,
            policy.ready_s,
            policy.send_deadline_s(announce.nbytes),
            announce,
            routes,
        )
        self._hurry(exchange)
        for member in window.members:
            if self._membership.get(member) is None:
                exchange.refuse(member, "it has left", now)
        early = self._early if stamp == self._prepared else {}
        fresh = [member for member, until in early.items() if now < until]
        complete = [exchange.ready(member, now) for member in fresh]
        return self._go(exchange) if any(complete) else []

    def _hurry(self, exchange: Exchange) -> None:
        """Let the exchange wait for stragglers as the policy says."""
        policy = self._policy
        if policy.straggler_s is not None and policy.quorum != "all":
            exchange.quorum, exchange.straggler_s = policy.quorum, policy.straggler_s

    def under(self, stamp: Stamp) -> Exchange | None:
        """The exchange under way, if it is the one of this stamp."""
        return self.exchange if self.exchange is not None and self.exchange.stamp == stamp else None

    def answered(self, exchange: Exchange, message: Answer, now: float) -> list[TrainerCommand]:
        """A member's word on the exchange."""
        sender = message.sender
        match message:
            case msg.Ready():
                return self._go(exchange) if exchange.ready(sender, now) else []
            case msg.NotReady(reason=reason):
                exchange.refuse(sender, reason, now)
            case msg.Opened(error=error) if error is not None:
                # A window that one rank has not will never open: why wait for the rest?
                exchange.refuse(sender, error, now)
            case msg.Opened(error=error) | msg.Received(error=error):
                exchange.report(sender, error, now)
                if error is not None:
                    told = f"version {message.stamp.version}: {error}"
                    return [cmd.Tell("refused", sender.name, told)]
            case _:
                assert_never(message)
        return []

    def _go(self, exchange: Exchange) -> list[TrainerCommand]:
        stamp, work_s = exchange.stamp, exchange.work_s
        go = msg.Go(
            sender=self._me, stamp=stamp, announce=exchange.announce, routes=exchange.routes
        )
        if not exchange.opening:
            return [cmd.Say(go), cmd.Send(stamp, work_s, bool(exchange.routes))]
        window = self._next
        assert window is not None
        size, classes = 1 + sum(window.ranks), window.classes
        opening = cmd.OpenWindow(
            stamp, window.kind, 0, size, work_s, classes=classes.of, layouts=classes.layouts
        )
        return [cmd.Say(go), opening]

    def local(self, stamp: Stamp, error: str | None, now: float) -> None:
        """Our own part of the exchange is over, well or with `error`."""
        exchange = self.exchange
        if exchange is None or exchange.phase is not Phase.WORKING:
            return
        at = exchange.stamp
        if (at.epoch, at.window, at.attempt) == (stamp.epoch, stamp.window, stamp.attempt):
            exchange.local(error, now)

    def over(self) -> Exchange | None:
        """The exchange, once: if it has just ended."""
        exchange = self.exchange
        if exchange is None or not exchange.over:
            return None
        self.exchange = None
        return exchange

    def opened(self) -> list[TrainerCommand]:
        """Every rank has its end of the window: it is open."""
        window, self._next = self._next, None
        assert window is not None
        self.open = window
        self.openings.opened(window.kind)
        names = ", ".join(member.name for member in window.members)
        return [cmd.Tell("window-open", "trainer", f"{window.kind} {window.number}: {names}")]

    def failed(
        self, exchange: Exchange, left_out: tuple[Sender, ...], now: float
    ) -> list[TrainerCommand]:
        """It came to nothing: the window goes, and whoever is left out stays out for a while."""
        stamp, reason = exchange.stamp, exchange.reason
        out: list[TrainerCommand] = []
        for member in left_out:
            pause = self._membership.strike(member, now)
            if pause:
                out.append(cmd.Tell("evict", member.name, f"{reason}; out for {pause:g} s"))
        out.append(self._abort(stamp, reason))
        if not exchange.opening or exchange.went is not None:
            out.append(cmd.AbortWindow(stamp.window))
        out.append(cmd.Tell("window-abort", "trainer", f"window {stamp.window}: {reason}"))
        self.open = None
        window, self._next = self._next, None
        if exchange.opening and not left_out:
            assert window is not None
            self.openings.failed(window.kind, now)
        return out

    def abandon(self, reason: str) -> list[TrainerCommand]:
        """Break off whatever there is: the epoch or the trainer ends."""
        stamp = None
        if self.exchange is not None:
            stamp = self.exchange.stamp
        elif self.open is not None:
            stamp = self.open.stamp()
        self.exchange = self.open = self._next = None
        if stamp is None:
            return []
        return [self._abort(stamp, reason), cmd.AbortWindow(stamp.window)]

    def _abort(self, stamp: Stamp, reason: str) -> cmd.Say:
        return cmd.Say(msg.Abort(sender=self._me, stamp=stamp, reason=reason))
