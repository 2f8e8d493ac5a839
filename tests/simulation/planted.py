"""Bugs to plant: each breaks one rule of the protocol, and the simulation has to find it."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from sparsecast.messages import codec
from sparsecast.messages.control import Claim
from sparsecast.pipeline.bus.journal import Journal
from sparsecast.pipeline.core.replica import ReplicaCore
from sparsecast.pipeline.core.trainer import TrainerCore
from sparsecast.workers import incoming
from sparsecast.workers.outgoing import Outgoing

from .engine import SimGuard

Plant = Callable[[], contextlib.AbstractContextManager[Any]]


@contextlib.contextmanager
def base_unchecked() -> Iterator[None]:
    """Patches are applied on whatever the weights are: neither core nor apply looks at the base."""

    def chain(self: ReplicaCore) -> tuple[int, ...]:
        at = self.version
        return tuple(version for version in sorted(self._staged) if at is None or version > at)

    with (
        mock.patch.object(ReplicaCore, "_chain", chain),
        mock.patch.object(incoming, "_fits", return_value=True),
    ):
        yield


@contextlib.contextmanager
def old_epoch_kept() -> Iterator[None]:
    """A claim leaves what the epoch before has staged, and the weights as they were."""
    claimed = ReplicaCore._claimed

    def of_claim(self: ReplicaCore, claim: Claim) -> None:
        version, verified = self.version, self.verified
        with mock.patch.object(ReplicaCore, "_drop_all"):
            claimed(self, claim)
        if self.claim is claim:
            self.version, self.verified = version, verified

    with mock.patch.object(ReplicaCore, "_claimed", of_claim):
        yield


@contextlib.contextmanager
def log_given_up() -> Iterator[None]:
    """A log that failed once is never asked again."""
    failed = TrainerCore._log_failed

    def once(self: TrainerCore, *args: Any) -> None:
        failed(self, *args)
        self._safekeeping._store_at = float("inf")

    with mock.patch.object(TrainerCore, "_log_failed", once):
        yield


@contextlib.contextmanager
def lower_window_kept() -> Iterator[None]:
    """A member commits to a new window without breaking off the old one."""
    asked = ReplicaCore._asked_to_open

    def to_open(self: ReplicaCore, opening: Any) -> None:
        with mock.patch.object(ReplicaCore, "_leave_window"):
            asked(self, opening)

    with mock.patch.object(ReplicaCore, "_asked_to_open", to_open):
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


#: Every one, with the words by which the simulation tells of it (one of them).
PLANTED: dict[str, tuple[Plant, tuple[str, ...]]] = {
    "base unchecked": (base_unchecked, ("no trainer published", "not the announced")),
    "old epoch kept": (old_epoch_kept, ("believes that it holds", "no trainer published")),
    "log given up": (log_given_up, ("not converged",)),
    "lower window kept": (lower_window_kept, ("while it is in",)),
    "readers ignored": (readers_ignored, ("changed under a reader",)),
    "unsafe forgotten": (unsafe_forgotten, ("not converged",)),
    "fence down": (fence_down, ("the journal took",)),
}
