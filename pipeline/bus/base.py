"""What the rest of sparsecast asks of a bus: subjects, requests, and streams with compare-and-set.

`nats.NatsBus` is the real one; the simulation in tests/ replaces it by implementing `Bus`.
Every wait is bounded by the caller's `timeout_s`. Handlers run on the loop's thread and must
return at once.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Message:
    """One message as it came. `sequence` is the stream's, for what a stream republished."""

    subject: str
    data: bytes
    reply: str = ""
    sequence: int | None = None
    previous_sequence: int | None = None


@dataclass(frozen=True, slots=True)
class Record:
    """One message as a stream holds it."""

    subject: str
    sequence: int
    data: bytes


@dataclass(frozen=True, slots=True)
class StreamConfig:
    """A stream: its name, what it captures, how much it keeps.

    `republish` is (source subject filter, destination); `message_ttl` lets single messages carry a
    time to live. 0 means no limit.
    """

    name: str
    subjects: tuple[str, ...]
    republish: tuple[str, str] | None = None
    max_messages: int = 0
    max_messages_per_subject: int = 0
    max_nbytes: int = 0
    duplicate_window_s: float = 120.0
    message_ttl: bool = False
    description: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StreamState:
    """What a stream holds now; `metadata` is what it was made with (its nonce, say)."""

    created: bool
    first_sequence: int
    last_sequence: int
    nbytes: int
    metadata: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class StreamSize:
    """How many bytes a stream holds, and how many it may hold (None: as many as there is room)."""

    nbytes: int
    max_nbytes: int | None


Handler = Callable[[Message], None]
#: (event, detail): "connected", "disconnected", "reconnected", "slow-consumer", "denied", "error",
#: "closed".
StateHandler = Callable[[str, str], None]


class Subscription(Protocol):
    """A live subscription."""

    async def unsubscribe(self) -> None:
        """End it; no handler call starts afterwards."""


class Bus(Protocol):
    """One connection to a broker."""

    @property
    def url(self) -> str:
        """Where the broker is, without credentials."""

    @property
    def max_payload(self) -> int:
        """The largest message that the server takes, in bytes."""

    @property
    def connected(self) -> bool:
        """Whether the connection stands now."""

    def on_state(self, handler: StateHandler) -> None:
        """Hear of every change of the connection, slow consumers, denials and errors."""

    async def publish(self, subject: str, data: bytes, *, reply: str = "") -> None:
        """Hand a message to the connection; PayloadTooLarge if the server would refuse it.

        Only queues it: flush() before anything that blocks the loop.
        """

    async def flush(self, timeout_s: float) -> None:
        """Return once the server has everything published so far; else BusUnavailable."""

    async def subscribe(
        self, subject: str, handler: Handler, *, queue: str = "", pending_nbytes: int = 0
    ) -> Subscription:
        """Call `handler` with every message on `subject`; one member of `queue` gets each.

        `pending_nbytes` bounds what may wait for the handler (0: the client's default).
        """

    async def request(self, subject: str, data: bytes, *, timeout_s: float) -> bytes:
        """Return the first answer; BusUnavailable if nobody listens or none comes in time."""

    async def close(self, timeout_s: float = 2.0) -> None:
        """Drain and close, within `timeout_s`. Idempotent."""

    # ---- streams

    async def ensure_stream(self, config: StreamConfig, *, timeout_s: float) -> StreamState:
        """Make the stream, or find it there: `created` tells. An existing one is left as it is."""

    async def limit_stream(self, stream: str, max_nbytes: int | None, *, timeout_s: float) -> None:
        """Let a stream hold no more than that: what would be more is refused (StreamFull), and
        nothing that is there is dropped. None lifts a bound that was set so. StreamMissing."""

    async def subjects(self, stream: str, subject: str, *, timeout_s: float) -> list[str]:
        """The subjects, of those that `subject` names (wildcards allowed), of which the stream
        holds messages. StreamMissing."""

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

        SequenceConflict if the stream's (or the subject's) last sequence, or the `message_id` of
        the stream's last message, is another than the expected one, StreamMissing if the stream is
        not there, BusUnavailable at the deadline (the message may still be stored later: try again
        with the same `message_id`). A duplicate `message_id` returns the sequence of the first.
        """

    async def last(self, stream: str, subject: str, *, timeout_s: float) -> Record | None:
        """The newest message of a subject (wildcards allowed), or None; StreamMissing."""

    async def get(self, stream: str, sequence: int, *, timeout_s: float) -> Record | None:
        """The message with this sequence, or None if it was purged or never was; StreamMissing."""

    def read(
        self, stream: str, subject: str, *, start_sequence: int = 1, timeout_s: float
    ) -> AsyncIterator[Record]:
        """Every message of a subject from `start_sequence` up to the last one there is now.

        `timeout_s` bounds the wait for each next message.
        """

    async def purge(
        self, stream: str, *, subject: str = "", before_sequence: int = 0, timeout_s: float
    ) -> None:
        """Drop the messages of a subject (all: ""), below `before_sequence` if that is given."""

    async def delete_stream(self, stream: str, *, timeout_s: float) -> None:
        """Drop a stream with all it holds; nothing happens if it is not there."""
