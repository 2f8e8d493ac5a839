"""Who is in: joins, names, silence and back-off, as the trainer sees them (rules 5, 9, 12)."""

from __future__ import annotations

from dataclasses import dataclass, field

from ...messages.control import Heartbeat, Join, Role, Sender, WindowKind
from .policy import Policy

#: The kinds of window, best first.
PREFERENCE: tuple[WindowKind, ...] = ("nccl", "gloo", "bus")
#: How many versions beyond join_lag a member may be behind that the log alone does not bring near.
FURTHER = 8


@dataclass(slots=True)
class Member:
    """A worker that is in."""

    sender: Sender
    offers: tuple[WindowKind, ...]
    device: str
    host: str
    #: Of each of its ranks the GPU that it is on.
    gpus: tuple[str, ...]
    heard: float
    role: Role = "rollout"
    #: What each of its ranks holds, packed, and how many bytes that is; see Join.
    layouts: tuple[bytes, ...] = ()
    held_nbytes: tuple[int, ...] = ()
    version: int | None = None
    verified: int | None = None
    lagging: str | None = None
    mismatches: int = 0
    #: How often in a row it was put out of a window, and until when it stays out.
    strikes: int = 0
    #: How often the log has brought it on since it last came through a round.
    steps: int = 0
    back_at: float = 0.0
    #: A newcomer that wants this name, until when the holder may answer the probe.
    challenger: Join | None = None
    challenge_ends: float = 0.0


@dataclass(slots=True)
class Membership:
    """The members by name. Methods return what happened; the caller tells the world."""

    policy: Policy
    members: dict[str, Member] = field(default_factory=dict)
    #: The GPU of each of the trainer's ranks: its places in a window are there.
    gpus: tuple[str, ...] = ("",)
    #: Before that, time alone changes nothing; None: to be found out. With many members each of
    #: their words would else cost a look at all of them.
    _calm_until: float | None = None

    def get(self, sender: Sender) -> Member | None:
        """The member with this name and life, or None."""
        member = self.members.get(sender.name)
        return member if member is not None and member.sender == sender else None

    @property
    def awaited(self) -> list[Member]:
        """The members that updates are for and wait for: all but those that evaluate."""
        return [member for member in self.members.values() if member.role == "rollout"]

    def admit(self, join: Join, now: float) -> Member:
        """Take a member in, in place of an earlier life of its name."""
        member = Member(
            sender=join.sender,
            offers=join.offers,
            device=join.device,
            host=join.host,
            gpus=join.gpus,
            heard=now,
            role=join.role,
            version=join.version,
            layouts=join.layouts,
            held_nbytes=join.held_nbytes,
        )
        self.members[join.sender.name] = member
        return member

    def challenge(self, join: Join, now: float) -> Member:
        """A newcomer wants a name that is held: the holder has probe_s to answer."""
        holder = self.members[join.sender.name]
        holder.challenger = join
        holder.challenge_ends = now + self.policy.probe_s
        self._calm_until = None
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
        self._calm_until = None
        return pause

    def struck(self, sender: Sender) -> bool:
        """Whether a member was put out since it last came through a round."""
        member = self.get(sender)
        return member is not None and member.strikes > 0

    def pardon(self, sender: Sender) -> None:
        """A member has come through a round: its strikes are forgotten."""
        member = self.get(sender)
        if member is not None:
            member.strikes = 0
            member.steps = 0

    def stepped(self, sender: Sender, lag: int) -> None:
        """The log has brought a member on, to `lag` versions behind the head."""
        member = self.get(sender)
        if member is not None:
            member.steps = 0 if lag <= self.policy.join_lag else member.steps + 1

    def fit(
        self,
        kinds: tuple[WindowKind, ...],
        inside: frozenset[Sender],
        head: int,
        now: float,
    ) -> tuple[WindowKind | None, tuple[Sender, ...]]:
        """The kind of the next window and its members, in the order of their names.

        `inside` are the members of the present window: they stay whatever their lag, since
        patches wait in their staging; others enter only when they hold the head, or nearly (a
        version less near with each step that the log has brought them), so that a joiner never
        delays a round. Who evaluates never enters.
        """
        ready = [
            m
            for m in sorted(self.awaited, key=lambda m: m.sender.name)
            if m.back_at <= now
            and m.version is not None
            and (m.sender in inside or self._may_enter(m, head))
        ]
        best: WindowKind | None = None
        members: tuple[Sender, ...] = ()
        for kind in self._wanted():
            # The best kind that all can, else the one that the most can.
            able = [m for m in ready if kind in kinds and kind in m.offers]
            if kind == "nccl":
                able = self._one_a_gpu(able, inside)
            if len(able) > len(members):
                best, members = kind, tuple(m.sender for m in able)
        return best, members

    def unseated(self, sender: Sender) -> str | None:
        """Why no window has a place for this member as things are; None if one has.

        Of two ranks on one GPU, NCCL takes neither: a member that can do nothing else needs a GPU
        that is known, and nobody else's.
        """
        member = self.get(sender)
        if member is None or member not in self.awaited:
            return None
        if [kind for kind in self._wanted() if kind in member.offers] != ["nccl"]:
            return None
        others = (m for m in self.awaited if m is not member and "nccl" in m.offers)
        shared = next(
            ((gpu, m.sender.name) for m in others for gpu in m.gpus if gpu in member.gpus), None
        )
        trainer = next((gpu for gpu in self.gpus if gpu in member.gpus), None)
        if "" in self.gpus:
            why = "it is not known which GPU the trainer's weights are on"
        elif len(set(self.gpus)) < len(self.gpus):
            why = f"two of the trainer's {len(self.gpus)} ranks share a GPU"
        elif "" in member.gpus:
            why = "it is not known which GPU its weights are on"
        elif trainer is not None:
            why = f"it shares {trainer} with the trainer"
        elif len(set(member.gpus)) < len(member.gpus):
            why = f"two of its {len(member.gpus)} ranks share a GPU"
        elif shared is not None:
            why = "it shares {} with {}".format(*shared)
        else:
            return None
        return (
            f"{why}, and nccl takes one rank a GPU: updates reach it by the log until it has a GPU "
            "of its own, or gloo or bus is offered and allowed"
        )

    def _wanted(self) -> tuple[WindowKind, ...]:
        return PREFERENCE if self.policy.window == "auto" else (self.policy.window,)

    def _one_a_gpu(self, able: list[Member], inside: frozenset[Sender]) -> list[Member]:
        """One of those that share a GPU, and none that shares the trainer's or is nowhere known."""
        if "" in self.gpus or len(set(self.gpus)) < len(self.gpus):
            return []
        taken, seated = {"", *self.gpus}, []
        # Who is in the window stays in: a newcomer on the same GPU would break it.
        for member in sorted(able, key=lambda m: m.sender not in inside):
            alone = len(set(member.gpus)) == len(member.gpus)
            if alone and taken.isdisjoint(member.gpus):
                taken.update(member.gpus)
                seated.append(member)
        return sorted(seated, key=lambda m: m.sender.name)

    def _may_enter(self, member: Member, head: int) -> bool:
        # A name in question stays where it is: anyone could break a window by asking for it.
        if member.challenger is not None or member.lagging is not None:
            return False
        if member.version is None:
            return False
        # Whom the log brings on, and who does not come near for all that, would stay behind as long
        # as updates follow each other faster: inside, they wait in its staging for what is missing.
        lag = self.policy.join_lag + min(member.steps, FURTHER)
        return member.version >= head - lag

    def next_change(self, now: float) -> float | None:
        """When time alone may change something here, and no later than it does."""
        if self._calm_until is None or self._calm_until <= now:
            self._calm_until = self._next_change(now)
        return self._calm_until

    def _next_change(self, now: float) -> float | None:
        times = [m.heard + self.policy.silence_s for m in self.members.values()]
        times += [m.back_at for m in self.members.values() if m.back_at > now]
        times += [m.challenge_ends for m in self.members.values() if m.challenger is not None]
        return min(times, default=None)
