"""What a replica's core asks of one rank: its windows, its staging, its weights."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from ..messages.control import Claim, LogEntry, Stamp
from ..messages.errors import PatchError, WindowError, brief
from ..pipeline.core import commands as cmd
from ..pipeline.core import events as ev
from ..pipeline.log.base import Progress
from .driver import Ports, Windows
from .incoming import Incoming, Together

T = TypeVar("T")

#: For how long a worker that has committed to a round waits for it awake: a small model's takes a
#: few milliseconds.
ALERT_S = 0.02


class Hands:
    """Does it, and tells what came of it. On the driver's loop; `notify` hears when weights or
    staging may have changed."""

    def __init__(
        self,
        ports: Ports,
        windows: Windows,
        incoming: Incoming,
        notify: Callable[[], None],
    ) -> None:
        self._ports = ports
        self._windows = windows
        self._incoming = incoming
        self._notify = notify

    # ---- windows

    async def open(self, command: cmd.OpenWindow) -> ev.WindowOpened | ev.WindowFailed:
        """Open this end of a window, and keep it."""
        return await self._windows.open(command)

    async def abort(self, window: int) -> None:
        """Break a window off; nothing happens if it is not here."""
        await self._windows.abort(window)

    async def close(self, window: int) -> None:
        """Leave an idle window in order."""
        await self._windows.close(window)

    async def alert(self, stamp: Stamp) -> None:
        """We have committed: what sleeps wakes up, and what was not looked at for long is."""
        window = self._windows[stamp.window]
        if window is not None:
            window.alert(ALERT_S)
            await self._ports.run(self._incoming.warm)

    async def receive(self, command: cmd.Receive) -> ev.Staged | ev.ReceiveFailed:
        """Receive a payload through its window, check it, and stage it."""
        stamp, announce = command.stamp, command.announce
        identity = (stamp.epoch, stamp.window, stamp.attempt)
        window = self._windows[stamp.window]
        if window is None:
            return ev.ReceiveFailed(*identity, stamp.version, "the window is gone", corrupt=False)
        began = self._ports.clock()
        try:
            # Fresh memory for each attempt: an aborted one may still write to its own.
            buffer = self._incoming.staging(announce.nbytes, window.spec.kind)
        except (RuntimeError, TypeError) as exc:  # more than there is, or no size at all
            reason = f"no staging for the announced {announce.nbytes} bytes: {brief(exc)}"
            return ev.ReceiveFailed(*identity, stamp.version, reason, corrupt=False)
        payload = self._incoming.expect(buffer, announce)
        try:
            await window.receive(
                buffer, attempt=stamp.attempt, timeout_s=command.timeout_s, behind=payload
            )
        except WindowError as exc:
            return ev.ReceiveFailed(*identity, stamp.version, exc.reason, corrupt=False)
        receive_us = round((self._ports.clock() - began) * 1e6)
        stage = functools.partial(
            self._incoming.stage,
            buffer,
            announce,
            receive_us=receive_us,
            transport=window.spec.kind,
            window=stamp.window,
            attempt=stamp.attempt,
            scratch=command.scratch,
            payload=payload,
        )
        try:
            if payload is not None and payload.settled:
                stage()  # the window has waited for all of it
            else:
                await self._ports.run(stage)
        except (PatchError, RuntimeError, MemoryError) as exc:
            return ev.ReceiveFailed(*identity, stamp.version, brief(exc), corrupt=True)
        return ev.Staged(stamp, announce)

    # ---- staging and weights

    async def take(self, entry: LogEntry, *, timeout_s: float, progress: Progress) -> None:
        """Load an entry of the log, check it, and stage it (LogError, BusError, PatchError)."""
        began = self._ports.clock()
        data = await self._ports.log.load(entry, timeout_s=timeout_s, progress=progress)
        receive_us = round((self._ports.clock() - began) * 1e6)
        await self._ports.run(
            lambda: self._incoming.stage_bytes(data, entry, receive_us=receive_us)
        )

    async def drop(self, versions: tuple[int, ...] | None) -> None:
        """Forget staged patches (None: all)."""
        await self._work(self._incoming.drop, versions)

    async def prove(self, claim: Claim) -> ev.Proved | ev.Unfit:
        """Compare the weights with a claim's manifest, and digest them."""
        return await self._work(self._incoming.prove, claim)

    async def hold(self, version: int) -> None:
        """Serve the weights, as they stand, as `version`."""
        await self._work(self._incoming.hold, version)

    async def quarantine(self, reason: str) -> None:
        """Serve nothing until the next apply has committed."""
        await self._work(self._incoming.quarantine, reason)

    async def apply(
        self, versions: tuple[int, ...], together: Together | None = None
    ) -> ev.AppliedHere | ev.ApplyFailed:
        """Apply staged versions in order, in one hold of the guard; see `Incoming.apply`."""
        return await self._work(self._incoming.apply, versions, together)

    async def digest(self, version: int) -> ev.Digested | ev.DigestFailed:
        """Digest the whole state, if it still is `version`."""
        return await self._work(self._incoming.digest, version)

    async def _work(self, function: Callable[..., T], *args: Any) -> T:
        result: T = await self._ports.run(function, *args)
        self._notify()
        return result
