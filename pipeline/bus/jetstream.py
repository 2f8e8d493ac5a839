"""JetStream's API as this project speaks it: configurations, headers, and what its errors mean."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import msgspec

from ...messages.errors import (
    BusError,
    BusUnavailable,
    RemoteProtocolError,
    SequenceConflict,
    SparsecastError,
    StreamFull,
    StreamMissing,
)
from .base import Record, StreamConfig, StreamSize, StreamState

#: Error codes of the server (nats-server's errors.json).
NOT_ENABLED = frozenset({10039, 10076})
STREAM_NOT_FOUND = 10059
STREAM_NAME_IN_USE = 10058
WRONG_STREAM = 10060
#: Another last sequence, of the stream or of the subject, or another last message id.
WRONG_LAST = frozenset({10070, 10071, 10164})
STORE_FAILED = 10077
#: What the server says of STORE_FAILED when the stream's own bound is the reason.
FULL = "maximum bytes exceeded"
TEMPORARY = frozenset({10008, STORE_FAILED})

OTHERS_METADATA = "_nats."


def api(operation: str, stream: str) -> str:
    """The subject of an API operation on a stream; "": on all of them."""
    return f"$JS.API.{operation}.{stream}".rstrip(".")


def encode_config(config: StreamConfig) -> bytes:
    """The request that makes a stream."""
    body: dict[str, Any] = {
        "name": config.name,
        "subjects": list(config.subjects),
        "retention": "limits",
        "storage": "file",
        "discard": "old",
        "num_replicas": 1,
        "max_consumers": -1,
        "max_age": 0,
        "max_msg_size": -1,
        "max_msgs": config.max_messages or -1,
        "max_msgs_per_subject": config.max_messages_per_subject or -1,
        "max_bytes": config.max_nbytes or -1,
        "duplicate_window": round(config.duplicate_window_s * 1e9),
        "allow_direct": True,
        "allow_msg_ttl": config.message_ttl,
        "description": config.description,
        "metadata": dict(config.metadata),
    }
    if config.republish is not None:
        source, destination = config.republish
        body["republish"] = {"src": source, "dest": destination}
    return msgspec.json.encode(body)


def decode_reply(data: bytes, subject: str) -> dict[str, Any]:
    """An answer of the API; RemoteProtocolError if it is none (somebody else answered)."""
    try:
        return msgspec.json.decode(data, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise RemoteProtocolError(f"not an answer of JetStream: {exc}", subject=subject) from exc


def decode_state(reply: dict[str, Any], *, created: bool, subject: str) -> StreamState:
    """What a stream's information says."""
    try:
        state, metadata = reply["state"], reply["config"].get("metadata") or {}
        return StreamState(
            created=created,
            first_sequence=int(state["first_seq"]),
            last_sequence=int(state["last_seq"]),
            nbytes=int(state["bytes"]),
            metadata={
                key: value for key, value in metadata.items() if not key.startswith(OTHERS_METADATA)
            },
        )
    except (KeyError, TypeError, ValueError, AttributeError) as exc:
        raise RemoteProtocolError(f"not a stream's information: {exc!r}", subject=subject) from exc


@dataclass(frozen=True, slots=True)
class Streams:
    """A page of the list of streams: their sizes by their names, and how many there are in all."""

    sizes: dict[str, StreamSize]
    total: int


def decode_streams(reply: dict[str, Any]) -> Streams:
    """What a list of streams says."""
    try:
        listed = reply.get("streams") or []
        sizes = {
            str(one["config"]["name"]): StreamSize(
                int(one["state"]["bytes"]), _bound(one["config"].get("max_bytes", -1))
            )
            for one in listed
        }
        return Streams(sizes, int(reply["total"]))
    except (KeyError, TypeError, ValueError, AttributeError) as exc:
        raise RemoteProtocolError(
            f"not a list of streams: {exc!r}", subject=api("STREAM.LIST", "")
        ) from exc


def encode_limit(config: dict[str, Any], max_nbytes: int | None) -> bytes | None:
    """The request that bounds the stream of this configuration, as the server told it; None if
    nothing is to be changed. A bound that refuses is known by "new", which no stream is made with.
    """
    known = config.get("max_bytes"), config.get("discard")
    wanted: tuple[int, str] = (-1, "old") if max_nbytes is None else (max_nbytes, "new")
    if known == wanted or (max_nbytes is None and known[1] != "new"):
        return None
    return msgspec.json.encode(config | {"max_bytes": wanted[0], "discard": wanted[1]})


def decode_subjects(reply: dict[str, Any]) -> tuple[list[str], int]:
    """A page of a stream's subjects, and how many there are in all."""
    try:
        subjects = reply["state"].get("subjects") or {}
        return [str(subject) for subject in subjects], int(reply.get("total", len(subjects)))
    except (KeyError, TypeError, ValueError, AttributeError) as exc:
        raise RemoteProtocolError(
            f"not a stream's subjects: {exc!r}", subject=api("STREAM.INFO", "")
        ) from exc


def _bound(max_bytes: Any) -> int | None:
    return int(max_bytes) if int(max_bytes) > 0 else None


def error_of(
    error: Any, *, url: str, stream: str, subject: str = "", expected: int = 0
) -> SparsecastError:
    """Our error for an error object of the API."""
    fields = error if isinstance(error, dict) else {}
    code, description = fields.get("err_code"), str(fields.get("description", error))
    if code in WRONG_LAST:
        last = re.search(r"wrong last sequence: (\d+)", description)
        return SequenceConflict(subject, expected, int(last[1]) if last else None)
    if code in (STREAM_NOT_FOUND, WRONG_STREAM):
        return StreamMissing(stream)
    if code == STORE_FAILED and FULL in description:
        return StreamFull(stream, description)
    if code in NOT_ENABLED:
        return BusUnavailable(url, "JetStream is not enabled there: start nats-server with -js")
    if code in TEMPORARY or fields.get("code") == 503:
        return BusUnavailable(url, f"JetStream cannot answer for stream {stream!r}: {description}")
    return BusError(f"stream {stream!r} on {url}: {description} (error {code})")


def decode_record(headers: dict[str, str], data: bytes) -> Record | None:
    """A message that a direct get returned; None if the headers are not those of one."""
    sequence, subject = headers.get("Nats-Sequence", ""), headers.get("Nats-Subject")
    if subject is None or not sequence.isdigit():
        return None
    return Record(subject=subject, sequence=int(sequence), data=data)


def append_headers(
    stream: str,
    message_id: str,
    expected_sequence: int | None,
    expected_subject_sequence: int | None,
    ttl_s: int | None,
    expected_message_id: str = "",
) -> dict[str, str]:
    """The headers that carry the conditions of an append."""
    headers = {"Nats-Expected-Stream": stream}
    if message_id:
        headers["Nats-Msg-Id"] = message_id
    if expected_sequence is not None:
        headers["Nats-Expected-Last-Sequence"] = str(expected_sequence)
    if expected_message_id:
        headers["Nats-Expected-Last-Msg-Id"] = expected_message_id
    if expected_subject_sequence is not None:
        headers["Nats-Expected-Last-Subject-Sequence"] = str(expected_subject_sequence)
    if ttl_s is not None:
        headers["Nats-TTL"] = str(ttl_s)
    return headers


def headers_nbytes(headers: dict[str, str] | None) -> int:
    """Bytes that headers take on the wire; the server counts them as payload."""
    if not headers:
        return 0
    return 12 + sum(len(key) + len(value.encode()) + 4 for key, value in headers.items())
