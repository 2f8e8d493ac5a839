"""The one codec: control and rollouts in msgpack, metrics in JSON.

Whatever is not one of our messages is a RemoteProtocolError that names the subject.
"""

from __future__ import annotations

import zlib
from typing import Any

import msgspec

from .control import Lease, LogEntry, TrainerMessage, WorkerMessage
from .errors import RemoteProtocolError
from .layout import Layout
from .metrics import Metric
from .ranks import AnyRankMessage
from .rollouts import RolloutMessage

Message = TrainerMessage | WorkerMessage

#: No layout is larger; what says so would fill the memory of whoever reads it.
LAYOUT_NBYTES = 1 << 26

_encoder = msgspec.msgpack.Encoder()
_control = msgspec.msgpack.Decoder(Message)
_rollouts = msgspec.msgpack.Decoder(RolloutMessage)
_ranks = msgspec.msgpack.Decoder(AnyRankMessage)
_leases = msgspec.msgpack.Decoder(Lease)
_entries = msgspec.msgpack.Decoder(LogEntry)
_layouts = msgspec.msgpack.Decoder(Layout)
_json_encoder = msgspec.json.Encoder()
_metrics = msgspec.json.Decoder(Metric)


def _decode(decoder: Any, data: bytes, subject: str) -> Any:
    try:
        return decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, ValueError, RecursionError) as exc:
        raise RemoteProtocolError(
            f"undecodable message of {len(data)} bytes: {exc}", subject=subject
        ) from exc


def encode(
    message: Message | RolloutMessage | AnyRankMessage | Lease | LogEntry | Layout,
) -> bytes:
    """Encode a control, rollout or rank message, a lease, a log entry or a layout as msgpack."""
    return _encoder.encode(message)


def decode(data: bytes, *, subject: str = "") -> Message:
    """Decode a control message; RemoteProtocolError if it is none."""
    message: Message = _decode(_control, data, subject)
    return message


def decode_rollout(data: bytes, *, subject: str = "") -> RolloutMessage:
    """Decode a generation request or its answer; RemoteProtocolError if it is none."""
    message: RolloutMessage = _decode(_rollouts, data, subject)
    return message


def decode_rank(data: bytes, *, subject: str = "") -> AnyRankMessage:
    """Decode what one rank of a worker says to another; RemoteProtocolError if it is nothing."""
    message: AnyRankMessage = _decode(_ranks, data, subject)
    return message


def decode_lease(data: bytes, *, subject: str = "") -> Lease:
    """Decode a lease; RemoteProtocolError if it is none."""
    lease: Lease = _decode(_leases, data, subject)
    return lease


def decode_entry(data: bytes, *, subject: str = "") -> LogEntry:
    """Decode a log entry; RemoteProtocolError if it is none."""
    entry: LogEntry = _decode(_entries, data, subject)
    return entry


def decode_layout(data: bytes, *, subject: str = "") -> Layout:
    """Decode the layout of a rank; RemoteProtocolError if it is none."""
    layout: Layout = _decode(_layouts, data, subject)
    return layout


def pack_layout(layout: Layout) -> bytes:
    """The layout of a rank, small enough for a message: msgpack, deflated."""
    return zlib.compress(_encoder.encode(layout))


def unpack_layout(data: bytes, *, subject: str = "") -> Layout:
    """What pack_layout() made; RemoteProtocolError if it is nothing of that kind."""
    inflate = zlib.decompressobj()
    try:
        packed = inflate.decompress(data, LAYOUT_NBYTES)
    except zlib.error as exc:
        raise RemoteProtocolError(f"no deflated layout: {exc}", subject=subject) from exc
    if not inflate.eof:
        raise RemoteProtocolError(
            f"a layout of {len(data)} bytes that is cut short, or larger than {LAYOUT_NBYTES}",
            subject=subject,
        )
    return decode_layout(packed, subject=subject)


def encode_metric(metric: Metric) -> bytes:
    """Encode a metric or event as JSON."""
    return _json_encoder.encode(metric)


def decode_metric(data: bytes, *, subject: str = "") -> Metric:
    """Decode a metric or event; RemoteProtocolError if it is none."""
    metric: Metric = _decode(_metrics, data, subject)
    return metric
