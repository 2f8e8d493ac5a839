"""The lane: everything that is done to the weights or read from them, one thing at a time.

Prove under each claim; then apply what is staged in the order of versions, from rounds and from
the log alike; digest each state before the next apply; fetch what is missing.
"""

from __future__ import annotations

from ...messages import control as msg
from ...messages.control import Role, Sender, Stamp
from . import commands as cmd
from . import events as ev
from .announced import Announced
from .catchup import CatchUp
from .commands import ReplicaCommand, Report
from .follow import Follow
from .policy import Policy
from .staging import Patch, Staging

ANOTHER = "the journal has announced another patch"


class Lane:
    """What the weights are, and what happens to them next. Methods return what is to be done."""

    def __init__(
        self, me: Sender, policy: Policy, announced: Announced, role: Role, follow: Follow
    ) -> None:
        #: What the weights are proven or applied to be in this epoch; None: not known, or wrong.
        self.version: int | None = None
        self.verified: int | None = None
        self.mismatches = 0
        #: Why patches wait although nothing is missing.
        self.lagging: str | None = None
        #: Of our model, once it was found to be the claim's.
        self.manifest_hash = ""
        #: A claim has come that the weights were not compared with yet.
        self.to_prove = False
        #: What is at the weights just now.
        self.proving = False
        self.applying: tuple[int, ...] | None = None
        self.digesting: int | None = None
        self.staging = Staging()
        self._catchup = CatchUp(policy)
        self._me = me
        self._policy = policy
        self._announced = announced
        self._role = role
        self._follow = follow
        #: The digest of the one version that is followed, once it was here, and the newest claim
        #: under which that is so.
        self._pinned: tuple[int, msg.Claim] | None = None
        #: A resync was called for while an apply or a proof ran: what it finds does not count.
        self._void = False
        #: The digest of weights that are no version yet, until something is written to them.
        self._unnamed: int | None = None
        self._apply_at = 0.0

    # ---- what comes next

    def next(self, coming: Stamp | None, now: float) -> list[ReplicaCommand]:
        """Start the next thing that the weights need. `coming` is the attempt on its way."""
        claim = self._announced.claim
        if claim is None or not self._free:
            return []
        if self.to_prove:
            self.to_prove = False
            self._void = False
            self.proving = True
            return [cmd.Prove(claim)]
        if not self.manifest_hash:
            return []
        out = self._tidy()
        chain = self.staging.chain(self.version)
        if chain and now >= self._apply_at:
            self.applying = chain
            self._unnamed = None
            out.append(cmd.Apply(chain))
        elif not chain and self._may_fetch(coming) and now >= self._catchup.due:
            self._catchup.under_way = True
            target, goal = claim.version if self.version is None else self.version + 1, self.goal
            if not self._follow.latest and goal is not None:
                target = goal
            # Of the latest at least one step: the driver goes as far as the log does.
            reach = self._follow.reach
            out.append(cmd.Fetch(claim.epoch, self.version, target, reach, self._unnamed))
        return out

    def next_change(self, coming: Stamp | None, now: float) -> float | None:
        """When time alone will let something start: next() has started what is due."""
        if not self._free or self.to_prove or not self.manifest_hash:
            return None
        times = [self._apply_at]
        if self._may_fetch(coming):
            times.append(self._catchup.due)
        return min((time for time in times if time > now), default=None)

    @property
    def behind(self) -> bool:
        """Whether there is more to be had than the weights hold."""
        goal = self.goal
        return goal is not None and (self.version is None or self.version < goal)

    @property
    def goal(self) -> int | None:
        """The version that the weights should hold as things are; None: none is there yet."""
        claim, head = self._announced.claim, self._announced.head
        if claim is None or head is None:
            return None
        return self._follow.goal(claim.version, head)

    @property
    def _free(self) -> bool:
        return self.applying is None and self.digesting is None and not self.proving

    def _may_fetch(self, coming: Stamp | None) -> bool:
        if not self.behind or self._catchup.under_way:
            return False
        if self.version is None or coming is None or not coming.attempt:
            return True
        announce = self._announced.announce(coming.version)
        # Unless the round in flight brings just what is missing.
        return announce is None or announce.base_version > self.version

    # ---- claims and proofs

    def claimed(self, now: float) -> list[ReplicaCommand]:
        """A new epoch: what an earlier one called this version may be void."""
        self.lagging = None
        out = self._drop_all()
        # Only the digest can tell.
        self.version = None
        self._keep_pinned()
        self.verified = None
        self._unnamed = None
        self.manifest_hash = ""
        self.to_prove = True
        self._catchup.claimed(now)
        return out

    def _keep_pinned(self) -> None:
        """No later epoch changes what a version is; but a journal that was made anew by another
        trainer counts its own versions from 0."""
        claim, pinned = self._announced.claim, self._follow.pinned
        if self._pinned is None or claim is None or pinned is None:
            return
        digest, before = self._pinned
        self._pinned = None
        if claim.nonce == before.nonce or claim.sender == before.sender:
            self._pinned = digest, claim
            self._announced.digests[pinned] = digest

    def proved(self, event: ev.Proved) -> list[ReplicaCommand]:
        """Our model is the claim's, and the weights have this digest."""
        self.proving = False
        void, self._void = self._void, False
        if event.epoch != self._announced.epoch:
            return []
        self.manifest_hash = event.manifest_hash
        if void:
            return []
        self._unnamed = event.digest
        return self._name()

    def _name(self) -> list[ReplicaCommand]:
        """Weights that are no version yet may be one that was announced."""
        if self._unnamed is None:
            return []
        shown = [v for v in self._announced.shown_by(self._unnamed) if self._follow.admits(v)]
        if not shown:
            return []
        self._proven(shown[-1], self._unnamed)
        self._unnamed = None
        return [cmd.Hold(shown[-1])]

    def _shown(self, version: int) -> list[ReplicaCommand]:
        """The log knows which version the weights are."""
        digest, self._unnamed = self._unnamed, None
        if digest is None or not self._follow.admits(version):
            return []
        self._proven(version, digest)
        return [cmd.Hold(version)]

    def _proven(self, version: int, digest: int) -> None:
        """The weights are this version."""
        self.version = self.verified = version
        claim = self._announced.claim
        if version == self._follow.pinned and claim is not None:
            self._pinned = digest, claim

    def unfit(self) -> None:
        """Our model is not the claim's."""
        self.proving = False

    # ---- staging

    def raise_head(self, version: int, now: float) -> None:
        """This version was announced, here or where we have not heard it."""
        head = self._announced.head
        if head is not None and version <= head:
            return
        if not self.behind:
            # Who is behind already must not be put off by each new version.
            self._catchup.announced(now)
        self._announced.head = version

    def stored(self, now: float) -> None:
        """The log has more."""
        self._catchup.stored(now)

    def has(self, version: int) -> bool:
        """Whether it is in the weights or in staging."""
        held = self.version is not None and self.version >= version
        return held or version in self.staging.patches

    def full(self, nbytes: int) -> str | None:
        """Why so many bytes more cannot be staged, or None. One patch always can."""
        held = self.staging.nbytes
        if held and held + nbytes > self._policy.staging_nbytes:
            return f"{held} bytes of patches wait in staging"
        return None

    def received(self, event: ev.Staged) -> list[ReplicaCommand]:
        """A receive that completed and checked is good, whatever became of its attempt (rule 6); it
        is kept apart until the journal has made the announcement that it was checked against.
        """
        stamp, announce, version = event.stamp, event.announce, event.announce.version
        known, why = self._announced.announce(version), None
        out: list[ReplicaCommand] = []
        if self.version is not None and version <= self.version:
            out = [self.staging.drop((version,))]  # The log was faster.
        elif known is not None and known != announce:
            out, why = [self.staging.drop((version,))], ANOTHER
        else:
            awaits = announce if known is None else None
            patch = Patch(announce.base_version, version, announce.nbytes, "window", awaits)
            self.staging.add(patch)
        return [*out, Report(msg.Received(sender=self._me, stamp=stamp, error=why))]

    def announced(self, announce: msg.Announce) -> list[ReplicaCommand]:
        """The journal has made this announcement: what came with another one is worth nothing.

        A trainer that resumes may announce what the one before had, and the log had not: who holds
        that need not fetch it.
        """
        if self.staging.confirm(announce):
            return self._name()
        version = announce.version
        return [self.refused(version, ANOTHER), self.staging.drop((version,))]

    def fetched(self, event: ev.Fetched, now: float) -> list[ReplicaCommand]:
        """The log gave these."""
        self._catchup.under_way = False
        if event.epoch != self._announced.epoch:
            return [self.staging.drop(tuple(item.version for item in event.items))]
        if event.shown is not None:
            return self._shown(event.shown)
        self._announced.logged(event.items)
        for item in event.items:
            self.staging.add(Patch(item.base_version, item.version, item.nbytes, "log"))
        if not self.behind:
            self._catchup.found(now)
            return []
        out = self._tidy()
        if self.staging.chain(self.version):
            self._catchup.found(now)
        else:
            # What it gave leads nowhere from here (a resync came in between, say).
            self._catchup.failed(now, "it has nothing that fits")
        return out

    def fetch_failed(self, event: ev.FetchFailed, now: float) -> None:
        """The log gave nothing."""
        self._catchup.under_way = False
        if event.epoch == self._announced.epoch:
            self._catchup.failed(now, event.reason, hole=event.hole)

    @property
    def trouble(self) -> str:
        """Why the log gave nothing the last time, in words; "" if all is well."""
        return self._catchup.trouble

    # ---- applies and digests

    def applied(self, event: ev.AppliedHere) -> list[ReplicaCommand]:
        """The weights hold what was applied."""
        applying, self.applying = self.applying, None
        void, self._void = self._void, False
        assert applying is not None
        if self.to_prove:
            return []  # A claim came meanwhile: the digest tells what this version is called there.
        if void:
            # Its commit must not lift the quarantine of the resync.
            return [cmd.Quarantine("a resync was called for while an apply ran")]
        source = self.staging.take(applying)
        self.version = self.digesting = event.version
        self.lagging = None
        told = msg.Applied(
            sender=self._me,
            epoch=self._announced.epoch,
            version=event.version,
            staged_us=event.staged_us,
            apply_us=event.apply_us,
            source=source,
        )
        return [Report(told), cmd.Digest(event.version)]

    def apply_failed(self, event: ev.ApplyFailed, now: float) -> list[ReplicaCommand]:
        """The weights hold what they held, or are torn."""
        applying, self.applying = self.applying, None
        void, self._void = self._void, False
        if self.to_prove or void:
            return []
        reason = event.reason
        if event.waiting:
            self.lagging = reason
            self._apply_at = now + self._policy.retry_s
            return [self.heartbeat()]
        assert applying is not None
        out: list[ReplicaCommand] = [self.refused(applying[-1], reason)]
        out.append(self.staging.drop(applying))
        if event.torn:
            return [*out, *self.resync(f"an apply broke off: {reason}", now)]
        self._catchup.set_back(now)
        return out

    def digested(self, event: ev.Digested, now: float) -> list[ReplicaCommand]:
        """The digest of the whole state: it is the announced one, or the weights are wrong."""
        version = event.version
        self.digesting = None
        if self.to_prove or self.version != version:
            return []
        expected = self._announced.digests.get(version)
        ok = expected == event.digest
        if ok:
            self._proven(version, event.digest)
            self._catchup.proven()
        else:
            self.mismatches += 1
        told = msg.Verified(
            sender=self._me,
            epoch=self._announced.epoch,
            version=version,
            digest=event.digest,
            ok=ok,
            verify_us=event.verify_us,
        )
        out: list[ReplicaCommand] = [Report(told), cmd.Compared(version, ok, event.verify_us)]
        if ok:
            return out
        right = "nothing" if expected is None else f"{expected:016x}"
        reason = f"digest {event.digest:016x} at version {version}, announced was {right}"
        return [*out, *self.resync(reason, now)]

    def digest_failed(self, event: ev.DigestFailed, now: float) -> list[ReplicaCommand]:
        """Nobody knows what the weights are."""
        self.digesting = None
        if self.to_prove or self.version != event.version:
            return []
        return self.resync(f"its state could not be digested: {event.reason}", now)

    def resync(self, reason: str, now: float) -> list[ReplicaCommand]:
        """The weights are worth nothing: serve none of them, and start again from an anchor."""
        self.version = None
        self.verified = None
        self._unnamed = None
        self._void = self.applying is not None or self.proving
        out = self._drop_all()
        self._catchup.set_back(now)
        return [*out, cmd.Quarantine(reason), cmd.Tell("resync", self._me.name, reason)]

    # ---- words

    def heartbeat(self) -> Report:
        """What the weights are, for the trainer."""
        return Report(
            msg.Heartbeat(
                sender=self._me,
                epoch=self._announced.epoch,
                version=self.version,
                verified=self.verified,
                lagging=self.lagging,
                follow=str(self._follow) if self._role == "evaluation" else None,
                stranded=self._stranded,
            )
        )

    @property
    def _stranded(self) -> bool:
        # One old version may be gone for good.
        return self.version is None and self._catchup.hole and self._follow.pinned is None

    def refused(self, version: int, reason: str) -> Report:
        """What this version's bytes, or our model, were refused for."""
        epoch = self._announced.epoch
        return Report(msg.Refused(sender=self._me, epoch=epoch, version=version, reason=reason))

    def _tidy(self) -> list[ReplicaCommand]:
        useless = self.staging.useless(self.version)
        return [self.staging.drop(useless)] if useless else []

    def _drop_all(self) -> list[ReplicaCommand]:
        staged = tuple(self.staging.patches)
        return [self.staging.drop(staged)] if staged else []
