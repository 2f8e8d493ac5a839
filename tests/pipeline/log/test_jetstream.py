"""The JetStream tier beyond the contract: broken connections, half-stored entries, small limits."""

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from logs import pieces
from servers import Proxy, until
from sparsecast.messages.control import LogEntry
from sparsecast.messages.errors import LogError, LogFull, LogHole
from sparsecast.messages.subjects import Subjects
from sparsecast.pipeline.bus.base import StreamConfig
from sparsecast.pipeline.bus.broker import Broker
from sparsecast.pipeline.bus.nats import NatsBus
from sparsecast.pipeline.log import jetstream
from sparsecast.pipeline.log.base import Log, Streams
from sparsecast.pipeline.log.jetstream import JetStreamLog

Connect = Callable[..., Awaitable[NatsBus]]
S = 10.0


def entry(payload: bytes, name: str = "1-patch-1", version: int = 1) -> LogEntry:
    """An entry for a payload."""
    return LogEntry(
        name=name,
        epoch=1,
        base_version=version - 1,
        version=version,
        nbytes=len(payload),
        checksum=0,
        digest=0,
        manifest_hash="m",
        chunks=0,
    )


async def held(bus: NatsBus, run: str) -> dict[str, int]:
    """How many messages the log stream holds, by the last tokens of their subjects."""
    found: dict[str, int] = {}
    subjects = Subjects(run)
    async for record in bus.read(subjects.log_stream, subjects.log_all, timeout_s=S):
        what = ".".join(record.subject.split(".")[2:])
        found[what] = found.get(what, 0) + 1
    return found


def test_it_asks_for_a_stream_as_the_bus_knows_it() -> None:
    """The log does not know the bus's StreamConfig, but makes one in the same shape."""
    ours, theirs = jetstream._StreamConfig, StreamConfig
    assert set(ours.__dataclass_fields__) == set(theirs.__dataclass_fields__)
    known = theirs(name="n", subjects=("s",), description="d")
    same = ours(name="n", subjects=("s",), description="d")
    for name in theirs.__dataclass_fields__:
        assert getattr(same, name) == getattr(known, name), name


async def test_the_bus_is_streams_and_the_tier_is_a_log(bus: NatsBus, run: str) -> None:
    """A NatsBus fulfils what the tier asks, and the tier fulfils the contract."""
    streams: Streams = bus
    log: Log = JetStreamLog(streams, run)
    assert await log.entries(timeout_s=S) == []


async def test_the_servers_limit_is_respected(connected: Connect, run: str) -> None:
    """A server that takes only small messages gets small chunks."""
    with Broker(max_payload=20_000) as url:
        bus = await connected(url)
        log = JetStreamLog(bus, run)
        payload = os.urandom(100_000)
        await log.store(entry(payload), payload, timeout_s=S)
        [found] = await log.entries(timeout_s=S)
        assert found.chunks == 6
        assert await log.load(found, timeout_s=S) == payload
        await bus.close()


async def test_what_a_dead_trainer_left_half_is_not_counted(bus: NatsBus, run: str) -> None:
    """A trainer died while it stored: chunks without an entry. Nobody sees them, the successor's
    entry of that name is whole, and the next prune sweeps what no entry claims."""
    log, subjects = JetStreamLog(bus, run), Subjects(run)
    payload = os.urandom(700_000)
    await log.store(entry(payload, "first"), payload, timeout_s=S)
    for name in ("1-patch-1", "orphan"):
        for number in range(2):
            await bus.append(
                subjects.log_stream,
                subjects.log_chunks(name),
                b"left over",
                message_id=f"{name}-{number}",
                timeout_s=S,
            )
    await log.store(entry(payload), payload, timeout_s=S)
    found = await log.entries(timeout_s=S)
    assert [one.name for one in found] == ["first", "1-patch-1"]
    assert await log.load(found[1], timeout_s=S) == payload
    await log.prune(found[:1], timeout_s=S)
    assert await held(bus, run) == {"log.chunks.1-patch-1": 2, "log.index.1-patch-1": 1}
    assert await log.load(found[1], timeout_s=S) == payload


async def test_roots_sweep_what_is_their_own(bus: NatsBus, run: str) -> None:
    """A trainer of three roots died amid its pieces, and its successor has two: before its first
    piece each root drops the chunks without an entry that nobody else may be at, and no prune
    drops those of the other root, which may be on their way."""
    subjects = Subjects(run)
    first, second = JetStreamLog(bus, run), JetStreamLog(bus, run)
    await JetStreamLog(bus, run).store(entry(b"x", "warm"), b"x", timeout_s=S)
    for name in ("old.0", "old.1", "old.2", "alone"):
        await bus.append(
            subjects.log_stream, subjects.log_chunks(name), b"left", message_id=name, timeout_s=S
        )
    stored = pieces(0, 1, [b"abc", b"de"])
    kept = {"log.chunks.warm": 1, "log.index.warm": 1}
    one = {"log.chunks.1-patch-1.0": 1, "log.index.1-patch-1.0": 1}
    await first.store(stored[0], b"abc", timeout_s=S)
    assert await held(bus, run) == kept | one | {"log.chunks.old.1": 1}
    [warm, _] = await first.entries(timeout_s=S)
    await first.prune([warm], timeout_s=S)
    assert await held(bus, run) == one | {"log.chunks.old.1": 1}
    await second.store(stored[1], b"de", timeout_s=S)
    assert await held(bus, run) == one | {"log.chunks.1-patch-1.1": 1, "log.index.1-patch-1.1": 1}


async def test_a_store_that_ran_out_of_time_leaves_nothing(
    broker: Broker, bus: NatsBus, connected: Connect, run: str
) -> None:
    """The server falls silent in mid-store: LogError at the deadline, no entry. Once it speaks
    again, storing works and holds each chunk once."""
    async with Proxy(broker.url) as proxy:
        log = JetStreamLog(await connected(proxy.url), run)
        payload = os.urandom(3_000_000)
        await log.store(entry(b"", "warm"), b"", timeout_s=S)
        proxy.stall()
        with pytest.raises(LogError, match="1-patch-1"):
            await log.store(entry(payload), payload, timeout_s=0.3)
        proxy.flow()
        assert [one.name for one in await log.entries(timeout_s=S)] == ["warm"]
        await log.store(entry(payload), payload, timeout_s=S)
        [_, found] = await log.entries(timeout_s=S)
        assert await log.load(found, timeout_s=S) == payload
    assert await held(bus, run) == {
        "log.index.warm": 1, "log.chunks.1-patch-1": 6, "log.index.1-patch-1": 1,
    }  # fmt: skip


@pytest.mark.parametrize("after_nbytes", [1, 600_000, 2_000_000, 4_500_000])
async def test_a_store_outlives_a_broken_connection(
    broker: Broker, bus: NatsBus, connected: Connect, run: str, after_nbytes: int
) -> None:
    """The line breaks in mid-store, with chunks on their way: the store goes on by itself, and
    holds every chunk once and in order."""
    async with Proxy(broker.url) as proxy:
        here = await connected(proxy.url)
        log = JetStreamLog(here, run)
        payload = os.urandom(5_000_000)
        await log.store(entry(b"", "warm"), b"", timeout_s=S)
        sent = 0

        def count(data: bytes) -> bytes:
            nonlocal sent
            sent += len(data)
            return data

        proxy.from_client = count
        storing = asyncio.ensure_future(log.store(entry(payload), payload, timeout_s=S))
        await until(lambda: sent >= after_nbytes)
        proxy.cut()
        await storing
        [_, found] = await log.entries(timeout_s=S)
        assert await log.load(found, timeout_s=S) == payload
    assert (await held(bus, run))["log.chunks.1-patch-1"] == 10


async def test_chunks_out_of_order_are_stored_anew(
    bus: NatsBus, run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One chunk is delayed past its successors, as a resent one may be: the tier sees it by the
    sequences and stores all again; the bytes are right."""
    log = JetStreamLog(bus, run)
    append, delayed = bus.append, []

    async def late(stream: str, subject: str, data: bytes, **options: object) -> int:
        if data[:1] == b"2" and not delayed:
            delayed.append(data)
            await asyncio.sleep(0.1)
        return await append(stream, subject, data, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(bus, "append", late)
    payload = b"".join(str(number).encode() * (512 << 10) for number in range(6))
    await log.store(entry(payload), payload, timeout_s=S)
    assert delayed
    [found] = await log.entries(timeout_s=S)
    assert await log.load(found, timeout_s=S) == payload
    assert (await held(bus, run))["log.chunks.1-patch-1"] == 6


async def test_a_lost_stream_is_made_again(bus: NatsBus, run: str) -> None:
    """The bus forgets the log: it reads as empty, entries of before are holes, and the next store
    makes the stream again."""
    log = JetStreamLog(bus, run)
    await log.store(entry(b"one"), b"one", timeout_s=S)
    [gone] = await log.entries(timeout_s=S)
    await bus.delete_stream(Subjects(run).log_stream, timeout_s=S)
    assert await log.entries(timeout_s=S) == []
    await log.prune([], timeout_s=S)
    with pytest.raises(LogHole):
        await log.load(gone, timeout_s=S)
    await log.store(entry(b"two"), b"two", timeout_s=S)
    [found] = await log.entries(timeout_s=S)
    assert await log.load(found, timeout_s=S) == b"two"


async def test_a_missing_chunk_is_a_hole_and_a_foreign_one_an_error(bus: NatsBus, run: str) -> None:
    """A chunk is lost: LogHole with what is there. A chunk too many: LogError. Nonsense in the
    index is passed over."""
    log, subjects = JetStreamLog(bus, run), Subjects(run)
    payload = os.urandom(1_200_000)
    await log.store(entry(payload), payload, timeout_s=S)
    [found] = await log.entries(timeout_s=S)
    chunks = subjects.log_chunks(found.name)
    await bus.purge(subjects.log_stream, subject=chunks, before_sequence=2, timeout_s=S)
    with pytest.raises(LogHole, match=r"2 chunk\(s\) and 675712 bytes of 1200000"):
        await log.load(found, timeout_s=S)
    for number in (1, 2):
        await bus.append(subjects.log_stream, chunks, bytes(524288 * number), timeout_s=S)
    with pytest.raises(LogError, match="its index says 3"):
        await log.load(found, timeout_s=S)
    await bus.append(subjects.log_stream, subjects.log_entry("x"), b"\xff nonsense", timeout_s=S)
    assert await log.entries(timeout_s=S) == [found]


async def test_an_unreachable_broker_is_a_log_error(tmp_path: Path, connected: Connect) -> None:
    """The broker is gone: every operation ends at its deadline with a LogError."""
    broker = Broker(store_dir=tmp_path)
    bus = await connected(broker.start())
    log = JetStreamLog(bus, "run")
    await log.store(entry(b"x"), b"x", timeout_s=S)
    [found] = await log.entries(timeout_s=S)
    broker.close()
    await until(lambda: not bus.connected)
    operations = (
        lambda: log.store(entry(b"y", "y"), b"y", timeout_s=0.2),
        lambda: log.entries(timeout_s=0.2),
        lambda: log.load(found, timeout_s=0.2),
        lambda: log.prune([], timeout_s=0.2),
    )
    for operation in operations:
        with pytest.raises(LogError):
            await asyncio.wait_for(operation(), 5.0)


async def test_what_is_beyond_the_quota_is_refused_whole(bus: NatsBus, run: str) -> None:
    """The second entry would be more than the log may hold: it is refused by name, nothing of it
    stays, the first one is there; when that is dropped there is room for it."""
    log = JetStreamLog(bus, run, quota_nbytes=1_500_000)
    first, second = (entry(bytes(900_000), name=f"1-patch-{n}", version=n) for n in (1, 2))
    await log.store(first, bytes(900_000), timeout_s=S)
    with pytest.raises(LogFull, match=r"1-patch-2.*quota_nbytes"):
        await log.store(second, bytes(900_000), timeout_s=S)
    assert [one.name for one in await log.entries(timeout_s=S)] == ["1-patch-1"]
    assert not [what for what in await held(bus, run) if "1-patch-2" in what]
    await log.prune([first], timeout_s=S)
    await log.store(second, bytes(900_000), timeout_s=S)
    assert await log.load(second, timeout_s=S) == bytes(900_000)
