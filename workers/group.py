"""The hands of all ranks of one worker, as those of one: its first rank leads.

What a replica's core asks of a worker every rank does, each with its own window end, staging and
weights; the first one hears from all of them, and tells the core one thing. The version that
readers see is the first rank's: an apply holds its guard until every rank has written.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import zlib
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any, TypeVar

import msgspec

from ..messages import codec
from ..messages.control import Claim, LogEntry, Stamp, WindowKind
from ..messages.errors import (
    EngineError,
    LogError,
    ManifestMismatch,
    RemoteProtocolError,
    SparsecastError,
    WorkerDied,
)
from ..messages.layout import Layout, require_whole
from ..messages.ranks import Answer, Deed, Fellow, Here, Lead, Order, Over
from ..messages.subjects import Subjects
from ..pipeline.bus.base import Message
from ..pipeline.core import commands as cmd
from ..pipeline.core import events as ev
from ..pipeline.core.policy import Policy
from ..pipeline.log.base import Progress
from .driver import Changes, Outbox, Ports
from .hands import Hands
from .orders import Given, result_of

log = logging.getLogger("sparsecast.replica")

T = TypeVar("T")

#: A digest is a sum mod 2⁶⁴.
MASK = (1 << 64) - 1
#: So many orders are kept for a rank that does not answer; then it is given up.
PATIENCE = 1000


class RankSilent(SparsecastError):
    """A rank does not answer; the message says which, and for how long."""


class Group:
    """Does what `Hands` does, on every rank: `mine` are the first rank's.

    `life` names this life of the first rank; `broke` hears of a rank that cannot be led any more.
    """

    def __init__(
        self,
        mine: Hands,
        *,
        ports: Ports,
        outbox: Outbox,
        subjects: Subjects,
        name: str,
        life: str,
        ranks: int,
        layout: Layout,
        policy: Policy,
        broke: Callable[[Exception], None],
    ) -> None:
        self._mine = mine
        self._ports = ports
        self._outbox = outbox
        self._subjects = subjects
        self._name = name
        self._life = life
        self._policy = policy
        self._broke = broke
        self._given = Given(life, frozenset(range(1, ranks)))
        #: What each of the others is, and when it was last heard.
        self._fellows: dict[int, Fellow] = {}
        self._layouts: dict[int, Layout] = {0: layout}
        self._heard: dict[int, float] = {}
        self._changes = Changes()
        #: Who waits for what came of an order on a rank.
        self._waiting: dict[tuple[int, int], asyncio.Future[Any]] = {}
        self._over = False

    # ---- meeting

    async def start(self, life: contextlib.AsyncExitStack) -> None:
        """Meet the other ranks; WaitTimeout says which have not come within Policy.gather_s."""
        if not self._given.ranks:
            return
        subscription = await self._ports.bus.subscribe(
            self._subjects.rank(self._name, None), self._hear
        )
        life.push_async_callback(subscription.unsubscribe)
        beating = asyncio.get_running_loop().create_task(self._beat())
        life.push_async_callback(_ended, beating)
        life.callback(self._leave)
        await self._changes.until(
            lambda: None if self._absent else True,
            self._policy.gather_s,
            what=f"every rank of worker {self._name!r}",
            why=lambda: f"{_ranks(self._absent)} did not come",
        )

    @property
    def _absent(self) -> frozenset[int]:
        return self._given.ranks - self._fellows.keys()

    def common(self, kinds: tuple[WindowKind, ...]) -> tuple[WindowKind, ...]:
        """Those of the first rank's kinds of window that every rank can open."""
        others = [fellow.kinds for fellow in self._fellows.values()]
        return tuple(kind for kind in kinds if all(kind in theirs for theirs in others))

    @property
    def gpus(self) -> tuple[str, ...]:
        """The GPU of each rank, the first one's first."""
        others = (fellow.gpu for _, fellow in sorted(self._fellows.items()))
        return (self._ports.gpu, *others)

    def silent(self) -> str | None:
        """Which ranks are unheard for Policy.silence_s, in words; None: none is."""
        quiet = frozenset(filter(self._is_silent, self._given.ranks))
        if not quiet:
            return None
        return f"{_ranks(quiet)} of worker {self._name!r} unheard for {self._policy.silence_s:g} s"

    def _is_silent(self, rank: int) -> bool:
        heard = self._heard.get(rank)
        return heard is None or self._ports.clock() - heard >= self._policy.silence_s

    # ---- windows

    async def open(self, command: cmd.OpenWindow) -> ev.WindowOpened | ev.WindowFailed:
        """Open every rank's end of a window."""
        try:
            found = await self._both(self._mine.open(command), "open", command)
        except RankSilent as exc:
            return ev.WindowFailed(command.stamp.epoch, command.stamp.window, str(exc))
        return _first_of(ev.WindowFailed, found) or found[0]

    async def abort(self, window: int) -> None:
        """Break a window off on every rank."""
        await self._all_of(self._mine.abort(window), "abort", window)

    async def close(self, window: int) -> None:
        """Leave an idle window in order, on every rank."""
        await self._all_of(self._mine.close(window), "close", window)

    async def alert(self, stamp: Stamp) -> None:
        """A round is about to come."""
        await self._all_of(self._mine.alert(stamp), "alert", stamp)

    async def receive(self, command: cmd.Receive) -> ev.Staged | ev.ReceiveFailed:
        """Receive a payload on every rank; what some have and others have not is not staged."""
        try:
            found = await self._both(self._mine.receive(command), "receive", command)
        except RankSilent as exc:
            stamp = command.stamp
            identity = (stamp.epoch, stamp.window, stamp.attempt, stamp.version)
            return ev.ReceiveFailed(*identity, str(exc), corrupt=False)
        failures = {
            rank: event for rank, event in found.items() if isinstance(event, ev.ReceiveFailed)
        }
        if not failures:
            return ev.Staged(command.stamp, command.announce)
        # A window that broke on one rank is broken, whatever others refused.
        return failures[min(failures, key=lambda rank: (failures[rank].corrupt, rank))]

    # ---- staging and weights

    async def take(self, entry: LogEntry, *, timeout_s: float, progress: Progress) -> None:
        """Load an entry of the log, check it, and stage it, on every rank."""
        mine = self._mine.take(entry, timeout_s=timeout_s, progress=progress)
        try:
            await self._both(mine, "take", entry)
        except RankSilent as exc:
            raise LogError(str(exc)) from None

    async def drop(self, versions: tuple[int, ...] | None) -> None:
        """Forget staged patches (None: all)."""
        await self._all_of(self._mine.drop(versions), "drop", versions)

    async def prove(self, claim: Claim) -> ev.Proved | ev.Unfit:
        """Compare every rank's weights with a claim's manifest; their digests add up."""
        layouts = [layout for _, layout in sorted(self._layouts.items())]
        try:
            require_whole(layouts, claim.manifest)
            found = await self._both(self._mine.prove(claim), "prove", claim)
        except ManifestMismatch as exc:
            return ev.Unfit(claim.epoch, exc.difference)
        except RankSilent:
            # No state has this digest: it is proven by an anchor, once all ranks are back.
            return ev.Proved(claim.epoch, claim.manifest.hash, -1)
        unfit = _first_of(ev.Unfit, found)
        if unfit is not None:
            return unfit
        digests = [event.digest for event in found.values()]
        total = -1 if -1 in digests else sum(digests) & MASK
        return ev.Proved(claim.epoch, claim.manifest.hash, total)

    async def hold(self, version: int) -> None:
        """Serve the weights, as they stand, as `version`."""
        await self._all_of(self._mine.hold(version), "hold", version)

    async def quarantine(self, reason: str) -> None:
        """Serve nothing until the next apply has committed."""
        await self._all_of(self._mine.quarantine(reason), "quarantine", reason)

    async def apply(self, versions: tuple[int, ...]) -> ev.AppliedHere | ev.ApplyFailed:
        """Apply staged versions on every rank, the others within the first one's hold of the guard;
        its version flips when all have written."""
        silent = self.silent()
        if silent is not None:
            return ev.ApplyFailed(silent, torn=False, waiting=True)
        loop = asyncio.get_running_loop()

        def together() -> None:
            # On the torch thread, which waits for the loop; never the other way round.
            others = asyncio.run_coroutine_threadsafe(self._others("apply", versions), loop)
            failed = _first_of(ev.ApplyFailed, others.result())
            if failed is not None:
                raise EngineError(failed.reason)

        return await self._mine.apply(versions, together)

    async def digest(self, version: int) -> ev.Digested | ev.DigestFailed:
        """The digest of the whole state: the shares of the ranks add up."""
        try:
            found = await self._both(self._mine.digest(version), "digest", version)
        except RankSilent as exc:
            return ev.DigestFailed(version, str(exc))
        failed = _first_of(ev.DigestFailed, found)
        if failed is not None:
            return failed
        total = sum(event.digest for event in found.values()) & MASK
        return ev.Digested(version, total, max(event.verify_us for event in found.values()))

    # ---- orders

    async def _both(self, mine: Awaitable[Any], deed: Deed, what: Any) -> dict[int, Any]:
        """What came of it on every rank; or, once all are done, what the first of them raised."""
        own, others = await asyncio.gather(mine, self._others(deed, what), return_exceptions=True)
        if isinstance(own, BaseException):
            raise own
        if isinstance(others, BaseException):
            raise others
        return {0: own, **others}

    async def _all_of(self, mine: Awaitable[Any], deed: Deed, what: Any) -> None:
        """Have it done everywhere; a silent rank does it when it is back."""
        with contextlib.suppress(RankSilent):
            await self._both(mine, deed, what)

    async def _others(self, deed: Deed, what: Any) -> dict[int, Any]:
        """Have the other ranks do it; what came of it on each, or what the first of them raised."""
        if not self._given.ranks:
            return {}
        if self._over:
            raise RankSilent(f"worker {self._name!r} has left")
        order = self._given.give(deed, what)
        if self._given.waiting > PATIENCE:
            told = self.silent() or f"a rank of worker {self._name!r} hangs"
            self._broke(WorkerDied(f"{told}, and {PATIENCE} orders wait for it"))
        loop = asyncio.get_running_loop()
        futures = {rank: loop.create_future() for rank in sorted(self._given.ranks)}
        keys = [(rank, order.number) for rank in futures]
        self._waiting.update(zip(keys, futures.values(), strict=True))
        self._say(order)
        try:
            results = await asyncio.gather(*futures.values(), return_exceptions=True)
        finally:
            for key in keys:
                del self._waiting[key]
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return dict(zip(futures, results, strict=True))

    def _say(self, message: Lead | Over | Order) -> None:
        self._outbox.put(self._subjects.orders(self._name), codec.encode(message))

    def _hear(self, message: Message) -> None:
        try:
            said = codec.decode_rank(message.data, subject=message.subject)
            match said:
                case Answer() | Here() | Fellow() if said.rank not in self._given.ranks:
                    log.warning("worker %s has no rank %d", self._name, said.rank)
                case Answer(leader=self._life):
                    self._answered(said)
                case Here():
                    self._met(said)
                case Fellow(leader=self._life):
                    self._met(said)
                    layout = codec.decode_layout(
                        zlib.decompress(said.layout), subject=message.subject
                    )
                    self._fellows[said.rank], self._layouts[said.rank] = said, layout
                    self._changes.notify()
        except (RemoteProtocolError, msgspec.DecodeError, zlib.error, KeyError) as exc:
            log.warning("ignored on %s: %s", message.subject, exc)

    def _answered(self, answer: Answer) -> None:
        result = result_of(answer)
        self._heard[answer.rank] = self._ports.clock()
        if not self._given.answered(answer.rank, answer.number):
            return
        future = self._waiting.get((answer.rank, answer.number))
        if future is None or future.done():
            return
        if isinstance(result, Exception):
            future.set_exception(result)
        else:
            future.set_result(result)

    def _met(self, said: Here | Fellow) -> None:
        known = self._fellows.get(said.rank)
        if known is not None and known.incarnation != said.incarnation:
            # What its weights are nobody knows, and what was ordered it has not done.
            who = f"rank {said.rank} of worker {self._name!r}"
            self._broke(WorkerDied(f"{who} has started again: start all of its ranks again"))
        elif said.leader == self._life:
            self._heard[said.rank] = self._ports.clock()
            for order in self._given.unanswered(said.rank):
                self._say(order)

    async def _beat(self) -> None:
        while True:
            gathering = bool(self._absent)
            self._say(Lead(leader=self._life, done=self._given.done, gathering=gathering))
            await asyncio.sleep(self._policy.heartbeat_s)
            for (rank, _), future in list(self._waiting.items()):
                if self._is_silent(rank) and not future.done():
                    future.set_exception(RankSilent(self.silent()))

    def _leave(self) -> None:
        """Nothing follows, and nobody waits: a torch thread that does would hold the end up."""
        self._over = True
        self._say(Over(leader=self._life))
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(RankSilent(f"worker {self._name!r} leaves"))


async def _ended(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def _first_of(kind: type[T], found: Mapping[int, Any]) -> T | None:
    """The event of this kind of the lowest rank that has one, or None."""
    return next((found[rank] for rank in sorted(found) if isinstance(found[rank], kind)), None)


#: What a replica works with: one rank's hands, or those of all ranks of a worker.
AnyHands = Hands | Group


def _ranks(ranks: Iterable[int]) -> str:
    return ", ".join(f"rank {rank}" for rank in sorted(ranks))
