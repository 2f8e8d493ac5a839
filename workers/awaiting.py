"""Waiting for the members of a run: until they are there, and until they hold a version."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from ..pipeline.core.trainer import TrainerCore
from .driver import Changes
from .updates import AtLeast, Report


class Awaiting:
    """What a trainer may wait for; `check` raises once there is nothing to wait for any more."""

    def __init__(self, core: TrainerCore, changes: Changes, check: Callable[[], None]) -> None:
        self._core = core
        self._changes = changes
        self._check = check

    async def members(self, n: int, timeout_s: float, *, least: int) -> list[str]:
        """Until `n` workers for rollouts are in and hold the head, or `least` if that is newer;
        their names. WaitTimeout says who is not."""
        core = self._core

        def current() -> int:
            # A run that was resumed starts from old weights: whoever holds those has not ours yet.
            return max(core.head, least)

        def present() -> list[str] | None:
            self._check()
            members, version = core.membership.awaited, current()
            names = sorted(
                m.sender.name for m in members if m.version is not None and m.version >= version
            )
            return names if len(names) >= n else None

        def why() -> str:
            applied, missing = core.progress(current())
            return f"{len(applied)} of {n} are in" + "".join(
                f"; {name}: {reason}" for name, reason in missing.items()
            )

        return await self._changes.until(present, timeout_s, what=f"{n} members", why=why)

    async def applied(self, version: int, timeout_s: float, enough: AtLeast) -> Report:
        """Until so many members hold a version, or the timeout; how far it has come."""

        def done() -> bool | None:
            self._check()
            applied, missing = self._core.progress(version)
            if enough == "all":
                return True if applied and not missing else None
            return True if len(applied) >= enough else None

        await self._until(done, timeout_s)
        applied, missing = self._core.progress(version)
        return Report(version, applied, missing)

    async def acknowledged(self, version: int, timeout_s: float) -> None:
        """Until the members that a window has brought a version to say that they have applied it,
        or the timeout. The others wait for the log."""
        core = self._core
        record = core.record(version)
        by_window: set[str] = set()
        if record is not None:
            # But for who lacks what comes before, which the log's very next entry may be.
            held = {
                m.sender: -1 if m.version is None else m.version for m in core.membership.awaited
            }
            by_window = {
                member.name
                for member in record.received
                if held.get(member, -1) >= record.base_version
            }

        def done() -> bool | None:
            _, missing = core.progress(version)
            return None if by_window & missing.keys() else True

        await self._until(done, timeout_s)

    async def _until(self, done: Callable[[], bool | None], timeout_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            await self._changes.until(done, timeout_s, what="applied", why=str)
