"""How the ranks of a collective find each other: a dictionary at rank 0, asked over the bus.

First all ranks meet (`Rendezvous.meet`: nobody enters a collective library before everyone is
there), then they exchange what the library needs; `store.BusStore` is that library's view of it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from ...messages.errors import (
    BusUnavailable,
    SparsecastError,
    WindowAborted,
    WindowError,
    WindowTimeout,
)
from .base import Courier, Received, Subscription, WindowSpec
from .lifecycle import GRACE_S, Deadline

#: A question is asked again after this long: the broker may have lost it, or the answer.
_ASK_AGAIN_S = 1.0
_PAUSE_S, _PAUSE_MAX_S = 0.002, 0.05


class _Join(msgspec.Struct, frozen=True, kw_only=True, tag="join"):
    """A rank is there, with this address; answered by _Met once all are."""

    rank: int
    address: str


class _Put(msgspec.Struct, frozen=True, kw_only=True, tag="put"):
    """Keep these; answered by _Entries with all that rank 0 has."""

    entries: dict[str, bytes]


class _Want(msgspec.Struct, frozen=True, kw_only=True, tag="want"):
    """Answered by _Entries with all that rank 0 has, once these keys are among it."""

    keys: tuple[str, ...]


class _Met(msgspec.Struct, frozen=True, kw_only=True, tag="met"):
    addresses: tuple[str, ...]


class _Entries(msgspec.Struct, frozen=True, kw_only=True, tag="entries"):
    entries: dict[str, bytes]


class _Failed(msgspec.Struct, frozen=True, kw_only=True, tag="failed"):
    reason: str


_Ask = _Join | _Put | _Want
_Answer = _Met | _Entries | _Failed

_encode = msgspec.msgpack.Encoder().encode
_asks = msgspec.msgpack.Decoder(_Ask)
_answers = msgspec.msgpack.Decoder(_Answer)


class Rendezvous:
    """One rank's end of the meeting of a window's ranks. Rank 0 answers, the others ask."""

    def __init__(self, spec: WindowSpec, courier: Courier) -> None:
        self._spec = spec
        self._courier = courier
        self._subject = f"{spec.prefix}.store"
        self._addresses: dict[int, str] = {}
        self._entries: dict[str, bytes] = {}
        self._waiting: list[tuple[_Ask, Callable[[_Answer], None]]] = []
        self._subscription: Subscription | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._over: str | None = None

    @property
    def label(self) -> str:
        """How errors name the window."""
        return self._spec.label

    async def start(self) -> None:
        """Rank 0: begin to answer."""
        if self._spec.rank == 0:
            self._subscription = await self._courier.subscribe(self._subject, self._heard)

    async def meet(self, address: str, deadline: Deadline) -> tuple[str, ...]:
        """Wait until all ranks are there; returns the address of each."""
        answer = await self.ask(_Join(rank=self._spec.rank, address=address), deadline)
        if not isinstance(answer, _Met):
            raise self._error(f"rank 0 answered a join with {type(answer).__name__}")
        return answer.addresses

    async def put(self, entries: dict[str, bytes], deadline: Deadline) -> dict[str, bytes]:
        """Leave entries for the other ranks; returns all that rank 0 has."""
        return self._all(await self.ask(_Put(entries=entries), deadline))

    async def want(self, keys: Sequence[str], deadline: Deadline) -> dict[str, bytes]:
        """Wait until all keys are there; returns all that rank 0 has."""
        return self._all(await self.ask(_Want(keys=tuple(keys)), deadline))

    async def ask(self, ask: _Ask, deadline: Deadline) -> _Answer:
        """Ask rank 0 until it answers; WindowTimeout at the deadline, WindowError if it refuses."""
        if self._over is not None:
            raise WindowAborted(self._spec.label, self._over)
        answer = await (self._ask_self if self._spec.rank == 0 else self._ask_root)(ask, deadline)
        if isinstance(answer, _Failed):
            raise self._error(f"rank 0 says: {answer.reason}")
        return answer

    async def stop(self, reason: str) -> None:
        """Answer whoever still waits with `reason`, and listen no more. Idempotent."""
        self._over = self._over or reason
        waiting, self._waiting = self._waiting, []
        for _, deliver in waiting:
            deliver(_Failed(reason=reason))
        subscription, self._subscription = self._subscription, None
        if subscription is not None:
            # An error here: the connection is gone, and the subscription with it.
            with contextlib.suppress(SparsecastError, TimeoutError):
                await asyncio.wait_for(subscription.unsubscribe(), GRACE_S)

    # ---- asking

    async def _ask_root(self, ask: _Ask, deadline: Deadline) -> _Answer:
        data = _encode(ask)
        pause_s, trouble = _PAUSE_S, "it does not answer"
        asked: set[asyncio.Task[bytes]] = set()
        try:
            while not deadline.passed:
                asked.add(asyncio.ensure_future(self._request(data, deadline)))
                # Asked again, not instead: the answer to an earlier question may be under way, and
                # rank 0 may have gone on and away when the next one comes.
                done, asked = await asyncio.wait(
                    asked,
                    timeout=min(deadline.remaining_s, _ASK_AGAIN_S),
                    return_when=asyncio.FIRST_COMPLETED,
                )
                for task in done:
                    try:
                        return self._read(task.result())
                    except BusUnavailable as exc:
                        # A question cut short by the deadline tells less than those before it.
                        if not deadline.passed:
                            trouble = exc.reason
                if done:  # rank 0 does not listen yet, or the connection broke
                    await asyncio.sleep(min(pause_s, deadline.remaining_s))
                    pause_s = min(2 * pause_s, _PAUSE_MAX_S)
        finally:
            for task in asked:
                task.cancel()
                task.add_done_callback(_seen)
        raise WindowTimeout(
            self._spec.label,
            f"no answer of rank 0 for rank {self._spec.rank} within {deadline.timeout_s:g} s: "
            f"{trouble}",
        )

    async def _request(self, data: bytes, deadline: Deadline) -> bytes:
        return await self._courier.request(self._subject, data, timeout_s=deadline.remaining_s)

    def _read(self, reply: bytes) -> _Answer:
        try:
            answer: _Answer = _answers.decode(reply)
        except msgspec.DecodeError as exc:
            raise self._error(f"undecodable answer of rank 0: {exc}") from exc
        return answer

    async def _ask_self(self, ask: _Ask, deadline: Deadline) -> _Answer:
        answer: asyncio.Future[_Answer] = asyncio.get_running_loop().create_future()
        self._take(ask, lambda found: None if answer.done() else answer.set_result(found))
        try:
            return await asyncio.wait_for(answer, deadline.remaining_s)
        except TimeoutError:
            raise WindowTimeout(
                self._spec.label,
                f"{self._missing(ask)} within {deadline.timeout_s:g} s",
            ) from None

    # ---- answering

    def _heard(self, message: Received) -> None:
        deliver = self._replier(message.reply)
        try:
            ask = _asks.decode(message.data)
        except msgspec.DecodeError as exc:
            deliver(_Failed(reason=f"undecodable question: {exc}"))
            return
        self._take(ask, deliver)

    def _replier(self, reply: str) -> Callable[[_Answer], None]:
        def deliver(answer: _Answer) -> None:
            if reply:
                task = asyncio.ensure_future(self._courier.publish(reply, _encode(answer)))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
                task.add_done_callback(_seen)

        return deliver

    def _take(self, ask: _Ask, deliver: Callable[[_Answer], None]) -> None:
        if self._over is not None:
            deliver(_Failed(reason=self._over))
            return
        if isinstance(ask, _Join):
            if not 0 <= ask.rank < self._spec.size:
                deliver(_Failed(reason=f"there is no rank {ask.rank} of {self._spec.size}"))
                return
            if self._addresses.setdefault(ask.rank, ask.address) != ask.address:
                deliver(_Failed(reason=f"rank {ask.rank} joined twice, from two addresses"))
                return
        elif isinstance(ask, _Put):
            self._entries.update(ask.entries)
        self._waiting.append((ask, deliver))
        still = []
        for entry in self._waiting:
            answer = self._answer(entry[0])
            if answer is None:
                still.append(entry)
            else:
                entry[1](answer)
        self._waiting = still

    def _answer(self, ask: _Ask) -> _Answer | None:
        if isinstance(ask, _Join):
            if len(self._addresses) < self._spec.size:
                return None
            return _Met(addresses=tuple(self._addresses[r] for r in range(self._spec.size)))
        if isinstance(ask, _Want) and not all(key in self._entries for key in ask.keys):
            return None
        return _Entries(entries=self._entries)

    def _missing(self, ask: _Ask) -> str:
        if isinstance(ask, _Want):
            return f"no rank left {[k for k in ask.keys if k not in self._entries]}"
        absent = sorted(set(range(self._spec.size)) - set(self._addresses))
        return f"{len(self._addresses)}/{self._spec.size} ranks met, ranks {absent} did not come"

    def _all(self, answer: _Answer) -> dict[str, bytes]:
        if not isinstance(answer, _Entries):
            raise self._error(f"rank 0 answered with {type(answer).__name__}")
        return answer.entries

    def _error(self, reason: str) -> WindowError:
        return WindowError(self._spec.label, reason)


def _seen(task: asyncio.Task[Any]) -> None:
    """Take note of a task's error: a lost answer is asked for again."""
    if not task.cancelled():
        task.exception()
