"""The replica's side of the protocol: commitments, one apply lane ordered by version, and the way
back through the log.

Three strands run beside each other, each in a file of its own. *Belonging*: claim → prove → join →
heartbeats. The *seat* in windows: opening, ready, go, receive. The *lane*: what is done to the
weights. All three read what was *announced*. Here is what follows on what across them.
"""

from __future__ import annotations

from typing import assert_never

from ...messages import control as msg
from ...messages.control import Role, Sender, Stamp, WindowKind
from ...messages.errors import NameInUse, ReplicaRefused, SparsecastError
from . import commands as cmd
from . import events as ev
from .announced import Announced
from .belonging import Belonging
from .commands import ReplicaCommand
from .follow import Follow
from .lane import Lane
from .policy import Policy
from .seat import Seat


class ReplicaCore:
    """Events in, commands out. `me` is this worker; `kinds` the windows that it can open, `gpus`
    where the weights of each of its ranks are ("": on none), `layouts` and `held_nbytes` what they
    hold, see Join. `role`: whether updates wait for it; `follow`: which versions it wants, of which
    a rollout worker wants all."""

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
        gpus: tuple[str, ...] = ("",),
        layouts: tuple[bytes, ...] = (),
        held_nbytes: tuple[int, ...] = (),
        role: Role = "rollout",
        follow: Follow = Follow(),  # noqa: B008 - frozen
    ) -> None:
        self.run = run
        self.me = me
        self.policy = policy
        self.started = started
        self.follow = follow
        self.error: SparsecastError | None = None

        self._announced = Announced()
        self._belonging = Belonging(
            me=me,
            kinds=kinds,
            device=device,
            host=host,
            pid=pid,
            gpus=gpus,
            layouts=layouts,
            held_nbytes=held_nbytes,
            policy=policy,
            announced=self._announced,
            started=started,
            role=role,
            follow=str(follow),
        )
        self._seat = Seat(me, policy, self._announced)
        self._lane = Lane(me, policy, self._announced, role, follow)
        self._closed = False
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
        self._go_on()
        return self._out

    def next_deadline(self) -> float | None:
        """When a Tick is due, on the clock of `now`."""
        if self._closed or self.error is not None:
            return None
        times = (
            self._belonging.beat_at,
            self._seat.next_change(),
            self._lane.next_change(self._seat.coming, self._now),
        )
        return max(min(time for time in times if time is not None), self._now)

    @property
    def claim(self) -> msg.Claim | None:
        """The claim that this replica follows."""
        return self._announced.claim

    @property
    def epoch(self) -> int:
        """The epoch of the claim that this replica follows; 0 before the first."""
        return self._announced.epoch

    @property
    def head(self) -> int | None:
        """The newest announced version of this epoch."""
        return self._announced.head

    @property
    def goal(self) -> int | None:
        """The version that the weights should hold as things are; None: there is none yet."""
        return self._lane.goal

    @property
    def version(self) -> int | None:
        """What the weights are proven or applied to be in this epoch; None: not known, or wrong."""
        return self._lane.version

    @property
    def verified(self) -> int | None:
        """The newest version whose digest was the announced one."""
        return self._lane.verified

    @property
    def mismatches(self) -> int:
        """How many digests were not the announced ones."""
        return self._lane.mismatches

    @property
    def lagging(self) -> str | None:
        """Why patches wait in staging, or None."""
        return self._lane.lagging

    @property
    def unproven(self) -> str | None:
        """Why the weights are no version of the claim that is followed, as far as that was to be
        found out; None: they are one, or are being compared."""
        lane = self._lane
        if self._announced.claim is None or lane.version is not None:
            return None
        if lane.proving or lane.to_prove or (lane.goal is not None and not lane.trouble):
            return None
        return self.why()

    @property
    def trainer_heard(self) -> float | None:
        """When the trainer was last heard, on the clock of `now`."""
        return self._belonging.heard

    def trainer_away_s(self, now: float) -> float | None:
        """For how long the trainer has been unheard, or None if it was never heard."""
        heard = self._belonging.heard
        return None if heard is None else now - heard

    def why(self) -> str:
        """Why the weights are not where they should be, in words."""
        lane, head = self._lane, self._announced.head
        if self.error is not None:
            return str(self.error)
        if self._announced.claim is None:
            return f"no trainer on run {self.run} yet, {self._now - self.started:.0f} s"
        if lane.lagging is not None:
            return f"lagging: {lane.lagging}"
        if lane.proving or lane.to_prove:
            return "comparing the weights with the trainer's"
        trouble = f"; the log: {lane.trouble}" if lane.trouble else ""
        if lane.goal is None:
            return f"waiting for version {self.follow.pinned}, {head} is the newest"
        if lane.version is None:
            return f"waiting for an anchor from the log{trouble}"
        if lane.behind:
            return f"at version {lane.version} of {lane.goal}{trouble}"
        if self.follow.latest:
            return f"at version {lane.version}, the newest that was announced"
        return f"at version {lane.version}: follows {self.follow}, {head} is the newest"

    # ---- events

    def _dispatch(self, event: ev.ReplicaEvent) -> None:
        now = self._now
        match event:
            case ev.Tick():
                self._tick()
            case ev.FromTrainer(message):
                self._hear(message)
            case ev.Proved():
                self._proved(event)
            case ev.Unfit():
                self._unfit(event)
            case ev.WindowOpened(epoch, window):
                self._out += self._seat.opened(epoch, window)
            case ev.WindowFailed(epoch, window, reason):
                self._out += self._seat.failed(epoch, window, reason)
            case ev.Staged():
                self._received(event)
            case ev.ReceiveFailed():
                self._out += self._seat.receive_failed(event)
            case ev.Fetched():
                self._out += self._lane.fetched(event, now)
            case ev.FetchFailed():
                self._lane.fetch_failed(event, now)
            case ev.AppliedHere():
                self._out += self._lane.applied(event)
            case ev.ApplyFailed():
                self._out += self._lane.apply_failed(event, now)
            case ev.Digested():
                self._out += self._lane.digested(event, now)
            case ev.DigestFailed():
                self._out += self._lane.digest_failed(event, now)
            case ev.Close(reason):
                self._close(reason)
            case _:
                assert_never(event)

    def _tick(self) -> None:
        self._seat.tick(self._now)
        if self._belonging.beats(self._now) and self._lane.manifest_hash:
            if self._belonging.joined:
                self._out.append(self._lane.heartbeat())
            else:
                self._join()

    def _hear(self, message: msg.TrainerMessage) -> None:
        if isinstance(message, msg.Claim):
            self._claimed(message)
            return
        if not self._belonging.obeys(message, self._now):
            return
        match message:
            case msg.Announce():
                self._announce(message)
            case msg.Welcome(to=to, epoch=epoch, version=version):
                if to == self.me and epoch == self.epoch:
                    self._belonging.joined = True
                    self._raise_head(version)
            case msg.Opening():
                self._out += self._seat.asked(message, self._now)
                if self._seat.opening == message:
                    self._raise_head(message.enters_at)
            case msg.Prepare(stamp=stamp):
                self._out += self._seat.prepare(stamp, self._unable, self._now)
            case msg.Call(stamp=stamp):
                self._commit(stamp)
            case msg.Go():
                self._out += self._seat.go(message, self._lane.has, self._now)
            case msg.Abort(stamp=stamp):
                self._out += self._seat.aborted(stamp)
            case msg.Stored(epoch=epoch):
                if epoch == self.epoch:
                    self._lane.stored(self._now)
            case msg.Beat(epoch=epoch, version=version):
                if epoch == self.epoch:
                    self._raise_head(version)
            case msg.Probe(to=to):
                if to == self.me:
                    self._out.append(self._lane.heartbeat())
            case msg.Refuse(to=to, code=code, reason=reason):
                if to == self.me:
                    self._refused(code, reason)
            case msg.Rejoin(to=to):
                if to == self.me:
                    self._leave_run()
                    # Not before our model is proven to be the claim's: a Join without a manifest
                    # would be refused for good.
                    if self._lane.manifest_hash:
                        self._join()
            case msg.Resync(to=to, reason=reason):
                # Without a version it is on its way to an anchor already.
                if to == self.me and (self._lane.version is not None or self._lane.proving):
                    self._out += self._lane.resync(reason, self._now)
            case msg.Bye(epoch=epoch):
                if epoch == self.epoch:
                    self._leave_run()
            case _:
                assert_never(message)

    # ---- belonging

    def _claimed(self, claim: msg.Claim) -> None:
        if self._announced.outranks(claim):
            return
        self._out += self._seat.leave()
        self._announced.claimed(claim)
        self._belonging.claimed(self._now)
        self._seat.claimed(claim.epoch)
        self._out += self._lane.claimed(self._now)

    def _proved(self, event: ev.Proved) -> None:
        self._out += self._lane.proved(event)
        if event.epoch == self.epoch:
            self._join()

    def _unfit(self, event: ev.Unfit) -> None:
        self._lane.unfit()
        if event.epoch != self.epoch:
            return
        self._out.append(self._lane.refused(self.head or 0, event.difference))
        self._out.append(cmd.Tell("refused", self.me.name, event.difference))
        self._fail(ReplicaRefused(self.run, self.me.name, event.difference))

    def _refused(self, code: str, reason: str) -> None:
        if code == "name-in-use":
            self._fail(NameInUse(self.run, self.me.name))
        else:
            self._fail(ReplicaRefused(self.run, self.me.name, reason))

    def _join(self) -> None:
        self._out.append(self._belonging.join(self._lane.manifest_hash, self._lane.version))

    def _leave_run(self) -> None:
        self._belonging.joined = False
        self._out += self._seat.leave()

    # ---- rounds

    def _announce(self, announce: msg.Announce) -> None:
        if announce.stamp.epoch != self.epoch:
            return
        self._announced.announced(announce)
        self._out += self._lane.announced(announce)
        self._raise_head(announce.version)
        if announce.stamp.window:
            self._commit(announce.stamp)

    def _raise_head(self, version: int) -> None:
        self._lane.raise_head(version, self._now)

    def _commit(self, stamp: Stamp) -> None:
        self._out += self._seat.commit(stamp, self._unable, self._now)

    def _unable(self, nbytes: int) -> str | None:
        """Why a patch of so many bytes cannot be taken now, or None."""
        if self._lane.version is None:
            return self.why()
        return self._lane.lagging or self._lane.full(nbytes)

    def _received(self, event: ev.Staged) -> None:
        stamp = event.stamp
        self._seat.received(stamp)
        if stamp.epoch != self.epoch:
            self._out.append(cmd.Drop((stamp.version,)))
            return
        self._out += self._lane.received(event)

    def _go_on(self) -> None:
        """Whatever has happened, the weights may need something now."""
        if not self._closed and self.error is None:
            self._out += self._lane.next(self._seat.coming, self._now)

    # ---- ends

    def _fail(self, error: SparsecastError) -> None:
        self._out += self._seat.leave()
        self.error = error
        self._out.append(cmd.Fail(error))

    def _close(self, reason: str) -> None:
        if self._belonging.joined:
            leave = msg.Leave(sender=self.me, epoch=self.epoch, reason=reason)
            self._out.append(cmd.Report(leave))
        self._out += self._seat.leave()
        self._closed = True
