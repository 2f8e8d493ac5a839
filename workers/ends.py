"""The ends of one window in this process: a trainer of several ranks has one for each root."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import torch

from ..messages.errors import WindowError, WindowTimeout
from ..pipeline.windows.base import Behind, Window, WindowSpec


class Ends:
    """Ends of one window, in the order of their roots; most windows have one.

    Each is a communicator of its own, in which one rank of the trainer sends. A worker has all of
    them, a rank of the trainer its own. What takes them one after the other keeps to one order, and
    to one deadline: every worker waits at the same end.
    """

    def __init__(self, roots: Sequence[int], ends: Sequence[Window]) -> None:
        self._roots = tuple(roots)
        self._ends = tuple(ends)

    def __len__(self) -> int:
        return len(self._ends)

    @property
    def spec(self) -> WindowSpec:
        """The first end's: but for the prefix, all are alike."""
        return self._ends[0].spec

    async def open(self, timeout_s: float) -> None:
        """Meet the other ranks at every end; see `Window.open`. After an error: abort()."""
        await self._in_turn(timeout_s, lambda end, _, left_s: end.open(left_s))

    async def send(self, payload: torch.Tensor, *, attempt: int, timeout_s: float) -> None:
        """Rank 0, which has one end: send through it; see `Window.send`."""
        (end,) = self._ends
        await end.send(payload, attempt=attempt, timeout_s=timeout_s)

    async def receive(
        self,
        stagings: Sequence[torch.Tensor],
        *,
        attempt: int,
        timeout_s: float,
        behind: Sequence[Behind] | None = None,
    ) -> None:
        """Other ranks: fill the staging of each root, with its work behind it; see
        `Window.receive`."""

        def receive(end: Window, at: int, left_s: float) -> Awaitable[None]:
            work = None if behind is None else behind[at]
            return end.receive(stagings[at], attempt=attempt, timeout_s=left_s, behind=work)

        await self._in_turn(timeout_s, receive)

    def alert(self, seconds: float) -> None:
        """A send or receive is likely within the next seconds."""
        for end in self._ends:
            end.alert(seconds)

    async def abort(self) -> None:
        """Break every end off. All at once: what one still does on a device may hold up another."""
        await asyncio.gather(*(end.abort() for end in self._ends))

    async def close(self) -> None:
        """Leave every end in order."""
        await asyncio.gather(*(end.close() for end in self._ends))

    async def _in_turn(
        self, timeout_s: float, operation: Callable[[Window, int, float], Awaitable[None]]
    ) -> None:
        """One end after the other within the deadline; what fails says which root it was."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        for at, (root, end) in enumerate(zip(self._roots, self._ends, strict=True)):
            # For the first one all of it; in round numbers, for errors name them.
            left_s = round(deadline - loop.time(), 3) if at else timeout_s
            try:
                if left_s <= 0:
                    raise WindowTimeout(end.spec.label, f"not reached within {timeout_s:g} s")
                await operation(end, at, left_s)
            except WindowError as exc:
                if len(self._ends) == 1:
                    raise
                raise type(exc)(exc.window, f"root {root}: {exc.reason}") from exc
