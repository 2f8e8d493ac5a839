"""Streams on a real JetStream: compare-and-set, time to live, reading, outages, denials."""

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from servers import Proxy, nats_server, until
from sparsecast.messages.errors import (
    BusUnavailable,
    PermissionDenied,
    SequenceConflict,
    StreamFull,
    StreamMissing,
)
from sparsecast.pipeline.bus import nats as nats_bus
from sparsecast.pipeline.bus.base import Message, Record, StreamConfig
from sparsecast.pipeline.bus.broker import Broker
from sparsecast.pipeline.bus.nats import NatsBus

Connect = Callable[..., Awaitable[NatsBus]]
S = 5.0


@pytest.fixture
async def stream(bus: NatsBus, run: str) -> StreamConfig:
    """A stream of this test's own, which captures and republishes `<name>.>`."""
    config = StreamConfig(
        name=run,
        subjects=(f"{run}.in.>",),
        republish=(f"{run}.in.>", f"{run}.out.>"),
        message_ttl=True,
        metadata={"nonce": "first"},
    )
    state = await bus.ensure_stream(config, timeout_s=S)
    assert state.created
    return config


async def read(bus: NatsBus, stream: str, subject: str, start: int = 1) -> list[Record]:
    """All that read() gives."""
    return [record async for record in bus.read(stream, subject, start_sequence=start, timeout_s=S)]


# ---- making and finding


async def test_who_made_the_stream_is_told_apart(bus: NatsBus, run: str) -> None:
    """Many make the same stream at once: one made it, all find its nonce, none changes it."""
    configs = [
        StreamConfig(name=run, subjects=(f"{run}.>",), metadata={"nonce": str(number)})
        for number in range(8)
    ]
    states = await asyncio.gather(*(bus.ensure_stream(config, timeout_s=S) for config in configs))
    assert sum(state.created for state in states) == 1
    [maker] = [number for number, state in enumerate(states) if state.created]
    assert [dict(state.metadata) for state in states] == [{"nonce": str(maker)}] * 8


async def test_limits_hold(bus: NatsBus, run: str) -> None:
    """A bounded stream drops the oldest, and one message a subject stays where that is asked."""
    config = StreamConfig(name=run, subjects=(f"{run}.>",), max_messages=3)
    await bus.ensure_stream(config, timeout_s=S)
    for number in range(5):
        await bus.append(run, f"{run}.a", str(number).encode(), timeout_s=S)
    assert [record.sequence for record in await read(bus, run, f"{run}.>")] == [3, 4, 5]
    state = await bus.ensure_stream(config, timeout_s=S)
    assert (state.created, state.first_sequence, state.last_sequence) == (False, 3, 5)

    config = StreamConfig(name=f"{run}-one", subjects=(f"{run}one.>",), max_messages_per_subject=1)
    await bus.ensure_stream(config, timeout_s=S)
    for subject in "aab":
        await bus.append(config.name, f"{run}one.{subject}", b"", timeout_s=S)
    found = await read(bus, config.name, f"{run}one.>")
    assert [record.sequence for record in found] == [2, 3]


async def test_a_full_stream_refuses_and_keeps(bus: NatsBus, run: str) -> None:
    """A stream gets a bound when it holds more already: nothing of it is dropped, more is refused,
    by name and at once; with a higher bound it takes messages again, and the same bound said twice
    changes nothing."""
    config = StreamConfig(name=run, subjects=(f"{run}.>",), metadata={"nonce": "n"})
    await bus.ensure_stream(config, timeout_s=S)
    for subject in "ab":
        await bus.append(run, f"{run}.{subject}", bytes(1000), timeout_s=S)
    for _ in range(2):
        await bus.limit_stream(run, 1500, timeout_s=S)
    began = time.monotonic()
    with pytest.raises(StreamFull, match=f"stream '{run}' is full"):
        await bus.append(run, f"{run}.c", bytes(1000), message_id="m", timeout_s=30.0)
    assert time.monotonic() - began < 5.0
    assert len(await read(bus, run, f"{run}.>")) == 2
    await bus.limit_stream(run, 4000, timeout_s=S)
    assert await bus.append(run, f"{run}.c", bytes(1000), message_id="m", timeout_s=S) == 3
    sizes = await bus.streams(timeout_s=S)
    assert sizes[run].max_nbytes == 4000
    assert 3000 < sizes[run].nbytes < 4000
    assert (await bus.ensure_stream(config, timeout_s=S)).metadata["nonce"] == "n"
    await bus.limit_stream(run, None, timeout_s=S)
    assert (await bus.streams(timeout_s=S))[run].max_nbytes is None
    assert sorted(await bus.subjects(run, f"{run}.*", timeout_s=S)) == [f"{run}.{s}" for s in "abc"]
    assert await bus.subjects(run, f"{run}.x.*", timeout_s=S) == []
    with pytest.raises(StreamMissing):
        await bus.limit_stream(f"{run}-not", 10, timeout_s=S)
    with pytest.raises(StreamMissing):
        await bus.subjects(f"{run}-not", ">", timeout_s=S)


async def test_a_stream_that_is_not_there_is_missing(bus: NatsBus, run: str) -> None:
    """Nobody made the stream: every operation says so, at once; deleting it is no error."""
    began = time.monotonic()
    with pytest.raises(StreamMissing, match=run):
        await bus.append(run, f"{run}.a", b"", timeout_s=30.0)
    with pytest.raises(StreamMissing):
        await bus.last(run, f"{run}.a", timeout_s=30.0)
    with pytest.raises(StreamMissing):
        await bus.get(run, 1, timeout_s=30.0)
    with pytest.raises(StreamMissing):
        await read(bus, run, f"{run}.a")
    with pytest.raises(StreamMissing):
        await bus.purge(run, timeout_s=30.0)
    await bus.delete_stream(run, timeout_s=30.0)
    assert time.monotonic() - began < 5.0


async def test_a_missing_stream_is_found_out_though_someone_listens(
    bus: NatsBus, broker: Broker, connected: Connect, run: str
) -> None:
    """A person watches everything with `nats sub`: the server takes that for a responder and says
    nothing. The append finds out by itself that the stream is gone, long before its deadline."""
    watcher = await connected(broker.url)
    await watcher.subscribe(f"{run}.>", lambda _message: None)
    await watcher.flush(S)
    began = time.monotonic()
    with pytest.raises(StreamMissing):
        await bus.append(run, f"{run}.a", b"", message_id="m", timeout_s=30.0)
    assert time.monotonic() - began < 5.0


async def test_another_stream_on_the_subject_is_not_taken_for_ours(
    bus: NatsBus, stream: StreamConfig, run: str
) -> None:
    """The subject is captured by a stream of another name: that is not where it should go."""
    with pytest.raises(StreamMissing, match="other"):
        await bus.append("other", f"{run}.in.a", b"", timeout_s=S)
    assert await bus.last(run, f"{run}.in.a", timeout_s=S) is None


# ---- compare-and-set


async def test_two_writers_and_one_expected_sequence(
    bus: NatsBus, broker: Broker, connected: Connect, stream: StreamConfig, run: str
) -> None:
    """A hundred times two trainers append at the same sequence: one gets it, the other is told
    which sequence is the last."""
    rival = await connected(broker.url)
    for last in range(100):
        results = await asyncio.gather(
            *(
                writer.append(
                    run,
                    f"{run}.in.a",
                    name,
                    message_id=f"{last}-{name.decode()}",
                    expected_sequence=last,
                    timeout_s=S,
                )
                for writer, name in ((bus, b"one"), (rival, b"two"))
            ),
            return_exceptions=True,
        )
        stored = [result for result in results if isinstance(result, int)]
        [conflict] = [result for result in results if isinstance(result, SequenceConflict)]
        assert stored == [last + 1]
        assert (conflict.expected, conflict.last) == (last, last + 1)
    assert len(await read(bus, run, f"{run}.in.a")) == 100


async def test_the_last_sequence_of_a_subject_is_compared_too(
    bus: NatsBus, stream: StreamConfig, run: str
) -> None:
    """Other subjects go on: a condition on one subject looks at that one alone; 0 means none."""
    first = await bus.append(run, f"{run}.in.a", b"", expected_subject_sequence=0, timeout_s=S)
    await bus.append(run, f"{run}.in.b", b"", expected_subject_sequence=0, timeout_s=S)
    second = await bus.append(run, f"{run}.in.a", b"", expected_subject_sequence=first, timeout_s=S)
    assert (first, second) == (1, 3)
    with pytest.raises(SequenceConflict):
        await bus.append(run, f"{run}.in.a", b"", expected_subject_sequence=first, timeout_s=S)
    with pytest.raises(SequenceConflict):
        await bus.append(run, f"{run}.in.b", b"", expected_subject_sequence=0, timeout_s=S)


async def test_a_message_that_is_there_already_is_success(
    bus: NatsBus, stream: StreamConfig, run: str
) -> None:
    """The acknowledgement was lost and the same message is appended again, with and without its
    condition: it gets the sequence of the first, and is there once."""
    first = await bus.append(run, f"{run}.in.a", b"x", message_id="m", timeout_s=S)
    assert await bus.append(run, f"{run}.in.a", b"x", message_id="m", timeout_s=S) == first
    again = await bus.append(
        run, f"{run}.in.a", b"x", message_id="m", expected_sequence=first - 1, timeout_s=S
    )
    assert again == first
    with pytest.raises(SequenceConflict):
        await bus.append(
            run, f"{run}.in.a", b"y", message_id="other", expected_sequence=0, timeout_s=S
        )
    assert len(await read(bus, run, f"{run}.in.>")) == 1


async def test_what_is_stored_is_republished_with_its_sequence(
    bus: NatsBus, broker: Broker, connected: Connect, stream: StreamConfig, run: str
) -> None:
    """Members hear what the stream accepted, with sequences, and nothing that it refused."""
    member = await connected(broker.url)
    heard: list[Message] = []
    await member.subscribe(f"{run}.out.>", heard.append)
    await member.flush(S)
    for number in range(3):
        await bus.append(
            run, f"{run}.in.a", str(number).encode(), expected_sequence=number, timeout_s=S
        )
    with pytest.raises(SequenceConflict):
        await bus.append(run, f"{run}.in.a", b"stale", expected_sequence=0, timeout_s=S)
    await until(lambda: len(heard) == 3)
    await member.flush(S)
    assert [(m.subject, m.data, m.sequence, m.previous_sequence) for m in heard] == [
        (f"{run}.out.a", b"0", 1, 0),
        (f"{run}.out.a", b"1", 2, 1),
        (f"{run}.out.a", b"2", 3, 2),
    ]


async def test_a_message_lives_as_long_as_it_was_given(
    bus: NatsBus, stream: StreamConfig, run: str
) -> None:
    """After its time the subject counts as empty again: 0 is the expected sequence."""
    await bus.append(run, f"{run}.in.a", b"", expected_subject_sequence=0, ttl_s=1, timeout_s=S)
    with pytest.raises(SequenceConflict):
        await bus.append(run, f"{run}.in.a", b"", expected_subject_sequence=0, timeout_s=S)
    await asyncio.sleep(1.3)
    assert await bus.last(run, f"{run}.in.a", timeout_s=S) is None
    later = await bus.append(run, f"{run}.in.a", b"", expected_subject_sequence=0, timeout_s=S)
    assert later == 2


# ---- reading


async def test_reading_is_bounded_and_in_order(
    bus: NatsBus, stream: StreamConfig, run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches of a few messages: all of the subject come in order, from the start that was asked,
    and what is appended while reading is left for the next time."""
    monkeypatch.setattr(nats_bus, "BATCH_MESSAGES", 4)
    for number in range(11):
        await bus.append(run, f"{run}.in.a", str(number).encode(), timeout_s=S)
        await bus.append(run, f"{run}.in.b", b"other", timeout_s=S)
    found = []
    async for record in bus.read(run, f"{run}.in.a", start_sequence=4, timeout_s=S):
        found.append(record.data)
        await bus.append(run, f"{run}.in.a", b"late", timeout_s=S)
    assert found == [str(number).encode() for number in range(2, 11)]
    assert [r.sequence for r in await read(bus, run, f"{run}.in.*", 20)] == list(range(20, 32))
    assert await read(bus, run, f"{run}.in.none") == []
    assert await read(bus, run, f"{run}.in.a", 10_000) == []


async def test_a_batch_is_bounded_in_bytes(
    bus: NatsBus, stream: StreamConfig, run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Messages far larger than a batch may be are read all the same, one a batch."""
    monkeypatch.setattr(nats_bus, "BATCH_NBYTES", 1000)
    for number in range(5):
        await bus.append(run, f"{run}.in.a", bytes([number]) * 100_000, timeout_s=S)
    found = await read(bus, run, f"{run}.in.a")
    assert [(len(record.data), record.data[0]) for record in found] == [
        (100_000, number) for number in range(5)
    ]


async def test_a_reader_that_leaves_early_leaves_nothing_behind(
    bus: NatsBus, stream: StreamConfig, run: str
) -> None:
    """Reading is broken off after one record: no consumer, no question stays."""
    for _ in range(20):
        await bus.append(run, f"{run}.in.a", bytes(1000), timeout_s=S)
    reading = bus.read(run, f"{run}.in.a", timeout_s=S)
    async for record in reading:
        assert record.sequence == 1
        break
    await reading.aclose()  # type: ignore[attr-defined]
    assert not bus._questions
    answer = await bus.request(f"$JS.API.STREAM.INFO.{run}", b"", timeout_s=S)
    assert b'"consumer_count":0' in answer
    assert len(await read(bus, run, f"{run}.in.a")) == 20


async def test_reading_goes_on_after_the_connection_broke(
    bus: NatsBus, broker: Broker, connected: Connect, stream: StreamConfig, run: str
) -> None:
    """The line is cut again and again while a stream is read: every record comes once."""
    for number in range(200):
        await bus.append(run, f"{run}.in.a", str(number).encode() + bytes(5000), timeout_s=S)
    async with Proxy(broker.url) as proxy:
        here = await connected(proxy.url)
        found = []
        async for record in here.read(run, f"{run}.in.a", timeout_s=S):
            found.append(int(record.data.rstrip(b"\0")))
            if len(found) in (1, 50, 120):
                proxy.cut()
                await asyncio.sleep(0.05)
        assert found == list(range(200))


async def test_a_dropped_message_is_asked_for_again(
    bus: NatsBus, stream: StreamConfig, run: str
) -> None:
    """A message of a batch is lost in the client (its buffer was full): the gap is seen, and the
    rest is asked for again."""
    for number in range(10):
        await bus.append(run, f"{run}.in.a", str(number).encode(), timeout_s=S)
    deliver, lost = bus._on_answer, []

    async def losing(msg: object) -> None:
        if getattr(msg, "data", b"") == b"6" and not lost:
            lost.append(msg)
            return
        await deliver(msg)  # type: ignore[arg-type]

    [inbox] = [sub for sub in bus.client._subs.values() if sub.subject.startswith(bus._inbox)]
    inbox._cb = losing
    found = await read(bus, run, f"{run}.in.a")
    assert lost
    assert [int(record.data) for record in found] == list(range(10))


async def test_single_messages_are_found_and_purged(
    bus: NatsBus, stream: StreamConfig, run: str
) -> None:
    """get() and last() find what is there and give None for what is not; purge() drops what it
    was told to, below a sequence or all."""
    for subject in "aabab":
        await bus.append(run, f"{run}.in.{subject}", subject.encode(), timeout_s=S)
    found = await bus.get(run, 3, timeout_s=S)
    assert found == Record(f"{run}.in.b", 3, b"b")
    assert await bus.get(run, 99, timeout_s=S) is None
    assert await bus.get(run, 0, timeout_s=S) is None
    newest = await bus.last(run, f"{run}.in.*", timeout_s=S)
    assert newest is not None
    assert newest.sequence == 5
    await bus.purge(run, subject=f"{run}.in.a", before_sequence=4, timeout_s=S)
    assert [r.sequence for r in await read(bus, run, f"{run}.in.>")] == [3, 4, 5]
    await bus.purge(run, subject=f"{run}.in.a", timeout_s=S)
    assert [r.sequence for r in await read(bus, run, f"{run}.in.>")] == [3, 5]
    await bus.purge(run, timeout_s=S)
    assert await read(bus, run, f"{run}.in.>") == []
    await bus.delete_stream(run, timeout_s=S)
    with pytest.raises(StreamMissing):
        await bus.last(run, f"{run}.in.a", timeout_s=S)


# ---- outages


async def stored(bus: NatsBus, stream: str, subject: str) -> None:
    """Wait until a message is there."""
    async with asyncio.timeout(S):
        while (await bus.last(stream, subject, timeout_s=S)) is None:  # noqa: ASYNC110 - as until()
            await asyncio.sleep(0.01)


async def test_an_append_whose_acknowledgement_is_lost_is_stored_once(
    bus: NatsBus, broker: Broker, connected: Connect, stream: StreamConfig, run: str
) -> None:
    """The message reaches the server, the line breaks before the answer: the append asks again by
    itself, gets the first sequence, and one message is there."""
    async with Proxy(broker.url) as proxy:
        here = await connected(proxy.url)
        proxy.stall()
        appending = asyncio.ensure_future(
            here.append(
                run, f"{run}.in.a", b"x", message_id="m", expected_sequence=0, timeout_s=10.0
            )
        )
        await stored(bus, run, f"{run}.in.a")
        proxy.cut()
        proxy.flow()
        assert await appending == 1
    assert len(await read(bus, run, f"{run}.in.a")) == 1


async def test_an_append_without_an_id_is_not_sent_twice(
    bus: NatsBus, broker: Broker, connected: Connect, stream: StreamConfig, run: str
) -> None:
    """Without a message id the server could not tell the second from the first: it fails."""
    async with Proxy(broker.url) as proxy:
        here = await connected(proxy.url)
        proxy.stall()
        appending = asyncio.ensure_future(here.append(run, f"{run}.in.a", b"x", timeout_s=10.0))
        await stored(bus, run, f"{run}.in.a")
        proxy.cut()
        proxy.flow()
        with pytest.raises(BusUnavailable, match="broke before"):
            await appending
    assert len(await read(bus, run, f"{run}.in.a")) == 1


async def test_an_append_during_an_outage_waits_and_is_stored_once(
    tmp_path: Path, connected: Connect, run: str
) -> None:
    """The broker is killed and comes back with its store: appends of that time are stored once,
    in order, and what was there before is still there."""
    first = Broker(store_dir=tmp_path)
    bus = await connected(first.start())
    config = StreamConfig(name=run, subjects=(f"{run}.>",))
    await bus.ensure_stream(config, timeout_s=S)
    for number in range(5):
        await bus.append(run, f"{run}.a", str(number).encode(), message_id=str(number), timeout_s=S)
    os.kill(first.pid, signal.SIGKILL)
    await until(lambda: not bus.connected)

    async def append_rest() -> None:
        for number in range(5, 10):
            await bus.append(
                run, f"{run}.a", str(number).encode(), message_id=str(number), timeout_s=10.0
            )

    appending = asyncio.ensure_future(append_rest())
    port = int(bus.url.rpartition(":")[2])
    first.close()
    second = Broker(port=port, store_dir=tmp_path)
    await asyncio.to_thread(second.start)
    try:
        await appending
        # The server knows message ids again, though it was killed.
        again = await bus.append(run, f"{run}.a", b"3", message_id="3", timeout_s=S)
        assert again == 4
        found = await read(bus, run, f"{run}.a")
        assert [(r.sequence, int(r.data)) for r in found] == [(n + 1, n) for n in range(10)]
    finally:
        await bus.close()
        second.close()


async def test_a_broker_that_lost_its_store_says_so(tmp_path: Path, connected: Connect) -> None:
    """The broker comes back empty: StreamMissing, not a wait, and the stream can be made anew."""
    first = Broker(store_dir=tmp_path / "one")
    bus = await connected(first.start())
    config = StreamConfig(name="s", subjects=("s.>",))
    await bus.ensure_stream(config, timeout_s=S)
    await bus.append("s", "s.a", b"", message_id="m", timeout_s=S)
    first.close()
    await until(lambda: not bus.connected)
    second = Broker(port=int(bus.url.rpartition(":")[2]), store_dir=tmp_path / "two")
    await asyncio.to_thread(second.start)
    try:
        with pytest.raises(StreamMissing):
            await bus.append("s", "s.a", b"", message_id="n", expected_sequence=1, timeout_s=10.0)
        assert (await bus.ensure_stream(config, timeout_s=S)).created
        sequence = await bus.append(
            "s", "s.a", b"", message_id="m", expected_sequence=0, timeout_s=S
        )
        assert sequence == 1
    finally:
        await bus.close()
        second.close()


# ---- servers that say no


PERMISSIONS = """
jetstream { store_dir: "STORE" }
authorization {
  users = [
    { user: trainer, password: t }
    { user: worker, password: w, permissions: {
        publish: { deny: ["run.announce.>", "run.Secret.>", "$JS.API.STREAM.PURGE.>"] }
        subscribe: { deny: ["run.hidden.>"] } } }
    { user: mute, password: m, permissions: { subscribe: { deny: ["_INBOX.>"] } } }
  ]
}
"""


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """host:port of a server with users: a trainer who may all, a worker who may not announce."""
    folder = tmp_path_factory.mktemp("guarded")
    with nats_server(folder, PERMISSIONS.replace("STORE", str(folder / "store"))) as address:
        yield address


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """host:port of a server without JetStream."""
    with nats_server(tmp_path_factory.mktemp("plain"), "") as address:
        yield address


async def test_wrong_credentials_are_refused_at_once(guarded: str, connected: Connect) -> None:
    """The password is wrong: that is said at once, without the password, not after retries."""
    began = time.monotonic()
    with pytest.raises(BusUnavailable, match="refuses the credentials") as caught:
        await connected(f"nats://worker:falsch@{guarded}", timeout_s=10.0)
    assert time.monotonic() - began < 3.0
    assert "falsch" not in str(caught.value)


async def test_credentials_of_the_environment_open_the_door(
    guarded: str, connected: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """User and password come from the environment; the URL stays free of them."""
    monkeypatch.setenv("SPARSECAST_BUS_USER", "trainer")
    monkeypatch.setenv("SPARSECAST_BUS_PASSWORD", "t")
    bus = await connected(f"nats://{guarded}")
    assert bus.url == f"nats://{guarded}"
    await bus.flush(S)


async def test_a_denied_append_names_the_denial_at_once(guarded: str, connected: Connect) -> None:
    """A worker tries to announce: the server only drops it and says so aside. The append fails at
    once with PermissionDenied, naming the subject as it was written, and on_state tells it."""
    told: list[tuple[str, str]] = []
    trainer = await connected(f"nats://trainer:t@{guarded}")
    await trainer.ensure_stream(StreamConfig(name="run", subjects=("run.>",)), timeout_s=S)
    worker = await connected(
        f"nats://worker:w@{guarded}", on_state=lambda event, detail: told.append((event, detail))
    )
    began = time.monotonic()
    with pytest.raises(PermissionDenied, match=r"denies this client publishing to run\.Secret\.x"):
        await worker.append("run", "run.Secret.x", b"", message_id="m", timeout_s=30.0)
    with pytest.raises(PermissionDenied, match=r"PURGE\.run"):
        await worker.purge("run", timeout_s=30.0)
    assert time.monotonic() - began < 3.0
    assert ("denied", "publish run.Secret.x") in told
    assert await worker.append("run", "run.free", b"", timeout_s=S) == 1


async def test_a_denied_publish_or_subscription_is_told(guarded: str, connected: Connect) -> None:
    """Nobody waits for an answer here: on_state is where the denial shows; the rest goes on."""
    told: list[tuple[str, str]] = []
    worker = await connected(
        f"nats://worker:w@{guarded}", on_state=lambda event, detail: told.append((event, detail))
    )
    await worker.publish("run.announce.update", b"")
    await worker.subscribe("run.hidden.x", lambda _message: None)
    await worker.flush(S)
    await until(lambda: len(told) >= 3)
    assert told[1:] == [
        ("denied", "publish run.announce.update"),
        ("denied", "subscription run.hidden.x"),
    ]
    assert worker.connected


async def test_a_client_without_an_inbox_is_told_why_nobody_answers(
    guarded: str, connected: Connect
) -> None:
    """The user may not subscribe to its inbox: no answer ever comes, and the error says why."""
    mute = await connected(f"nats://mute:m@{guarded}")
    await mute.flush(S)
    with pytest.raises(BusUnavailable, match="denies this client its inbox"):
        await mute.last("run", "run.x", timeout_s=0.5)


async def test_a_server_without_jetstream_is_named(plain: str, connected: Connect) -> None:
    """The server runs without -js: the error says what to start it with."""
    bus = await connected(f"nats://{plain}")
    with pytest.raises(BusUnavailable, match="start it with -js"):
        await bus.ensure_stream(StreamConfig(name="s", subjects=("s",)), timeout_s=S)
