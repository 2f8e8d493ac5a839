"""Several tiers as one log: what one of them loses or refuses, another one has."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TypeVar

from ...messages.control import LogEntry
from ...messages.errors import BusError, LogError, LogHole
from ...messages.manifest import Manifest
from .base import Log, Progress, Tell, oldest_first, unheard

log = logging.getLogger("sparsecast.log")

T = TypeVar("T")

#: How long a tier that failed the last time is waited for, once another one has answered.
GRACE_S = 1.0


class TieredLog:
    """Tiers by name, the quickest first: implements `Log`.

    Every tier is asked to store, list and prune at once; entries are those of all; an entry is
    loaded from the first tier that gives it. A tier that fails is told, once until it works again,
    and costs no more than one deadline: from then on the others are waited for, and it only
    `GRACE_S` longer.
    """

    def __init__(self, tiers: Mapping[str, Log], *, tell: Tell = log.warning) -> None:
        self._tiers = dict(tiers)
        self._tell = tell
        self._failing: set[str] = set()

    @property
    def durable(self) -> bool:
        """Whether one of the tiers is."""
        return any(tier.durable for tier in self._tiers.values())

    async def store(
        self, entry: LogEntry, payload: bytes | memoryview, *, timeout_s: float
    ) -> None:
        """Store it in every tier. LogError if none took it, or none that outlives this process
        although there is one: the entry would be taken for safe."""
        took, failures = await self._ask(
            lambda tier: tier.store(entry, payload, timeout_s=timeout_s), timeout_s
        )
        if not any(self._tiers[name].durable or not self.durable for name in took):
            raise _together(failures)

    async def entries(self, *, timeout_s: float) -> list[LogEntry]:
        """The entries of all tiers, oldest first. LogError if none can be read."""
        found, failures = await self._ask(lambda tier: tier.entries(timeout_s=timeout_s), timeout_s)
        if not found:
            raise _together(failures)
        merged: dict[str, LogEntry] = {}
        for name in self._tiers:
            for entry in found.get(name, ()):
                merged.setdefault(entry.name, entry)
        return oldest_first(list(merged.values()))

    async def load(
        self, entry: LogEntry, *, timeout_s: float, progress: Progress | None = None
    ) -> bytes | bytearray:
        """Its bytes from the first tier that gives them. LogHole if none does and one has no such
        entry, else LogError.

        `progress` starts again from 0 where a tier failed and the next one is asked."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        left = sorted(self._tiers, key=lambda name: name in self._failing)
        failures: dict[str, LogError | BusError] = {}
        while left:
            name = left.pop(0)
            # The next one must have time, too.
            share_s = (deadline - loop.time()) / (2 if left else 1)
            try:
                async with asyncio.timeout(share_s):
                    found = await self._tiers[name].load(
                        entry, timeout_s=share_s, progress=progress
                    )
            except (LogError, BusError, TimeoutError) as exc:
                failures[name] = _as_ours(exc, share_s)
                if not isinstance(exc, LogHole):
                    self._failed(name, failures[name])
                if left:
                    (progress or unheard)(0)
            else:
                self._failing.discard(name)
                return found
        raise _together(failures, version=entry.version)

    async def prune(self, drop: Sequence[LogEntry], *, timeout_s: float) -> None:
        """Drop these entries in every tier. LogError if none could."""
        pruned, failures = await self._ask(
            lambda tier: tier.prune(drop, timeout_s=timeout_s), timeout_s
        )
        if not pruned:
            raise _together(failures)

    async def manifest(self, manifest_hash: str, *, timeout_s: float) -> Manifest | None:
        """The manifest of that hash, from the first tier that knows it. LogError if none can be
        read."""
        found, failures = await self._ask(
            lambda tier: tier.manifest(manifest_hash, timeout_s=timeout_s), timeout_s
        )
        if not found:
            raise _together(failures)
        return next((manifest for manifest in found.values() if manifest is not None), None)

    async def _ask(
        self, call: Callable[[Log], Awaitable[T]], timeout_s: float
    ) -> tuple[dict[str, T], dict[str, LogError | BusError]]:
        """What the tiers answer, or why not, by their names."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        tasks = {name: asyncio.ensure_future(call(tier)) for name, tier in self._tiers.items()}
        sound = [task for name, task in tasks.items() if name not in self._failing]
        try:
            if sound:
                await asyncio.wait(sound, timeout=timeout_s)
            left_s = max(0.0, deadline - loop.time())
            answered = any(task.done() and task.exception() is None for task in sound)
            await asyncio.wait(tasks.values(), timeout=min(left_s, GRACE_S) if answered else left_s)
        finally:
            for task in tasks.values():
                task.cancel()
            await asyncio.gather(*tasks.values(), return_exceptions=True)
        answers: dict[str, T] = {}
        failures: dict[str, LogError | BusError] = {}
        for name, task in tasks.items():
            try:
                answers[name] = task.result()
            except (LogError, BusError, TimeoutError, asyncio.CancelledError) as exc:
                failures[name] = _as_ours(exc, timeout_s)
                self._failed(name, failures[name])
            else:
                self._failing.discard(name)
        return answers, failures

    def _failed(self, name: str, why: Exception) -> None:
        if name not in self._failing:
            self._failing.add(name)
            self._tell(f"tier {name} of the log fails, the others go on: {why}")


def _as_ours(exc: BaseException, timeout_s: float) -> LogError | BusError:
    if isinstance(exc, LogError | BusError):
        return exc
    return LogError(f"no answer within {timeout_s:g} s")


def _together(
    failures: Mapping[str, LogError | BusError], *, version: int | None = None
) -> LogError:
    """All failures as one error: a hole if one of them is."""
    said = "; ".join(f"{name}: {exc}" for name, exc in failures.items())
    if any(isinstance(exc, LogHole) for exc in failures.values()):
        return LogHole(said, version=version)
    return LogError(said)
