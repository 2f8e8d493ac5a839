"""The round in flight: one sealed update, its announcement, its attempts and who failed in them."""

from __future__ import annotations

from dataclasses import dataclass, field

from ...messages.control import Announce, Sender, Stamp
from .events import Sealed
from .exchange import Exchange
from .ledger import RoundRecord
from .window import Window


@dataclass(slots=True)
class Round:
    """An update's way to the members. `attempt` 0: it goes by the log alone."""

    record: RoundRecord
    announce: Announce
    attempt: int
    #: Who had nothing from the attempt before.
    _suspects: frozenset[Sender] = field(default_factory=frozenset)

    @property
    def version(self) -> int:
        """The version that it brings."""
        return self.record.version

    @property
    def known(self) -> bool:
        """Whether the journal is known to have its announcement."""
        return self.record.announced_at != 0.0

    def announced(self, now: float) -> None:
        """The journal has its announcement: by its own word, or since a member has applied it."""
        self.record.announced_at = self.record.announced_at or now

    def follow(self, exchange: Exchange) -> None:
        """How its attempt stands."""
        if exchange.went is not None:
            self.record.went_at = exchange.went

    def carried(self, through: Exchange) -> None:
        """The window has brought it to whoever has not refused it."""
        self.record.received = tuple(m for m, error in through.reports.items() if error is None)
        self.record.received_at = through.ended or 0.0

    def blamed(self, failed: Exchange) -> tuple[Sender, ...]:
        """Whom to leave out after an attempt that failed."""
        if failed.left_out:
            return failed.left_out
        # Once, anyone may have held it up; who has nothing after two attempts stays out, or
        # one worker that never receives would cost every round all of its attempts.
        without = frozenset(m for m in failed.members if failed.reports.get(m, "") is not None)
        again = tuple(m for m in failed.members if m in without & self._suspects)
        self._suspects = without
        return again

    def end(self, window: Window | None, members: tuple[Sender, ...], now: float) -> RoundRecord:
        """It is over, through this window or without one."""
        record = self.record
        record.members = members
        record.attempt = self.attempt
        if window is not None:
            record.window = window.number
            record.transport = window.kind
        record.received_at = record.received_at or now
        return record


def begin(sealed: Sealed, announce: Announce, now: float) -> Round:
    """The round of what was sealed just now, announced like that."""
    return Round(
        RoundRecord(
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
            sealed_at=now,
        ),
        announce,
        announce.stamp.attempt,
    )


def announcement(sealed: Sealed, stamp: Stamp, me: Sender, manifest_hash: str) -> Announce:
    """What members are told of it. Bytes and checksum are fixed from here on."""
    return Announce(
        sender=me,
        stamp=stamp,
        base_version=sealed.base_version,
        manifest_hash=manifest_hash,
        nbytes=sealed.nbytes,
        checksum=sealed.checksum,
        digest=sealed.digest,
        changed=sealed.changed,
        encoding=sealed.encoding,
        dense_nbytes=sealed.dense_nbytes,
        step=sealed.step,
        tags=sealed.tags,
        pieces=sealed.pieces,
    )
