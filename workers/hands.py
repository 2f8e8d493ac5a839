"""What a replica's core asks of one rank: its windows, its staging, its weights."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from ..messages.control import Claim, LogEntry, Stamp
from ..messages.errors import CorruptPatch, LogError, PatchError, WindowError, brief
from ..pipeline.core import commands as cmd
from ..pipeline.core import events as ev
from ..pipeline.log.base import Progress
from .driver import Ports, Windows
from .incoming import Incoming, Together
from .roots import pieces_of, routed

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
        """Receive the payload of each root through its end of the window, check them, and stage
        them all or none."""
        stamp = command.stamp
        identity = (stamp.epoch, stamp.window, stamp.attempt)
        ends = self._windows[stamp.window]
        if ends is None:
            return ev.ReceiveFailed(*identity, stamp.version, "the window is gone", corrupt=False)
        began = self._ports.clock()
        announce = command.announce
        try:
            if command.routes:
                announce = routed(announce, command.routes, ends.of_class)
            sizes = [piece.nbytes for piece in pieces_of(announce)]
            if len(sizes) != len(ends):
                raise CorruptPatch(f"{len(sizes)} pieces, and the window has {len(ends)} roots")
            # Fresh memory for each attempt: an aborted one may still write to its own.
            buffers = self._incoming.staging(sizes, ends.spec.kind)
        except (PatchError, RuntimeError, TypeError) as exc:  # more than there is, or no size
            reason = f"no staging for the announced {announce.nbytes} bytes: {brief(exc)}"
            return ev.ReceiveFailed(*identity, stamp.version, reason, corrupt=False)
        payloads = self._incoming.expect(buffers, announce)
        try:
            await ends.receive(
                buffers, attempt=stamp.attempt, timeout_s=command.timeout_s, behind=payloads
            )
        except WindowError as exc:
            return ev.ReceiveFailed(*identity, stamp.version, exc.reason, corrupt=False)
        receive_us = round((self._ports.clock() - began) * 1e6)
        stage = functools.partial(
            self._incoming.stage,
            buffers,
            announce,
            receive_us=receive_us,
            transport=ends.spec.kind,
            window=stamp.window,
            attempt=stamp.attempt,
            scratch=command.scratch,
            payloads=payloads,
        )
        try:
            if payloads is not None and all(payload.settled for payload in payloads):
                stage()  # the window has waited for all of it
            else:
                await self._ports.run(stage)
        except (PatchError, RuntimeError, MemoryError) as exc:
            return ev.ReceiveFailed(*identity, stamp.version, brief(exc), corrupt=True)
        return ev.Staged(stamp, command.announce)

    # ---- staging and weights

    async def take(self, entry: LogEntry, *, timeout_s: float, progress: Progress) -> None:
        """Load what is needed here of an entry of the log, check it, and stage all of it or none
        (LogError, BusError, PatchError).

        `progress` hears bytes of the whole entry; what is not needed counts as come.
        """
        began = self._ports.clock()
        data: list[bytes | bytearray | None] = []
        before = 0
        pieces = entry.pieces or (entry,)
        for piece, needed in zip(pieces, self._incoming.wanted(entry), strict=True):
            left_s = timeout_s - (self._ports.clock() - began)
            if not needed:
                data.append(None)
                progress(before + piece.nbytes)
            elif left_s <= 0:
                raise LogError(f"log entry {entry.name!r} did not come within {timeout_s:g} s")
            else:
                heard = functools.partial(_further, progress, before)
                data.append(await self._ports.log.load(piece, timeout_s=left_s, progress=heard))
            before += piece.nbytes
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


def _further(progress: Progress, before: int, nbytes: int) -> None:
    """Tell of so many bytes beyond those that were there before."""
    progress(before + nbytes)
