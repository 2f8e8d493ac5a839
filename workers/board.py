"""What a run looks like from outside: messages in, rows out. No clock, no bus, no terminal.

`Board.hear` takes what travels on a run's control, metrics and event subjects; `Board.snapshot`
tells how things stand. Times come from the caller: seconds on one monotonic clock.
"""

from __future__ import annotations

import math
import re
from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

from ..messages import control as msg
from ..messages.codec import Message
from ..messages.metrics import Event, Metric, TrainerMetrics, WorkerMetrics

#: Rounds that the percentiles look back on.
ROUNDS = 200
#: Rounds of the trainer whose density is remembered, to tell it of a worker's version.
DENSITIES = 1024
#: Events that are kept.
EVENTS = 50

TrainerState = Literal["unheard", "alive", "silent", "left"]
MemberState = Literal[
    "joining", "catching up", "following", "verifying", "lagging", "mismatch", "refused", "put out",
    "silent", "left",
]  # fmt: skip


class TrainerRow(msgspec.Struct, frozen=True, kw_only=True):
    """The trainer as the board knows it; the newest round's figures are None before any is heard.

    `round_ms`: from publish() until the last member had applied. `transport` is the road of the
    newest round, `heard_s` how long ago the trainer spoke.
    """

    state: TrainerState
    epoch: int | None
    version: int | None
    step: int | None
    heard_s: float | None
    rounds: int
    round_p50_ms: float | None
    round_p99_ms: float | None
    nbytes: int | None
    dense_nbytes: int | None
    density: float | None
    encoding: str | None
    transport: str | None
    window: int | None
    members: int | None


class MemberRow(msgspec.Struct, frozen=True, kw_only=True):
    """One member. `lag` counts versions behind the trainer's head; `note` says what is the matter.

    `round_ms`: from the start of receiving until the weights held the version, as the member
    measured it. `density` is that of the version that it verified last, `nbytes` the bytes which
    that took; `rounds` and `mismatches` count since the member started or the board began to
    listen. `follow`: which versions it follows, if it evaluates. `caught_up` is the share of bytes
    (0 to 1) that a member has which takes versions from the log, None for any other.
    """

    name: str
    state: MemberState
    note: str
    version: int | None
    verified: int | None
    lag: int | None
    heard_s: float
    rounds: int
    round_p50_ms: float | None
    round_p99_ms: float | None
    nbytes: int | None
    density: float | None
    mismatches: int
    source: str | None
    follow: str | None
    caught_up: float | None


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """The run at one moment, members by name, events oldest first."""

    run: str
    trainer: TrainerRow
    members: tuple[MemberRow, ...]
    events: tuple[Event, ...]


def percentile(values: Sequence[float], share: float) -> float | None:
    """The smallest value that at least `share` (0 to 1) of the values do not exceed."""
    if not values:
        return None
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


@dataclass(slots=True)
class _Member:
    incarnation: str
    heard: float
    state: MemberState = "joining"
    note: str = ""
    version: int | None = None
    verified: int | None = None
    mismatches: int = 0
    nbytes: int | None = None
    source: str | None = None
    follow: str | None = None
    #: How far it said that it has caught up, and to which version.
    caught_up: float | None = None
    target: int = 0
    rounds: int = 0
    round_ms: deque[float] = field(default_factory=lambda: deque(maxlen=ROUNDS))


class Board:
    """One run's state, as far as it was heard."""

    def __init__(self, run: str, *, silence_s: float = 4.0, forget_s: float = 60.0) -> None:
        self.run = run
        self.silence_s = silence_s
        self.forget_s = forget_s
        self._members: dict[str, _Member] = {}
        self._events: deque[Event] = deque(maxlen=EVENTS)
        self._densities: OrderedDict[int, float] = OrderedDict()
        self._round: TrainerMetrics | None = None
        self._rounds = 0
        self._round_ms: deque[float] = deque(maxlen=ROUNDS)
        self._trainer_heard: float | None = None
        self._trainer_left = False
        self._epoch: int | None = None
        self._head: int | None = None
        self._step: int | None = None

    @property
    def heard(self) -> tuple[bool, frozenset[str]]:
        """Whether the trainer was heard, and which members."""
        return self._trainer_heard is not None, frozenset(self._members)

    def hear(self, message: Message | Metric, now: float) -> None:
        """Take in one message of the run."""
        match message:
            case TrainerMetrics():
                self._hear_round(message, now)
            case WorkerMetrics():
                self._hear_version(message, now)
            case Event():
                self._hear_event(message)
            case msg.Claim():
                self._hear_trainer(message.epoch, message.version, now, anew=True)
            case msg.Announce():
                self._hear_trainer(message.stamp.epoch, message.version, now)
                self._step = message.step
            case msg.Beat():
                self._hear_trainer(message.epoch, message.version, now)
            case msg.Bye():
                self._trainer_heard, self._trainer_left = now, True
            case msg.Refuse():
                member = self._members.get(message.to.name)
                # A newcomer refused for its name is not the holder, whose row this is.
                if member is not None and message.code != "name-in-use":
                    member.state, member.note = "refused", message.reason
            case (
                msg.Join() | msg.Ready() | msg.NotReady() | msg.Opened() | msg.Received()
                | msg.Applied() | msg.Verified() | msg.Refused() | msg.Heartbeat() | msg.Leave()
            ):  # fmt: skip
                self._hear_member(message, now)
            case _:
                if self._trainer_heard is not None:
                    self._trainer_heard = now

    def _hear_trainer(self, epoch: int, version: int, now: float, *, anew: bool = False) -> None:
        if self._epoch is not None and epoch < self._epoch:
            return
        if self._epoch is not None and (epoch != self._epoch or anew):
            self._densities.clear()
            self._head = None
            for member in self._members.values():
                member.version = member.verified = None
        self._epoch = epoch
        self._head = version if self._head is None else max(self._head, version)
        self._trainer_heard, self._trainer_left = now, False

    def _hear_round(self, metrics: TrainerMetrics, now: float) -> None:
        # The last round may be told after the goodbye.
        if not self._trainer_left:
            self._hear_trainer(metrics.epoch, metrics.version, now)
        self._round = metrics
        self._rounds += 1
        if metrics.members:
            self._round_ms.append(metrics.total_us / 1e3)
        self._densities[metrics.version] = metrics.density
        while len(self._densities) > DENSITIES:
            self._densities.popitem(last=False)
        if metrics.step is not None and metrics.version == self._head:
            self._step = metrics.step

    def _hear_version(self, metrics: WorkerMetrics, now: float) -> None:
        member = self._members.setdefault(metrics.worker, _Member("", now))
        member.heard = now
        member.version = max(metrics.version, member.version or 0)
        member.mismatches = metrics.mismatches
        member.nbytes = metrics.nbytes
        member.source = metrics.transport if metrics.source == "window" else metrics.source
        member.rounds += 1
        member.round_ms.append((metrics.receive_us + metrics.check_us + metrics.staged_us) / 1e3)
        if metrics.verified:
            member.verified = metrics.version
        self._settle(member)

    def _hear_member(self, message: msg.Control, now: float) -> None:
        name, incarnation = message.sender.name, message.sender.incarnation
        member = self._members.get(name)
        if member is None or member.incarnation not in ("", incarnation):
            # A second process under a taken name says Join until it is refused.
            held = member is not None and member.state != "left" and not self._silent(member, now)
            if held and isinstance(message, msg.Join):
                return
            member = self._members[name] = _Member(incarnation, now)
        member.incarnation = incarnation
        member.heard = now
        match message:
            case msg.Join():
                member.version = message.version
                if member.state not in ("refused", "put out"):
                    member.state, member.note = "joining", ""
                return
            case msg.Leave():
                member.state, member.note = "left", message.reason
                return
            case msg.Heartbeat():
                member.version, member.verified = message.version, message.verified
                member.follow = message.follow
                if message.lagging:
                    member.state, member.note = "lagging", message.lagging
                    return
            case msg.Applied():
                member.version = message.version
            case msg.Verified() if message.ok:
                member.verified = message.version
            case msg.Verified():
                member.verified = None
                member.state = "mismatch"
                member.note = f"version {message.version} is not what the trainer announced"
                return
            case _:
                return
        self._settle(member)

    @staticmethod
    def _settle(member: _Member) -> None:
        """What the state is when nothing is the matter."""
        if member.version is None:
            if member.state not in ("refused", "put out", "mismatch"):
                member.state, member.note = "joining", ""
        elif member.verified == member.version:
            if member.version >= member.target:
                member.caught_up = None  # its last word on it may be lost
            member.state, member.note = "following", ""
        else:
            member.state = "verifying"

    def _hear_event(self, event: Event) -> None:
        if event.kind == "catch-up":
            # One a second and member: only the newest of each says anything.
            for before in [e for e in self._events if _supersedes(event, e)]:
                self._events.remove(before)
        self._events.append(event)
        member = self._members.get(event.member)
        if member is None:
            return
        if event.kind == "evict":
            member.state, member.note = "put out", event.reason
        elif event.kind == "mismatch":
            member.state, member.note = "mismatch", event.reason
        elif event.kind == "catch-up":
            self._hear_progress(member, event.details or {})

    @staticmethod
    def _hear_progress(member: _Member, details: Mapping[str, Any]) -> None:
        member.caught_up = None
        match details:
            case {
                "state": "under way",
                "nbytes": int(nbytes),
                "of_nbytes": int(of_nbytes),
                "target": int(target),
            } if 0 <= nbytes <= of_nbytes and of_nbytes:
                member.caught_up, member.target = nbytes / of_nbytes, target

    def snapshot(self, now: float) -> Snapshot:
        """How things stand at `now`; members that left long ago are gone."""
        for name, member in list(self._members.items()):
            gone = now - member.heard > self.forget_s
            if gone and (member.state == "left" or self._silent(member, now)):
                del self._members[name]
        return Snapshot(
            run=self.run,
            trainer=self._trainer_row(now),
            members=tuple(
                self._member_row(name, member, now)
                for name, member in sorted(self._members.items(), key=lambda item: _key(item[0]))
            ),
            events=tuple(self._events),
        )

    def _silent(self, member: _Member, now: float) -> bool:
        return now - member.heard > self.silence_s

    def _trainer_row(self, now: float) -> TrainerRow:
        heard_s = None if self._trainer_heard is None else now - self._trainer_heard
        state: TrainerState = "alive"
        if heard_s is None:
            state = "unheard"
        elif self._trainer_left:
            state = "left"
        elif heard_s > self.silence_s:
            state = "silent"
        newest = self._round
        return TrainerRow(
            state=state,
            epoch=self._epoch,
            version=self._head,
            step=self._step,
            heard_s=heard_s,
            rounds=self._rounds,
            round_p50_ms=percentile(self._round_ms, 0.50),
            round_p99_ms=percentile(self._round_ms, 0.99),
            nbytes=newest.nbytes if newest else None,
            dense_nbytes=newest.dense_nbytes if newest else None,
            density=newest.density if newest else None,
            encoding=newest.encoding if newest else None,
            transport=newest.transport if newest else None,
            window=newest.window if newest else None,
            members=newest.members if newest else None,
        )

    def _member_row(self, name: str, member: _Member, now: float) -> MemberRow:
        state, note = member.state, member.note
        caught_up = member.caught_up
        if caught_up is not None and state in ("joining", "following", "verifying"):
            state = "catching up"
            note = f"{state} from the log: {caught_up:.0%} of what leads to version {member.target}"
        if state != "left" and self._silent(member, now):
            state, note = "silent", f"not heard for {now - member.heard:.0f} s"
        lag = None
        if member.version is not None and self._head is not None:
            lag = max(0, self._head - member.version)
        density = None if member.verified is None else self._densities.get(member.verified)
        return MemberRow(
            name=name,
            state=state,
            note=note,
            version=member.version,
            verified=member.verified,
            lag=lag,
            heard_s=now - member.heard,
            rounds=member.rounds,
            round_p50_ms=percentile(member.round_ms, 0.50),
            round_p99_ms=percentile(member.round_ms, 0.99),
            nbytes=member.nbytes,
            density=density,
            mismatches=member.mismatches,
            source=member.source,
            follow=member.follow,
            caught_up=None if state in ("silent", "left") else caught_up,
        )


def _supersedes(event: Event, before: Event) -> bool:
    """Whether `before` told how far this member's catch-up was earlier."""
    under_way = (before.details or {}).get("state") == "under way"
    return before.kind == "catch-up" and before.member == event.member and under_way


def _key(name: str) -> list[tuple[int, str]]:
    """worker-2 before worker-10."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", name)]
