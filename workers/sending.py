"""A trainer's ends of its windows, and what goes through them: of one rank, or of all."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch

from ..messages import codec
from ..messages.compose import through
from ..messages.control import Stamp
from ..messages.errors import SparsecastError, WindowError, brief
from ..messages.layout import Layout, identity
from ..pipeline.core import commands as cmd
from ..pipeline.core import events as ev
from ..pipeline.core.policy import Policy
from .driver import Ports, Windows
from .outgoing import Outgoing
from .streams import to_host
from .together import Together

#: For how long the window's thread waits awake for a patch that is being made.
ALERT_S = 0.02
#: So many layouts of workers' ranks are remembered.
WAYS = 256


class Sending:
    """One rank's. On the driver's loop."""

    def __init__(self, ports: Ports, windows: Windows, outgoing: Outgoing, root: int = 0) -> None:
        self._ports = ports
        self._windows = windows
        self._outgoing = outgoing
        self._root = root
        #: What ranks of a layout, packed, hold of the tensors here.
        self._ways: dict[bytes, Layout] = {}

    async def open(self, command: cmd.OpenWindow) -> ev.WindowOpened | ev.WindowFailed:
        """Open this rank's ends of a window, and keep them."""
        stamp, of = command.stamp, max(1, len(self._outgoing.roots))
        try:
            ways = [await self._way(packed, command.timeout_s) for packed in command.layouts]
        except (SparsecastError, TimeoutError) as exc:
            reason = f"what its ranks hold is not to be made out: {brief(exc)}"
            return ev.WindowFailed(stamp.epoch, stamp.window, reason)
        self._outgoing.route(stamp.window, ways)
        return await self._windows.open(replace(command, roots=(self._root,), of=of))

    async def _way(self, packed: bytes, timeout_s: float) -> Layout | None:
        """What ranks of this layout hold of the tensors here; None: all, or it is not told."""
        if not packed:
            return None
        if packed not in self._ways:
            # Of many parts it takes seconds.
            await self._ports.aside(self._find_way, packed, timeout_s=timeout_s)
        return self._ways[packed]

    def _find_way(self, packed: bytes) -> None:
        """Kept by itself: a window that fails, because it takes too long, opens the next time."""
        if packed in self._ways:
            return
        roots, manifest = self._outgoing.roots, self._outgoing.manifest
        layout = codec.unpack_layout(packed)
        layout.require_fit(manifest)
        way = through(roots[self._root] if roots else identity(manifest), layout)
        while len(self._ways) >= WAYS:
            del self._ways[next(iter(self._ways))]
        self._ways[packed] = way

    async def abort(self, window: int) -> None:
        """Break a window off; nothing happens if it is not here."""
        self._outgoing.unroute(window)
        await self._windows.abort(window)

    async def close(self, window: int) -> None:
        """Leave an idle window in order."""
        self._outgoing.unroute(window)
        await self._windows.close(window)

    def alert(self, stamp: Stamp) -> None:
        """A patch is being made: what sleeps wakes up."""
        window = self._windows[stamp.window]
        if window is not None and self._ports.device != "cpu":
            window.alert(ALERT_S)

    async def send(self, command: cmd.Send) -> ev.Sent:
        """Send a sealed version: whole to all, or to each class of ranks what that holds."""
        stamp = command.stamp
        window = self._windows[stamp.window]
        payloads: list[torch.Tensor] | None = None
        if command.routed:
            payloads = self._outgoing.routed(stamp.version, stamp.window)
        else:
            payload = self._outgoing.payload(stamp.version)
            if payload is not None and window is not None:
                payloads = [payload] * len(window)
        if payloads and payloads[0].is_cuda and window and window.spec.kind != "nccl":
            # By our own stream: the window's thread would copy behind what the trainer has queued.
            payloads = await self._ports.run(self._on_host, command, payloads)
        error: str | None = None
        if window is None:
            error = "the window is gone"
        elif not payloads:
            error = f"version {stamp.version} is not kept any more"
        else:
            try:
                await window.send(payloads, attempt=stamp.attempt, timeout_s=command.timeout_s)
            except WindowError as exc:
                error = exc.reason
        return ev.Sent(stamp.window, stamp.attempt, error)

    def _on_host(self, command: cmd.Send, payloads: list[torch.Tensor]) -> list[torch.Tensor]:
        if command.routed:
            return [to_host(payload) for payload in payloads]
        host = self._outgoing.host_payload(command.stamp.version)
        return [] if host is None else [host] * len(payloads)


class SendingTogether:
    """Those of all ranks: the first one's, and at its order the others'. On the driver's loop."""

    def __init__(self, mine: Sending, together: Together, policy: Policy) -> None:
        self._mine = mine
        self._together = together
        self._policy = policy

    async def open(self, command: cmd.OpenWindow) -> ev.WindowOpened | ev.WindowFailed:
        """Open every rank's end of a window."""
        return await self._together.open(self._mine.open, command)

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
