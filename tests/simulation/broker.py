"""A simulated broker: subjects, streams with compare-and-set, and its store.

It speaks as nats-server 2.15 does to `pipeline.bus.nats`: order is kept on each connection, core
messages are delivered at most once, streams answer or do not. `bus.SimBus` is one connection.
"""

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cache
from typing import TYPE_CHECKING

from sparsecast.messages.errors import SequenceConflict, StreamFull, StreamMissing
from sparsecast.pipeline.bus.base import Message, Record, StreamConfig, StreamState

from .loop import VirtualLoop

if TYPE_CHECKING:
    from .bus import SimBus


@cache
def matches(pattern: str, subject: str) -> bool:
    """Whether a subject is one of a pattern's: `*` is one token, a last `>` one or more."""
    wanted, found = pattern.split("."), subject.split(".")
    for at, token in enumerate(wanted):
        if token == ">":
            return len(found) > at
        if at >= len(found) or token not in ("*", found[at]):
            return False
    return len(wanted) == len(found)


@dataclass
class Stored:
    """One message in a stream. `expires` is on the loop's clock."""

    subject: str
    data: bytes
    message_id: str
    expires: float | None


@dataclass
class Stream:
    """One stream: its messages by sequence."""

    config: StreamConfig
    last: int = 0
    last_id: str = ""
    messages: dict[int, Stored] = field(default_factory=dict)
    #: Message ids of the last duplicate_window_s, with their sequence and time.
    ids: dict[str, tuple[int, float]] = field(default_factory=dict)

    def of(self, pattern: str) -> Iterable[int]:
        """Sequences of a subject's messages, oldest first."""
        return [n for n, stored in self.messages.items() if matches(pattern, stored.subject)]

    def expire(self, now: float) -> None:
        """Drop what has had its time."""
        for n in [n for n, s in self.messages.items() if s.expires is not None and s.expires < now]:
            del self.messages[n]
        window = self.config.duplicate_window_s
        for name in [name for name, (_, at) in self.ids.items() if at < now - window]:
            del self.ids[name]

    def limit(self) -> None:
        """Drop the oldest beyond the limits."""
        config = self.config
        while config.max_messages and len(self.messages) > config.max_messages:
            del self.messages[next(iter(self.messages))]
        most = config.max_messages_per_subject
        if most and self.messages:
            newest = next(reversed(self.messages.values())).subject
            of = [n for n, stored in self.messages.items() if stored.subject == newest]
            for n in of[:-most]:
                del self.messages[n]

    def record(self, sequence: int) -> Record:
        """A message as it is read."""
        stored = self.messages[sequence]
        return Record(subject=stored.subject, sequence=sequence, data=stored.data)


class Broker:
    """The broker. Faults are its attributes: shares of messages lost or doubled, and times."""

    max_payload = 1 << 20

    def __init__(self, loop: VirtualLoop, rng: random.Random) -> None:
        self.loop = loop
        self.rng = rng
        self.up = True
        self.streams: dict[str, Stream] = {}
        self.connections: list[SimBus] = []
        #: Faults: the shares of core messages lost and doubled, of requests to streams that are
        #: lost or whose answers are, and the mean of the one-way latency.
        self.loss = 0.0
        self.doubles = 0.0
        self.deaf = 0.0
        self.latency_s = 0.0003
        #: Streams whose appends are refused.
        self.full: Callable[[str], bool] = lambda stream: False
        self.counts: dict[str, int] = {}
        self.watch: Callable[[str, bytes], None] = lambda subject, data: None

    def count(self, what: str) -> None:
        """Remember that a fault happened."""
        self.counts[what] = self.counts.get(what, 0) + 1

    def hop_s(self) -> float:
        """One way between a client and the broker, in seconds."""
        return self.rng.expovariate(1 / self.latency_s) + 1e-5

    # ---- life

    def stop(self, *, keep_store: bool) -> None:
        """The broker dies, with its store or without."""
        self.up = False
        if not keep_store:
            self.streams.clear()
        for connection in list(self.connections):
            connection.broke("the broker went away")

    def start(self) -> None:
        """It is back; its clients find it by themselves."""
        self.up = True
        for connection in list(self.connections):
            connection.reconnect_soon()

    # ---- subjects

    def route(self, subject: str, data: bytes, reply: str = "", **headers: int) -> int:
        """Deliver to whoever subscribes; returns to how many."""
        self.watch(subject, data)
        message = Message(subject, data, reply, **headers)
        takers: list[tuple[SimBus, int]] = []
        groups: dict[tuple[str, str], list[tuple[SimBus, int]]] = {}
        for connection in self.connections:
            for number, (pattern, queue) in connection.interests.items():
                if matches(pattern, subject):
                    if queue:
                        groups.setdefault((pattern, queue), []).append((connection, number))
                    else:
                        takers.append((connection, number))
        takers += [self.rng.choice(group) for group in groups.values()]
        for connection, number in takers:
            if self.loss and self.rng.random() < self.loss:
                self.count("message lost")
                continue
            connection.hand(number, message)
            if self.doubles and self.rng.random() < self.doubles:
                self.count("message doubled")
                connection.hand(number, message)
        return len(takers)

    # ---- streams

    def stream(self, name: str) -> Stream:
        """A stream, without what has expired; StreamMissing."""
        if name not in self.streams:
            raise StreamMissing(name)
        found = self.streams[name]
        found.expire(self.loop.time())
        return found

    def ensure(self, config: StreamConfig) -> StreamState:
        """Make it or find it."""
        created = config.name not in self.streams
        if created:
            self.streams[config.name] = Stream(config)
        stream = self.stream(config.name)
        return StreamState(
            created=created,
            first_sequence=next(iter(stream.messages), stream.last + 1),
            last_sequence=stream.last,
            nbytes=sum(len(stored.data) for stored in stream.messages.values()),
            metadata=dict(stream.config.metadata),
        )

    def limit(self, name: str, max_nbytes: int | None) -> None:
        """Bound what it may hold."""
        stream = self.stream(name)
        stream.config = replace(stream.config, max_nbytes=max_nbytes or 0)

    def subjects(self, name: str, pattern: str) -> list[str]:
        """The subjects that there are messages of."""
        stream = self.stream(name)
        return list(dict.fromkeys(stream.messages[n].subject for n in stream.of(pattern)))

    def store(
        self,
        name: str,
        subject: str,
        data: bytes,
        *,
        message_id: str,
        expected: int | None,
        expected_of_subject: int | None,
        expected_id: str,
        ttl_s: int | None,
    ) -> int:
        """Append, as the server does: expectations are looked at before duplicates."""
        stream = self.stream(name)
        assert any(matches(pattern, subject) for pattern in stream.config.subjects), subject
        assert ttl_s is None or stream.config.message_ttl
        before = max(stream.of(subject), default=0)
        if expected is not None and expected != stream.last:
            raise SequenceConflict(subject, expected, stream.last)
        if expected_id and expected_id != stream.last_id:
            raise SequenceConflict(subject, expected or 0)
        if expected_of_subject is not None and expected_of_subject != before:
            raise SequenceConflict(subject, expected_of_subject, before)
        if message_id in stream.ids:
            return stream.ids[message_id][0]
        most = stream.config.max_nbytes
        if most and sum(len(one.data) for one in stream.messages.values()) + len(data) > most:
            self.count("quota reached")
            raise StreamFull(name, "maximum bytes exceeded")
        now = self.loop.time()
        stream.last += 1
        stream.last_id = message_id
        stream.messages[stream.last] = Stored(
            subject, data, message_id, None if ttl_s is None else now + ttl_s
        )
        if message_id:
            stream.ids[message_id] = (stream.last, now)
        stream.limit()
        if stream.config.republish is not None:
            source, target = stream.config.republish
            if matches(source, subject):
                head, tail = source.rstrip(">"), target.rstrip(">")
                self.route(
                    tail + subject[len(head) :],
                    data,
                    sequence=stream.last,
                    previous_sequence=before,
                )
        return stream.last

    def newest(self, name: str, pattern: str) -> Record | None:
        """The newest message of a subject."""
        stream = self.stream(name)
        found = max(stream.of(pattern), default=0)
        return stream.record(found) if found else None

    def newest_id(self, name: str, subject: str) -> tuple[int, str]:
        """The sequence and the message id of the newest message of a subject."""
        stream = self.stream(name)
        found = max(stream.of(subject), default=0)
        return (found, stream.messages[found].message_id) if found else (0, "")

    def get(self, name: str, sequence: int) -> Record | None:
        """One message."""
        stream = self.stream(name)
        return stream.record(sequence) if sequence in stream.messages else None

    def batch(self, name: str, pattern: str, start: int, most: int) -> list[Record]:
        """The next messages of a subject."""
        stream = self.stream(name)
        return [stream.record(n) for n in stream.of(pattern) if n >= start][:most]

    def purge(self, name: str, subject: str, before: int) -> None:
        """Drop messages."""
        stream = self.stream(name)
        for n in list(stream.of(subject or ">")):
            if not before or n < before:
                del stream.messages[n]

    def delete(self, name: str) -> None:
        """Drop a stream."""
        self.streams.pop(name, None)
