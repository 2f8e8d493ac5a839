"""One window's ends in this process: for each root, and each class of ranks it sends to."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple

import torch

from ..messages.errors import WindowError, WindowTimeout
from ..pipeline.core.commands import OpenWindow
from ..pipeline.windows.base import Behind, Window, WindowSpec


class Place(NamedTuple):
    """A rank's place at one end of a window: the end in which `root` sends to a class of ranks, or
    to all of them."""

    root: int
    of_class: int | None
    rank: int
    size: int
    #: What sets the end's subjects apart from those of the others.
    suffix: str


def places_of(command: OpenWindow) -> list[Place]:
    """The ends of a window that one rank opens, in the order in which it uses them."""
    if not command.classes:
        suffixes = [f".{root}" if command.of > 1 else "" for root in command.roots]
        return [
            Place(root, None, command.rank, command.size, suffix)
            for root, suffix in zip(command.roots, suffixes, strict=True)
        ]
    ours = range(len(command.layouts))
    rank = 0
    if command.rank:
        before = command.classes[: command.rank - 1]
        ours = range(command.classes[command.rank - 1], command.classes[command.rank - 1] + 1)
        rank = 1 + before.count(ours[0])
    return [
        Place(root, one, rank, 1 + command.classes.count(one), f".{root}.{one}")
        for root in command.roots
        for one in ours
    ]


class Ends:
    """Ends of one window; most windows have one.

    Each is a communicator of its own, in which one rank of the trainer sends, to all ranks of the
    workers or to those that hold the same. A worker's rank has an end for each root, the trainer's
    for each class. What takes them one after the other keeps to one order, and to one deadline:
    by roots and then classes on every rank, so that none waits for another around a circle.
    """

    def __init__(self, places: Sequence[Place], ends: Sequence[Window]) -> None:
        self._places = tuple(places)
        self._ends = tuple(ends)

    @property
    def of_class(self) -> int | None:
        """The class of ranks that these are for; None: all, or (on the trainer) several."""
        classes = {place.of_class for place in self._places}
        return classes.pop() if len(classes) == 1 else None

    def __len__(self) -> int:
        return len(self._ends)

    @property
    def spec(self) -> WindowSpec:
        """The first end's: but for the prefix, all are alike."""
        return self._ends[0].spec

    async def open(self, timeout_s: float) -> None:
        """Meet the other ranks at every end; see `Window.open`. After an error: abort()."""
        await self._in_turn(timeout_s, lambda end, _, left_s: end.open(left_s))

    async def send(
        self, payloads: Sequence[torch.Tensor], *, attempt: int, timeout_s: float
    ) -> None:
        """Rank 0: send a payload through each end; see `Window.send`."""

        def send(end: Window, at: int, left_s: float) -> Awaitable[None]:
            return end.send(payloads[at], attempt=attempt, timeout_s=left_s)

        await self._in_turn(timeout_s, send)

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
        for at, (place, end) in enumerate(zip(self._places, self._ends, strict=True)):
            # For the first one all of it; in round numbers, for errors name them.
            left_s = round(deadline - loop.time(), 3) if at else timeout_s
            try:
                if left_s <= 0:
                    raise WindowTimeout(end.spec.label, f"not reached within {timeout_s:g} s")
                await operation(end, at, left_s)
            except WindowError as exc:
                if len(self._ends) == 1:
                    raise
                raise type(exc)(exc.window, f"root {place.root}: {exc.reason}") from exc
