"""Who is in: joins, names, silence and back-off, as the trainer sees them (rules 5, 9, 12)."""

from __future__ import annotations

from dataclasses import dataclass, field

from ...messages.control import Heartbeat, Join, Sender, WindowKind
from .policy import Policy

#: The kinds of window, best first.
PREFERENCE: tuple[WindowKind, ...] = ("nccl", "gloo", "bus")


@dataclass(slots=True)
class Member:
    """A worker that is in."""

    sender: Sender
    offers: tuple[WindowKind, ...]
    device: str
    host: str
    heard: float
    version: int | None = None
    verified: int | None = None
    lagging: str | None = None
    mismatches: int = 0
    #: How often in a row it was put out of a window, and until when it stays out.
    strikes: int = 0
    back_at: float = 0.0
    #: A newcomer that wants this name, until when the holder may answer the probe.
    challenger: Join | None = None
    challenge_ends: float = 0.0


@dataclass(slots=True)
class Membership:
    """The members by name. Methods return what happened; the caller tells the world."""

    policy: Policy
    members: dict[str, Member] = field(default_factory=dict)

    def get(self, sender: Sender) -> Member | None:
        """The member with this name and life, or None."""
        member = self.members.get(sender.name)
        return member if member is not None and member.sender == sender else None

    def admit(self, join: Join, now: float) -> Member:
        """Take a member in, in place of an earlier life of its name."""
        member = Member(
            sender=join.sender,
            offers=join.offers,
            device=join.device,
            host=join.host,
            heard=now,
            version=join.version,
        )
        self.members[join.sender.name] = member
        return member

    def challenge(self, join: Join, now: float) -> Member:
        """A newcomer wants a name that is held: the holder has probe_s to answer."""
        holder = self.members[join.sender.name]
        holder.challenger = join
        holder.challenge_ends = now + self.policy.probe_s
        return holder

    def hear(self, sender: Sender, now: float) -> Join | None:
        """Any word of a member counts as life; returns the challenger that this refutes."""
        member = self.get(sender)
        if member is None:
            return None
        member.heard = now
        refuted, member.challenger = member.challenger, None
        return refuted

    def beat(self, heartbeat: Heartbeat) -> None:
        """What a member holds, repeated with every heartbeat."""
        member = self.get(heartbeat.sender)
        if member is not None:
            member.version = heartbeat.version
            member.verified = heartbeat.verified
            member.lagging = heartbeat.lagging

    def reset(self) -> None:
        """A new epoch: what members hold has to be shown anew."""
        for member in self.members.values():
            member.version = None
            member.verified = None
            # What a newcomer holds has to be shown anew as well: it will say Join again.
            member.challenger = None

    def remove(self, sender: Sender) -> bool:
        """Take a member out; False if it was not in."""
        if self.get(sender) is None:
            return False
        del self.members[sender.name]
        return True

    def ceded(self, now: float) -> list[tuple[Member, Join]]:
        """Names whose holder did not answer its probe in time, with the newcomer."""
        return [
            (member, member.challenger)
            for member in self.members.values()
            if member.challenger is not None and now >= member.challenge_ends
        ]

    def silent(self, now: float) -> list[Member]:
        """Members unheard for silence_s."""
        return [m for m in self.members.values() if now - m.heard >= self.policy.silence_s]

    def strike(self, sender: Sender, now: float) -> float:
        """Put a member out of windows for a while; returns for how long, in seconds."""
        member = self.get(sender)
        if member is None:
            return 0.0
        pause = min(self.policy.backoff_s * 2.0**member.strikes, self.policy.backoff_max_s)
        member.strikes += 1
        member.back_at = now + pause
        return pause

    def pardon(self, sender: Sender) -> None:
        """A member has come through a round: its strikes are forgotten."""
        member = self.get(sender)
        if member is not None:
            member.strikes = 0

    def fit(
        self,
        kinds: tuple[WindowKind, ...],
        inside: frozenset[Sender],
        head: int,
        now: float,
    ) -> tuple[WindowKind | None, tuple[Sender, ...]]:
        """The kind of the next window and its members, in the order of their names.

        `inside` are the members of the present window: they stay whatever their lag, since
        patches wait in their staging; others enter only when they hold the head, or nearly, so
        that a joiner never delays a round.
        """
        ready = [
            m
            for m in sorted(self.members.values(), key=lambda m: m.sender.name)
            if m.back_at <= now
            and m.version is not None
            and (m.sender in inside or self._may_enter(m, head))
        ]
        wanted = PREFERENCE if self.policy.window == "auto" else (self.policy.window,)
        best: WindowKind | None = None
        members: tuple[Sender, ...] = ()
        for kind in wanted:
            # The best kind that all can, else the one that the most can.
            able = tuple(m.sender for m in ready if kind in kinds and kind in m.offers)
            if len(able) > len(members):
                best, members = kind, able
        return best, members

    def _may_enter(self, member: Member, head: int) -> bool:
        # A name in question stays where it is: anyone could break a window by asking for it.
        if member.challenger is not None or member.lagging is not None:
            return False
        return member.version is not None and member.version >= head - self.policy.join_lag

    def next_change(self, now: float) -> float | None:
        """When time alone will change something here."""
        times = [m.heard + self.policy.silence_s for m in self.members.values()]
        times += [m.back_at for m in self.members.values() if m.back_at > now]
        times += [m.challenge_ends for m in self.members.values() if m.challenger is not None]
        return min(times, default=None)
