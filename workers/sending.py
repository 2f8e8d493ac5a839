"""A trainer's ends of its windows, and what goes through them: of one rank, or of all."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from ..messages.control import Stamp
from ..messages.errors import SparsecastError, WindowError, brief
from ..pipeline.core import commands as cmd
from ..pipeline.core import events as ev
from ..pipeline.core.policy import Policy
from .driver import Ports, Windows
from .outgoing import Outgoing
from .together import Together

#: For how long the window's thread waits awake for a patch that is being made.
ALERT_S = 0.02


class Sending:
    """One rank's. On the driver's loop."""

    def __init__(self, ports: Ports, windows: Windows, outgoing: Outgoing, root: int = 0) -> None:
        self._ports = ports
        self._windows = windows
        self._outgoing = outgoing
        self._root = root

    async def open(self, command: cmd.OpenWindow) -> ev.WindowOpened | ev.WindowFailed:
        """Open this rank's end of a window, and keep it."""
        of = max(1, len(self._outgoing.roots))
        return await self._windows.open(replace(command, roots=(self._root,), of=of))

    async def abort(self, window: int) -> None:
        """Break a window off; nothing happens if it is not here."""
        await self._windows.abort(window)

    async def close(self, window: int) -> None:
        """Leave an idle window in order."""
        await self._windows.close(window)

    def alert(self, stamp: Stamp) -> None:
        """A patch is being made: what sleeps wakes up."""
        window = self._windows[stamp.window]
        if window is not None and self._ports.device != "cpu":
            window.alert(ALERT_S)

    async def send(self, command: cmd.Send) -> ev.Sent:
        """Send the payload of a sealed version."""
        stamp = command.stamp
        window = self._windows[stamp.window]
        payload = self._outgoing.payload(stamp.version)
        if payload is not None and payload.is_cuda and window and window.spec.kind != "nccl":
            # By our own stream: the window's thread would copy behind what the trainer has queued.
            payload = await self._ports.run(self._outgoing.host_payload, stamp.version)
        error: str | None = None
        if window is None:
            error = "the window is gone"
        elif payload is None:
            error = f"version {stamp.version} is not kept any more"
        else:
            try:
                await window.send(payload, attempt=stamp.attempt, timeout_s=command.timeout_s)
            except WindowError as exc:
                error = exc.reason
        return ev.Sent(stamp.window, stamp.attempt, error)


class SendingTogether:
    """Those of all ranks: the first one's, and at its order the others'. On the driver's loop."""

    def __init__(self, mine: Sending, together: Together, policy: Policy) -> None:
        self._mine = mine
        self._together = together
        self._policy = policy

    async def open(self, command: cmd.OpenWindow) -> ev.WindowOpened | ev.WindowFailed:
        """Open every rank's end of a window."""
        timeout_s = command.timeout_s + self._policy.bus_s
        try:
            mine = partial(self._mine.open, command)
            found = await self._together.all(mine, "open", command, timeout_s, hurry=True)
        except SparsecastError as exc:
            return ev.WindowFailed(command.stamp.epoch, command.stamp.window, brief(exc))
        opened: ev.WindowOpened | ev.WindowFailed = found[0]
        failed = (event for event in found.values() if isinstance(event, ev.WindowFailed))
        return next(failed, opened)

    async def abort(self, window: int) -> None:
        """Break a window off on every rank."""
        await self._together.everywhere(partial(self._mine.abort, window), "abort", window)

    async def close(self, window: int) -> None:
        """Leave an idle window in order, on every rank."""
        await self._together.everywhere(partial(self._mine.close, window), "close", window)

    def alert(self, stamp: Stamp) -> None:
        """A patch is being made; the other ranks know it by their own publish()."""
        self._mine.alert(stamp)

    async def send(self, command: cmd.Send) -> ev.Sent:
        """Send each rank's payload of a sealed version through its own end."""
        stamp = command.stamp
        timeout_s = command.timeout_s + self._policy.bus_s
        try:
            mine = partial(self._mine.send, command)
            found = await self._together.all(mine, "send", command, timeout_s)
        except SparsecastError as exc:
            return ev.Sent(stamp.window, stamp.attempt, brief(exc))
        errors = [f"root {rank}: {sent.error}" for rank, sent in found.items() if sent.error]
        return ev.Sent(stamp.window, stamp.attempt, "; ".join(errors) or None)
