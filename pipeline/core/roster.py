"""What members say of themselves, and what they are told: joins, names, heartbeats, proofs."""

from __future__ import annotations

from typing import Literal, assert_never

from ...messages import control as msg
from ...messages.control import Sender
from ...messages.metrics import EventKind
from . import commands as cmd
from .commands import TrainerCommand
from .ledger import Ledger
from .membership import Member, Membership
from .policy import Policy

#: The log is looked at at least so often while a member is stranded.
MEND_MAX_S = 600.0


class Roster:
    """Brings the membership and the ledger up to date. Methods return what is to be said."""

    def __init__(
        self,
        me: Sender,
        manifest_hash: str,
        policy: Policy,
        membership: Membership,
        ledger: Ledger,
    ) -> None:
        self._me = me
        self._manifest_hash = manifest_hash
        self._policy = policy
        self._membership = membership
        self._ledger = ledger
        #: The log is not looked at before, and how long it is left alone after that.
        self._mend_at = 0.0
        self._mend_s = policy.settle_s
        self._stranded: set[str] = set()

    # ---- in and out

    def heard(self, sender: Sender, now: float) -> list[TrainerCommand]:
        """Any word of a member is a sign of life, and an answer to a probe for its name."""
        refuted = self._membership.hear(sender, now)
        if refuted is None:
            return []
        reason = f"{sender.name} is held by a live worker"
        return self._refuse(refuted.sender, "name-in-use", reason)

    def join(self, join: msg.Join, epoch: int, head: int, now: float) -> list[TrainerCommand]:
        """A worker wants to be in, or says again that it is."""
        if join.manifest_hash != self._manifest_hash:
            return self._refuse(join.sender, "manifest", "its model is not the trainer's")
        out: list[TrainerCommand] = []
        known = self._membership.members.get(join.sender.name)
        if known is None:
            self._membership.admit(join, now)
            what = f", evaluates {join.follow}" if join.role == "evaluation" else ""
            told = f"on {join.host}, {join.device}{what}"
            out.append(cmd.Tell("join", join.sender.name, told))
            reason = self._membership.unseated(join.sender)
            if reason is not None:
                out.append(cmd.Tell("log-only", join.sender.name, reason))
        elif known.sender == join.sender:
            known.version = join.version
        elif known.challenger is None:
            self._membership.challenge(join, now)
            return [cmd.Say(msg.Probe(sender=self._me, to=known.sender))]
        else:
            return []
        welcome = msg.Welcome(sender=self._me, to=join.sender, epoch=epoch, version=head)
        return [*out, cmd.Say(welcome)]

    def remove(self, sender: Sender, kind: EventKind, reason: str) -> list[TrainerCommand]:
        """A member is out; nothing is said if it was not in."""
        if not self._membership.remove(sender):
            return []
        self._ledger.gone(sender.name)
        return [cmd.Tell(kind, sender.name, reason)]

    # ---- what they hold

    def told(
        self,
        message: msg.Applied | msg.Verified | msg.Heartbeat | msg.Refused,
        epoch: int,
        head: int,
        now: float,
    ) -> list[TrainerCommand]:
        """A word about a member's weights, which counts in its own epoch."""
        member = self._membership.get(message.sender)
        current = isinstance(message, msg.Refused) or message.epoch == epoch
        if member is None:
            # A member that was put out while it was stopped or cut off does not know: without a
            # word it would wait for rounds that never come.
            if current and isinstance(message, msg.Heartbeat):
                return [cmd.Say(msg.Rejoin(sender=self._me, to=message.sender))]
            return []
        if not current:
            return []
        match message:
            case msg.Applied(version=version, source=source):
                member.lagging = None
                if source == "log":
                    self._membership.stepped(member.sender, head - version)
                self._advanced(member, version, member.verified, now)
                return []
            case msg.Verified():
                return self._verified(member, message, now)
            case msg.Heartbeat():
                return self._beaten(member, message, now)
            case msg.Refused(version=version, reason=reason):
                return [cmd.Tell("refused", member.sender.name, f"version {version}: {reason}")]
            case _:
                assert_never(message)

    def have(self, version: int) -> bool:
        """Whether every member that is waited for, and at least one, has it in staging or already
        in its weights."""
        record = self._ledger.at(version)
        received = record.received if record is not None else ()
        members = self._membership.awaited
        return bool(members) and all(
            member.sender in received or (member.version is not None and member.version >= version)
            for member in members
        )

    def _beaten(self, member: Member, beat: msg.Heartbeat, now: float) -> list[TrainerCommand]:
        out: list[TrainerCommand] = []
        if beat.lagging is not None and member.lagging is None:
            out.append(cmd.Tell("lagging", member.sender.name, beat.lagging))
        self._membership.beat(beat)
        if beat.stranded and now >= self._mend_at:
            # Looking is a read of a whole anchor, and a member may be stranded by its own fault.
            self._mend_at = now + self._mend_s
            self._mend_s = min(2 * self._mend_s, MEND_MAX_S)
            self._stranded.add(member.sender.name)
            out.append(cmd.Mend())
        elif beat.version is not None and member.sender.name in self._stranded:
            # It has found a way: the next one is looked after at once.
            self._stranded.clear()
            self._mend_at, self._mend_s = now, self._policy.settle_s
        if beat.version is not None:
            self._advanced(member, beat.version, beat.verified, now)
        return out

    def _verified(self, member: Member, message: msg.Verified, now: float) -> list[TrainerCommand]:
        version, name = message.version, member.sender.name
        record = self._ledger.at(version)
        if message.ok and (record is None or record.digest == message.digest):
            self._advanced(member, member.version or version, version, now)
            return []
        member.mismatches += 1
        member.version = None
        told = cmd.Tell("mismatch", name, f"digest {message.digest:016x} at {version}")
        if not message.ok:
            return [told]
        reason = f"digest at version {version} is not the trainer's"
        return [told, cmd.Say(msg.Resync(sender=self._me, to=member.sender, reason=reason))]

    def review(self, now: float) -> None:
        """A round is over: who holds its version already has it."""
        for member in self._membership.members.values():
            if member.version is not None:
                self._advanced(member, member.version, member.verified, now)

    def _advanced(self, member: Member, version: int, verified: int | None, now: float) -> None:
        member.version = version
        member.verified = verified
        if member.role == "evaluation":
            return
        self._ledger.advanced(member.sender.name, version, verified, now)

    # ---- words

    def progress(
        self, version: int, missing_as: str | None, now: float
    ) -> tuple[dict[str, float], dict[str, str]]:
        """Who has applied `version`, in seconds after publish(), and who has not, and why, of
        those that are waited for.

        `missing_as` says why nobody can have it yet. A member that applied it and left since
        counts as one that has.
        """
        record = self._ledger.bringing(version)
        applied: dict[str, float] = {}
        if record is not None:
            applied = {name: at - record.published_at for name, at in record.applied.items()}
        missing: dict[str, str] = {}
        for member in self._membership.awaited:
            name = member.sender.name
            if member.version is not None and member.version >= version:
                applied.setdefault(name, 0.0)
            else:
                applied.pop(name, None)
                missing[name] = self._why_missing(member, missing_as, now)
        return applied, missing

    def _why_missing(self, member: Member, missing_as: str | None, now: float) -> str:
        silent_s = now - member.heard
        if silent_s > 2 * self._policy.heartbeat_s:
            return f"unheard for {silent_s:.1f} s"
        if member.lagging is not None:
            return f"lagging: {member.lagging}"
        if missing_as is not None:
            return missing_as
        if member.version is None:
            return "has not shown yet which version it holds"
        return f"at version {member.version}"

    def _refuse(
        self, to: Sender, code: Literal["name-in-use", "manifest"], reason: str
    ) -> list[TrainerCommand]:
        refusal = msg.Refuse(sender=self._me, to=to, code=code, reason=reason)
        return [cmd.Say(refusal), cmd.Tell("refused", to.name, reason)]
