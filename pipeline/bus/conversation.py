"""Talking over a connection: publish, subscribe, and ask.

Requests share one inbox. When the connection breaks, everything that waits for an answer hears of
it at once: what may be asked twice is asked again after the reconnection, the rest fails.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

import nats.errors
from nats.aio.msg import Msg
from nats.aio.subscription import DEFAULT_SUB_PENDING_BYTES_LIMIT

from ...messages.errors import BusError, BusUnavailable, PayloadTooLarge, PermissionDenied
from .base import Handler, Message
from .connection import Connection, reason_of
from .jetstream import headers_nbytes

log = logging.getLogger("sparsecast.bus")

#: How long a request waits for its answer before it probes why there is none.
PROBE_AFTER_S = 0.5
NO_RESPONDERS = "503"


class Lost(Exception):
    """The connection broke while an answer was awaited."""


class Question:
    """Something that was sent with a reply subject: where its answers go."""

    __slots__ = ("answers", "inbox", "subject", "wake")

    def __init__(self, subject: str, inbox: str) -> None:
        self.subject = subject
        self.inbox = inbox
        self.answers: deque[Msg | Exception] = deque()
        self.wake: asyncio.Future[None] | None = None

    def put(self, answer: Msg | Exception) -> None:
        """Hand an answer over, or the reason why none comes."""
        self.answers.append(answer)
        if self.wake is not None and not self.wake.done():
            self.wake.set_result(None)

    async def next(self, deadline: float) -> Msg:
        """The next answer; TimeoutError, Lost or PermissionDenied."""
        if not self.answers:
            self.wake = asyncio.get_running_loop().create_future()
            async with asyncio.timeout_at(deadline):
                await self.wake
            self.wake = None
        answer = self.answers.popleft()
        if isinstance(answer, Exception):
            raise answer
        return answer


class NatsSubscription:
    """A subscription that lives until it is ended, across reconnections."""

    def __init__(self, subject: str) -> None:
        self.subject = subject
        self.ended = False
        self._end: Callable[[], Any] | None = None

    async def unsubscribe(self) -> None:
        """End it; no handler call starts afterwards. Idempotent."""
        self.ended = True
        end, self._end = self._end, None
        if end is None:
            return
        try:
            await end()
        except nats.errors.Error as exc:
            log.debug("unsubscribing from %s: %s", self.subject, exc)


class Conversation(Connection):
    """A connection that publishes, subscribes and asks."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self._questions: dict[str, Question] = {}
        self._pongs: set[asyncio.Future[None]] = set()
        self._inbox = ""
        self._inbox_denied = False
        self._count = 0

    async def _begin(self) -> None:
        self._inbox = self._client.new_inbox()
        await self._client.subscribe(f"{self._inbox}.*", cb=self._on_answer)

    def _break_off(self) -> None:
        self._inbox_denied = False
        for question in self._questions.values():
            question.put(Lost())
        for pong in self._pongs:
            if not pong.done():
                pong.set_exception(Lost())

    def _deny(self, action: str, subject: str) -> None:
        # nats-py hands the server's text over in lower case.
        if subject.startswith(self._inbox.lower()):
            self._inbox_denied = True
        for question in self._questions.values():
            asked = (question.subject.lower(), question.inbox.lower())
            if action == "publish" and subject in asked:
                subject = question.subject
                question.put(self._denied(f"publishing to {question.subject}"))
        self._tell("denied", f"{action} {subject}")

    def _denied(self, what: str) -> PermissionDenied:
        return PermissionDenied(
            f"bus {self._url} denies this client {what}; "
            "allow it in the permissions of its user on the server"
        )

    def _unavailable(self, what: str) -> BusUnavailable:
        if self._inbox_denied:
            what = f"{what} (the server denies this client its inbox {self._inbox}.*)"
        return super()._unavailable(what)

    async def publish(self, subject: str, data: bytes, *, reply: str = "") -> None:
        """Hand a message to the connection: PayloadTooLarge, or BusUnavailable while it is down.

        Only queues it: flush() before anything that blocks the loop.
        """
        if not self.connected:
            raise self._unavailable(f"{subject} was not published: disconnected")
        await self._send(subject, data, reply, None)

    async def _send(
        self, subject: str, data: bytes, reply: str, headers: dict[str, str] | None
    ) -> None:
        nbytes = len(data) + headers_nbytes(headers)
        if nbytes > self._client.max_payload:
            raise PayloadTooLarge(subject, nbytes, self._client.max_payload)
        try:
            await self._client.publish(subject, data, reply, headers)
        except nats.errors.BadSubjectError as exc:
            raise BusError(f"{subject!r} cannot be a subject") from exc
        except (nats.errors.Error, OSError) as exc:
            raise self._unavailable(f"{subject} was not published: {reason_of(exc)}") from exc

    async def flush(self, timeout_s: float) -> None:
        """Return once the server has everything published so far; else BusUnavailable."""
        deadline = asyncio.get_running_loop().time() + timeout_s
        await self._wait_up(deadline)
        pong: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._pongs.add(pong)
        try:
            async with asyncio.timeout_at(deadline):
                await self._client._send_ping(pong)
                await pong
        except TimeoutError:
            raise self._unavailable(f"no answer within {timeout_s:g} s") from None
        except Lost:
            raise self._unavailable("the connection broke before all was sent") from None
        finally:
            self._pongs.discard(pong)

    async def subscribe(
        self, subject: str, handler: Handler, *, queue: str = "", pending_nbytes: int = 0
    ) -> NatsSubscription:
        """Call `handler` with every message on `subject`; one member of `queue` gets each.

        The server knows of it before anything that this connection sends afterwards. Messages
        above `pending_nbytes` (0: 128 MiB) that wait for the handler are dropped, and told as
        "slow-consumer". An error in the handler is logged.
        """
        subscription = NatsSubscription(subject)

        async def deliver(msg: Msg) -> None:
            if subscription.ended:
                return
            try:
                handler(_message(msg))
            except Exception:
                log.exception("the handler of %s failed", subject)

        try:
            found = await self._client.subscribe(
                subject,
                queue=queue,
                cb=deliver,
                pending_bytes_limit=pending_nbytes or DEFAULT_SUB_PENDING_BYTES_LIMIT,
            )
        except nats.errors.BadSubjectError as exc:
            raise BusError(f"{subject!r} cannot be subscribed to") from exc
        except (nats.errors.Error, OSError) as exc:
            raise self._unavailable(f"not subscribed to {subject}: {reason_of(exc)}") from exc
        subscription._end = found.unsubscribe
        return subscription

    async def request(self, subject: str, data: bytes, *, timeout_s: float) -> bytes:
        """Ask and return the first answer; BusUnavailable if nobody listens or none comes in time.

        Asked once: if the connection breaks meanwhile, nobody knows whether it was heard.
        """
        deadline = asyncio.get_running_loop().time() + timeout_s
        answer = await self._ask(subject, data, None, deadline, again=False)
        if status_of(answer) == NO_RESPONDERS:
            raise BusUnavailable(self._url, f"nobody listens on {subject}")
        return answer.data

    def _question(self, subject: str) -> tuple[str, Question]:
        self._count += 1
        token = format(self._count, "x")
        question = Question(subject, f"{self._inbox}.{token}")
        self._questions[token] = question
        return token, question

    async def _on_answer(self, msg: Msg) -> None:
        question = self._questions.get(msg.subject[len(self._inbox) + 1 :])
        if question is not None:
            question.put(msg)

    async def _ask(
        self,
        subject: str,
        data: bytes,
        headers: dict[str, str] | None,
        deadline: float,
        *,
        again: bool,
        probe: Callable[[float], Awaitable[object]] | None = None,
    ) -> Msg:
        """The first answer, a 503 for "nobody listens" included. `again`: ask anew after a break.

        `probe` is called with the deadline when no answer comes soon: it may raise the reason.
        """
        loop = asyncio.get_running_loop()
        while True:
            await self._wait_up(deadline)
            token, question = self._question(subject)
            try:
                await self._send(subject, data, question.inbox, headers)
                if probe is not None:
                    try:
                        return await question.next(min(deadline, loop.time() + PROBE_AFTER_S))
                    except TimeoutError:
                        await probe(deadline)
                return await question.next(deadline)
            except TimeoutError:
                raise self._unavailable(f"no answer on {subject} within the deadline") from None
            except Lost:
                if not again or loop.time() >= deadline:
                    raise self._unavailable(
                        f"the connection broke before {subject} was answered"
                    ) from None
            finally:
                del self._questions[token]


def status_of(msg: Msg) -> str:
    """The status that the server put into an answer ("503": nobody listens), or ""."""
    return (msg.headers or {}).get("Status", "")


def _message(msg: Msg) -> Message:
    headers = msg.headers
    if headers is None:
        return Message(msg.subject, msg.data, msg.reply)
    sequence, previous = headers.get("Nats-Sequence", ""), headers.get("Nats-Last-Sequence", "")
    return Message(
        msg.subject,
        msg.data,
        msg.reply,
        int(sequence) if sequence.isdigit() else None,
        int(previous) if previous.isdigit() else None,
    )
