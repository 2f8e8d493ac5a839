"""One thing done on every rank: by the first one itself, and by the others at its order."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any, TypeVar

from ..messages.errors import SparsecastError, brief
from ..messages.ranks import Deed
from ..pipeline.core import commands as cmd
from ..pipeline.core import events as ev
from ..pipeline.core.policy import Policy
from .leading import Leading, RankSilent

T = TypeVar("T")


class Together:
    """What the first rank does, `mine`, with what it orders beside it. On the driver's loop."""

    def __init__(self, leading: Leading, policy: Policy) -> None:
        self._leading = leading
        self._policy = policy

    async def open(
        self,
        mine: Callable[[cmd.OpenWindow], Awaitable[ev.WindowOpened | ev.WindowFailed]],
        command: cmd.OpenWindow,
    ) -> ev.WindowOpened | ev.WindowFailed:
        """Open every rank's ends of a window: it is open on all, or has failed."""
        timeout_s = command.timeout_s + self._policy.bus_s
        try:
            found = await self.all(partial(mine, command), "open", command, timeout_s, hurry=True)
        except SparsecastError as exc:
            return ev.WindowFailed(command.stamp.epoch, command.stamp.window, brief(exc))
        opened: ev.WindowOpened | ev.WindowFailed = first_of(ev.WindowFailed, found) or found[0]
        return opened

    async def all(
        self,
        mine: Callable[[], Awaitable[Any]],
        deed: Deed,
        what: Any,
        timeout_s: float,
        *,
        hurry: bool = False,
    ) -> dict[int, Any]:
        """What came of it on every rank, once it is over on all; or what another rank raised, or
        this one. `hurry`: this one breaks off when another one has not done it, and what came of
        it here is then of no account."""
        silent = self._leading.silent() if self._leading.ranks else None
        if silent is not None:
            raise RankSilent(silent)
        # Before anything is waited for: orders are given in the order in which the core asks.
        others = [asyncio.wrap_future(one) for one in self._leading.order(deed, what, timeout_s)]
        own = asyncio.ensure_future(mine())

        def has_failed(other: asyncio.Future[Any]) -> bool:
            if not other.done() or other.cancelled():
                return False
            return other.exception() is not None or isinstance(other.result(), ev.WindowFailed)

        def look(other: asyncio.Future[Any]) -> None:
            if has_failed(other):
                own.cancel()

        for other in others if hurry else ():
            other.add_done_callback(look)
        *theirs, ours = await asyncio.gather(*others, own, return_exceptions=True)
        for result in theirs:
            if isinstance(result, BaseException):
                raise result
        if isinstance(ours, BaseException) and not (hurry and any(map(has_failed, others))):
            raise ours
        return dict(enumerate([ours, *theirs]))

    async def patiently(
        self,
        mine: Callable[[], Awaitable[Any]],
        deed: Deed,
        what: Any,
        *,
        while_: Callable[[], bool] = lambda: True,
    ) -> dict[int, Any]:
        """The same, again and again until no rank is silent, or RankSilent."""
        while True:
            try:
                return await self.all(mine, deed, what, self._policy.resume_s)
            except RankSilent:
                await asyncio.sleep(self._policy.heartbeat_s)
                if not while_():
                    raise

    async def everywhere(self, mine: Callable[[], Awaitable[None]], deed: Deed, what: Any) -> None:
        """Have it done on every rank; a silent one does it when it is back."""
        others = self._leading.order(deed, what, self._policy.store_s)
        await mine()
        await asyncio.gather(*map(asyncio.wrap_future, others), return_exceptions=True)


def first_of(kind: type[T], found: Mapping[int, Any]) -> T | None:
    """The event of this kind of the lowest rank that has one, or None."""
    return next((found[rank] for rank in sorted(found) if isinstance(found[rank], kind)), None)
