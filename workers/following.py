"""Another rank's talk with the first one, which leads: it does its orders, in order, each once.

The other side is leading.py, what both keep in mind orders.py.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from ..messages import codec
from ..messages.errors import RemoteProtocolError, SparsecastError
from ..messages.ranks import Answer, Fellow, Here, Lead, Order, Over
from ..messages.subjects import Subjects
from ..pipeline.bus.base import Message
from ..pipeline.core.policy import Policy
from .driver import Outbox, Ports
from .orders import Taken, answer_of

log = logging.getLogger("sparsecast.ranks")


class Following:
    """Follows one life of the first rank at a time. Everything is on one event loop.

    `perform` does an order, `introduce` says what this rank is; `let_go` ends what an earlier life
    has begun, and its coroutine is over before the next one's orders begin; `deserted` is called
    with each heartbeat while the first rank is unheard for Policy.silence_s; `over` hears why a
    life of it is followed no more. `once`: one is followed, and none after it.
    """

    def __init__(
        self,
        *,
        ports: Ports,
        outbox: Outbox,
        run: str,
        name: str,
        rank: int,
        policy: Policy,
        perform: Callable[[Order], Awaitable[Any]],
        introduce: Callable[[str, str], Fellow],
        let_go: Callable[[], Awaitable[None]],
        deserted: Callable[[], Awaitable[None]],
        once: bool = False,
        over: Callable[[str], None] = lambda why: None,
    ) -> None:
        self._ports = ports
        self._outbox = outbox
        self._subjects = Subjects(run)
        self._name = name
        self._rank = rank
        self._policy = policy
        self._perform = perform
        self._introduce = introduce
        self._let_go = let_go
        self._deserted = deserted
        self._once = once
        self._over = over
        self._incarnation = ports.token()
        self._taken: Taken | None = None
        self._heard = 0.0
        #: Lives of the first rank that were followed before.
        self._ended: set[str] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        #: Lets go of what an earlier life has begun; what this one orders meanwhile waits.
        self._clearing: asyncio.Task[None] | None = None
        self._early: list[tuple[Taken, Order]] = []

    async def start(self) -> None:
        """Listen, and say that this rank is here (BusError)."""
        orders = self._subjects.orders(self._name)
        self._subscription = await self._ports.bus.subscribe(orders, self._hear)
        self._beating = self._spawn(self._beat())

    async def stop(self) -> None:
        """Take no more orders; what is under way is broken off."""
        await self._subscription.unsubscribe()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    @property
    def leader(self) -> str | None:
        """The life of the first rank that is followed; None: there is none."""
        return None if self._taken is None else self._taken.leader

    @property
    def ended(self) -> bool:
        """Whether some life of the first rank was followed to its end."""
        return bool(self._ended)

    @property
    def away_s(self) -> float:
        """For how long the first rank is unheard, in seconds; 0 before it was heard."""
        return self._ports.clock() - self._heard if self._taken is not None else 0.0

    @property
    def abandoned(self) -> bool:
        """Whether the first rank is unheard for too long."""
        return self.away_s > self._policy.silence_s

    # ---- what the first rank says

    def _hear(self, message: Message) -> None:
        try:
            said = codec.decode_rank(message.data, subject=message.subject)
        except RemoteProtocolError as exc:
            log.warning("ignored: %s", exc)
            return
        if not isinstance(said, Lead | Over | Order):
            return
        if (self._once and self._taken is None and self._ended) or not self._obeys(said.leader):
            return
        taken = self._taken
        assert taken is not None
        match said:
            case Lead(done=done, gathering=gathering):
                taken.done(done)
                if gathering:
                    self._say(self._introduce(said.leader, self._incarnation))
            case Over(why=why):
                self._follow(None, why)
            case Order():
                answer = taken.repeat(said)
                if answer is not None:
                    self._say(answer)
                for order in taken.hear(said):
                    if self._clearing is None:
                        self._spawn(self._do(taken, order))
                    else:
                        self._early.append((taken, order))

    def _obeys(self, leader: str) -> bool:
        """Whether this life of the first rank is the one to follow."""
        taken = self._taken
        if leader in self._ended:
            return False
        if taken is None or (leader != taken.leader and self.abandoned and not self._once):
            self._follow(leader, "another process is the first rank now")
        elif leader != taken.leader:
            return False
        self._heard = self._ports.clock()
        return True

    def _follow(self, leader: str | None, why: str) -> None:
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
        self._over(why)

    async def _clear(self) -> None:
        try:
            await self._let_go()
        finally:
            self._clearing = None
            early, self._early = self._early, []
            for taken, order in early:
                self._spawn(self._do(taken, order))

    async def _do(self, taken: Taken, order: Order) -> None:
        try:
            answer = answer_of(order, self._rank, await self._perform(order))
        except Exception as exc:
            if not isinstance(exc, SparsecastError):
                log.warning("rank %d of %s: %s", self._rank, self._name, order.deed, exc_info=exc)
            answer = answer_of(order, self._rank, exc)
        taken.answer(answer)
        self._say(answer)

    # ---- what it says

    async def _beat(self) -> None:
        while True:
            taken = self._taken
            here = Here(
                leader=self.leader or "",
                rank=self._rank,
                incarnation=self._incarnation,
                begun=0 if taken is None else taken.begun,
            )
            self._say(here)
            if not self._ports.bus.connected:
                self._heard = self._ports.clock()  # it is we who hear nobody
            if self.abandoned:
                await self._deserted()
            await asyncio.sleep(self._policy.heartbeat_s)

    def _say(self, message: Here | Fellow | Answer) -> None:
        self._outbox.put(self._subjects.rank(self._name, self._rank), codec.encode(message))

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        # A task that is cancelled before its first step leaves its coroutine unawaited.
        task.add_done_callback(lambda _: coroutine.close())
        return task
