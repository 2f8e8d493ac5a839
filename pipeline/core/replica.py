"""The replica's side of the protocol: commitments, one apply lane ordered by version, and the way
back through the log.

Three strands run beside each other. *Belonging*: claim → prove → join → heartbeats. *Windows*:
opening, ready, go, receive; only the highest (epoch, window) counts. *The lane*: staged patches
from rounds and from the log alike are applied in the order of their versions, each state is
digested before the next apply, and what the lane lacks it fetches.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Literal, assert_never

from ...messages import control as msg
from ...messages.control import Sender, Stamp, WindowKind
from ...messages.errors import NameInUse, ReplicaRefused, SparsecastError
from ...messages.metrics import EventKind
from . import commands as cmd
from . import events as ev
from .commands import ReplicaCommand
from .policy import Policy

#: How many announcements are remembered: their digests prove what the log brings.
HISTORY = 1024


@dataclass(frozen=True, slots=True)
class _Patch:
    base_version: int | None
    version: int
    nbytes: int
    source: Literal["window", "log"]

    def wider(self, other: _Patch | None) -> bool:
        """Whether it goes back further than `other`: of two for one version that one is kept."""
        if other is None or other.base_version is None:
            return other is None
        return self.base_version is None or self.base_version < other.base_version


class ReplicaCore:
    """Events in, commands out. `me` is this worker; `kinds` the windows that it can open."""

    def __init__(
        self,
        *,
        run: str,
        me: Sender,
        kinds: tuple[WindowKind, ...],
        device: str,
        host: str,
        pid: int,
        policy: Policy,
        started: float,
    ) -> None:
        self.run = run
        self.me = me
        self.kinds = kinds
        self.device = device
        self.host = host
        self.pid = pid
        self.policy = policy
        #: What the weights are proven or applied to be in this epoch; None: not known, or wrong.
        self.version: int | None = None
        self.verified: int | None = None
        self.mismatches = 0
        self.claim: msg.Claim | None = None
        #: The newest announced version of this epoch.
        self.head: int | None = None
        self.lagging: str | None = None
        self.error: SparsecastError | None = None
        self.trainer_heard: float | None = None
        self.started = started

        self._closed = False
        self._joined = False
        self._manifest_hash = ""
        self._to_prove = False
        self._proving = False
        self._seen = (0, 0)
        self._opening: msg.Opening | None = None
        self._inside: tuple[int, int] | None = None
        self._commitment: tuple[Stamp, float] | None = None
        self._receiving: Stamp | None = None
        self._announces: OrderedDict[int, msg.Announce] = OrderedDict()
        self._digests: OrderedDict[int, int] = OrderedDict()
        self._staged: dict[int, _Patch] = {}
        self._applying: tuple[int, ...] | None = None
        #: A resync was called for while an apply or a proof ran: what it finds does not count.
        self._void = False
        self._going: Stamp | None = None
        self._digesting: int | None = None
        self._fetching = False
        self._fetch_at = 0.0
        self._held_back_until = 0.0
        self._fetch_failures = 0
        #: Resyncs and refused applies since the last state that was proven.
        self._setbacks = 0
        self._apply_at = 0.0
        self._beat_at = started
        self._now = started
        self._out: list[ReplicaCommand] = []

    # ---- the face

    def handle(self, event: ev.ReplicaEvent, now: float) -> list[ReplicaCommand]:
        """Take one event; return what is to be done, in order."""
        self._now = now
        self._out = []
        if self._closed or (self.error is not None and not isinstance(event, ev.Close)):
            return []
        self._dispatch(event)
        self._lane()
        return self._out

    def next_deadline(self) -> float | None:
        """When a Tick is due, on the clock of `now`."""
        if self._closed or self.error is not None:
            return None
        times = [self._beat_at]
        if self._commitment is not None:
            times.append(self._commitment[1])
        if self._free() and not self._to_prove and self._manifest_hash:
            # _lane() has started what is due: what is left waits for its time.
            if self._apply_at > self._now:
                times.append(self._apply_at)
            if self._may_fetch() and self._fetch_due() > self._now:
                times.append(self._fetch_due())
        return max(min(times), self._now)

    @property
    def epoch(self) -> int:
        """The epoch of the claim that this replica follows; 0 before the first."""
        return self.claim.epoch if self.claim else 0

    def trainer_away_s(self, now: float) -> float | None:
        """For how long the trainer has been unheard, or None if it was never heard."""
        return None if self.trainer_heard is None else now - self.trainer_heard

    def why(self) -> str:
        """Why the weights are not at the head, in words."""
        if self.error is not None:
            return str(self.error)
        if self.claim is None:
            return f"no trainer on run {self.run} yet, {self._now - self.started:.0f} s"
        if self.lagging is not None:
            return f"lagging: {self.lagging}"
        if self._proving or self._to_prove:
            return "comparing the weights with the trainer's"
        if self.version is None:
            return "waiting for an anchor from the log"
        if self.head is not None and self.version < self.head:
            return f"at version {self.version} of {self.head}"
        return f"at version {self.version}, the newest that was announced"

    # ---- events

    def _dispatch(self, event: ev.ReplicaEvent) -> None:
        match event:
            case ev.Tick():
                self._tick()
            case ev.FromTrainer(message):
                self._hear(message)
            case ev.Proved():
                self._proved(event)
            case ev.Unfit(epoch, difference):
                self._unfit(epoch, difference)
            case ev.WindowOpened(epoch, window):
                self._window_opened(epoch, window)
            case ev.WindowFailed(epoch, window, reason):
                self._window_failed(epoch, window, reason)
            case ev.Staged():
                self._received(event)
            case ev.ReceiveFailed():
                self._receive_failed(event)
            case ev.Fetched():
                self._fetched(event)
            case ev.FetchFailed(epoch, reason):
                self._fetch_failed(epoch, reason)
            case ev.AppliedHere():
                self._applied(event)
            case ev.ApplyFailed(reason, torn, waiting):
                self._apply_failed(reason, torn, waiting)
            case ev.Digested():
                self._digested(event)
            case ev.DigestFailed(version, reason):
                self._digesting = None
                if not self._to_prove and self.version == version:
                    self._resync(f"its state could not be digested: {reason}")
            case ev.Close(reason):
                self._close(reason)
            case _:
                assert_never(event)

    def _tick(self) -> None:
        now = self._now
        if self._commitment is not None and now >= self._commitment[1]:
            self._commitment = None
        if now >= self._beat_at:
            self._beat_at = now + self.policy.heartbeat_s
            if self.claim is not None and self._manifest_hash:
                if self._joined:
                    self._heartbeat()
                else:
                    self._join()

    def _hear(self, message: msg.TrainerMessage) -> None:
        if isinstance(message, msg.Claim):
            self._claimed(message)
            return
        if self.claim is None or message.sender != self.claim.sender:
            return
        self.trainer_heard = self._now
        match message:
            case msg.Announce():
                self._announced(message)
            case msg.Welcome(to=to, epoch=epoch, version=version):
                if to == self.me and epoch == self.epoch:
                    self._joined = True
                    self._raise_head(version)
            case msg.Opening():
                self._asked_to_open(message)
            case msg.Call(stamp=stamp):
                self._commit(stamp)
            case msg.Go(stamp=stamp):
                self._go(stamp)
            case msg.Abort(stamp=stamp):
                self._abort(stamp)
            case msg.Stored(epoch=epoch):
                if epoch == self.epoch:
                    self._fetch_at = min(self._fetch_at, self._now)
            case msg.Beat(epoch=epoch, version=version):
                if epoch == self.epoch:
                    self._raise_head(version)
            case msg.Probe(to=to):
                if to == self.me:
                    self._heartbeat()
            case msg.Refuse(to=to, code=code, reason=reason):
                if to == self.me:
                    self._refused(code, reason)
            case msg.Rejoin(to=to):
                if to == self.me:
                    self._joined = False
                    self._leave_window()
                    self._join()
            case msg.Resync(to=to, reason=reason):
                # Without a version it is on its way to an anchor already.
                if to == self.me and (self.version is not None or self._proving):
                    self._resync(reason)
            case msg.Bye(epoch=epoch):
                if epoch == self.epoch:
                    self._joined = False
                    self._leave_window()
            case _:
                assert_never(message)

    # ---- belonging

    def _claimed(self, claim: msg.Claim) -> None:
        if self.claim is not None:
            # One journal never holds two claims of one epoch: another trainer's is of a new
            # journal, made by someone who could not know ours. It hears our epoch if it is lower.
            same = claim.epoch == self.epoch and claim.sender != self.claim.sender
            if claim.epoch <= self.epoch and not same:
                return
        self._leave_window()
        self._seen = (claim.epoch, 0)
        self.claim = claim
        self.trainer_heard = self._now
        self.head = claim.version
        self._joined = False
        self._announces.clear()
        self._digests.clear()
        self._digests[claim.version] = claim.digest
        self._fetch_at = self._now
        self._fetch_failures = 0
        self._setbacks = 0
        self._held_back_until = self._now
        self.lagging = None
        self._drop_all()
        # What an earlier epoch called this version may be void: only the digest can tell.
        self.version = None
        self.verified = None
        self._manifest_hash = ""
        self._to_prove = True

    def _proved(self, event: ev.Proved) -> None:
        self._proving = False
        void, self._void = self._void, False
        if self.claim is None or event.epoch != self.claim.epoch:
            return
        self._manifest_hash = event.manifest_hash
        known = [v for v, digest in self._digests.items() if digest == event.digest]
        if known and not void:
            self.version = self.verified = max(known)
            self._out.append(cmd.Hold(self.version))
        self._join()

    def _unfit(self, epoch: int, difference: str) -> None:
        self._proving = False
        if epoch != self.epoch:
            return
        self._out.append(
            cmd.Report(
                msg.Refused(sender=self.me, epoch=epoch, version=self.head or 0, reason=difference)
            )
        )
        self._tell("refused", difference)
        self._fail(ReplicaRefused(self.run, self.me.name, difference))

    def _refused(self, code: str, reason: str) -> None:
        if code == "name-in-use":
            self._fail(NameInUse(self.run, self.me.name))
        else:
            self._fail(ReplicaRefused(self.run, self.me.name, reason))

    def _join(self) -> None:
        self._out.append(
            cmd.Report(
                msg.Join(
                    sender=self.me,
                    epoch=self.epoch,
                    manifest_hash=self._manifest_hash,
                    offers=self.kinds,
                    device=self.device,
                    host=self.host,
                    pid=self.pid,
                    version=self.version,
                    trainer=self.claim.sender.incarnation if self.claim is not None else "",
                )
            )
        )

    def _heartbeat(self) -> None:
        self._out.append(
            cmd.Report(
                msg.Heartbeat(
                    sender=self.me,
                    epoch=self.epoch,
                    version=self.version,
                    verified=self.verified,
                    lagging=self.lagging,
                )
            )
        )

    # ---- windows and rounds

    def _announced(self, announce: msg.Announce) -> None:
        if announce.stamp.epoch != self.epoch:
            return
        self._announces[announce.version] = announce
        self._digests[announce.version] = announce.digest
        while len(self._announces) > HISTORY:
            self._announces.popitem(last=False)
        self._trim_digests()
        self._raise_head(announce.version)
        if announce.stamp.window:
            self._commit(announce.stamp)

    def _asked_to_open(self, opening: msg.Opening) -> None:
        stamp = opening.stamp
        if stamp.epoch != self.epoch or (stamp.epoch, stamp.window) <= self._seen:
            return
        # Aborting the lower window first: two communicators at once could wait for each other.
        self._leave_window()
        self._seen = (stamp.epoch, stamp.window)
        if self.me not in opening.members:
            return
        self._opening = opening
        self._raise_head(opening.enters_at)
        self._promise(stamp)

    def _commit(self, stamp: Stamp) -> None:
        """Answer the call for an attempt: Ready, or why not."""
        if stamp.epoch != self.epoch or (stamp.epoch, stamp.window) != self._inside:
            return
        if stamp == self._going:
            return  # Said twice, and answered.
        announce = self._announces.get(stamp.version)
        held = sum(patch.nbytes for patch in self._staged.values())
        if announce is None:
            why = f"version {stamp.version} was not announced here"
        elif self._receiving is not None:
            why = f"still receiving {self._receiving}"
        elif self.version is None:
            why = self.why()
        elif self.lagging is not None:
            why = self.lagging
        elif held + announce.nbytes > self.policy.staging_nbytes and held:
            why = f"{held} bytes of patches wait in staging"
        else:
            self._promise(stamp)
            return
        self._out.append(cmd.Report(msg.NotReady(sender=self.me, stamp=stamp, reason=why)))

    def _promise(self, stamp: Stamp) -> None:
        expires_s = self.policy.commit_s
        self._commitment = (stamp, self._now + expires_s)
        self._out.append(cmd.Report(msg.Ready(sender=self.me, stamp=stamp, expires_s=expires_s)))

    def _go(self, stamp: Stamp) -> None:
        opening = self._opening
        if opening is None or (stamp.epoch, stamp.window) != self._seen:
            return  # Not a window of ours.
        if stamp == self._going:
            return  # Said twice.
        commitment = self._commitment
        if commitment is not None and commitment[0] == stamp:
            self._commitment = None
        if commitment is None or commitment[0] != stamp or self._now >= commitment[1]:
            self._out.append(
                cmd.Report(
                    msg.NotReady(sender=self.me, stamp=stamp, reason="the commitment has run out")
                )
            )
            return
        self._going = stamp
        if stamp.attempt == 0:
            rank = opening.members.index(self.me) + 1
            self._out.append(
                cmd.OpenWindow(
                    stamp, opening.kind, rank, len(opening.members) + 1, self.policy.open_s
                )
            )
            return
        announce = self._announces[stamp.version]
        self._receiving = stamp
        here = stamp.version in self._staged or (
            self.version is not None and self.version >= stamp.version
        )
        self._out.append(
            cmd.Receive(stamp, announce, here, self.policy.send_deadline_s(announce.nbytes))
        )

    def _abort(self, stamp: Stamp) -> None:
        if (stamp.epoch, stamp.window) == self._seen:
            self._leave_window()

    def _leave_window(self) -> None:
        """Break off whatever there is of a window; its number stays seen."""
        self._commitment = None
        if self._opening is not None:
            self._out.append(cmd.AbortWindow(self._opening.stamp.window))
        self._opening = None
        self._inside = None
        self._receiving = None

    def _window_opened(self, epoch: int, window: int) -> None:
        opening = self._opening
        if opening is None or (opening.stamp.epoch, opening.stamp.window) != (epoch, window):
            return
        self._inside = (epoch, window)
        self._out.append(cmd.Report(msg.Opened(sender=self.me, stamp=opening.stamp)))

    def _window_failed(self, epoch: int, window: int, reason: str) -> None:
        opening = self._opening
        if opening is None or (opening.stamp.epoch, opening.stamp.window) != (epoch, window):
            return
        self._leave_window()
        self._out.append(cmd.Report(msg.Opened(sender=self.me, stamp=opening.stamp, error=reason)))

    def _received(self, event: ev.Staged) -> None:
        stamp = Stamp(event.epoch, event.window, event.attempt, event.version)
        if self._receiving == stamp:
            self._receiving = None
        if event.epoch != self.epoch:
            self._out.append(cmd.Drop((event.version,)))
            return
        # A receive that completed and checked is good, whatever became of its attempt (rule 6).
        if self.version is None or event.version > self.version:
            self._stage(_Patch(event.base_version, event.version, event.nbytes, "window"))
        else:
            self._drop((event.version,))  # The log was faster.
        self._out.append(cmd.Report(msg.Received(sender=self.me, stamp=stamp)))

    def _receive_failed(self, event: ev.ReceiveFailed) -> None:
        stamp = Stamp(event.epoch, event.window, event.attempt, event.version)
        if self._receiving != stamp:
            return
        self._receiving = None
        if event.corrupt:
            report: msg.WorkerMessage = msg.Received(
                sender=self.me, stamp=stamp, error=event.reason
            )
        else:
            self._leave_window()
            report = msg.NotReady(sender=self.me, stamp=stamp, reason=event.reason)
        self._out.append(cmd.Report(report))

    def _raise_head(self, version: int) -> None:
        if self.head is None or version > self.head:
            if not self._behind():
                # The round of this version may still bring it; the log is asked a little later.
                # Who is behind already must not be put off by each new version.
                self._fetch_at = max(self._fetch_at, self._now + self.policy.retry_s)
            self.head = version

    # ---- the lane

    def _behind(self) -> bool:
        return self.claim is not None and (
            self.version is None or (self.head is not None and self.version < self.head)
        )

    def _lane(self) -> None:
        """Start the next thing that the weights need, one at a time."""
        if self._closed or self.error is not None or self.claim is None:
            return
        if not self._free():
            return
        if self._to_prove:
            self._to_prove = False
            self._void = False
            self._proving = True
            self._out.append(cmd.Prove(self.claim))
            return
        if not self._manifest_hash:
            return
        chain = self._chain()
        if chain and self._now >= self._apply_at:
            self._applying = chain
            self._out.append(cmd.Apply(chain))
        elif not chain:
            self._fetch()

    def _chain(self) -> tuple[int, ...]:
        """Staged versions that follow, without a hole, on what the weights hold."""
        at = self.version
        chain: list[int] = []
        useless: list[int] = []
        for version, patch in sorted(self._staged.items()):
            if at is not None and version <= at:
                useless.append(version)
            elif patch.base_version is None or (at is not None and patch.base_version <= at):
                if patch.base_version is None:
                    chain.clear()
                chain.append(version)
                at = version
        if useless:
            self._drop(tuple(useless))
        return tuple(chain)

    def _free(self) -> bool:
        """Whether nobody is at the weights."""
        return self._applying is None and self._digesting is None and not self._proving

    def _may_fetch(self) -> bool:
        if not self._behind() or self._fetching:
            return False
        coming = self._receiving or (self._commitment[0] if self._commitment else None)
        if self.version is None or coming is None or not coming.attempt:
            return True
        announce = self._announces.get(coming.version)
        # Unless the round in flight brings just what is missing.
        return announce is None or announce.base_version > self.version

    def _fetch_due(self) -> float:
        return max(self._fetch_at, self._held_back_until)

    def _fetch(self) -> None:
        if not self._may_fetch() or self._now < self._fetch_due():
            return
        assert self.claim is not None
        self._fetching = True
        # At least one step: the driver goes as far as the log does.
        target = self.claim.version if self.version is None else self.version + 1
        self._out.append(cmd.Fetch(self.epoch, self.version, target))

    def _fetched(self, event: ev.Fetched) -> None:
        self._fetching = False
        if event.epoch != self.epoch:
            self._drop(tuple(item.version for item in event.items))
            return
        for item in event.items:
            # What was announced counts before what the log says of itself.
            self._digests.setdefault(item.version, item.digest)
            self._stage(_Patch(item.base_version, item.version, item.nbytes, "log"))
        self._trim_digests()
        if self._behind() and not self._chain():
            # What it gave leads nowhere from here (a resync came in between, say).
            self._fetch_failed(event.epoch, "nothing that follows on what is held")
            return
        self._fetch_failures = 0
        self._fetch_at = max(self._fetch_at, self._now)

    def _stage(self, patch: _Patch) -> None:
        if patch.wider(self._staged.get(patch.version)):
            self._staged[patch.version] = patch

    def _trim_digests(self) -> None:
        while len(self._digests) > HISTORY:
            self._digests.popitem(last=False)

    def _fetch_failed(self, epoch: int, reason: str) -> None:
        self._fetching = False
        if epoch != self.epoch:
            return
        pause = self.policy.retry_s * 2.0 ** min(self._fetch_failures, 4)
        self._fetch_failures += 1
        self._fetch_at = self._now + pause

    def _applied(self, event: ev.AppliedHere) -> None:
        applying, self._applying = self._applying, None
        void, self._void = self._void, False
        assert applying is not None
        if self._to_prove:
            return  # A claim came meanwhile: what this version is called there, its digest tells.
        if void:
            # Its commit must not lift the quarantine of the resync.
            self._out.append(cmd.Quarantine("a resync was called for while an apply ran"))
            return
        source: Literal["window", "log"] = "window"
        for version in applying:
            patch = self._staged.pop(version, None)
            source = patch.source if patch is not None else source
        self.version = event.version
        self.lagging = None
        self._out.append(
            cmd.Report(
                msg.Applied(
                    sender=self.me,
                    epoch=self.epoch,
                    version=event.version,
                    staged_us=event.staged_us,
                    apply_us=event.apply_us,
                    source=source,
                )
            )
        )
        self._digesting = event.version
        self._out.append(cmd.Digest(event.version))

    def _apply_failed(self, reason: str, torn: bool, waiting: bool) -> None:
        applying, self._applying = self._applying, None
        void, self._void = self._void, False
        if self._to_prove or void:
            return
        if waiting:
            self.lagging = reason
            self._apply_at = self._now + self.policy.retry_s
            self._heartbeat()
            return
        assert applying is not None
        self._out.append(
            cmd.Report(
                msg.Refused(sender=self.me, epoch=self.epoch, version=applying[-1], reason=reason)
            )
        )
        self._drop(applying)
        if torn:
            self._resync(f"an apply broke off: {reason}")
        else:
            self._set_back()

    def _digested(self, event: ev.Digested) -> None:
        self._digesting = None
        if self._to_prove or self.version != event.version:
            return
        expected = self._digests.get(event.version)
        ok = expected == event.digest
        if ok:
            self.verified = event.version
            self._setbacks = 0
        else:
            self.mismatches += 1
        self._out.append(
            cmd.Report(
                msg.Verified(
                    sender=self.me,
                    epoch=self.epoch,
                    version=event.version,
                    digest=event.digest,
                    ok=ok,
                    verify_us=event.verify_us,
                )
            )
        )
        self._out.append(cmd.Compared(event.version, ok, event.verify_us))
        if not ok:
            told = "nothing" if expected is None else f"{expected:016x}"
            self._resync(
                f"digest {event.digest:016x} at version {event.version}, announced was {told}"
            )

    def _resync(self, reason: str) -> None:
        """The weights are worth nothing: serve none of them, and start again from an anchor."""
        self.version = None
        self.verified = None
        self._void = self._applying is not None or self._proving
        self._drop_all()
        self._set_back()
        self._out.append(cmd.Quarantine(reason))
        self._tell("resync", reason)

    def _set_back(self) -> None:
        """Ask the log again: at once the first time, then ever later. An anchor is a full copy."""
        pause = self.policy.retry_s * (2.0 ** min(self._setbacks, 8) - 1.0)
        self._setbacks += 1
        self._held_back_until = self._now + min(pause, self.policy.backoff_max_s)
        self._fetch_at = self._now

    # ---- ends and words

    def _drop(self, versions: tuple[int, ...]) -> None:
        for version in versions:
            self._staged.pop(version, None)
        self._out.append(cmd.Drop(versions))

    def _drop_all(self) -> None:
        if self._staged:
            self._drop(tuple(self._staged))

    def _fail(self, error: SparsecastError) -> None:
        self._leave_window()
        self.error = error
        self._out.append(cmd.Fail(error))

    def _close(self, reason: str) -> None:
        if self._joined:
            self._out.append(cmd.Report(msg.Leave(sender=self.me, epoch=self.epoch, reason=reason)))
        self._leave_window()
        self._closed = True

    def _tell(self, kind: EventKind, reason: str) -> None:
        self._out.append(cmd.Tell(kind, self.me.name, reason))
