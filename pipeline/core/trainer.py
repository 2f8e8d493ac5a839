"""The trainer's side of the protocol: one round in flight, one patch pending, nobody waited for
beyond a deadline.

    UNCLAIMED → IDLE → TAKING → ROUND → IDLE        (a round through the open window, or the log)
                 ↕                ↕
              OPENING         OPENING               (a window is opened only between attempts)
"""

from __future__ import annotations

from collections import OrderedDict
from enum import Enum
from typing import assert_never

from ...messages import control as msg
from ...messages.control import Sender, Stamp, WindowKind
from ...messages.errors import Fenced, LocalProtocolError
from ...messages.metrics import EventKind
from . import commands as cmd
from . import events as ev
from .commands import RoundRecord, TrainerCommand
from .exchange import Exchange, Phase
from .membership import Member, Membership
from .policy import Policy

#: How many settled rounds are remembered, for waits that come late.
HISTORY = 256


class State(Enum):
    """Where the trainer is."""

    UNCLAIMED = "unclaimed"
    IDLE = "idle"
    TAKING = "taking"
    OPENING = "opening"
    ROUND = "round"
    RECLAIMING = "reclaiming"
    FENCED = "fenced"
    CLOSED = "closed"


class TrainerCore:
    """Events in, commands out. `me` is the trainer, `kinds` the windows that it can open."""

    def __init__(
        self,
        *,
        run: str,
        me: Sender,
        manifest_hash: str,
        kinds: tuple[WindowKind, ...],
        policy: Policy,
    ) -> None:
        self.run = run
        self.me = me
        self.manifest_hash = manifest_hash
        self.kinds = kinds
        self.policy = policy
        self.state = State.UNCLAIMED
        self.membership = Membership(policy)
        self.epoch = 0
        #: The newest version that was announced and whose round is over.
        self.head = 0
        #: The newest version that publish() has made.
        self.published = 0
        #: What the log holds.
        self.stored = 0
        self.error: Fenced | None = None

        self._window = 0
        self._open_window = 0
        self._open_kind: WindowKind | None = None
        self._open_members: tuple[Sender, ...] = ()
        self._exchange: Exchange | None = None
        self._opening_kind: WindowKind | None = None
        self._opening_failures = 0
        #: Kinds that did not open, until when they are not tried, and how often that has been so.
        self._barred: dict[WindowKind, float] = {}
        self._bars: dict[WindowKind, int] = {}
        self._reopen_at = 0.0
        self._attempt = 0
        #: Who had nothing from the attempt before, of the round in flight.
        self._suspects: set[Sender] = set()
        self._round: RoundRecord | None = None
        #: The announcement that the journal has not confirmed yet: the next one waits for it, since
        #: it has to name the place of this one there.
        self._announce: msg.Announce | None = None
        #: An announcement given up with its epoch, whose outcome is still to come.
        self._orphan: int | None = None
        #: The epoch at which the run is being claimed anew.
        self._reclaimed = 0
        self._retry_at: float | None = None
        #: Announced versions that are not stored yet, and those on their way into the log.
        self._unsafe: list[int] = []
        self._storing: tuple[int, ...] = ()
        self._store_at = 0.0
        self._log_failures = 0
        self._records: OrderedDict[int, RoundRecord] = OrderedDict()
        #: Names that a record still waits for.
        self._awaited: dict[int, set[str]] = {}
        self._settled: OrderedDict[int, RoundRecord] = OrderedDict()
        self._beat_at = 0.0
        self._now = 0.0
        self._out: list[TrainerCommand] = []

    # ---- the face

    def handle(self, event: ev.TrainerEvent, now: float) -> list[TrainerCommand]:
        """Take one event; return what is to be done, in order."""
        self._now = now
        self._out = []
        if self.state is State.CLOSED or (
            self.state is State.FENCED and not isinstance(event, ev.Close)
        ):
            return []
        self._dispatch(event)
        self._advance()
        self._store()
        self._settle()
        return self._out

    def next_deadline(self) -> float | None:
        """When a Tick is due, on the clock of `now`."""
        if self.state in (State.CLOSED, State.FENCED, State.UNCLAIMED):
            return None
        times = [self._beat_at]
        if self._exchange is not None and self._exchange.deadline is not None:
            times.append(self._exchange.deadline)
        if self._retry_at is not None:
            times.append(self._retry_at)
        if self._storable():
            times.append(self._store_at)
        if self.state is State.IDLE and self._reopen_at > self._now:
            times.append(self._reopen_at)
        change = self.membership.next_change(self._now)
        if change is not None:
            times.append(change)
        if self._records:
            oldest = next(iter(self._records.values()))
            times.append(oldest.received_at + self.policy.settle_s)
        return min(times)

    @property
    def busy(self) -> bool:
        """Whether a round is in flight or a patch is pending."""
        return self._round is not None or self.published > self.head

    @property
    def quiet(self) -> bool:
        """Whether everything published has been through its round and is in the log."""
        calm = self.state is State.IDLE and self._announce is None
        return calm and not self.busy and not self._unsafe

    @property
    def window_kind(self) -> WindowKind | None:
        """The kind of the open window, if one is open."""
        return self._open_kind if self._open_window else None

    def record(self, version: int) -> RoundRecord | None:
        """The round that brought `version`, alone or merged with later ones, while remembered."""
        for records in (self._settled, self._records):
            for candidate in records.values():
                if candidate.base_version < version <= candidate.version:
                    return candidate
        return None

    def progress(self, version: int) -> tuple[dict[str, float], dict[str, str]]:
        """Who has applied `version`, in seconds after publish(), and who has not, and why.

        A member that applied it and left since counts as one that has.
        """
        record = self.record(version)
        applied: dict[str, float] = {}
        if record is not None:
            applied = {name: at - record.published_at for name, at in record.applied.items()}
        missing: dict[str, str] = {}
        for name, member in self.membership.members.items():
            if member.version is not None and member.version >= version:
                applied.setdefault(name, 0.0)
            else:
                applied.pop(name, None)
                missing[name] = self._why_missing(member, version)
        return applied, missing

    # ---- events

    def _dispatch(self, event: ev.TrainerEvent) -> None:
        match event:
            case ev.Tick():
                self._tick()
            case ev.FromWorker(message):
                self._hear(message)
            case ev.Published(version):
                self.published = max(self.published, version)
            case ev.Sealed():
                self._sealed(event)
            case ev.Announced(version):
                self._announced(version)
            case ev.AnnounceFailed():
                self._announce_failed(event)
            case ev.WindowOpened(epoch, window):
                self._local(Stamp(epoch, window), None, opening=True)
            case ev.WindowFailed(epoch, window, reason):
                self._local(Stamp(epoch, window), reason, opening=True)
            case ev.Sent(window, attempt, error):
                self._local(Stamp(self.epoch, window, attempt), error, opening=False)
            case ev.LogStored(version):
                self._log_stored(version)
            case ev.LogFailed(version, reason):
                self._log_failed(version, reason)
            case ev.LeaseLost(reason):
                self._fence(reason)
            case ev.ReclaimFailed(reason):
                self._reclaim_failed(reason)
            case ev.Claimed():
                self._claimed(event)
            case ev.Close(reason):
                self._close(reason)
            case _:
                assert_never(event)

    def _claimed(self, event: ev.Claimed) -> None:
        if self.state not in (State.UNCLAIMED, State.RECLAIMING):
            raise LocalProtocolError(f"Claimed in state {self.state.value}")
        self.epoch = event.epoch
        self.head = self.stored = event.version
        self.published = max(self.published, event.version)
        self.membership.reset()
        self._opening_failures = 0
        self._unsafe = []
        self._storing = ()
        self._retry_at = None
        self._store_at = 0.0
        self._log_failures = 0
        self._beat_at = self._now
        self.state = State.IDLE
        self._tell("claim", "trainer", f"epoch {self.epoch} starts at version {self.head}")

    def _tick(self) -> None:
        now = self._now
        if self.state is State.UNCLAIMED:
            return
        if now >= self._beat_at:
            self._beat_at = now + self.policy.heartbeat_s
            self._say(msg.Beat(sender=self.me, epoch=self.epoch, version=self.head))
        for holder, challenger in self.membership.ceded(now):
            self._remove(holder.sender, "leave", "did not answer the probe for its name")
            self._join(challenger)
        for member in self.membership.silent(now):
            self._remove(member.sender, "evict", f"unheard for {now - member.heard:.1f} s")
        if self._exchange is not None:
            if self._unheard(self._exchange):
                # Nobody is late for what the journal has perhaps not stored yet.
                self._exchange.began = max(self._exchange.began, now)
            self._exchange.tick(now)
            self._resolve()
        if self._retry_at is not None and now >= self._retry_at:
            self._retry_at = None
            if self.state is State.RECLAIMING:
                self._out.append(cmd.Reclaim(self._reclaimed))
            elif self._announce is not None:
                self._append(self._announce)

    def _unheard(self, exchange: Exchange) -> bool:
        return (
            exchange.phase is Phase.GATHERING
            and self._announce is not None
            and self._announce.stamp == exchange.stamp
        )

    # ---- members

    def _hear(self, message: msg.WorkerMessage) -> None:
        sender = message.sender
        if self.state is State.UNCLAIMED:
            return
        if isinstance(message, msg.Join | msg.Heartbeat) and message.epoch > self.epoch:
            # Members refuse lower epochs (rule 11): either a successor has the run, which claiming
            # it anew will find out, or the bus has forgotten an epoch that members have seen.
            self._reclaim(message.epoch + 1, f"{sender.name} has seen epoch {message.epoch}")
            return
        refuted = self.membership.hear(sender, self._now)
        if refuted is not None:
            self._refuse(refuted.sender, "name-in-use", f"{sender.name} is held by a live worker")
        if isinstance(message, msg.Join):
            if message.epoch == self.epoch:
                self._join(message)
            return
        member = self.membership.get(sender)
        if member is None:
            self._stranger(message)
            return
        match message:
            case msg.Ready(stamp=stamp):
                if self._current(stamp) and self._exchange is not None:
                    if self._exchange.ready(sender, self._now):
                        self._go()
                    self._resolve()
            case msg.NotReady(stamp=stamp, reason=reason):
                if self._current(stamp) and self._exchange is not None:
                    self._exchange.refuse(sender, reason, self._now)
                    self._resolve()
            case msg.Opened(stamp=stamp, error=error) | msg.Received(stamp=stamp, error=error):
                if self._current(stamp) and self._exchange is not None:
                    if error is not None and isinstance(message, msg.Opened):
                        # A window that one rank has not will never open: why wait for the rest?
                        self._exchange.refuse(sender, error, self._now)
                    else:
                        self._exchange.report(sender, error, self._now)
                    if error is not None and isinstance(message, msg.Received):
                        self._tell("refused", sender.name, f"version {stamp.version}: {error}")
                    self._resolve()
            case msg.Applied(epoch=epoch, version=version):
                if epoch == self.epoch:
                    member.lagging = None
                    self._advanced(member, version, member.verified)
            case msg.Verified():
                if message.epoch == self.epoch:
                    self._verified(member, message)
            case msg.Heartbeat():
                if message.epoch == self.epoch:
                    self._beaten(member, message)
            case msg.Refused(version=version, reason=reason):
                self._tell("refused", sender.name, f"version {version}: {reason}")
            case msg.Leave(reason=reason):
                self._remove(sender, "leave", reason)
            case _:
                assert_never(message)

    def _stranger(self, message: msg.WorkerMessage) -> None:
        # A member that was put out while it was stopped or cut off does not know: without a word
        # it would wait for rounds that never come.
        if isinstance(message, msg.Heartbeat) and message.epoch == self.epoch:
            self._say(msg.Rejoin(sender=self.me, to=message.sender))

    def _join(self, join: msg.Join) -> None:
        if join.manifest_hash != self.manifest_hash:
            self._refuse(join.sender, "manifest", "its model is not the trainer's")
            return
        known = self.membership.members.get(join.sender.name)
        if known is None:
            self.membership.admit(join, self._now)
            self._tell("join", join.sender.name, f"on {join.host}, {join.device}")
        elif known.sender == join.sender:
            known.version = join.version
        else:
            if known.challenger is None:
                self.membership.challenge(join, self._now)
                self._say(msg.Probe(sender=self.me, to=known.sender))
            return
        self._say(msg.Welcome(sender=self.me, to=join.sender, epoch=self.epoch, version=self.head))

    def _beaten(self, member: Member, beat: msg.Heartbeat) -> None:
        if beat.lagging is not None and member.lagging is None:
            self._tell("lagging", member.sender.name, beat.lagging)
        self.membership.beat(beat)
        if beat.version is not None:
            self._advanced(member, beat.version, beat.verified)

    def _advanced(self, member: Member, version: int, verified: int | None) -> None:
        member.version = version
        member.verified = verified
        for record in self._records.values():
            if record.version <= version:
                record.applied.setdefault(member.sender.name, self._now)
            if verified is not None and record.version <= verified:
                record.verified.setdefault(member.sender.name, self._now)
                self._awaited[record.version].discard(member.sender.name)

    def _verified(self, member: Member, message: msg.Verified) -> None:
        record = self._records.get(message.version) or self._settled.get(message.version)
        if message.ok and (record is None or record.digest == message.digest):
            self._advanced(member, member.version or message.version, message.version)
            return
        member.mismatches += 1
        member.version = None
        self._tell(
            "mismatch", member.sender.name, f"digest {message.digest:016x} at {message.version}"
        )
        if message.ok:
            self._say(
                msg.Resync(
                    sender=self.me,
                    to=member.sender,
                    reason=f"digest at version {message.version} is not the trainer's",
                )
            )

    def _remove(self, sender: Sender, kind: EventKind, reason: str) -> None:
        if not self.membership.remove(sender):
            return
        self._tell(kind, sender.name, reason)
        for awaited in self._awaited.values():
            awaited.discard(sender.name)
        if self._exchange is not None:
            self._exchange.refuse(sender, reason, self._now)
            self._resolve()

    def _refuse(self, to: Sender, code: str, reason: str) -> None:
        assert code in ("name-in-use", "manifest")
        self._say(
            msg.Refuse(
                sender=self.me,
                to=to,
                code="name-in-use" if code == "name-in-use" else "manifest",
                reason=reason,
            )
        )
        self._tell("refused", to.name, reason)

    # ---- windows

    def _advance(self) -> None:
        """Between exchanges: first the window that the members call for, then the next patch."""
        if self.state is not State.IDLE or self._retry_at is not None:
            return
        now = self._now
        inside = frozenset(self._open_members)
        kinds = tuple(k for k in self.kinds if self._barred.get(k, 0.0) <= now)
        kind, members = self.membership.fit(kinds, inside, self.head, now)
        right = self._open_window and (kind, members) == (self._open_kind, self._open_members)
        if kind is not None and not right and now >= self._reopen_at:
            self._open(kind, members)
        elif self._announce is not None:
            return  # Nobody may be called for a version that the journal has not stored yet.
        elif self._round is not None:
            if self._open_window and right and self._attempt < self.policy.attempts:
                self._call()
            else:
                self._finish("log-only")
        elif self.published > self.head:
            if self._open_window and not right:
                self._drop_window("its members are not the run's")
            self.state = State.TAKING
            self._out.append(cmd.Take(self._mergeable()))
        elif self._open_window and kind is None:
            self._drop_window("no member is left")

    def _open(self, kind: WindowKind, members: tuple[Sender, ...]) -> None:
        self._drop_window("another window follows")
        self._window += 1
        stamp = Stamp(self.epoch, self._window, 0, self.head)
        self._opening_kind = kind
        self._exchange = Exchange(
            stamp, members, self._now, self.policy.ready_s, self.policy.open_s
        )
        self.state = State.OPENING
        self._say(
            msg.Opening(
                sender=self.me, stamp=stamp, kind=kind, members=members, enters_at=self.head
            )
        )

    def _drop_window(self, reason: str) -> None:
        if not self._open_window:
            return
        window, self._open_window = self._open_window, 0
        sound = all(self.membership.get(m) is not None for m in self._open_members)
        self._open_members = ()
        self._out.append(cmd.CloseWindow(window) if sound else cmd.AbortWindow(window))
        self._say(msg.Abort(sender=self.me, stamp=Stamp(self.epoch, window), reason=reason))

    def _go(self) -> None:
        exchange = self._exchange
        assert exchange is not None
        stamp = exchange.stamp
        self._say(msg.Go(sender=self.me, stamp=stamp))
        if stamp.attempt == 0:
            assert self._opening_kind is not None
            self._out.append(
                cmd.OpenWindow(
                    stamp, self._opening_kind, 0, len(exchange.members) + 1, exchange.work_s
                )
            )
        else:
            record = self._round
            assert record is not None
            # The journal republishes before our append returns: a Ready is proof enough.
            record.announced_at = record.announced_at or self._now
            record.went_at = self._now
            self._out.append(cmd.Send(stamp, exchange.work_s))

    def _current(self, stamp: Stamp) -> bool:
        return self._exchange is not None and self._exchange.stamp == stamp

    def _local(self, stamp: Stamp, error: str | None, *, opening: bool) -> None:
        exchange = self._exchange
        if exchange is None or exchange.phase is not Phase.WORKING:
            return
        at = exchange.stamp
        if (at.epoch, at.window, at.attempt) == (stamp.epoch, stamp.window, stamp.attempt):
            assert opening == (at.attempt == 0)
            exchange.local(error, self._now)
            self._resolve()

    def _resolve(self) -> None:
        """If the exchange is over: what follows from how it ended."""
        exchange = self._exchange
        if exchange is None or not exchange.over:
            return
        self._exchange = None
        opening = self.state is State.OPENING
        if exchange.phase is Phase.FAILED:
            self._failed(exchange, opening=opening)
        elif opening:
            self._open_window = exchange.stamp.window
            self._open_kind = self._opening_kind
            self._open_members = exchange.members
            self._opening_failures = 0
            assert self._open_kind is not None
            self._bars.pop(self._open_kind, None)
            names = ", ".join(m.name for m in exchange.members)
            self._tell("window-open", "trainer", f"{self._open_kind} {self._open_window}: {names}")
            self.state = State.IDLE
        else:
            received = [m for m, error in exchange.reports.items() if error is None]
            for member in received:
                self.membership.pardon(member)
            assert self._round is not None
            self._round.received = tuple(received)
            self._finish(exchange.reason)

    def _failed(self, exchange: Exchange, *, opening: bool) -> None:
        stamp = exchange.stamp
        left_out = exchange.left_out
        if not opening and not left_out:
            # Once, anyone may have held it up; who has nothing after two attempts stays out, or
            # one worker that never receives would cost every round all of its attempts.
            without = {m for m in exchange.members if exchange.reports.get(m, "") is not None}
            left_out = tuple(m for m in exchange.members if m in without & self._suspects)
            self._suspects = without
        for member in left_out:
            pause = self.membership.strike(member, self._now)
            if pause:
                self._tell("evict", member.name, f"{exchange.reason}; out for {pause:g} s")
        self._say(msg.Abort(sender=self.me, stamp=stamp, reason=exchange.reason))
        if not opening or exchange.went is not None:
            self._out.append(cmd.AbortWindow(stamp.window))
        self._open_window = 0
        self._open_members = ()
        self._tell("window-abort", "trainer", f"window {stamp.window}: {exchange.reason}")
        self.state = State.IDLE
        if opening and not left_out:
            self._bar()

    def _bar(self) -> None:
        """A window did not open, and nobody in particular is to blame."""
        kind = self._opening_kind
        assert kind is not None
        self._opening_failures += 1
        before = self._bars.get(kind, 0)
        # What has been given up before gets one try at a time: each holds rounds up for open_s.
        if self._opening_failures < (1 if before else self.policy.attempts):
            return
        self._opening_failures = 0
        self._bars[kind] = before + 1
        if self.policy.window == "auto" and kind != "bus":
            self._barred[kind] = self._now + self.policy.backoff_max_s
        else:
            pause = self.policy.backoff_s * 2.0 ** min(before, 16)
            self._reopen_at = self._now + min(pause, self.policy.backoff_max_s)

    # ---- rounds

    def _mergeable(self) -> tuple[int, ...]:
        """Announced versions that are neither stored nor with everyone (rule 3)."""
        waiting = [v for v in self._unsafe if v not in self._storing]
        members = {m.sender for m in self.membership.members.values()}
        for at, version in enumerate(waiting):
            if not members or not members <= self._staged_by(version):
                # With all that follow it: a merged patch has no holes.
                return tuple(waiting[at:])
        return ()

    def _staged_by(self, version: int) -> set[Sender]:
        """The members that have it in staging or already in their weights."""
        record = self._records.get(version) or self._settled.get(version)
        staged = set(record.received) if record is not None else set()
        for member in self.membership.members.values():
            if member.version is not None and member.version >= version:
                staged.add(member.sender)
        return staged

    def _sealed(self, sealed: ev.Sealed) -> None:
        if self.state is not State.TAKING:
            return  # The run began anew meanwhile; its anchor has what this patch brings.
        merged = range(sealed.base_version + 1, sealed.version)
        self._unsafe = [v for v in self._unsafe if v in self._storing or v not in merged]
        self._attempt = 1 if self._open_window else 0
        self._suspects = set()
        stamp = Stamp(self.epoch, self._open_window, self._attempt, sealed.version)
        self._round = RoundRecord(
            base_version=sealed.base_version,
            version=sealed.version,
            published_at=sealed.published_at,
            nbytes=sealed.nbytes,
            dense_nbytes=sealed.dense_nbytes,
            changed=sealed.changed,
            numel=sealed.numel,
            encoding=sealed.encoding,
            digest=sealed.digest,
            diff_us=sealed.diff_us,
            encode_us=sealed.encode_us,
            step=sealed.step,
            tags=sealed.tags,
            sealed_at=self._now,
        )
        announce = msg.Announce(
            sender=self.me,
            stamp=stamp,
            base_version=sealed.base_version,
            manifest_hash=self.manifest_hash,
            nbytes=sealed.nbytes,
            checksum=sealed.checksum,
            digest=sealed.digest,
            changed=sealed.changed,
            encoding=sealed.encoding,
            dense_nbytes=sealed.dense_nbytes,
            step=sealed.step,
            tags=sealed.tags,
        )
        self._append(announce)
        self.state = State.ROUND
        if stamp.window:
            # Members may answer before our append returns; their time runs from when it does.
            self._begin(stamp, sealed.nbytes, self._now)

    def _append(self, announce: msg.Announce) -> None:
        self._announce = announce
        self._out.append(cmd.Append(announce))

    def _begin(self, stamp: Stamp, nbytes: int, began: float) -> None:
        self._exchange = Exchange(
            stamp,
            self._open_members,
            began,
            self.policy.ready_s,
            self.policy.send_deadline_s(nbytes),
        )

    def _announced(self, version: int) -> None:
        if self._announce is None or self._announce.version != version:
            return
        self._announce = None
        record = self._round
        if record is None:
            return  # A Ready has proven it before, and the round is over.
        record.announced_at = record.announced_at or self._now
        if self._exchange is not None and self._exchange.stamp.attempt:
            self._exchange.began = self._now
        elif self.state is State.ROUND:
            self._finish("log-only")

    def _announce_failed(self, event: ev.AnnounceFailed) -> None:
        if self.state is State.RECLAIMING:
            return
        ours = self._announce is not None and self._announce.version == event.version
        match event.cause:
            case "fenced":
                if ours:
                    self._fence(event.reason)
            case "lost":
                # The keeper of the lease may find it out before an append that is still under way:
                # what that one says later is of the stream that is gone.
                if event.version == self._orphan:
                    self._orphan = None
                    return
                self._reclaim(self.epoch + 1, f"the bus has forgotten the run: {event.reason}")
            case "unavailable":
                if ours:
                    self._retry_at = self._now + self.policy.retry_s
            case _:
                assert_never(event.cause)

    def _reclaim(self, epoch: int, reason: str) -> None:
        if self.state is State.RECLAIMING:
            return
        if self._announce is not None:
            self._orphan = self._announce.version
        self._abandon(reason)
        self.state = State.RECLAIMING
        self._reclaimed = epoch
        self._retry_at = None
        self._out.append(cmd.Reclaim(epoch))

    def _reclaim_failed(self, reason: str) -> None:
        if self.state is State.RECLAIMING:
            self._retry_at = self._now + self.policy.retry_s

    def _call(self) -> None:
        record = self._round
        assert record is not None
        self._attempt += 1
        stamp = Stamp(self.epoch, self._open_window, self._attempt, record.version)
        self.state = State.ROUND
        self._begin(stamp, record.nbytes, self._now)
        self._say(msg.Call(sender=self.me, stamp=stamp))

    def _finish(self, reason: str) -> None:
        """The round is over: everyone staged it, or whoever did not takes it from the log."""
        record = self._round
        assert record is not None
        if reason == "log-only":
            record.members = tuple(m.sender for m in self.membership.members.values())
            record.attempt = self._attempt
            if record.members:
                self._tell("log-only", "trainer", f"version {record.version} goes by the log")
        else:
            assert self._open_kind is not None
            record.members = self._open_members
            record.window = self._open_window
            record.transport = self._open_kind
            record.attempt = self._attempt
        record.received_at = self._now
        self._round = None
        self.head = record.version
        self._records[record.version] = record
        self._awaited[record.version] = {
            m.name for m in record.members if self.membership.get(m) is not None
        }
        self._unsafe.append(record.version)
        for member in self.membership.members.values():
            if member.version is not None:
                self._advanced(member, member.version, member.verified)
        self.state = State.IDLE
        self._advance()

    def _settle(self) -> None:
        """Tell the metrics of rounds that all have verified, or that have had their time."""
        for version, record in list(self._records.items()):
            late = self._now >= record.received_at + self.policy.settle_s
            if late or not self._awaited[version]:
                del self._records[version], self._awaited[version]
                self._settled[version] = record
                self._out.append(cmd.Settled(record))
        while len(self._settled) > HISTORY:
            self._settled.popitem(last=False)

    # ---- the log

    def _storable(self) -> bool:
        # While a patch is being taken, what it may take along must not be stored as well.
        settled = self.state in (State.IDLE, State.OPENING, State.ROUND)
        return settled and not self._storing and bool(self._unsafe)

    def _store(self) -> None:
        if not self._storable() or self._now < self._store_at:
            return
        self._storing = tuple(self._unsafe)
        self._out.append(cmd.Store(self._storing))

    def _log_stored(self, version: int) -> None:
        if version not in self._storing:
            return  # Of an epoch that is over.
        self._storing = ()
        self._log_failures = 0
        self._unsafe = [v for v in self._unsafe if v > version]
        if version > self.stored:
            self.stored = version
            self._say(msg.Stored(sender=self.me, epoch=self.epoch, version=version))

    def _log_failed(self, version: int, reason: str) -> None:
        if version not in self._storing:
            return  # Of an epoch that is over.
        # They were merged to be stored, and are kept as one: a log that fails for long must not
        # cost memory for each of them.
        self._unsafe = [v for v in self._unsafe if v not in self._storing[:-1]]
        self._storing = ()
        pause = self.policy.retry_s * 2.0 ** min(self._log_failures, 6)
        self._store_at = self._now + pause
        if self._log_failures == 0:
            self._tell("log-failed", "trainer", f"version {version}: {reason}")
        self._log_failures += 1

    # ---- ends

    def _abandon(self, reason: str) -> None:
        stamp = self._exchange.stamp if self._exchange else Stamp(self.epoch, self._open_window)
        if stamp.window:
            self._say(msg.Abort(sender=self.me, stamp=stamp, reason=reason))
            self._out.append(cmd.AbortWindow(stamp.window))
        self._exchange = None
        self._open_window = 0
        self._open_members = ()
        self._round = None
        self._announce = None

    def _fence(self, reason: str) -> None:
        self._abandon("the trainer was fenced off")
        self.error = Fenced(self.run, self.epoch, reason)
        self.state = State.FENCED
        self._tell("fenced", "trainer", reason)
        self._out.append(cmd.Fail(self.error))

    def _close(self, reason: str) -> None:
        if self.state not in (State.UNCLAIMED, State.FENCED):
            self._drop_window(reason)
            self._abandon(reason)
            self._tell("bye", "trainer", reason)
            self._say(msg.Bye(sender=self.me, epoch=self.epoch))
        self.state = State.CLOSED

    # ---- words

    def _say(self, message: msg.TrainerMessage) -> None:
        self._out.append(cmd.Say(message))

    def _tell(self, kind: EventKind, member: str, reason: str) -> None:
        self._out.append(cmd.Tell(kind, member, reason))

    def _why_missing(self, member: Member, version: int) -> str:
        silent = self._now - member.heard
        if silent > 2 * self.policy.heartbeat_s:
            return f"unheard for {silent:.1f} s"
        if member.lagging is not None:
            return f"lagging: {member.lagging}"
        if version > self.head:
            where = self._exchange.reason if self._exchange else self.state.value
            return f"the round has not ended ({where})"
        if member.version is None:
            return "has not shown yet which version it holds"
        return f"at version {member.version}"
