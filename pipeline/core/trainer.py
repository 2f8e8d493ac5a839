"""The trainer's side of the protocol: one round in flight, one patch pending, nobody waited for
beyond a deadline.

    UNCLAIMED → IDLE → TAKING → ROUND → IDLE        (a round through the open window, or the log)
                 ↕                ↕
              OPENING         OPENING               (a window is opened only between attempts)

While a patch is made and taken, members commit to it: where all have, go is said before the journal
is asked. A round ends when its collective is over and the journal has its announcement.

Here is what follows on what; each part that has a memory of its own has a file of its own.
"""

from __future__ import annotations

from enum import Enum
from typing import assert_never

from ...messages import control as msg
from ...messages.control import Sender, Stamp, WindowKind
from ...messages.errors import Fenced, LocalProtocolError
from ...messages.metrics import EventKind
from . import commands as cmd
from . import events as ev
from .announcing import Announcing
from .commands import TrainerCommand
from .exchange import Exchange, Phase
from .ledger import Ledger, RoundRecord
from .membership import Membership
from .policy import Policy
from .roster import Roster
from .round import Round, announcement, begin
from .safekeeping import Safekeeping
from .window import Answer, Window, Windows


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


#: While a patch is being taken, what it may take along must not be stored as well.
STORING = (State.IDLE, State.OPENING, State.ROUND)


class TrainerCore:
    """Events in, commands out. `me` is the trainer, `kinds` the windows that it can open, `gpus`
    where the weights of each of its ranks are ("": on none), `nbytes` what all publish together."""

    def __init__(
        self,
        *,
        run: str,
        me: Sender,
        manifest_hash: str,
        kinds: tuple[WindowKind, ...],
        policy: Policy,
        gpus: tuple[str, ...] = ("",),
        nbytes: int = 0,
    ) -> None:
        self.run = run
        self.me = me
        self.manifest_hash = manifest_hash
        self.kinds = kinds
        self.policy = policy
        self.state = State.UNCLAIMED
        self.membership = Membership(policy, gpus=gpus)
        self.epoch = 0
        #: The newest version that was announced and whose round is over.
        self.head = 0
        #: The newest version that publish() has made.
        self.published = 0
        self.error: Fenced | None = None

        self._ledger = Ledger(policy.settle_s)
        self._roster = Roster(me, manifest_hash, policy, self.membership, self._ledger)
        self._windows = Windows(me, kinds, policy, self.membership, roots=len(gpus), nbytes=nbytes)
        self._announcing = Announcing(policy.retry_s)
        self._safekeeping = Safekeeping(policy.retry_s)
        self._round: Round | None = None
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
        self._out += [cmd.Settled(record) for record in self._ledger.settle(now)]
        return self._out

    def next_deadline(self) -> float | None:
        """When a Tick is due, on the clock of `now`."""
        if self.state in (State.CLOSED, State.FENCED, State.UNCLAIMED):
            return None
        now, exchange, openings = self._now, self._timed, self._windows.openings
        times = (
            self._beat_at,
            exchange.deadline if exchange is not None else None,
            self._announcing.retry_at,
            self._safekeeping.due if self.state in STORING else None,
            openings.resume_at if self.state is State.IDLE and openings.resume_at > now else None,
            self.membership.next_change(now),
            self._ledger.next_change(),
        )
        return min(time for time in times if time is not None)

    @property
    def stored(self) -> int:
        """What the log holds."""
        return self._safekeeping.stored

    @property
    def busy(self) -> bool:
        """Whether a round is in flight or a patch is pending."""
        return self._round is not None or self.published > self.head

    @property
    def quiet(self) -> bool:
        """Whether everything published has been through its round and is in the log."""
        calm = self.state is State.IDLE and self._announcing.pending is None
        return calm and not self.busy and not self._safekeeping.unsafe

    @property
    def window_kind(self) -> WindowKind | None:
        """The kind of the open window, if one is open."""
        return self._windows.open.kind if self._windows.open is not None else None

    def record(self, version: int) -> RoundRecord | None:
        """The round that brought `version`, alone or merged with later ones, while remembered."""
        return self._ledger.bringing(version)

    def progress(self, version: int) -> tuple[dict[str, float], dict[str, str]]:
        """Who has applied `version`, in seconds after publish(), and who has not, and why.

        Of those that are waited for: who evaluates is in neither. A member that applied it and
        left since counts as one that has.
        """
        nobody_yet = None
        if version > self.head:
            exchange = self._windows.exchange
            where = exchange.reason if exchange is not None else self.state.value
            nobody_yet = f"the round has not ended ({where})"
        return self._roster.progress(version, nobody_yet, self._now)

    # ---- events

    def _dispatch(self, event: ev.TrainerEvent) -> None:
        match event:
            case ev.Tick():
                self._tick()
            case ev.FromWorker(message):
                self._hear(message)
            case ev.Publishing():
                self._publishing()
            case ev.Published(version):
                self.published = max(self.published, version)
            case ev.Sealed():
                self._sealed(event)
            case ev.NothingTaken():
                if self.state is State.TAKING:
                    self.state = State.IDLE
            case ev.Announced(version):
                self._announced(version)
            case ev.AnnounceFailed():
                self._announce_failed(event)
            case ev.WindowOpened(epoch, window):
                self._local(Stamp(epoch, window), None)
            case ev.WindowFailed(epoch, window, reason):
                self._local(Stamp(epoch, window), reason)
            case ev.Sent(window, attempt, error):
                self._local(Stamp(self.epoch, window, attempt), error)
            case ev.LogStored(version):
                self._log_stored(version)
            case ev.LogFailed(version, reason):
                self._log_failed(version, reason)
            case ev.LeaseLost(reason):
                self._fence(reason)
            case ev.ReclaimFailed():
                self._announcing.reclaim_failed(self._now)
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
        self.head = event.version
        self.published = max(self.published, event.version)
        self.membership.reset()
        self._windows.openings.reset()
        self._announcing.claimed()
        self._safekeeping.reset(event.version)
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
        exchange = self._timed
        if exchange is not None:
            exchange.tick(now)
            self._resolve()
        again = self._announcing.retry(now)
        if again is not None:
            self._out.append(again)

    @property
    def _timed(self) -> Exchange | None:
        """The exchange whose deadlines count: nobody is late for what the journal has perhaps not
        stored yet; members' time to answer runs from its word on."""
        exchange = self._windows.exchange
        if exchange is None or exchange.phase is not Phase.GATHERING:
            return exchange
        return None if self._announcing.asks(exchange.stamp) else exchange

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
        self._out += self._roster.heard(sender, self._now)
        match message:
            case msg.Join(epoch=epoch, trainer=trainer):
                # Another trainer may have claimed this epoch in a journal that was forgotten.
                if epoch == self.epoch and trainer in ("", self.me.incarnation):
                    self._join(message)
            case msg.Ready() | msg.NotReady() | msg.Opened() | msg.Received():
                self._answered(message)
            case msg.Leave(reason=reason):
                self._remove(sender, "leave", reason)
            case _:
                self._out += self._roster.told(message, self.epoch, self.head, self._now)
                if isinstance(message, msg.Applied):
                    self._applied(message)

    def _answered(self, message: Answer) -> None:
        if self.membership.get(message.sender) is None:
            return
        exchange = self._windows.under(message.stamp)
        if exchange is None:
            self._windows.early(message, self._now)
            return
        self._out += self._windows.answered(exchange, message, self._now)
        self._follow()

    def _join(self, join: msg.Join) -> None:
        self._out += self._roster.join(join, self.epoch, self.head, self._now)

    def _remove(self, sender: Sender, kind: EventKind, reason: str) -> None:
        out = self._roster.remove(sender, kind, reason)
        if not out:
            return
        self._out += out
        if self._windows.exchange is not None:
            self._windows.exchange.refuse(sender, reason, self._now)
            self._resolve()

    # ---- what comes next

    def _advance(self) -> None:
        """Between exchanges: first the window that the members call for, then the next patch."""
        if self.state is not State.IDLE or self._announcing.retry_at is not None:
            return
        now, windows, round_ = self._now, self._windows, self._round
        kind, members = windows.wanted(self.head, now)
        right = windows.is_open(kind, members)
        if kind is not None and not right and now >= windows.openings.resume_at:
            again = round_ is not None  # a class after the other would take its time
            self._out += windows.ask(self.epoch, kind, members, self.head, now, whole=again)
            self.state = State.OPENING
        elif self._announcing.pending is not None:
            return  # Nobody may be called for a version that the journal has not stored yet.
        elif round_ is not None:
            if right and round_.attempt < self.policy.attempts:
                round_.attempt += 1
                stamp = windows.stamp(self.epoch, round_.version, round_.attempt)
                self._say(msg.Call(sender=self.me, stamp=stamp))
                self._out += windows.attempt(stamp, round_.announce, now)
                self.state = State.ROUND
            else:
                self._finish(round_, None)
        elif self.published > self.head:
            if not right:
                self._out += windows.leave("its members are not the run's")
            self._take(self.published)
        elif kind is None:
            self._out += windows.leave("no member is left")

    def _local(self, stamp: Stamp, error: str | None) -> None:
        self._windows.local(stamp, error, self._now)
        self._resolve()

    def _resolve(self) -> None:
        """If the exchange is over: what follows from how it ended."""
        exchange = self._windows.over()
        if exchange is None:
            return
        if exchange.phase is Phase.FAILED:
            self._failed(exchange)
        elif exchange.opening:
            self._out += self._windows.opened()
            self.state = State.IDLE
        else:
            assert self._round is not None
            self._round.carried(exchange)
            for member in self._round.record.received:
                self.membership.pardon(member)
            self._end(self._round)

    def _failed(self, exchange: Exchange) -> None:
        if exchange.opening:
            left_out = exchange.left_out
        else:
            assert self._round is not None
            left_out = self._round.blamed(exchange)
        self._out += self._windows.failed(exchange, left_out, self._now)
        self.state = State.IDLE

    # ---- rounds

    def _publishing(self) -> None:
        """A patch is being made; if nothing is in its way, its round begins meanwhile."""
        kind, members = self._windows.wanted(self.head, self._now)
        free = self.state is State.IDLE and not self.busy and self._announcing.pending is None
        if free and self._windows.is_open(kind, members):
            self._take(self.published + 1)

    def _take(self, version: int) -> None:
        """Ask for the patch, and meanwhile for commitments to `version`, which it should make."""
        if self._windows.open is not None:
            self._out += self._windows.prepare(version)
        self._out.append(cmd.Take(self._safekeeping.mergeable(self._roster.have)))
        self.state = State.TAKING

    def _sealed(self, sealed: ev.Sealed) -> None:
        if self.state is not State.TAKING:
            return  # The run began anew meanwhile; its anchor has what this patch brings.
        self._safekeeping.merged(sealed.base_version, sealed.version)
        # Published may come after it.
        self.published = max(self.published, sealed.version)
        stamp = self._windows.stamp(self.epoch, sealed.version)
        announce = announcement(sealed, stamp, self.me, self.manifest_hash)
        self._round = begin(sealed, announce, self._now)
        self.state = State.ROUND
        if stamp.window:
            # Go leaves before the append does: what the journal costs is no time of the round's.
            routes = sealed.routes if sealed.routed == stamp.window else ()
            self._out += self._windows.attempt(stamp, announce, self._now, routes)
        self._out.append(self._announcing.append(announce))
        self._follow()

    def _follow(self) -> None:
        exchange = self._windows.exchange
        if self._round is not None and exchange is not None and not exchange.opening:
            self._round.follow(exchange)
        self._resolve()

    def _announced(self, version: int) -> None:
        if not self._announcing.confirmed(version):
            return
        exchange = self._windows.exchange
        if exchange is not None and not exchange.opening:
            exchange.began = self._now
        self._known(version)

    def _applied(self, message: msg.Applied) -> None:
        """Members apply what came by a window only once the journal has announced it to them."""
        ours = message.epoch == self.epoch and self.membership.get(message.sender) is not None
        if ours and message.source == "window":
            self._known(message.version)

    def _known(self, version: int) -> None:
        """The journal has the announcement of this version."""
        if self._round is not None and self._round.version == version:
            self._round.announced(self._now)
            self._end(self._round)

    def _end(self, round_: Round) -> None:
        """It ends once its collective is over and the journal has its announcement."""
        over = self.state is State.ROUND and self._windows.exchange is None
        if over and round_.known:
            self._finish(round_, self._windows.open)

    def _announce_failed(self, event: ev.AnnounceFailed) -> None:
        match self._announcing.failed(event, self._now):
            case "fenced":
                self._fence(event.reason)
            case "lost":
                self._reclaim(self.epoch + 1, f"the bus has forgotten the run: {event.reason}")
            case None:
                pass

    def _finish(self, round_: Round, window: Window | None) -> None:
        """The round is over: everyone staged it, or whoever did not takes it from the log."""
        members = tuple(member.sender for member in self.membership.awaited)
        if window is not None:
            members = window.members
        elif members:
            self._tell("log-only", "trainer", f"version {round_.version} goes by the log")
        record = round_.end(window, members, self._now)
        self._round = None
        self.head = record.version
        present = (member.name for member in members if self.membership.get(member) is not None)
        self._ledger.add(record, present)
        self._safekeeping.announced(record.version)
        self._roster.review(self._now)
        self.state = State.IDLE
        self._advance()

    # ---- the log

    def _store(self) -> None:
        versions = self._safekeeping.store(self._now) if self.state in STORING else ()
        if versions:
            self._out.append(cmd.Store(versions))

    def _log_stored(self, version: int) -> None:
        if self._safekeeping.confirmed(version):
            self._say(msg.Stored(sender=self.me, epoch=self.epoch, version=version))

    def _log_failed(self, version: int, reason: str) -> None:
        if self._safekeeping.failed(version, self._now):
            self._tell("log-failed", "trainer", f"version {version}: {reason}")

    # ---- ends

    def _reclaim(self, epoch: int, reason: str) -> None:
        """The epoch is over: claim the run anew."""
        if self.state is State.RECLAIMING:
            return
        self._abandon(reason)
        self._out.append(self._announcing.reclaim(epoch))
        self.state = State.RECLAIMING

    def _fence(self, reason: str) -> None:
        self._abandon("the trainer was fenced off")
        self._announcing.drop()
        self.error = Fenced(self.run, self.epoch, reason)
        self.state = State.FENCED
        self._tell("fenced", "trainer", reason)
        self._out.append(cmd.Fail(self.error))

    def _close(self, reason: str) -> None:
        if self.state not in (State.UNCLAIMED, State.FENCED):
            self._out += self._windows.leave(reason)
            self._abandon(reason)
            self._announcing.drop()
            self._tell("bye", "trainer", reason)
            self._say(msg.Bye(sender=self.me, epoch=self.epoch))
        self.state = State.CLOSED

    def _abandon(self, reason: str) -> None:
        self._out += self._windows.abandon(reason)
        self._round = None

    # ---- words

    def _say(self, message: msg.TrainerMessage) -> None:
        self._out.append(cmd.Say(message))

    def _tell(self, kind: EventKind, member: str, reason: str) -> None:
        self._out.append(cmd.Tell(kind, member, reason))
