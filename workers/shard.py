"""The face of a worker's other ranks: a Shard keeps its part of the weights with the first rank."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..messages import codec
from ..messages.control import WindowKind
from ..messages.errors import Closed, RemoteProtocolError, SettingsError, SparsecastError
from ..messages.layout import Layout
from ..messages.ranks import Answer, Fellow, Here, Lead, Order, Over
from ..pipeline.bus.base import Message
from ..pipeline.core.policy import Policy
from ..pipeline.log.base import unheard
from .driver import Ports
from .engine import Engine
from .orders import Taken, answer_of, decode_what
from .rank import Rank
from .tiers import DEFAULT_LOG, LogSetting

log = logging.getLogger("sparsecast.replica")


class Shard(Rank):
    """One of the other ranks of a worker whose weights are spread over several processes.

    `name` is the worker's, whose first rank runs `Replica(layout=…, ranks=…)`; `rank` is from 1 on,
    `layout` says which parts of the published tensors `model` holds here. It does what the first
    rank orders: receives in the same windows, applies when that applies, and proves its share. It
    has no readers of its own: the first rank's guard is that of the whole engine. `log` is the
    trainer's. A first rank that is unheard for Policy.silence_s may be followed by another life of
    it; then the weights are proven anew.
    """

    def __init__(
        self,
        model: torch.nn.Module | Mapping[str, torch.Tensor] | Engine,
        *,
        run: str,
        bus: str,
        name: str,
        rank: int,
        layout: Layout,
        device: str | None = None,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        rename: Callable[[str], str] | Mapping[str, str] | None = None,
        windows: Sequence[WindowKind] | None = None,
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
        if rank < 1:
            raise SettingsError(
                f"rank {rank} of worker {name!r}: its first rank, 0, is a Replica; Shards follow"
            )
        self.rank = rank
        self._taken: Taken | None = None
        self._heard = 0.0

    async def _start(self, life: contextlib.AsyncExitStack) -> None:
        await self._reach(life)
        self._incarnation = self._ports.token()
        self._taken = None
        #: Lives of the first rank that were followed before.
        self._ended: set[str] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        #: Lets go of what an earlier life has begun; what this one orders meanwhile waits.
        self._clearing: asyncio.Task[None] | None = None
        self._early: list[tuple[Taken, Order]] = []
        life.push_async_callback(self._stop_work)
        subscription = await self._ports.bus.subscribe(self._subjects.orders(self.name), self._hear)
        life.push_async_callback(subscription.unsubscribe)
        self._beating = self._spawn(self._beat())

    @property
    def version(self) -> int | None:
        """The version that this part of the weights holds; None before the first proof."""
        return self.engine.guard().version

    @property
    def status(self) -> str:
        """Where this rank stands, in words."""
        if self._life is None:
            return "not started"
        if self._taken is None:
            return f"waiting for the first rank of worker {self.name!r}"
        if self._abandoned:
            away_s = self._ports.clock() - self._heard
            return f"the first rank of worker {self.name!r} is unheard for {away_s:.1f} s"
        return f"rank {self.rank} of worker {self.name!r}, at version {self.version}"

    async def wait_version(self, version: int, timeout_s: float = 30.0) -> int:
        """Wait until this part holds `version` or a newer one; WaitTimeout says why it does not.

        Closed if this does not run. That a version is here does not say that the other ranks hold
        it: the first one's replica knows.
        """
        if self._life is None:
            raise Closed(f"rank {self.rank} of worker {self.name!r} is not running")

        def reached() -> int | None:
            guard = self.engine.guard()
            held = guard.version if guard.torn is None else None
            return held if held is not None and held >= version else None

        waiting = self._changes.until(
            reached, timeout_s, what=f"version {version}", why=lambda: self.status
        )
        return await self._on_own_loop(waiting)

    # ---- what the first rank says

    def _hear(self, message: Message) -> None:
        try:
            said = codec.decode_rank(message.data, subject=message.subject)
        except RemoteProtocolError as exc:
            log.warning("ignored: %s", exc)
            return
        if not isinstance(said, Lead | Over | Order) or not self._obeys(said.leader):
            return
        taken = self._taken
        assert taken is not None
        match said:
            case Lead(done=done, gathering=gathering):
                taken.done(done)
                if gathering:
                    self._introduce(said.leader)
            case Over():
                self._follow(None)
            case Order():
                answer = taken.repeat(said)
                if answer is not None:
                    self._say(answer)
                for order in taken.hear(said):
                    if self._clearing is None:
                        self._spawn(self._do(taken, order))
                    else:
                        self._early.append((taken, order))

    @property
    def _abandoned(self) -> bool:
        """Whether the first rank is unheard for too long."""
        away_s = self._ports.clock() - self._heard
        return self._taken is not None and away_s > self.policy.silence_s

    def _obeys(self, leader: str) -> bool:
        """Whether this life of the first rank is the one to follow."""
        taken = self._taken
        if leader in self._ended:
            return False
        if taken is None or (leader != taken.leader and self._abandoned):
            self._follow(leader)
        elif leader != taken.leader:
            return False
        self._heard = self._ports.clock()
        return True

    def _follow(self, leader: str | None) -> None:
        """Follow another life of the first rank: nothing goes on of what this one has ordered."""
        before = self._taken
        self._taken = Taken(leader) if leader is not None else None
        if before is None:
            return
        self._ended.add(before.leader)
        for task in self._tasks - {self._beating, self._clearing}:
            task.cancel()
        self._early.clear()
        if self._clearing is None and before.begun:
            self._clearing = self._spawn(self._clear())

    async def _clear(self) -> None:
        try:
            await self._let_go()
            # Behind what the torch thread was at: it is whole again, or torn. Which version that
            # is has to be shown anew.
            await self._ports.run(self.engine.guard().declare, None)
        finally:
            self._clearing = None
            early, self._early = self._early, []
            for taken, order in early:
                self._spawn(self._do(taken, order))

    async def _let_go(self) -> None:
        await self._windows.abort_all()
        await self._hands.drop(None)

    def _introduce(self, leader: str) -> None:
        assert self.layout is not None
        fellow = Fellow(
            leader=leader,
            rank=self.rank,
            incarnation=self._incarnation,
            layout=codec.pack_layout(self.layout),
            kinds=self._kinds,
            gpu=self._ports.gpu,
        )
        self._say(fellow)

    async def _do(self, taken: Taken, order: Order) -> None:
        result: Any
        try:
            result = await self._perform(order)
            answer = answer_of(order, self.rank, result)
        except Exception as exc:
            if not isinstance(exc, SparsecastError):
                log.warning("rank %d of %s: %s", self.rank, self.name, order.deed, exc_info=exc)
            answer = answer_of(order, self.rank, exc)
        taken.answer(answer)
        self._say(answer)

    async def _perform(self, order: Order) -> Any:
        what, hands = decode_what(order), self._hands
        match order.deed:
            case "open":
                return await hands.open(replace(what, rank=what.rank + self.rank))
            case "take":
                return await hands.take(what, timeout_s=self.policy.store_s, progress=unheard)
            case deed:
                return await getattr(hands, deed)(what)

    # ---- what it says

    async def _beat(self) -> None:
        while True:
            leader = self._taken.leader if self._taken is not None else ""
            here = Here(leader=leader, rank=self.rank, incarnation=self._incarnation)
            self._say(here)
            if self._abandoned:
                await self._windows.abort_all()  # the others' ends may wait for ours
            await asyncio.sleep(self.policy.heartbeat_s)

    def _say(self, message: Here | Fellow | Answer) -> None:
        self._outbox.put(self._subjects.rank(self.name, self.rank), codec.encode(message))

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        # A task that is cancelled before its first step leaves its coroutine unawaited.
        task.add_done_callback(lambda _: coroutine.close())
        return task

    async def _stop_work(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
