"""The simulated broker keeps the promises of the real one, and breaks as it does."""

import asyncio
import random
from collections.abc import Awaitable, Callable

import pytest

from sparsecast.messages.errors import BusUnavailable, SequenceConflict, StreamMissing
from sparsecast.pipeline.bus.base import Message, StreamConfig

from .broker import Broker, matches
from .bus import SimBus
from .loop import Process, VirtualLoop

CONFIG = StreamConfig(
    name="s", subjects=("a.>",), republish=("a.>", "b.>"), message_ttl=True, metadata={"k": "v"}
)


def play(program: Callable[[Broker, SimBus, SimBus], Awaitable[None]]) -> None:
    """Run a program with a broker and two connections of two processes."""
    loop = VirtualLoop()
    broker = Broker(loop, random.Random(1))
    one, two = (SimBus(broker, Process(loop, name)) for name in ("one", "two"))
    loop.run_until_complete(asyncio.wait_for(program(broker, one, two), 600))
    loop.finish()
    assert loop.complaints == []


@pytest.mark.parametrize(
    ("pattern", "subject", "expected"),
    [
        ("a.>", "a.b.c", True),
        ("a.>", "a", False),
        ("a.*.c", "a.b.c", True),
        ("a.*", "a.b.c", False),
    ],
)
def test_patterns(pattern: str, subject: str, expected: bool) -> None:
    """A star is one token, a last > is one or more."""
    assert matches(pattern, subject) is expected


def test_order_is_kept_on_a_connection() -> None:
    """One sends a thousand messages, two hears each once, in order."""

    async def program(broker: Broker, one: SimBus, two: SimBus) -> None:
        heard: list[bytes] = []
        await two.subscribe("x.*", lambda message: heard.append(message.data))
        await two.flush(1)
        for n in range(1000):
            await one.publish("x.y", b"%d" % n)
        await one.flush(5)
        await asyncio.sleep(5)
        assert heard == [b"%d" % n for n in range(1000)]

    play(program)


def test_a_stream_fences_dedupes_and_republishes() -> None:
    """Two trainers append: the stale one is refused, a retry with its id is found to be there."""

    async def program(broker: Broker, one: SimBus, two: SimBus) -> None:
        heard: list[Message] = []
        with pytest.raises(StreamMissing):
            await one.append("s", "a.x", b"0", timeout_s=1)
        await two.subscribe("b.>", heard.append)
        assert (await one.ensure_stream(CONFIG, timeout_s=1)).created
        assert not (await two.ensure_stream(CONFIG, timeout_s=1)).created
        first = await one.append("s", "a.x", b"1", message_id="i", expected_sequence=0, timeout_s=1)
        again = await one.append("s", "a.x", b"1", message_id="i", expected_sequence=0, timeout_s=1)
        assert (first, again) == (1, 1)
        with pytest.raises(SequenceConflict):
            await two.append("s", "a.x", b"2", expected_sequence=0, timeout_s=1)
        await two.append("s", "a.y", b"3", expected_sequence=1, timeout_s=1)
        assert [(m.subject, m.data, m.sequence) for m in heard] == [
            ("b.x", b"1", 1),
            ("b.y", b"3", 2),
        ]
        assert [r.data async for r in two.read("s", "a.>", timeout_s=1)] == [b"1", b"3"]
        await two.purge("s", subject="a.x", timeout_s=1)
        assert await two.last("s", "a.x", timeout_s=1) is None
        assert await two.get("s", 2, timeout_s=1) is not None

    play(program)


def test_a_message_expires() -> None:
    """A lease of two seconds is there after one and gone after three."""

    async def program(broker: Broker, one: SimBus, two: SimBus) -> None:
        await one.ensure_stream(CONFIG, timeout_s=1)
        await one.append("s", "a.l", b"", ttl_s=2, expected_subject_sequence=0, timeout_s=1)
        await asyncio.sleep(1)
        assert await one.last("s", "a.l", timeout_s=1) is not None
        await asyncio.sleep(2)
        assert await one.last("s", "a.l", timeout_s=1) is None
        await one.append("s", "a.l", b"", ttl_s=2, expected_subject_sequence=0, timeout_s=1)

    play(program)


@pytest.mark.parametrize("keep_store", [True, False])
def test_a_broker_that_restarts(keep_store: bool) -> None:
    """The broker dies for three seconds: publishing fails, then all is as before but the store."""

    async def program(broker: Broker, one: SimBus, two: SimBus) -> None:
        heard: list[bytes] = []
        states: list[str] = []
        two.on_state(lambda event, detail: states.append(event))
        await two.subscribe("x", lambda message: heard.append(message.data))
        await one.ensure_stream(CONFIG, timeout_s=1)
        await one.append("s", "a.x", b"1", timeout_s=1)
        broker.stop(keep_store=keep_store)
        with pytest.raises(BusUnavailable):
            await one.publish("x", b"lost")
        with pytest.raises(BusUnavailable):
            await one.last("s", "a.x", timeout_s=1)
        waiting = asyncio.ensure_future(one.last("s", "a.x", timeout_s=10))
        await asyncio.sleep(2)
        broker.start()
        if keep_store:
            record = await waiting
            assert record is not None
            assert record.data == b"1"
        else:
            with pytest.raises(StreamMissing):
                await waiting
        await asyncio.sleep(1)
        await one.publish("x", b"heard")
        await one.flush(1)
        await asyncio.sleep(1)
        assert heard == [b"heard"]
        assert states == ["disconnected", "reconnected"]

    play(program)


def test_requests_are_answered_or_told() -> None:
    """One asks two, and then a subject that nobody listens on."""

    replies: list[asyncio.Future[None]] = []

    async def program(broker: Broker, one: SimBus, two: SimBus) -> None:
        def answer(message: Message) -> None:
            replies.append(asyncio.ensure_future(two.publish(message.reply, message.data * 2)))

        await two.subscribe("q", answer, queue="workers")
        await two.flush(1)
        assert await one.request("q", b"ab", timeout_s=1) == b"abab"
        with pytest.raises(BusUnavailable, match="nobody"):
            await one.request("nobody", b"", timeout_s=1)

    play(program)


def test_the_dead_hear_nothing_and_the_frozen_late() -> None:
    """Two is stopped, then killed: what came while it was stopped comes late, then nothing."""

    async def program(broker: Broker, one: SimBus, two: SimBus) -> None:
        heard: list[bytes] = []
        await two.subscribe("x", lambda message: heard.append(message.data))
        await two.flush(1)
        two.process.freeze()
        await one.publish("x", b"1")
        await asyncio.sleep(5)
        assert heard == []
        two.process.thaw()
        await asyncio.sleep(0.1)
        assert heard == [b"1"]
        two.process.kill()
        await one.publish("x", b"2")
        await asyncio.sleep(5)
        assert heard == [b"1"]

    play(program)
