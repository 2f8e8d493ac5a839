"""The bus on NATS: a connection that comes back by itself, and streams on JetStream."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import AsyncIterator
from typing import Any

import msgspec
from nats.aio.msg import Msg

from ...messages.errors import (
    BusError,
    BusUnavailable,
    SequenceConflict,
    SparsecastError,
    StreamMissing,
)
from . import jetstream
from .base import Record, StateHandler, StreamConfig, StreamSize, StreamState
from .client import Credentials
from .conversation import NO_RESPONDERS, Conversation, Lost, status_of

log = logging.getLogger("sparsecast.bus")

#: One batch of read(): large enough to hide a round trip, far below the client's pending limit.
BATCH_NBYTES = 16 << 20
BATCH_MESSAGES = 1024


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
    await bus.open(name, credentials or Credentials.from_environment(), timeout_s)
    return bus


class NatsBus(Conversation):
    """One connection to a NATS server: implements `Bus`. Made by connect(); for one event loop."""

    async def _api(
        self, operation: str, stream: str, body: bytes, deadline: float
    ) -> dict[str, Any]:
        subject = jetstream.api(operation, stream)
        answer = await self._ask(subject, body, None, deadline, again=True)
        if status_of(answer) == NO_RESPONDERS:
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

    async def streams(self, *, timeout_s: float) -> dict[str, StreamSize]:
        """The names of all streams that this client may see, and the size of each."""
        deadline = asyncio.get_running_loop().time() + timeout_s
        found: dict[str, StreamSize] = {}
        while True:
            body = msgspec.json.encode({"offset": len(found)})
            page = jetstream.decode_streams(await self._api("STREAM.LIST", "", body, deadline))
            found |= page.sizes
            if not page.sizes or len(found) >= page.total:
                return found

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

    async def limit_stream(self, stream: str, max_nbytes: int | None, *, timeout_s: float) -> None:
        """Let a stream hold no more than that: what would be more is refused (StreamFull), and
        nothing that is there is dropped. None lifts a bound that was set so. StreamMissing."""
        deadline = asyncio.get_running_loop().time() + timeout_s
        config = (await self._api("STREAM.INFO", stream, b"", deadline))["config"]
        body = jetstream.encode_limit(config, max_nbytes)
        if body is not None:
            await self._api("STREAM.UPDATE", stream, body, deadline)

    async def subjects(self, stream: str, subject: str, *, timeout_s: float) -> list[str]:
        """The subjects, of those that `subject` names (wildcards allowed), of which the stream
        holds messages. StreamMissing."""
        deadline = asyncio.get_running_loop().time() + timeout_s
        found: list[str] = []
        while True:
            body = msgspec.json.encode({"subjects_filter": subject, "offset": len(found)})
            reply = await self._api("STREAM.INFO", stream, body, deadline)
            page, total = jetstream.decode_subjects(reply)
            found += page
            if not page or len(found) >= total:
                return found

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
        """Store a message and return its sequence.

        With a `message_id` it is sent again after a reconnection, within the deadline, and stored
        once. SequenceConflict, StreamMissing, PayloadTooLarge, PermissionDenied, or BusUnavailable
        at the deadline (it may still be stored later: try again with the same `message_id`).
        """
        deadline = asyncio.get_running_loop().time() + timeout_s
        headers = jetstream.append_headers(
            stream,
            message_id,
            expected_sequence,
            expected_subject_sequence,
            ttl_s,
            expected_message_id,
        )
        answer = await self._ask(
            subject,
            data,
            headers,
            deadline,
            again=bool(message_id),
            probe=functools.partial(self._info, stream),
        )
        if status_of(answer) == NO_RESPONDERS:
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
        status = status_of(answer)
        if status == NO_RESPONDERS:
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
            before = 0
            try:
                await self._send(api, msgspec.json.encode(body), question.inbox, None)
                while cursor <= end:
                    answer = await question.next(deadline)
                    headers = answer.headers or {}
                    status = status_of(answer)
                    if status == NO_RESPONDERS:
                        raise StreamMissing(stream)
                    if status == "404":
                        return
                    if status or headers.get("Nats-Last-Sequence") != str(before):
                        break  # the batch is over, or a message of it was dropped on the way
                    record = jetstream.decode_record(headers, answer.data)
                    if record is None or record.sequence < cursor:
                        raise BusError(f"stream {stream!r} on {self._url} answered out of order")
                    if record.sequence > end:
                        return
                    before, cursor = record.sequence, record.sequence + 1
                    yield record
                    deadline = loop.time() + timeout_s
            except TimeoutError:
                raise self._unavailable(f"{stream!r} fell silent while it was read") from None
            except Lost:
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
