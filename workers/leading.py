"""The first rank's talk with the other ranks of its worker, or of its trainer, on a loop and a
connection of its own.

Of its own, since the torch thread waits for it within an apply, while readers of the guard, on the
replica's loop perhaps, wait for that. The other side is following.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass
from typing import Any

import msgspec

from ..messages import codec
from ..messages.errors import RemoteProtocolError, SparsecastError, WaitTimeout, WorkerDied
from ..messages.layout import Layout
from ..messages.ranks import Answer, Deed, Fellow, Here, Lead, Order, Over
from ..messages.subjects import Subjects
from ..pipeline.bus.base import Message
from ..pipeline.bus.nats import NatsBus, connect
from ..pipeline.core.policy import Policy
from .connect import LoopThread
from .driver import Outbox
from .orders import Given, result_of

log = logging.getLogger("sparsecast.ranks")

#: How long a begun order may be unanswered before it is said again.
AGAIN_S = 1.0
#: So many orders are kept for a rank that does not answer; then it is given up.
PATIENCE = 1000


class RankSilent(SparsecastError):
    """A rank does not answer; the message says which, and for how long."""


@dataclass(slots=True)
class _Wait:
    """Who waits for what came of an order, on each rank, and until when."""

    order: Order
    deadline: float
    futures: dict[int, Future[Any]]


class Leading:
    """Gives orders, and brings back what came of them. Every method is for any thread.

    `life` names this life of the first rank. `broke` hears, on the thread of this, of a rank that
    cannot be led any more.
    """

    def __init__(
        self,
        *,
        bus: str,
        run: str,
        name: str,
        life: str,
        ranks: int,
        policy: Policy,
        clock: Callable[[], float],
        broke: Callable[[Exception], None],
    ) -> None:
        self._url = bus
        self._subjects = Subjects(run)
        self._name = name
        self._who = "the trainer" if name == "trainer" else f"worker {name!r}"
        self._life = life
        self._policy = policy
        self._clock = clock
        self._broke = broke
        self._lock = threading.RLock()
        self._given = Given(life, frozenset(range(1, ranks)))
        #: What each of the others is, what it holds, and when it was last heard.
        self._fellows: dict[int, Fellow] = {}
        self._layouts: dict[int, Layout] = {}
        self._heard: dict[int, float] = {}
        self._met: Future[None] = Future()
        self._waiting: dict[int, _Wait] = {}
        #: When an order was said last that a rank has begun, and not answered.
        self._said: dict[int, float] = {}
        self._looked = clock()
        self._over = False
        self._why = ""
        self._thread: LoopThread | None = None

    # ---- life

    async def start(self) -> None:
        """Meet the other ranks (BusUnavailable); WaitTimeout says which have not come within
        Policy.gather_s."""
        thread = self._thread = LoopThread(f"sparsecast-{self._name}-ranks")
        await asyncio.wrap_future(thread.submit(self._open()))
        timeout_s = self._policy.gather_s
        try:
            async with asyncio.timeout(timeout_s):
                await asyncio.wrap_future(self._met)
        except TimeoutError:
            what = f"every rank of {self._who}"
            absent = _ranks(self._given.ranks - self._fellows.keys())
            raise WaitTimeout(what, timeout_s, f"{absent} did not come") from None

    async def close(self, why: str = "") -> None:
        """Nothing follows, and nobody waits; the others hear why, if it is amiss. Idempotent."""
        with self._lock:
            self._over = True
            self._why = self._why or why
            waiting = list(self._waiting.values())
        for wait in waiting:
            for future in wait.futures.values():
                _fail(future, RankSilent(f"{self._who} leaves"))
        thread, self._thread = self._thread, None
        if thread is not None:
            with contextlib.suppress(Exception):
                await asyncio.wrap_future(thread.submit(self._shut()))
            await asyncio.to_thread(thread.stop)

    async def _open(self) -> None:
        self._bus: NatsBus = await connect(
            self._url, name=f"{self._name}-ranks", timeout_s=self._policy.bus_s
        )
        self._outbox = Outbox(self._bus)
        await self._bus.subscribe(self._subjects.rank(self._name, None), self._hear)
        self._beating = asyncio.get_running_loop().create_task(self._beat())

    async def _shut(self) -> None:
        self._beating.cancel()
        await asyncio.gather(self._beating, return_exceptions=True)
        self._put(Over(leader=self._life, why=self._why))
        await self._outbox.close(1.0)
        await self._bus.close()

    # ---- who there is

    @property
    def ranks(self) -> frozenset[int]:
        """The other ranks."""
        return self._given.ranks

    @property
    def fellows(self) -> list[Fellow]:
        """What the other ranks are, in their order, once they have met."""
        with self._lock:
            return [self._fellows[rank] for rank in sorted(self._fellows)]

    @property
    def layouts(self) -> list[Layout]:
        """What the other ranks hold, in their order."""
        with self._lock:
            return [self._layouts[rank] for rank in sorted(self._layouts)]

    def silent(self) -> str | None:
        """Which ranks are unheard for Policy.silence_s, in words; None: none is."""
        with self._lock:
            quiet = [rank for rank in self._given.ranks if self._is_silent(rank)]
        if not quiet:
            return None
        return f"{_ranks(quiet)} of {self._who} unheard for {self._policy.silence_s:g} s"

    def _is_silent(self, rank: int) -> bool:
        heard = self._heard.get(rank)
        return heard is None or self._clock() - heard >= self._policy.silence_s

    # ---- orders

    def order(self, deed: Deed, what: Any, timeout_s: float) -> list[Future[Any]]:
        """Have all other ranks do something; what came of it on each, in their order, as futures.

        They end within `timeout_s`, beside what the bus is away for, and earlier with a rank that
        falls silent (RankSilent): it does what it can still do when it is back, but nothing that
        only this call has waited for.
        """
        with self._lock:
            if not self._given.ranks:
                return []
            futures: dict[int, Future[Any]] = {rank: Future() for rank in sorted(self.ranks)}
            if self._over or self._thread is None:
                for future in futures.values():
                    future.set_exception(RankSilent(f"{self._who} has left"))
                return list(futures.values())
            order = self._given.give(deed, what)
            self._waiting[order.number] = _Wait(order, self._clock() + timeout_s, futures)
            self._thread.loop.call_soon_threadsafe(self._put, order)
            too_many = self._given.waiting > PATIENCE
        if too_many:
            self._broke(WorkerDied(f"{PATIENCE} orders wait for a rank of {self._who}"))
        return list(futures.values())

    # ---- on the loop of this

    def _put(self, message: Lead | Over | Order) -> None:
        self._outbox.put(self._subjects.orders(self._name), codec.encode(message))

    def _hear(self, message: Message) -> None:
        try:
            said = codec.decode_rank(message.data, subject=message.subject)
            with self._lock:
                match said:
                    case Answer() | Here() | Fellow() if said.rank not in self._given.ranks:
                        log.warning("%s has no rank %d", self._who, said.rank)
                    case Answer(leader=self._life):
                        self._answered(said)
                    case Here():
                        self._lives(said)
                    case Fellow(leader=self._life):
                        self._comes(said, message.subject)
        except (RemoteProtocolError, msgspec.DecodeError) as exc:
            log.warning("ignored on %s: %s", message.subject, exc)

    def _answered(self, answer: Answer) -> None:
        self._heard[answer.rank] = self._clock()
        if not self._given.answered(answer.rank, answer.number):
            return
        wait = self._waiting.get(answer.number)
        if wait is None:
            return
        try:
            result = result_of(answer)
        except (msgspec.DecodeError, KeyError) as exc:
            result = SparsecastError(f"rank {answer.rank} answers {answer.kind!r}: {exc}")
        if isinstance(result, Exception):
            _fail(wait.futures[answer.rank], result)
        else:
            with contextlib.suppress(InvalidStateError):
                wait.futures[answer.rank].set_result(result)
        self._settle(wait)

    def _comes(self, said: Fellow, subject: str) -> None:
        if self._met.done():
            self._lives(said)
            return
        self._layouts[said.rank] = codec.unpack_layout(said.layout, subject=subject)
        self._fellows[said.rank] = said
        self._heard[said.rank] = self._clock()
        if self._fellows.keys() == self._given.ranks:
            self._met.set_result(None)

    def _lives(self, said: Here | Fellow) -> None:
        if not self._met.done():
            return
        who = f"rank {said.rank} of {self._who}"
        if self._fellows[said.rank].incarnation != said.incarnation:
            # What its weights are nobody knows, and what was ordered it has not done.
            self._broke(WorkerDied(f"{who} has started again: start all of its ranks again"))
        elif said.leader not in ("", self._life):
            self._broke(WorkerDied(f"{who} follows another first rank of that name"))
        elif said.leader:
            self._heard[said.rank] = self._clock()
            now, begun = self._clock(), said.begun if isinstance(said, Here) else 0
            for order in self._given.unanswered(said.rank):
                # What was begun may take long; its answer may have been lost all the same.
                if order.number > begun or now - self._said.get(order.number, now) > AGAIN_S:
                    self._put(order)
                    self._said[order.number] = now
                self._said.setdefault(order.number, now)
            for number in [number for number in self._said if number <= self._given.done]:
                del self._said[number]

    async def _beat(self) -> None:
        while True:
            with self._lock:
                self._look()
                lead = Lead(
                    leader=self._life, done=self._given.done, gathering=not self._met.done()
                )
            self._put(lead)
            await asyncio.sleep(self._policy.heartbeat_s)

    def _look(self) -> None:
        """Who has waited for long enough."""
        now = self._clock()
        away_s, self._looked = now - self._looked, now
        if not self._bus.connected:
            # It is we who hear nobody, and who are not heard.
            self._heard = dict.fromkeys(self._heard, now)
            for wait in self._waiting.values():
                wait.deadline += away_s
        for wait in list(self._waiting.values()):
            for rank, future in wait.futures.items():
                if future.done():
                    continue
                if self._is_silent(rank):
                    _fail(future, RankSilent(self.silent() or f"rank {rank} was silent"))
                elif now > wait.deadline:
                    _fail(future, RankSilent(f"rank {rank} is not done with {wait.order.deed}"))
            self._settle(wait)

    def _settle(self, wait: _Wait) -> None:
        """Forget who waits, once nobody does any more."""
        if all(future.done() for future in wait.futures.values()):
            del self._waiting[wait.order.number]
            self._given.void(wait.order.number)


def _fail(future: Future[Any], error: Exception) -> None:
    with contextlib.suppress(InvalidStateError):
        future.set_exception(error)


def _ranks(ranks: Iterable[int]) -> str:
    return ", ".join(f"rank {rank}" for rank in sorted(ranks))
