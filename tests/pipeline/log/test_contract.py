"""The contract of the log, for every tier. Stores are real; a tier's maker is all it needs here."""

import asyncio
import hashlib
import os
from collections.abc import Awaitable, Callable

import msgspec
import pytest

from sparsecast.messages.control import LogEntry
from sparsecast.messages.errors import LogError, LogHole
from sparsecast.pipeline.bus.broker import Broker
from sparsecast.pipeline.bus.nats import NatsBus
from sparsecast.pipeline.log.base import Log, way
from sparsecast.pipeline.log.jetstream import JetStreamLog

Connect = Callable[..., Awaitable[NatsBus]]
#: Opens another view of the same log, as another process would have it.
OpenLog = Callable[[], Awaitable[Log]]
S = 10.0


@pytest.fixture(params=["jetstream"])
async def open_log(
    request: pytest.FixtureRequest, broker: Broker, connected: Connect, run: str
) -> OpenLog:
    """Each tier of the log."""

    async def jetstream() -> Log:
        return JetStreamLog(await connected(broker.url), run)

    return {"jetstream": jetstream}[request.param]


@pytest.fixture
async def log(open_log: OpenLog) -> Log:
    """An empty log."""
    return await open_log()


def entry(base: int | None, version: int, payload: bytes, epoch: int = 1) -> LogEntry:
    """An entry as a trainer makes it: it does not know the number of chunks."""
    kind = "anchor" if base is None else "patch"
    return LogEntry(
        name=f"{epoch}-{kind}-{version}",
        epoch=epoch,
        base_version=base,
        version=version,
        nbytes=len(payload),
        checksum=version,
        digest=version * 7,
        manifest_hash="m",
        chunks=0,
        step=version,
    )


def names(entries: list[LogEntry]) -> list[str]:
    """What they are called."""
    return [entry.name for entry in entries]


async def test_an_empty_log_is_empty(log: Log) -> None:
    """Nobody has stored anything, or even made the log: it reads as empty, pruning does nothing."""
    assert await log.entries(timeout_s=S) == []
    await log.prune([], timeout_s=S)
    with pytest.raises(LogHole):
        await log.load(entry(0, 1, b"x"), timeout_s=S)


@pytest.mark.parametrize(
    "nbytes", [0, 1, 1000, 512 << 10, (512 << 10) + 1, 3_000_000], ids=lambda n: f"{n} bytes"
)
async def test_what_is_stored_is_loaded_to_the_byte(
    log: Log, open_log: OpenLog, nbytes: int
) -> None:
    """Of every size, chunk boundaries and nothing at all included; another process reads it."""
    payload = os.urandom(nbytes)
    stored = entry(0, 1, payload)
    await log.store(stored, memoryview(payload), timeout_s=S)
    for view in (log, await open_log()):
        [found] = await view.entries(timeout_s=S)
        assert msgspec.structs.replace(found, chunks=0) == stored
        assert await view.load(found, timeout_s=S) == payload
        assert await view.load(stored, timeout_s=S) == payload


async def test_entries_come_oldest_first(log: Log) -> None:
    """Anchors and patches of two epochs, in the order in which they were stored."""
    stored = [
        entry(None, 0, b"anchor"),
        entry(0, 1, b"1"),
        entry(1, 2, b"22"),
        entry(None, 2, b"anchor2", epoch=2),
        entry(2, 3, b"333", epoch=2),
    ]
    for one in stored:
        await log.store(one, bytes(one.nbytes), timeout_s=S)
    found = await log.entries(timeout_s=S)
    assert names(found) == names(stored)
    assert names(way(found, epoch=2, held=None, target=3)) == ["2-anchor-2", "2-patch-3"]


async def test_storing_again_replaces_nothing(log: Log, open_log: OpenLog) -> None:
    """The same entry is stored again, here and from another process, even with other bytes: no
    error, one entry, the first bytes."""
    first = os.urandom(100_000)
    stored = entry(0, 1, first)
    await log.store(stored, first, timeout_s=S)
    other = await open_log()
    for view in (log, other):
        await view.store(stored, first, timeout_s=S)
        await view.store(stored, bytes(100_000), timeout_s=S)
    [found] = await other.entries(timeout_s=S)
    assert await other.load(found, timeout_s=S) == first


async def test_an_entry_that_lies_about_its_size_is_refused(log: Log) -> None:
    """The entry says other than its payload has: LogError by name, and nothing is stored."""
    with pytest.raises(LogError, match=r"1-patch-1.*says 3 bytes, its payload has 4"):
        await log.store(entry(0, 1, b"abc"), b"abcd", timeout_s=S)
    assert await log.entries(timeout_s=S) == []


async def test_pruning_keeps_what_it_is_told_to(log: Log, open_log: OpenLog) -> None:
    """Old patches and an old anchor go, wherever they lie between those that stay; what stays can
    be loaded; what is gone is a hole, not garbage."""
    stored = [entry(None, 0, b"a0"), *(entry(v, v + 1, bytes([v]) * 9) for v in range(4))]
    stored.insert(3, entry(None, 2, b"a2"))
    for one in stored:
        payload = b"a%d" % one.version if one.base_version is None else bytes([one.version - 1]) * 9
        await log.store(one, payload, timeout_s=S)
    before = await log.entries(timeout_s=S)
    keep = [one for one in before if one.name in ("1-anchor-2", "1-patch-1", "1-patch-4")]
    await log.prune(keep, timeout_s=S)
    other = await open_log()
    assert await other.entries(timeout_s=S) == keep
    for one, payload in zip(keep, (bytes([0]) * 9, b"a2", bytes([3]) * 9), strict=True):
        assert await other.load(one, timeout_s=S) == payload
    for one in before:
        if one not in keep:
            with pytest.raises(LogHole, match=one.name) as caught:
                await other.load(one, timeout_s=S)
            assert caught.value.version == one.version
    await log.prune(keep, timeout_s=S)
    assert await other.entries(timeout_s=S) == keep


async def test_what_was_pruned_can_be_stored_again(log: Log) -> None:
    """An entry is dropped and stored again, with other bytes: it is there, with those."""
    stored = entry(0, 1, b"abc")
    await log.store(stored, b"abc", timeout_s=S)
    await log.prune([], timeout_s=S)
    assert await log.entries(timeout_s=S) == []
    await log.store(stored, b"xyz", timeout_s=S)
    [found] = await log.entries(timeout_s=S)
    assert await log.load(found, timeout_s=S) == b"xyz"


async def test_pruning_leaves_what_the_caller_has_not_seen(log: Log) -> None:
    """Between the caller's look at the log and its prune, the next patch was stored: it stays."""
    for version in range(3):
        await log.store(entry(version, version + 1, b"x"), b"x", timeout_s=S)
    keep = (await log.entries(timeout_s=S))[1:]
    await log.store(entry(3, 4, b"new"), b"new", timeout_s=S)
    await log.prune(keep, timeout_s=S)
    assert names(await log.entries(timeout_s=S)) == ["1-patch-2", "1-patch-3", "1-patch-4"]


async def test_many_store_and_load_at_once(log: Log, open_log: OpenLog) -> None:
    """Patches and an anchor are stored at the same time, two readers load meanwhile: whoever sees
    an entry gets its bytes."""
    payloads = {version: os.urandom(200_000 + version) for version in range(1, 9)}
    digests = {v: hashlib.sha256(payload).digest() for v, payload in payloads.items()}

    async def read_all(view: Log) -> int:
        seen: set[str] = set()
        async with asyncio.timeout(S):
            while len(seen) < len(payloads):
                for found in await view.entries(timeout_s=S):
                    if found.name not in seen:
                        seen.add(found.name)
                        data = await view.load(found, timeout_s=S)
                        assert hashlib.sha256(data).digest() == digests[found.version]
        return len(seen)

    readers = [asyncio.ensure_future(read_all(await open_log())) for _ in range(2)]
    await asyncio.gather(
        *(log.store(entry(v - 1, v, data), data, timeout_s=S) for v, data in payloads.items())
    )
    assert await asyncio.gather(*readers) == [8, 8]


async def test_a_reader_meets_the_broom(log: Log, open_log: OpenLog) -> None:
    """Entries are pruned while they are loaded, again and again: a reader gets the bytes or a
    LogHole, never half of them."""
    reader = await open_log()
    holes = whole = 0
    for round_ in range(12):
        payload = os.urandom(1_500_000)
        stored = entry(round_, round_ + 1, payload)
        await log.store(stored, payload, timeout_s=S)
        [found] = await reader.entries(timeout_s=S)
        loading = asyncio.ensure_future(reader.load(found, timeout_s=S))
        await asyncio.sleep(0.001 * (round_ % 4))
        await log.prune([], timeout_s=S)
        try:
            assert await loading == payload
            whole += 1
        except LogHole:
            holes += 1
    assert holes + whole == 12
