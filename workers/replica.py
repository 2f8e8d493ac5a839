"""The worker's face: Replica keeps an engine's weights at the newest version of a run."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import socket
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, get_args

import torch

from ..messages import codec
from ..messages.control import (
    Announce,
    Claim,
    NotReady,
    Ready,
    Role,
    Sender,
    Tags,
    TrainerMessage,
    WindowKind,
)
from ..messages.errors import Closed, ReplicaLagging, SettingsError, brief
from ..messages.layout import Layout
from ..pipeline.bus.base import Message
from ..pipeline.bus.journal import Journal
from ..pipeline.core import commands as cmd
from ..pipeline.core import events as ev
from ..pipeline.core.follow import follow_of
from ..pipeline.core.policy import Policy
from ..pipeline.core.replica import ReplicaCore
from .catching import Catching, Progress
from .connect import END_S
from .driver import Driver, Ports, decoded
from .engine import Engine
from .fetching import Fetching
from .group import AnyHands, Group, told
from .leading import Leading
from .rank import Rank
from .telling import Telling
from .tiers import DEFAULT_LOG, LogSetting

log = logging.getLogger("sparsecast.replica")

#: What a trainer says in control messages; claims and announcements come by the journal.
SAID = tuple(kind for kind in get_args(TrainerMessage) if kind not in (Claim, Announce))


class Replica(Rank):
    """One worker's weights, patched in place as the trainer publishes.

    `model` is a Module, a mapping of names to tensors, or an `Engine`. Use `async with replica`
    on an event loop, or start() / stop() from synchronous code (its loop then runs on a thread of
    its own). Entering connects and subscribes (BusUnavailable); it does not wait for a trainer.
    It may be entered again after it was left, or after entering has failed.
    `device` is where windows carry payloads to: None means the weights' CUDA device, else the host.
    `windows` narrows the kinds of window that this worker offers. `max_lag` versions, or a trainer
    unheard for `offline_s`, make `refusal()` say so. `log` is the trainer's.

    `layout`: the model's tensors are not the published ones but parts of them, fused ones say; in
    an engine of several `ranks` those of the first one, which leads, and to which the others belong
    as `Shard`s: it is they all together that hold the weights, apply an update or do not, and are
    proven. Readers of the guard are the first rank's.

    `role`: updates are for workers of role "rollout", and wait for them. One of role "evaluation"
    delays nobody: it is in no window, and takes from the log the versions that it follows:
    "latest", "every:K" (each that K divides, or the first one behind it that the log leads to), or
    "version:N" (that one alone, once it is there; of an earlier epoch too).
    """

    def __init__(
        self,
        model: torch.nn.Module | Mapping[str, torch.Tensor] | Engine,
        *,
        run: str,
        bus: str,
        name: str,
        device: str | None = None,
        layout: Layout | None = None,
        ranks: int = 1,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        rename: Callable[[str], str] | Mapping[str, str] | None = None,
        windows: Sequence[WindowKind] | None = None,
        role: Role = "rollout",
        follow: str = "latest",
        max_lag: int | None = None,
        offline_s: float | None = None,
        log: LogSetting = DEFAULT_LOG,
        policy: Policy | None = None,
        ports: Callable[[], Coroutine[Any, Any, Ports]] | None = None,
    ) -> None:
        super().__init__(
            model,
            run=run,
            bus=bus,
            name=name,
            device=device,
            layout=layout,
            include=include,
            exclude=exclude,
            rename=rename,
            windows=windows,
            log=log,
            policy=policy,
            ports=ports,
        )
        self.role: Role = role
        self.follow = follow_of(role, follow)
        self.ranks = ranks
        self._max_lag = max_lag
        self._offline_s = offline_s
        if ranks < 1 or (ranks > 1 and layout is None):
            raise SettingsError(
                f"worker {name!r} of {ranks} ranks: give the layout of the first one, and run the "
                "others as Shard(rank=1 …)"
            )
        self._group: Group | None = None
        self._error: Exception | None = None
        self._core: ReplicaCore | None = None

    # ---- life

    async def _start(self, life: contextlib.AsyncExitStack) -> None:
        self._error = None
        await self._reach(life)
        ports = self._ports
        me = Sender(self.name, ports.token())
        kinds: tuple[WindowKind, ...] = self._kinds
        gpus: tuple[str, ...] = (ports.gpu,)
        layouts: tuple[bytes, ...] = ()
        held_nbytes: tuple[int, ...] = ()
        hands: AnyHands = self._hands
        if self.layout is not None:
            leading = await self._lead(life, me)
            hands = self._group = Group(self._hands, leading, self.layout, self.policy)
            kinds, gpus = hands.common(kinds), hands.gpus(ports.gpu)
            layouts, held_nbytes = told([self.layout, *leading.layouts])
        self._all = hands
        self._core = ReplicaCore(
            run=self.run,
            me=me,
            kinds=kinds,
            device=ports.device,
            host=socket.gethostname(),
            pid=os.getpid(),
            gpus=gpus,
            layouts=layouts,
            held_nbytes=held_nbytes,
            role=self.role,
            follow=self.follow,
            policy=self.policy,
            started=ports.clock(),
        )
        self._driver: Driver[ev.ReplicaEvent, cmd.ReplicaCommand] = Driver(
            self._core,
            self._perform,
            tick=ev.Tick(),
            clock=ports.clock,
            on_change=self._changes.notify,
            on_error=self._broke,
        )
        #: The newest version whose patch is on its way or here, and that it has become another.
        self._coming = -1
        self._more = asyncio.Event()
        life.push_async_callback(self._driver.stop)
        self._telling = Telling(self.run, ports, self._outbox)
        self._catching = Catching(
            self.policy, ports.clock, functools.partial(self._telling.event, "catch-up", self.name)
        )
        journal = Journal(ports.bus, self.run)
        self._fetching = Fetching(self._core, ports, journal, hands, self._catching, self.policy)
        # Control first: what the trainer says between the journal's reading and a later
        # subscription would be lost.
        subscription = await ports.bus.subscribe(self._subjects.trainer_control, self._heard)
        life.push_async_callback(subscription.unsubscribe)
        follower = await journal.follow(self._announced, timeout_s=self.policy.bus_s)
        life.push_async_callback(follower.unsubscribe)
        self._driver.post(ev.Tick())

    async def _lead(self, life: contextlib.AsyncExitStack, me: Sender) -> Leading:
        """Meet the other ranks, if there are any."""
        loop = asyncio.get_running_loop()

        def broke(exc: Exception) -> None:
            loop.call_soon_threadsafe(self._lost_rank, exc)

        leading = Leading(
            bus=self._bus_url,
            run=self.run,
            name=self.name,
            life=me.incarnation,
            ranks=self.ranks,
            policy=self.policy,
            clock=self._ports.clock,
            broke=broke,
        )
        if leading.ranks:
            life.push_async_callback(self._end_leading, leading)
            await leading.start()
        return leading

    def _leaving(self) -> None:
        self._catching.broke_off("the worker left")
        self._driver.post(ev.Close("the worker left"))

    # ---- the user's face

    @property
    def ports(self) -> Ports:
        """What this replica is connected through, while it runs."""
        self._check()
        return self._ports

    @property
    def version(self) -> int | None:
        """The version that the weights hold and readers see; None before the first proof."""
        return self.engine.guard().version

    @property
    def verified(self) -> int | None:
        """The newest version whose digest was found to be the trainer's."""
        return self._core.verified if self._core is not None else None

    @property
    def head(self) -> int | None:
        """The newest version that the trainer has announced."""
        return self._core.head if self._core is not None else None

    @property
    def mismatches(self) -> int:
        """How many digests were not the announced ones."""
        return self._core.mismatches if self._core is not None else 0

    @property
    def catching_up(self) -> Progress | None:
        """How far this replica is on its way through the log, from the entries that it found there
        until the digest of the last one's version; None when it is on none. On any thread."""
        return self._catching.progress if self._life is not None else None

    def origin(self, version: int) -> tuple[int | None, Tags | None]:
        """The trainer's step and tags of a version that was applied here; None where unknown."""
        return self._incoming.origins.get(version, (None, None))

    @property
    def status(self) -> str:
        """Where this replica stands, in words."""
        if self._core is None:
            return "not started"
        return self._core.why()

    def reading(self, *, timeout_s: float = 60.0) -> AbstractContextManager[int | None]:
        """The guard: inside, the weights stand still; yields their version. See `Guard.reading`."""
        return self.engine.guard().reading(timeout_s=timeout_s)

    async def wait_version(self, version: int, timeout_s: float = 30.0) -> int:
        """Wait until the weights hold `version` or a newer one; WaitTimeout says why they do not.

        May be awaited on any event loop.
        """
        return await self._on_own_loop(self._wait_version(version, timeout_s))

    async def _wait_version(self, version: int, timeout_s: float) -> int:
        def reached() -> int | None:
            self._check()
            held = self.version
            if held is not None and held >= version and self.engine.guard().torn is None:
                return held
            return None

        return await self._changes.until(
            reached, timeout_s, what=f"version {version}", why=lambda: self.status
        )

    def refusal(self) -> str | None:
        """Why this worker must not generate now (torn, behind, offline, over), or None."""
        core = self._core
        if self._error is not None:
            return str(self._error)
        if core is None or self._life is None:
            return "the replica is not running"
        if self.engine.guard().torn is not None:
            return f"the weights are being resynced: {self.engine.guard().torn}"
        silent = self._silent
        if silent is not None:
            return silent
        if self._offline_s is not None:
            away = core.trainer_away_s(self._ports.clock())
            if away is not None and away > self._offline_s:
                return f"the trainer is unheard for {away:.1f} s (offline_s is {self._offline_s:g})"
        pinned = self.follow.pinned
        if pinned is not None and self.version != pinned:
            return f"version {pinned} is followed, the weights are at {self.version}"
        if pinned is not None and core.unproven is not None:
            # What an earlier run called so, which the bus has forgotten.
            return f"the weights are not known to be version {pinned}: {core.unproven}"
        if self._max_lag is not None and core.goal is not None:
            lag = core.goal - (self.version if self.version is not None else -1)
            if lag > self._max_lag:
                what = "the trainer" if self.follow.latest else f"version {core.goal}"
                return f"{lag} versions behind {what} (max_lag is {self._max_lag})"
        return None

    def require_current(self) -> None:
        """ReplicaLagging if `refusal()` has a reason."""
        reason = self.refusal()
        if reason is not None:
            raise ReplicaLagging(f"worker {self.name!r} refuses: {reason}")

    async def failed(self) -> Exception:
        """Wait until the replica is refused or broken, and return why. Unbounded: cancel it."""
        while True:
            if self._error is not None:
                return self._error
            try:
                await self._changes.until(
                    lambda: self._error, 3600.0, what="a failure", why=lambda: self.status
                )
            except TimeoutError:
                continue

    def _check(self) -> None:
        if self._error is not None:
            raise self._error
        if self._life is None:
            raise Closed(f"replica {self.name!r} is not running")

    # ---- what comes from the bus

    def _heard(self, message: Message) -> None:
        said = decoded(message, SAID, log)
        if said is not None:
            self._driver.post(ev.FromTrainer(said))

    def _announced(self, message: Claim | Announce, sequence: int) -> None:
        self._driver.post(ev.FromTrainer(message))

    @property
    def _silent(self) -> str | None:
        """Which ranks of this worker are silent, in words; None: none is."""
        return self._group.silent() if self._group is not None else None

    def _broke(self, exc: Exception) -> None:
        self._error = self._error or exc
        self._catching.broke_off(brief(exc))

    def _lost_rank(self, exc: Exception) -> None:
        """One of the ranks cannot be led any more: this worker is no member from here on."""
        if self._error is None:
            self._broke(exc)
            self._driver.post(ev.Close(str(exc)))
            self.engine.guard().tear(str(exc))
            self._changes.notify()

    async def _end_leading(self, leading: Leading) -> None:
        # An apply that is under way on the torch thread waits for the others.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(END_S):
                await self._ports.run(_nothing)
        await leading.close()

    # ---- what the core asks for

    def _perform(
        self, command: cmd.ReplicaCommand
    ) -> Coroutine[Any, Any, ev.ReplicaEvent | None] | None:
        hands = self._all
        match command:
            case cmd.Report(message):
                if isinstance(message, Ready) and (silent := self._silent) is not None:
                    # Nobody waits for what cannot come.
                    message = NotReady(sender=message.sender, stamp=message.stamp, reason=silent)
                self._outbox.put(self._subjects.worker_control(self.name), codec.encode(message))
                if isinstance(message, Ready) and self._ports.device != "cpu":
                    return hands.alert(message.stamp)
            case cmd.Tell(kind, member, reason):
                self._telling.event(kind, member, reason)
            case cmd.Fail(error):
                self._error = error
                self._catching.broke_off(str(error))
            case cmd.Compared():
                self._compared(command)
            case cmd.OpenWindow():
                return hands.open(command)
            case cmd.AbortWindow(window):
                return hands.abort(window)
            case cmd.CloseWindow(window):
                return hands.close(window)
            case cmd.Receive():
                return self._receive(command)
            case cmd.Prove(claim):
                self._catching.broke_off("another claim came")
                return hands.prove(claim)
            case cmd.Apply(versions):
                return self._apply(versions)
            case cmd.Digest(version):
                return self._digest(version)
            case cmd.Hold(version):
                return hands.hold(version)
            case cmd.Quarantine(reason):
                self._catching.broke_off(reason)
                return hands.quarantine(reason)
            case cmd.Drop(versions):
                return hands.drop(versions)
            case cmd.Fetch():
                return self._fetching.fetch(command)
        return None

    async def _apply(self, versions: tuple[int, ...]) -> ev.AppliedHere | ev.ApplyFailed:
        event = await self._all.apply(versions)
        if isinstance(event, ev.ApplyFailed) and not event.waiting:
            self._catching.broke_off(event.reason)
        return event

    async def _digest(self, version: int) -> ev.Digested | ev.DigestFailed:
        # Not at once: on a host with two members the digest of the first, many times longer than
        # an apply, would take the second one's core in the middle of its round.
        self._more.clear()
        if self._coming <= version:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.policy.verify_after_s):
                    await self._more.wait()
        return await self._all.digest(version)

    async def _receive(self, command: cmd.Receive) -> ev.Staged | ev.ReceiveFailed:
        stamp, announce = command.stamp, command.announce
        self._coming = max(self._coming, stamp.version)
        self._more.set()
        event = await self._all.receive(command)
        if isinstance(event, ev.ReceiveFailed):
            return event
        claim = self._core.claim if self._core is not None else None
        if claim is None or claim.sender != announce.sender:
            await self._all.drop((stamp.version,))
            reason = "another claim came meanwhile"
            return ev.ReceiveFailed(
                stamp.epoch, stamp.window, stamp.attempt, stamp.version, reason, corrupt=False
            )
        return event

    def _compared(self, command: cmd.Compared) -> None:
        core, last = self._core, self._incoming.last
        assert core is not None
        if command.ok:
            self._catching.verified(command.version)
        if last is not None and last.version == command.version:
            self._telling.compared(self.name, core, last, command)


def _nothing() -> None:
    """Behind all that the torch thread was given before."""
