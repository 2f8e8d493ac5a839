"""Bugs to plant: each breaks one rule of the protocol, and the simulation has to find it."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

from sparsecast.messages import codec
from sparsecast.messages.control import Claim
from sparsecast.pipeline.bus.journal import Journal
from sparsecast.pipeline.core.lane import Lane
from sparsecast.pipeline.core.membership import Membership
from sparsecast.pipeline.core.safekeeping import Safekeeping
from sparsecast.pipeline.core.seat import Seat
from sparsecast.pipeline.core.staging import Patch, Staging
from sparsecast.workers import incoming
from sparsecast.workers.outgoing import Outgoing

from .engine import SimGuard

Plant = Callable[[], contextlib.AbstractContextManager[Any]]


@contextlib.contextmanager
def base_unchecked() -> Iterator[None]:
    """Patches are applied on whatever the weights are: neither core nor apply looks at the base."""

    def chain(self: Staging, at: int | None) -> tuple[int, ...]:
        here = [v for v, patch in self.patches.items() if patch.awaits is None]
        return tuple(version for version in sorted(here) if at is None or version > at)

    with (
        mock.patch.object(Staging, "chain", chain),
        mock.patch.object(incoming, "_fits", return_value=True),
    ):
        yield


@contextlib.contextmanager
def journal_not_awaited() -> Iterator[None]:
    """A member applies what it has received before the journal has announced it."""
    add = Staging.add

    def known(self: Staging, patch: Patch) -> None:
        add(self, replace(patch, awaits=None))

    with mock.patch.object(Staging, "add", known):
        yield


@contextlib.contextmanager
def old_epoch_kept() -> Iterator[None]:
    """A claim leaves what the epoch before has staged, and the weights as they were."""
    claimed = Lane.claimed

    def of_claim(self: Lane, now: float) -> Any:
        version, verified = self.version, self.verified
        with mock.patch.object(Lane, "_drop_all", return_value=[]):
            out = claimed(self, now)
        self.version, self.verified = version, verified
        return out

    with mock.patch.object(Lane, "claimed", of_claim):
        yield


@contextlib.contextmanager
def log_given_up() -> Iterator[None]:
    """A log that failed once is never asked again."""
    failed = Safekeeping.failed

    def once(self: Safekeeping, *args: Any) -> bool:
        first = failed(self, *args)
        self._store_at = float("inf")
        return first

    with mock.patch.object(Safekeeping, "failed", once):
        yield


@contextlib.contextmanager
def lower_window_kept() -> Iterator[None]:
    """A member commits to a new window without breaking off the old one."""
    asked = Seat.asked

    def to_open(self: Seat, *args: Any) -> Any:
        with mock.patch.object(Seat, "leave", return_value=[]):
            return asked(self, *args)

    with mock.patch.object(Seat, "asked", to_open):
        yield


@contextlib.contextmanager
def readers_ignored() -> Iterator[None]:
    """An apply does not wait for readers to leave the guard."""

    def begin(self: SimGuard, thread: int, timeout_s: float) -> None:
        self._writer = thread

    with mock.patch.object(SimGuard, "_begin_writing", begin):
        yield


@contextlib.contextmanager
def unsafe_forgotten() -> Iterator[None]:
    """The trainer lets a patch go when it hands it to the log, not when the log has it."""
    entry = Outgoing.entry

    def and_forget(self: Outgoing, *args: Any) -> Any:
        made = entry(self, *args)
        self._kept.clear()
        return made

    with mock.patch.object(Outgoing, "entry", and_forget):
        yield


@contextlib.contextmanager
def fence_down() -> Iterator[None]:
    """The journal takes what any trainer appends."""

    async def append(self: Journal, message: Any, **how: Any) -> int:
        subjects = self._subjects
        claims = isinstance(message, Claim)
        return await self._bus.append(
            self._stream,
            subjects.announce_claim if claims else subjects.announce_update,
            codec.encode(message),
            message_id=how["message_id"],
            timeout_s=how["timeout_s"],
        )

    with mock.patch.object(Journal, "append", append):
        yield


@contextlib.contextmanager
def resumed_as_is() -> Iterator[None]:
    """A trainer that resumes takes its own weights for those that the log had."""
    begin = Outgoing.begin

    def and_forget(self: Outgoing, *args: Any) -> Any:
        start, found = begin(self, *args)
        self._pending.clear()
        self.version = start
        return start, found

    with mock.patch.object(Outgoing, "begin", and_forget):
        yield


@contextlib.contextmanager
def evaluators_awaited() -> Iterator[None]:
    """Who evaluates is waited for like anyone else."""
    everyone = property(lambda membership: list(membership.members.values()))
    with mock.patch.object(Membership, "awaited", everyone):
        yield


#: Every one, with the words by which the simulation tells of it (one of them).
PLANTED: dict[str, tuple[Plant, tuple[str, ...]]] = {
    "base unchecked": (base_unchecked, ("no trainer published", "not the announced")),
    "journal not awaited": (
        journal_not_awaited,
        ("which was not announced", "not the announced"),
    ),
    "old epoch kept": (old_epoch_kept, ("believes that it holds", "no trainer published")),
    "log given up": (log_given_up, ("not converged",)),
    "lower window kept": (lower_window_kept, ("while it is in",)),
    "readers ignored": (readers_ignored, ("changed under a reader",)),
    "unsafe forgotten": (unsafe_forgotten, ("not converged",)),
    "fence down": (fence_down, ("the journal took",)),
    "evaluators awaited": (evaluators_awaited, ("who evaluate",)),
    "resumed as is": (resumed_as_is, ("not the announced", "no trainer published")),
}
