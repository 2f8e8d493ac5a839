"""The bus on NATS: one connection that comes back by itself, and streams on JetStream.

Requests share one inbox. When the connection breaks, everything that waits for an answer hears of
it at once: what may be asked twice is asked again after the reconnection, the rest fails.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import DEFAULT_SUB_PENDING_BYTES_LIMIT

from ...messages.errors import (
    BusError,
    BusUnavailable,
    PayloadTooLarge,
    PermissionDenied,
    SequenceConflict,
    SparsecastError,
    StreamMissing,
)
from . import jetstream
from .base import Handler, Message, Record, StateHandler, StreamConfig, StreamState
from .client import MINIMUM_SERVER, Credentials, HardenedClient, redact, server_version

log = logging.getLogger("sparsecast.bus")

RECONNECT_WAIT_S = 0.25
PING_INTERVAL_S = 5
#: One batch of read(): large enough to hide a round trip, far below the client's pending limit.
BATCH_NBYTES = 16 << 20
BATCH_MESSAGES = 1024
#: How long an append waits for its acknowledgement before it asks whether the stream exists.
PROBE_AFTER_S = 0.5

_DENIED = re.compile(r'permissions violation for (publish|subscription)[^"]*"([^"]+)"')
_NO_RESPONDERS = "503"


class _Lost(Exception):
    """The connection broke while an answer was awaited."""


class _Question:
    """Something that was sent with a reply subject: where its answers go."""

    __slots__ = ("answers", "inbox", "subject", "wake")

    def __init__(self, subject: str, inbox: str) -> None:
        self.subject = subject
        self.inbox = inbox
        self.answers: deque[Msg | Exception] = deque()
        self.wake: asyncio.Future[None] | None = None

    def put(self, answer: Msg | Exception) -> None:
        self.answers.append(answer)
        if self.wake is not None and not self.wake.done():
            self.wake.set_result(None)

    async def next(self, deadline: float) -> Msg:
        """The next answer; TimeoutError, _Lost or PermissionDenied."""
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


async def connect(
    url: str,
    *,
    name: str,
    timeout_s: float = 5.0,
    credentials: Credentials | None = None,
    on_state: StateHandler | None = None,
) -> NatsBus:
    """Connect to a broker, trying again until `timeout_s` is over.

    `url` is nats://host:port (tls:// and ws:// too, several separated by commas), with or without
    user:password@ or token@; `credentials` (None: from the environment) go with it. `name` is what
    the server's monitoring shows. BusUnavailable at the deadline, or at once if the server refuses
    the credentials or is too old.
    """
    bus = NatsBus(url)
    if on_state is not None:
        bus.on_state(on_state)
    await bus._open(name, credentials or Credentials.from_environment(), timeout_s)
    return bus


class NatsBus:
    """One connection to a NATS server: implements `Bus`. Made by connect(); for one event loop."""

    def __init__(self, url: str) -> None:
        self._servers = [part.strip() for part in url.split(",") if part.strip()]
        self._url = redact(url)
        self._client = HardenedClient()
        self._state_handlers: list[StateHandler] = []
        self._questions: dict[str, _Question] = {}
        self._pongs: set[asyncio.Future[None]] = set()
        self._inbox = ""
        self._count = 0
        self._up = asyncio.Event()
        self._opened = False
        self._closing = False
        self._reason = ""
        self._refused = asyncio.Event()
        self._inbox_denied = False
        self._quiet: dict[str, float] = {}

    # ---- the connection

    async def _open(self, name: str, credentials: Credentials, timeout_s: float) -> None:
        if not self._servers:
            raise BusUnavailable(self._url, "no URL was given; expected nats://host:port")
        loop = asyncio.get_running_loop()
        connecting = loop.create_task(
            self._client.connect(
                servers=self._servers,
                name=name,
                error_cb=self._on_error,
                disconnected_cb=self._on_disconnected,
                reconnected_cb=self._on_reconnected,
                closed_cb=self._on_closed,
                max_reconnect_attempts=-1,
                reconnect_time_wait=RECONNECT_WAIT_S,  # type: ignore[arg-type]  # a float too
                connect_timeout=2,
                ping_interval=PING_INTERVAL_S,
                max_outstanding_pings=2,
                flush_timeout=5.0,
                drain_timeout=2,
                **credentials.options(),
            )
        )
        refused = loop.create_task(self._refused.wait())
        try:
            await asyncio.wait(
                {connecting, refused}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED
            )
            if not connecting.done() or refused.done():
                reason = self._reason or "no answer"
                tail = "" if refused.done() else f" (tried for {timeout_s:g} s)"
                raise BusUnavailable(self._url, reason + tail)
            try:
                connecting.result()
            except (nats.errors.Error, OSError, ValueError, AssertionError) as exc:
                raise BusUnavailable(self._url, _reason_of(exc)) from None
            found = str(self._client._server_info.get("version", ""))
            if server_version(found) < MINIMUM_SERVER:
                raise BusUnavailable(
                    self._url,
                    f"nats-server {found} is too old: sparsecast needs "
                    f"{'.'.join(map(str, MINIMUM_SERVER))} or newer",
                )
            self._inbox = self._client.new_inbox()
            await self._client.subscribe(f"{self._inbox}.*", cb=self._on_answer)
        except BaseException:
            self._closing = True
            for task in (connecting, refused):
                task.cancel()
            await asyncio.wait({connecting, refused}, timeout=0.5)
            await self._shut(0.5)
            raise
        refused.cancel()
        self._opened = True
        self._up.set()
        self._tell("connected", self._url)

    @property
    def url(self) -> str:
        """Where the broker is, without credentials."""
        return self._url

    @property
    def max_payload(self) -> int:
        """The largest message that the server takes, in bytes, headers included."""
        return self._client.max_payload

    @property
    def connected(self) -> bool:
        """Whether the connection stands now."""
        return self._up.is_set() and self._client.is_connected

    @property
    def client(self) -> Client:
        """The connection as nats-py has it, for its micro services."""
        return self._client

    def on_state(self, handler: StateHandler) -> None:
        """Hear of every change of the connection, slow consumers, denials and errors."""
        self._state_handlers.append(handler)

    async def close(self, timeout_s: float = 2.0) -> None:
        """Drain and close, within `timeout_s`. Idempotent."""
        if self._closing:
            return
        self._closing = True
        if self._client.is_connected:
            drain = asyncio.ensure_future(self._client.drain())
            # Not asyncio.timeout: drain() swallows a cancellation and waits on.
            await asyncio.wait({drain}, timeout=timeout_s)
            if not drain.done():
                log.warning("%s did not take what was left within %g s", self._url, timeout_s)
                self._client.abandon()
                drain.cancel()
        await self._shut(min(timeout_s, 0.5))
        self._interrupt()
        self._up.clear()
        self._tell("closed", "closed here")

    async def _shut(self, timeout_s: float) -> None:
        closing = asyncio.ensure_future(self._client.close())
        await asyncio.wait({closing}, timeout=timeout_s)
        if not closing.done():
            self._client.abandon()
            closing.cancel()
            await asyncio.wait({closing}, timeout=timeout_s)

    def _tell(self, event: str, detail: str) -> None:
        level = logging.INFO if event in ("connected", "reconnected", "closed") else logging.WARNING
        now = asyncio.get_running_loop().time()
        if now >= self._quiet.get(event + detail, 0.0):
            # A slow consumer is reported for every message that it drops: log one a second.
            self._quiet = {key: end for key, end in self._quiet.items() if end > now}
            self._quiet[event + detail] = now + 1.0
            log.log(level, "bus %s: %s: %s", self._url, event, detail)
        for handler in self._state_handlers:
            try:
                handler(event, detail)
            except Exception:
                log.exception("a state handler failed on %s", event)

    async def _on_error(self, exc: Exception) -> None:
        if isinstance(exc, nats.errors.SlowConsumerError):
            self._tell("slow-consumer", exc.subject)
            return
        text = str(exc)
        denied = _DENIED.search(text)
        if denied is not None:
            self._deny(denied[1], denied[2])
            return
        self._reason = _reason_of(exc)
        if not self._opened:
            if "authorization" in text.lower() or "authentication" in text.lower():
                self._reason = f"{self._reason}: the server refuses the credentials"
                self._refused.set()
        elif self._client.is_connected and not isinstance(exc, OSError):
            self._tell("error", self._reason)
        else:
            log.debug("bus %s: %s", self._url, self._reason)

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

    async def _on_disconnected(self) -> None:
        if not self._opened or self._closing:
            return
        self._up.clear()
        self._interrupt()
        self._tell("disconnected", self._reason or "the connection broke")

    async def _on_reconnected(self) -> None:
        self._reason = ""
        self._inbox_denied = False
        self._up.set()
        self._tell("reconnected", self._url)

    async def _on_closed(self) -> None:
        if self._opened and not self._closing:
            self._closing = True
            self._up.clear()
            self._interrupt()
            self._tell("closed", self._reason or "the client gave up")

    def _interrupt(self) -> None:
        for question in self._questions.values():
            question.put(_Lost())
        for pong in self._pongs:
            if not pong.done():
                pong.set_exception(_Lost())

    async def _wait_up(self, deadline: float) -> None:
        if self.connected:
            return
        if self._closing:
            raise BusUnavailable(self._url, "the connection is closed")
        try:
            async with asyncio.timeout_at(deadline):
                await self._up.wait()
        except TimeoutError:
            raise self._unavailable("disconnected, and not back in time") from None

    def _unavailable(self, what: str) -> BusUnavailable:
        if self._inbox_denied:
            what = f"{what} (the server denies this client its inbox {self._inbox}.*)"
        return BusUnavailable(self._url, f"{what}: {self._reason}" if self._reason else what)

    # ---- messages

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
        nbytes = len(data) + jetstream.headers_nbytes(headers)
        if nbytes > self._client.max_payload:
            raise PayloadTooLarge(subject, nbytes, self._client.max_payload)
        try:
            await self._client.publish(subject, data, reply, headers)
        except nats.errors.BadSubjectError as exc:
            raise BusError(f"{subject!r} cannot be a subject") from exc
        except (nats.errors.Error, OSError) as exc:
            raise self._unavailable(f"{subject} was not published: {_reason_of(exc)}") from exc

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
        except _Lost:
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
            raise self._unavailable(f"not subscribed to {subject}: {_reason_of(exc)}") from exc
        subscription._end = found.unsubscribe
        return subscription

    async def request(self, subject: str, data: bytes, *, timeout_s: float) -> bytes:
        """Ask and return the first answer; BusUnavailable if nobody listens or none comes in time.

        Asked once: if the connection breaks meanwhile, nobody knows whether it was heard.
        """
        deadline = asyncio.get_running_loop().time() + timeout_s
        answer = await self._ask(subject, data, None, deadline, again=False)
        if _status(answer) == _NO_RESPONDERS:
            raise BusUnavailable(self._url, f"nobody listens on {subject}")
        return answer.data

    def _question(self, subject: str) -> tuple[str, _Question]:
        self._count += 1
        token = format(self._count, "x")
        question = _Question(subject, f"{self._inbox}.{token}")
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
        probe: str = "",
    ) -> Msg:
        """The first answer, a 503 for "nobody listens" included. `again`: ask anew after a break.

        `probe` names a stream: if it is gone, nobody answers, though someone may listen.
        """
        loop = asyncio.get_running_loop()
        while True:
            await self._wait_up(deadline)
            token, question = self._question(subject)
            try:
                await self._send(subject, data, question.inbox, headers)
                if probe:
                    try:
                        return await question.next(min(deadline, loop.time() + PROBE_AFTER_S))
                    except TimeoutError:
                        await self._info(probe, deadline)
                return await question.next(deadline)
            except TimeoutError:
                raise self._unavailable(f"no answer on {subject} within the deadline") from None
            except _Lost:
                if not again or loop.time() >= deadline:
                    raise self._unavailable(
                        f"the connection broke before {subject} was answered"
                    ) from None
            finally:
                del self._questions[token]

    # ---- streams

    async def _api(
        self, operation: str, stream: str, body: bytes, deadline: float
    ) -> dict[str, Any]:
        subject = jetstream.api(operation, stream)
        answer = await self._ask(subject, body, None, deadline, again=True)
        if _status(answer) == _NO_RESPONDERS:
            raise BusUnavailable(self._url, "JetStream is not enabled there: start it with -js")
        reply = jetstream.decode_reply(answer.data, subject)
        if "error" in reply:
            raise self._error(reply, stream)
        return reply

    def _error(
        self, reply: dict[str, Any], stream: str, subject: str = "", expected: int = 0
    ) -> SparsecastError:
        return jetstream.error_of(
            reply["error"], url=self._url, stream=stream, subject=subject, expected=expected
        )

    async def _info(self, stream: str, deadline: float) -> StreamState:
        reply = await self._api("STREAM.INFO", stream, b"", deadline)
        return jetstream.decode_state(
            reply, created=False, subject=jetstream.api("STREAM.INFO", stream)
        )

    async def ensure_stream(self, config: StreamConfig, *, timeout_s: float) -> StreamState:
        """Make the stream, or find it there: `created` tells. An existing one is left as it is."""
        deadline = asyncio.get_running_loop().time() + timeout_s
        while True:
            try:
                return await self._info(config.name, deadline)
            except StreamMissing:
                pass
            subject = jetstream.api("STREAM.CREATE", config.name)
            body = jetstream.encode_config(config)
            answer = await self._ask(subject, body, None, deadline, again=True)
            reply = jetstream.decode_reply(answer.data, subject)
            error = reply.get("error")
            if error is None:
                # did_create is missing when another client made the very same stream meanwhile.
                return jetstream.decode_state(
                    reply, created=bool(reply.get("did_create", False)), subject=subject
                )
            if error.get("err_code") != jetstream.STREAM_NAME_IN_USE:
                raise self._error(reply, config.name)

    async def append(
        self,
        stream: str,
        subject: str,
        data: bytes,
        *,
        message_id: str = "",
        expected_sequence: int | None = None,
        expected_subject_sequence: int | None = None,
        ttl_s: int | None = None,
        timeout_s: float,
    ) -> int:
        """Store a message and return its sequence.

        With a `message_id` it is sent again after a reconnection, within the deadline, and stored
        once. SequenceConflict, StreamMissing, PayloadTooLarge, PermissionDenied, or BusUnavailable
        at the deadline (it may still be stored later: try again with the same `message_id`).
        """
        deadline = asyncio.get_running_loop().time() + timeout_s
        headers = jetstream.append_headers(
            stream, message_id, expected_sequence, expected_subject_sequence, ttl_s
        )
        answer = await self._ask(
            subject, data, headers, deadline, again=bool(message_id), probe=stream
        )
        if _status(answer) == _NO_RESPONDERS:
            raise StreamMissing(stream)
        reply = jetstream.decode_reply(answer.data, subject)
        if "error" not in reply:
            return int(reply["seq"])
        expected = expected_subject_sequence if expected_sequence is None else expected_sequence
        error = self._error(reply, stream, subject, expected or 0)
        if isinstance(error, SequenceConflict) and message_id:
            # The server looks at the expected sequence before it looks for duplicates.
            newest = await self._direct(stream, {"last_by_subj": subject}, deadline)
            if newest is not None and (newest.headers or {}).get("Nats-Msg-Id") == message_id:
                return int((newest.headers or {})["Nats-Sequence"])
        raise error

    async def _record(self, stream: str, body: dict[str, Any], timeout_s: float) -> Record | None:
        deadline = asyncio.get_running_loop().time() + timeout_s
        answer = await self._direct(stream, body, deadline)
        if answer is None:
            return None
        return jetstream.decode_record(answer.headers or {}, answer.data)

    async def _direct(self, stream: str, body: dict[str, Any], deadline: float) -> Msg | None:
        subject = jetstream.api("DIRECT.GET", stream)
        answer = await self._ask(subject, msgspec.json.encode(body), None, deadline, again=True)
        status = _status(answer)
        if status == _NO_RESPONDERS:
            raise StreamMissing(stream)
        if status == "404":
            return None
        if status:
            raise BusError(f"stream {stream!r} on {self._url}: direct get answered {status}")
        return answer

    async def last(self, stream: str, subject: str, *, timeout_s: float) -> Record | None:
        """The newest message of a subject (wildcards allowed), or None; StreamMissing."""
        return await self._record(stream, {"last_by_subj": subject}, timeout_s)

    async def get(self, stream: str, sequence: int, *, timeout_s: float) -> Record | None:
        """The message with this sequence, or None if it was purged or never was; StreamMissing."""
        if sequence < 1:
            return None
        return await self._record(stream, {"seq": sequence}, timeout_s)

    async def read(
        self, stream: str, subject: str, *, start_sequence: int = 1, timeout_s: float
    ) -> AsyncIterator[Record]:
        """Every message of a subject from `start_sequence` up to the last one there is now.

        Asks for batches, so that nothing is left on the server however the reading ends. After a
        reconnection it goes on where it was. `timeout_s` bounds the wait for each next message.
        """
        newest = await self.last(stream, subject, timeout_s=timeout_s)
        if newest is None:
            return
        end, cursor = newest.sequence, max(1, start_sequence)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        api = jetstream.api("DIRECT.GET", stream)
        while cursor <= end:
            await self._wait_up(deadline)
            token, question = self._question(api)
            body = {
                "seq": cursor,
                "next_by_subj": subject,
                "batch": BATCH_MESSAGES,
                "max_bytes": BATCH_NBYTES,
            }
            try:
                await self._send(api, msgspec.json.encode(body), question.inbox, None)
                while cursor <= end:
                    answer = await question.next(deadline)
                    status = _status(answer)
                    if status == _NO_RESPONDERS:
                        raise StreamMissing(stream)
                    if status == "404":
                        return
                    if status:
                        break
                    record = jetstream.decode_record(answer.headers or {}, answer.data)
                    if record is None or record.sequence < cursor:
                        raise BusError(f"stream {stream!r} on {self._url} answered out of order")
                    if record.sequence > end:
                        return
                    cursor = record.sequence + 1
                    yield record
                    deadline = loop.time() + timeout_s
            except TimeoutError:
                raise self._unavailable(f"{stream!r} fell silent while it was read") from None
            except _Lost:
                if loop.time() >= deadline:
                    raise self._unavailable(f"{stream!r} was lost while it was read") from None
            finally:
                del self._questions[token]

    async def purge(
        self, stream: str, *, subject: str = "", before_sequence: int = 0, timeout_s: float
    ) -> None:
        """Drop the messages of a subject (all: ""), below `before_sequence` if that is given."""
        body: dict[str, Any] = {}
        if subject:
            body["filter"] = subject
        if before_sequence:
            body["seq"] = before_sequence
        deadline = asyncio.get_running_loop().time() + timeout_s
        await self._api("STREAM.PURGE", stream, msgspec.json.encode(body), deadline)

    async def delete_stream(self, stream: str, *, timeout_s: float) -> None:
        """Drop a stream with all it holds; nothing happens if it is not there."""
        deadline = asyncio.get_running_loop().time() + timeout_s
        try:
            await self._api("STREAM.DELETE", stream, b"", deadline)
        except StreamMissing:
            log.debug("stream %s was not there to be deleted", stream)


def _status(msg: Msg) -> str:
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


def _reason_of(exc: BaseException) -> str:
    if isinstance(exc, ConnectionRefusedError):
        return "connection refused: is a broker running there?"
    if isinstance(exc, (TimeoutError, nats.errors.TimeoutError)):
        return "no answer in time"
    return str(exc).removeprefix("nats: ") or type(exc).__name__
