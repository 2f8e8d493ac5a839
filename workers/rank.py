"""What the ranks of a worker have in common: an engine's weights, and what they are reached by."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, Self, TypeVar

import torch

from ..messages.control import WindowKind
from ..messages.errors import LocalProtocolError
from ..messages.layout import Layout
from ..messages.subjects import Subjects, check_token
from ..pipeline.core.policy import Policy
from .connect import LoopThread, connect
from .driver import Changes, Outbox, Ports, Windows
from .engine import Engine, ModuleEngine
from .hands import Hands
from .incoming import Incoming
from .streams import device_for
from .tiers import LogSetting, parse_log

T = TypeVar("T")


class Rank:
    """Entered with `async with`, or by start() and stop() from synchronous code (its loop then runs
    on a thread of its own). It may be entered again after it was left, or after entering failed.

    `rename` and the like choose tensors of a model that is no engine; see `Replica` for the rest.
    """

    def __init__(
        self,
        model: torch.nn.Module | Mapping[str, torch.Tensor] | Engine,
        *,
        run: str,
        bus: str,
        name: str,
        device: str | None,
        layout: Layout | None,
        include: Sequence[str] | None,
        exclude: Sequence[str] | None,
        rename: Callable[[str], str] | Mapping[str, str] | None,
        windows: Sequence[WindowKind] | None,
        log: LogSetting,
        policy: Policy | None,
        ports: Callable[[], Coroutine[Any, Any, Ports]] | None,
    ) -> None:
        self.run = run
        self.name = check_token("worker", name)
        self.policy = policy or Policy()
        self.layout = layout
        self._subjects = Subjects(run)
        self._bus_url = bus
        self._device = device
        self._tiers = parse_log(log)
        self._offers = tuple(windows) if windows is not None else None
        self._open_ports = ports
        if isinstance(model, torch.nn.Module | Mapping):
            self.engine: Engine = ModuleEngine(
                model, include=include, exclude=exclude, rename=rename
            )
        else:
            self.engine = model
        #: What is to be undone on leaving, the youngest first; None while this does not run.
        self._life: contextlib.AsyncExitStack | None = None
        self._thread: LoopThread | None = None

    async def _start(self, life: contextlib.AsyncExitStack) -> None:
        """Begin; what is to be undone goes onto `life`."""
        raise NotImplementedError

    def _leaving(self) -> None:
        """Leaving begins; nothing is undone yet."""

    # ---- life

    async def __aenter__(self) -> Self:
        if self._life is not None:
            raise LocalProtocolError(f"worker {self.name!r} is running already")
        async with contextlib.AsyncExitStack() as life:
            await self._start(life)
            self._life = life.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Leave the run in order; the weights stay as they are. Idempotent."""
        life, self._life = self._life, None
        if life is not None:
            async with life:
                self._leaving()

    def start(self) -> None:
        """Enter from synchronous code."""
        if self._thread is None:
            self._thread = LoopThread(f"sparsecast-{self.name}")
            try:
                self._thread.call(self.__aenter__())
            except BaseException:
                self._thread.stop()
                self._thread = None
                raise

    def stop(self) -> None:
        """Leave from synchronous code. Idempotent."""
        if self._thread is not None:
            thread, self._thread = self._thread, None
            try:
                thread.call(self.close())
            finally:
                thread.stop()

    async def _on_own_loop(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Await it on the loop that this runs on, from any."""
        if self._thread is not None and asyncio.get_running_loop() is not self._thread.loop:
            return await asyncio.wrap_future(self._thread.submit(coroutine))
        return await coroutine

    # ---- what a rank is reached by, and works with

    async def _reach(self, life: contextlib.AsyncExitStack) -> None:
        """Connect, and get hands on the weights (BusUnavailable)."""
        self._changes = Changes()
        life.callback(self._changes.notify)
        if self._open_ports is not None:
            ports = await self._open_ports()
        else:
            ports = await connect(
                self._bus_url,
                run=self.run,
                name=self.name,
                device=lambda: device_for(self._device, self.engine.tensors),
                tiers=self._tiers,
                timeout_s=self.policy.bus_s,
            )
        self._ports = ports
        life.push_async_callback(ports.close)
        # Of another life, since when anything may have been written to them.
        self.engine.guard().declare(None)
        self._incoming = Incoming(
            self.engine,
            clock=ports.clock,
            guard_s=self.policy.guard_s,
            layout=self.layout,
            device=ports.device,
            device_nbytes=self.policy.staging_device_nbytes,
        )
        if ports.device != "cpu":
            await ports.run(self._incoming.start)
            if self._thread is not None:
                # A window orders what it receives behind its caller's current stream: on a thread
                # of our own that need not be the one on which the engine computes.
                self._incoming.adopt_thread()
        self._outbox = Outbox(ports.bus)
        life.push_async_callback(self._outbox.close, 1.0)
        self._windows = Windows(ports, self._subjects)
        life.push_async_callback(self._windows.abort_all)
        self._hands = Hands(ports, self._windows, self._incoming, self._changes.notify)

    @property
    def _kinds(self) -> tuple[WindowKind, ...]:
        """The kinds of window that this rank offers, best first."""
        offers = self._ports.kinds if self._offers is None else self._offers
        return tuple(kind for kind in offers if kind in self._ports.kinds)
