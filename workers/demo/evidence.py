"""The proof of a demo: what was announced, and what each worker applied and digested."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from ...messages import control as msg
from ...messages.codec import Message
from ...messages.metrics import Metric


class WorkerOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """One worker: how many versions it applied, of how many its digest was the announced one, how
    many digests were not, and the version that it ended with."""

    applied: int
    verified: int
    mismatches: int
    version: int | None


@dataclass(slots=True)
class _Seen:
    applied: set[int] = field(default_factory=set)
    verified: set[int] = field(default_factory=set)
    wrong: list[int] = field(default_factory=list)


class Evidence:
    """Collects digests as they travel on the bus; the trainer's announcement is what counts."""

    def __init__(self) -> None:
        self._announced: dict[int, int] = {}
        self._workers: dict[str, _Seen] = {}
        self._digests: dict[str, dict[int, int]] = {}

    def hear(self, message: Message | Metric, now: float) -> None:
        """Take in one message of the run; `now` does not matter."""
        match message:
            case msg.Claim():
                self._announced[message.version] = message.digest
            case msg.Announce():
                self._announced[message.version] = message.digest
            case msg.Applied():
                self._worker(message.sender.name).applied.add(message.version)
            case msg.Verified():
                self._digests.setdefault(message.sender.name, {})[message.version] = message.digest
                seen = self._worker(message.sender.name)
                if message.ok:
                    seen.verified.add(message.version)
                else:
                    seen.wrong.append(message.version)
            case _:
                pass

    def _worker(self, name: str) -> _Seen:
        return self._workers.setdefault(name, _Seen())

    def _proven(self, name: str) -> set[int]:
        """Versions that the worker called verified and whose digest is the announced one."""
        digests = self._digests.get(name, {})
        return {
            version
            for version in self._worker(name).verified
            if version in self._announced and digests.get(version) == self._announced[version]
        }

    def outcome(self, name: str) -> WorkerOutcome:
        """What is known of one worker."""
        seen, proven = self._worker(name), self._proven(name)
        return WorkerOutcome(
            applied=len(seen.applied),
            verified=len(proven & seen.applied),
            mismatches=len(seen.wrong) + len(seen.verified - proven),
            version=max(proven, default=None),
        )

    def missing(self, names: list[str], newest: int) -> list[str]:
        """What is wanting to call the run proven: one sentence each, none if all is there."""
        found = []
        for name in names:
            seen, proven = self._worker(name), self._proven(name)
            outcome = self.outcome(name)
            if outcome.mismatches:
                versions = sorted({*seen.wrong, *(seen.verified - proven)})
                found.append(f"{name} held other bits than announced at version {versions[0]}")
            unproven = sorted(seen.applied - proven)
            if unproven:
                found.append(f"{name} applied version {unproven[0]} and did not verify it")
            if newest not in proven:
                found.append(f"{name} has verified version {outcome.version}, not {newest}")
        return found
