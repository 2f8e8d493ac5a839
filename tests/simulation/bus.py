"""One simulated connection to the simulated broker: implements `Bus`.

Order is kept each way; what is on the way when the connection breaks is lost; what waits for an
answer then hears of it at once, as in `pipeline.bus.nats`, whose promises this one keeps and no
more: an append that fails at its deadline may still have been stored, or be stored later.
"""

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

from sparsecast.messages.errors import (
    BusError,
    BusUnavailable,
    PayloadTooLarge,
    SequenceConflict,
    SparsecastError,
)
from sparsecast.pipeline.bus.base import (
    Handler,
    Message,
    Record,
    StateHandler,
    StreamConfig,
    StreamState,
)

from .broker import Broker
from .loop import Process

T = TypeVar("T")

URL = "sim://broker"
BATCH = 16
RECONNECT_S = 0.3


class _Lost(Exception):
    """The connection broke while an answer was awaited."""


class SimSubscription:
    """A subscription of one connection."""

    def __init__(self, bus: "SimBus", number: int) -> None:
        self._bus = bus
        self._number = number

    async def unsubscribe(self) -> None:
        """End it."""
        bus, number = self._bus, self._number
        bus.handlers.pop(number, None)
        bus.wishes.pop(number, None)
        bus.up_link(lambda: bus.interests.pop(number, None))


class SimBus:
    """One process's connection; it breaks with the process."""

    def __init__(self, broker: Broker, process: Process) -> None:
        self.broker = broker
        self.process = process
        #: What the broker knows of our subscriptions, and what it is to know.
        self.interests: dict[int, tuple[str, str]] = {}
        self.wishes: dict[int, tuple[str, str]] = {}
        self.handlers: dict[int, Handler] = {}
        self._connected = True
        self._closed = False
        self._cut_until = 0.0
        #: Counts connections: what was on the way in an earlier one is lost.
        self._life = 0
        self._up_at = self._down_at = 0.0
        self._numbers = itertools.count(1)
        self._questions: dict[int, asyncio.Future[Any]] = {}
        self._up = asyncio.Event()
        self._up.set()
        self._state_handlers: list[StateHandler] = []
        broker.connections.append(self)
        process.on_exit.append(self._vanish)

    # ---- the wire

    def up_link(self, arrive: Callable[[], Any]) -> None:
        """Something on its way to the broker, after all that went before."""
        if not self._connected:
            return
        loop, life = self.broker.loop, self._life
        self._up_at = max(self._up_at, loop.time() + self.broker.hop_s())

        def land() -> None:
            if self._life == life:
                arrive()

        # In nobody's context: a frozen sender's bytes are in its socket already.
        loop.call_at(self._up_at, land, context=self.broker_context)

    def down_link(self, arrive: Callable[[], Any]) -> None:
        """Something on its way to the client, after all that went before."""
        loop, life = self.broker.loop, self._life
        self._down_at = max(self._down_at, loop.time() + self.broker.hop_s())

        def land() -> None:
            if self._life == life:
                arrive()

        self.process.call_at(self._down_at, land)

    @property
    def broker_context(self) -> Any:
        """A context that is no process's."""
        return self.broker.loop.bare_context

    def hand(self, number: int, message: Message) -> None:
        """The broker has a message for a subscription."""

        def deliver() -> None:
            handler = self.handlers.get(number)
            if handler is not None:
                handler(message)

        self.down_link(deliver)

    # ---- faults

    def broke(self, reason: str) -> None:
        """The connection breaks: what is on the way is lost."""
        if not self._connected or self._closed:
            return
        self._connected = False
        self._life += 1
        self.interests.clear()

        def notice() -> None:
            self._up.clear()
            for question in self._questions.values():
                if not question.done():
                    question.set_exception(_Lost())
            self._tell("disconnected", reason)

        self.process.call_at(self.broker.loop.time() + 1e-4, notice)

    def cut(self, seconds: float) -> None:
        """Break the connection, and let no new one through for a while."""
        self._cut_until = self.broker.loop.time() + seconds
        self.broke("the network is cut")
        self.reconnect_soon()

    def stall(self, seconds: float) -> None:
        """Nothing moves for a while, and then everything, in its order."""
        until = self.broker.loop.time() + seconds
        self._up_at = max(self._up_at, until)
        self._down_at = max(self._down_at, until)

    def reconnect_soon(self) -> None:
        """The client's next try, if nothing is in the way."""
        if self._connected or self._closed:
            return
        loop = self.broker.loop
        at = max(loop.time(), self._cut_until) + self.broker.rng.uniform(0.01, RECONNECT_S)
        self.process.call_at(at, self._reconnect)

    def _reconnect(self) -> None:
        if self._connected or self._closed or not self.broker.up:
            return
        if self.broker.loop.time() < self._cut_until:
            self.reconnect_soon()
            return
        self._connected = True
        self._life += 1
        self._up_at = self._down_at = 0.0
        self.interests = dict(self.wishes)
        self._up.set()
        self._tell("reconnected", URL)

    def _vanish(self) -> None:
        self._closed = True
        self._connected = False
        self.interests.clear()
        if self in self.broker.connections:
            self.broker.connections.remove(self)

    def _tell(self, event: str, detail: str) -> None:
        for handler in self._state_handlers:
            handler(event, detail)

    # ---- Bus

    @property
    def url(self) -> str:
        return URL

    @property
    def max_payload(self) -> int:
        return self.broker.max_payload

    @property
    def connected(self) -> bool:
        return self._connected

    def on_state(self, handler: StateHandler) -> None:
        self._state_handlers.append(handler)

    async def publish(self, subject: str, data: bytes, *, reply: str = "") -> None:
        if len(data) > self.max_payload:
            raise PayloadTooLarge(subject, len(data), self.max_payload)
        if not self._connected:
            raise BusUnavailable(URL, f"{subject} was not published: disconnected")
        self.up_link(lambda: self.broker.route(subject, data, reply))

    async def flush(self, timeout_s: float) -> None:
        await self._call(lambda: None, self._deadline(timeout_s), again=False, sure=True)

    async def subscribe(
        self, subject: str, handler: Handler, *, queue: str = "", pending_nbytes: int = 0
    ) -> SimSubscription:
        if self._closed:
            raise BusUnavailable(URL, "the connection is closed")
        number = next(self._numbers)
        self.handlers[number] = handler
        self.wishes[number] = (subject, queue)

        def register() -> None:
            if number in self.wishes:
                self.interests[number] = (subject, queue)

        self.up_link(register)
        return SimSubscription(self, number)

    async def request(self, subject: str, data: bytes, *, timeout_s: float) -> bytes:
        answer: asyncio.Future[bytes] = self.broker.loop.create_future()
        inbox = f"_INBOX.{self.process.name}.{next(self._numbers)}"

        def answered(message: Message) -> None:
            if not answer.done():
                answer.set_result(message.data)

        subscription = await self.subscribe(inbox, answered)
        try:
            takers = await self._call(
                lambda: self.broker.route(subject, data, inbox),
                self._deadline(timeout_s),
                again=False,
            )
            if not takers:
                raise BusUnavailable(URL, f"nobody listens on {subject}")
            async with asyncio.timeout(timeout_s):
                return await answer
        except TimeoutError:
            raise BusUnavailable(URL, f"no answer on {subject} within the deadline") from None
        finally:
            await subscription.unsubscribe()

    async def close(self, timeout_s: float = 2.0) -> None:
        if self._closed:
            return
        # What could not be sent is lost, as on a socket that is closed.
        with contextlib.suppress(BusError):
            await self.flush(timeout_s)
        self._vanish()

    # ---- streams

    def _deadline(self, timeout_s: float) -> float:
        return self.broker.loop.time() + timeout_s

    async def _call(
        self, operation: Callable[[], T], deadline: float, *, again: bool, sure: bool = False
    ) -> T:
        """Have the broker do something and hear what came of it. `sure`: no fault is drawn."""
        broker, loop = self.broker, self.broker.loop
        while True:
            if self._closed:
                raise BusUnavailable(URL, "the connection is closed")
            if not self._connected:
                try:
                    async with asyncio.timeout_at(deadline):
                        await self._up.wait()
                except TimeoutError:
                    raise BusUnavailable(URL, "disconnected, and not back in time") from None
            number = next(self._numbers)
            question: asyncio.Future[T] = loop.create_future()
            self._questions[number] = question
            deaf = not sure and broker.deaf and broker.rng.random() < broker.deaf
            mute = deaf and broker.rng.random() < 0.5
            if deaf:
                broker.count("answer lost" if mute else "request lost")

            def serve(question: asyncio.Future[T] = question, mute: bool = bool(mute)) -> None:
                try:
                    result, error = operation(), None
                except SparsecastError as exc:
                    result, error = None, exc

                def answer() -> None:
                    if question.done():
                        return
                    if error is not None:
                        question.set_exception(error)
                    else:
                        question.set_result(result)  # type: ignore[arg-type]

                if not mute:
                    self.down_link(answer)

            if not deaf or mute:
                self.up_link(serve)
            try:
                async with asyncio.timeout_at(deadline):
                    return await question
            except TimeoutError:
                raise BusUnavailable(URL, "no answer within the deadline") from None
            except _Lost:
                if not again or loop.time() >= deadline:
                    raise BusUnavailable(URL, "the connection broke before an answer") from None
            finally:
                del self._questions[number]
                if question.done() and not question.cancelled():
                    question.exception()

    async def ensure_stream(self, config: StreamConfig, *, timeout_s: float) -> StreamState:
        deadline = self._deadline(timeout_s)
        return await self._call(lambda: self.broker.ensure(config), deadline, again=True)

    async def limit_stream(self, stream: str, max_nbytes: int | None, *, timeout_s: float) -> None:
        deadline = self._deadline(timeout_s)
        await self._call(lambda: self.broker.limit(stream, max_nbytes), deadline, again=True)

    async def subjects(self, stream: str, subject: str, *, timeout_s: float) -> list[str]:
        deadline = self._deadline(timeout_s)
        return await self._call(lambda: self.broker.subjects(stream, subject), deadline, again=True)

    async def append(
        self,
        stream: str,
        subject: str,
        data: bytes,
        *,
        message_id: str = "",
        expected_sequence: int | None = None,
        expected_subject_sequence: int | None = None,
        expected_message_id: str = "",
        ttl_s: int | None = None,
        timeout_s: float,
    ) -> int:
        if len(data) > self.max_payload:
            raise PayloadTooLarge(subject, len(data), self.max_payload)
        deadline = self._deadline(timeout_s)
        broker = self.broker

        def store() -> int:
            if broker.full(stream):
                broker.count("append refused")
                raise BusError(f"stream {stream!r}: insufficient resources")
            return broker.store(
                stream,
                subject,
                data,
                message_id=message_id,
                expected=expected_sequence,
                expected_of_subject=expected_subject_sequence,
                expected_id=expected_message_id,
                ttl_s=ttl_s,
            )

        try:
            return await self._call(store, deadline, again=bool(message_id))
        except SequenceConflict:
            if not message_id:
                raise
            sequence, found = await self._call(
                lambda: broker.newest_id(stream, subject), deadline, again=True
            )
            if found != message_id:
                raise
            return sequence

    async def last(self, stream: str, subject: str, *, timeout_s: float) -> Record | None:
        deadline = self._deadline(timeout_s)
        return await self._call(lambda: self.broker.newest(stream, subject), deadline, again=True)

    async def get(self, stream: str, sequence: int, *, timeout_s: float) -> Record | None:
        deadline = self._deadline(timeout_s)
        return await self._call(lambda: self.broker.get(stream, sequence), deadline, again=True)

    async def read(
        self, stream: str, subject: str, *, start_sequence: int = 1, timeout_s: float
    ) -> AsyncIterator[Record]:
        newest = await self.last(stream, subject, timeout_s=timeout_s)
        if newest is None:
            return
        cursor = start_sequence
        while cursor <= newest.sequence:
            records = await self._call(
                lambda cursor=cursor: self.broker.batch(stream, subject, cursor, BATCH),
                self._deadline(timeout_s),
                again=True,
            )
            if not records:
                return
            for record in records:
                if record.sequence > newest.sequence:
                    return
                cursor = record.sequence + 1
                yield record

    async def purge(
        self, stream: str, *, subject: str = "", before_sequence: int = 0, timeout_s: float
    ) -> None:
        await self._call(
            lambda: self.broker.purge(stream, subject, before_sequence),
            self._deadline(timeout_s),
            again=True,
        )

    async def delete_stream(self, stream: str, *, timeout_s: float) -> None:
        await self._call(lambda: self.broker.delete(stream), self._deadline(timeout_s), again=True)
