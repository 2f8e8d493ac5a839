"""One process of a chaos run in the hands of the test: its lives, its way to the broker, and what
it says."""

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..servers import Proxy
from ..spawn import Processes
from . import roles

if TYPE_CHECKING:
    from .site import Site

#: Longer than any test: who is not killed by then is killed by nobody else.
LIFE_S = 24 * 3600.0


class Actor:
    """One process of the run, its way to the broker, and what it has said."""

    def __init__(self, site: "Site", name: str, role: Callable[..., None]) -> None:
        self.site = site
        self.name = name
        self.role = role
        #: Its way to the broker: `cut`, `stall`, `delay_s`.
        self.way = Proxy("")
        self.lives = 0
        self.alive = False
        self.stopped = False
        #: The newest of each kind that this life has said.
        self.said: dict[str, dict[str, Any]] = {}
        #: When it could not do anything: stopped, or held at a breakpoint.
        self.idle: list[list[float]] = []
        self._processes: Processes | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._orders: list[str] = []

    # ---- life and death

    def start(self) -> None:
        """A new life, under the same name."""
        assert not self.alive, f"{self.name} lives"
        self.lives += 1
        self.said, self.idle, self._writer = {}, [], None
        part = replace(self.site.part, name=self.name, bus=self.way.url, seed=self._seed())
        self._processes = Processes(1, self.role, part, timeout_s=LIFE_S)
        self.alive, self.stopped = True, False
        self.site.note(f"{self.name}: start")

    def _seed(self) -> int:
        """Trainers that follow another have weights of their own; workers begin as version 0."""
        if self.role is roles.worker:
            return 0
        return self.lives - 1 + 1000 * (self.name == "rival")

    def kill(self) -> None:
        """SIGKILL. Idempotent."""
        if self._processes is not None:
            self.site.note(f"{self.name}: SIGKILL")
            self.alive = False
            self._processes.kill(0)
            self._processes.end()
            self._processes = None

    def stop(self) -> None:
        """SIGSTOP."""
        assert self._processes is not None
        self.site.note(f"{self.name}: SIGSTOP")
        self.idle.append([time.monotonic(), float("inf")])
        self.stopped = True
        self._processes.stop(0)

    def go_on(self) -> None:
        """SIGCONT, and on from a breakpoint. Idempotent."""
        if self._processes is not None and self.alive:
            if self.stopped:
                self.site.note(f"{self.name}: SIGCONT")
                self._processes.resume(0)
                self.stopped = False
            self.tell("go on")
            self.said.pop("at", None)
            for spell in self.idle:
                spell[1] = min(spell[1], time.monotonic())

    # ---- words

    def tell(self, do: str, **fields: Any) -> None:
        order = json.dumps({"do": do, **fields}) + "\n"
        if self._writer is None:
            self._orders.append(order)  # it has not called yet
        else:
            self._writer.write(order.encode())

    async def arrive(self, stage: str, timeout_s: float = 10.0) -> None:
        """Set a breakpoint at this stage, and wait until it stands there."""
        self.tell("arm", stage=stage)
        await self.site.until(lambda: "at" in self.said, timeout_s, f"{self.name} is at {stage}")
        self.site.note(f"{self.name}: at {stage}")

    def called(self, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        for order in self._orders:
            writer.write(order.encode())
        self._orders.clear()

    def heard(self, words: dict[str, Any]) -> None:
        kind = words.pop("kind")
        if kind == "at":
            self.idle.append([time.monotonic(), float("inf")])
        self.said[kind] = words
