"""The contract of the log, for every tier. Stores are real; a tier's maker is all it needs here."""

import asyncio
import hashlib
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import pytest

from logs import ToyPayloads, entry, manifest, pieces
from sparsecast.messages.control import LogEntry
from sparsecast.messages.errors import LogError, LogHole
from sparsecast.pipeline.bus.broker import Broker
from sparsecast.pipeline.bus.nats import NatsBus
from sparsecast.pipeline.log.base import Log, way
from sparsecast.pipeline.log.directory import DirectoryLog
from sparsecast.pipeline.log.jetstream import JetStreamLog
from sparsecast.pipeline.log.memory import MemoryLog
from sparsecast.pipeline.log.pieces import WholeLog
from sparsecast.pipeline.log.tiered import TieredLog

Connect = Callable[..., Awaitable[NatsBus]]
#: Opens another view of the same log, as another process would have it.
OpenLog = Callable[[], Awaitable[Log]]
S = 10.0

TIERS = ["memory", "jetstream", "directory", "tiered", "one of two", "whole"]

pytestmark = pytest.mark.parametrize("tier", TIERS)


@pytest.fixture
async def open_log(
    tier: str, broker: Broker, connected: Connect, run: str, tmp_path: Path
) -> OpenLog:
    """Each tier of the log, and tiers together."""
    shared = MemoryLog()

    async def memory() -> Log:
        return shared

    async def jetstream() -> Log:
        return JetStreamLog(await connected(broker.url), run)

    async def directory() -> Log:
        return DirectoryLog(tmp_path, run, ToyPayloads())

    async def tiered() -> Log:
        return TieredLog({"directory": await directory(), "jetstream": await jetstream()})

    async def one_of_two() -> Log:
        gone = DirectoryLog(tmp_path / "not there", run, ToyPayloads())
        return TieredLog({"gone": gone, "jetstream": await jetstream()})

    async def whole_log() -> Log:
        return WholeLog(await tiered())

    return {
        "memory": memory, "jetstream": jetstream, "directory": directory, "tiered": tiered,
        "one of two": one_of_two, "whole": whole_log,
    }[tier]  # fmt: skip


@pytest.fixture
def open_whole(open_log: OpenLog) -> OpenLog:
    """The same, as readers see it: pieces are one entry once all are there."""

    async def opened() -> Log:
        return WholeLog(await open_log())

    return opened


@pytest.fixture
async def log(open_log: OpenLog) -> Log:
    """An empty log."""
    return await open_log()


def names(entries: list[LogEntry]) -> list[str]:
    """What they are called."""
    return [entry.name for entry in entries]


async def test_an_empty_log_is_empty(log: Log) -> None:
    """Nobody has stored anything, or even made the log: it reads as empty, pruning does nothing."""
    assert await log.entries(timeout_s=S) == []
    await log.prune([entry(0, 1, b"x")], timeout_s=S)
    assert await log.manifest("m", timeout_s=S) is None
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


@pytest.mark.parametrize("base", [0, None], ids=["patch", "anchor"])
@pytest.mark.parametrize(
    "nbytes", [0, 1, 1000, 512 << 10, 3_000_000, 20_000_000], ids=lambda n: f"{n} bytes"
)
async def test_a_load_tells_how_far_it_is(
    log: Log, open_log: OpenLog, tier: str, nbytes: int, base: int | None
) -> None:
    """Of every size, patch and anchor: what is told never falls, on the loop's thread, and ends
    with all bytes before load() returns; a large entry is told in between, but not byte by byte."""
    payload = os.urandom(nbytes)
    stored = entry(base, 1, payload)
    await log.store(stored, payload, timeout_s=S)
    loop, told = asyncio.get_running_loop(), []

    def hear(nbytes: int) -> None:
        assert asyncio.get_running_loop() is loop
        told.append(nbytes)

    reader = await open_log()
    assert await reader.load(stored, timeout_s=S, progress=hear) == payload
    assert told == sorted(told)
    assert told[-1] == nbytes
    assert len(told) <= nbytes // (500 << 10) + 4
    if nbytes == 20_000_000 and tier != "memory":
        assert any(0 < so_far < nbytes for so_far in told)
    seen = len(told)
    await asyncio.sleep(0.01)
    assert len(told) == seen


async def test_entries_come_oldest_first(log: Log) -> None:
    """Anchors and patches of two epochs, an anchor stored late: by epoch and version."""
    stored = [
        entry(None, 0, b"anchor"),
        entry(0, 1, b"1"),
        entry(1, 2, b"22"),
        entry(None, 2, b"anchor2", epoch=2),
        entry(2, 3, b"333", epoch=2),
    ]
    for one in [*stored[1:], stored[0]]:
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
    drop = [one for one in before if one not in keep]
    await log.prune(drop, timeout_s=S)
    other = await open_log()
    assert await other.entries(timeout_s=S) == keep
    for one, payload in zip(keep, (bytes([0]) * 9, b"a2", bytes([3]) * 9), strict=True):
        assert await other.load(one, timeout_s=S) == payload
    for one in drop:
        with pytest.raises(LogHole, match=one.name) as caught:
            await other.load(one, timeout_s=S)
        assert caught.value.version == one.version
    await log.prune(drop, timeout_s=S)
    assert await other.entries(timeout_s=S) == keep


async def test_what_was_pruned_can_be_stored_again(log: Log) -> None:
    """An entry is dropped and stored again, with other bytes: it is there, with those."""
    for payload in (b"abc", b"xyz"):
        stored = entry(0, 1, payload)
        await log.store(stored, payload, timeout_s=S)
        [found] = await log.entries(timeout_s=S)
        assert await log.load(found, timeout_s=S) == payload
        await log.prune([found], timeout_s=S)
        assert await log.entries(timeout_s=S) == []


async def test_a_deadline_of_nothing_is_an_error_and_not_a_hang(log: Log) -> None:
    """No time at all is given: whatever comes of it, it comes at once, and the next call works."""
    for _ in range(20):
        try:
            async with asyncio.timeout(S):
                await log.store(entry(0, 1, b"abc"), b"abc", timeout_s=1e-6)
        except LogError:
            pass
    await log.store(entry(0, 1, b"abc"), b"abc", timeout_s=S)
    [found] = await log.entries(timeout_s=S)
    assert await log.load(found, timeout_s=S) == b"abc"


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
        await log.prune([found], timeout_s=S)
        try:
            assert await loading == payload
            whole += 1
        except LogHole:
            holes += 1
    assert holes + whole == 12


# ---- pieces, of a trainer of several roots

NBYTES = {"one chunk": 1000, "several": 1_200_001, "many": 9_000_000}


@pytest.mark.parametrize("base", [0, None], ids=["patch", "anchor"])
@pytest.mark.parametrize("nbytes", NBYTES.values(), ids=NBYTES)
async def test_pieces_are_one_entry_once_all_are_there(
    open_whole: OpenLog, base: int | None, nbytes: int
) -> None:
    """Three roots store what is theirs of one version, each in a process of its own: readers see
    nothing before the last one has, then one entry of all bytes, and how far a load is."""
    payloads = [os.urandom(nbytes + root) for root in range(3)]
    stored = pieces(base, 1, payloads)
    reader = await open_whole()
    for one, payload in zip(stored, payloads, strict=True):
        assert await reader.entries(timeout_s=S) == []
        await (await open_whole()).store(one, payload, timeout_s=S)
    [found] = await reader.entries(timeout_s=S)
    assert found.name == stored[0].name.removesuffix(".0")
    assert (found.root, found.roots, found.manifest_hash) == (0, 3, "whole")
    assert found.nbytes == sum(map(len, payloads))
    assert found.checksum == sum(one.checksum for one in stored)
    assert [msgspec.structs.replace(one, chunks=0) for one in found.pieces] == stored
    told: list[int] = []
    assert await reader.load(found, timeout_s=S, progress=told.append) == b"".join(payloads)
    assert told == sorted(told)
    assert told[-1] == found.nbytes
    for one, payload in zip(found.pieces, payloads, strict=True):
        assert await reader.load(one, timeout_s=S) == payload


async def test_roots_store_at_once(open_whole: OpenLog) -> None:
    """Four roots store twelve versions at the same time, each in its own pace: nobody sweeps away
    what another one is at, and whoever sees an entry gets the bytes of all."""
    payloads = {v: [os.urandom(90_000 * root + v) for root in range(4)] for v in range(1, 13)}

    async def store(root: int) -> None:
        log = await open_whole()
        for version, of_roots in payloads.items():
            one = pieces(version - 1, version, of_roots)[root]
            await log.store(one, of_roots[root], timeout_s=S)

    async def read_all() -> None:
        reader, seen = await open_whole(), set[int]()
        async with asyncio.timeout(4 * S):
            while len(seen) < len(payloads):
                for found in await reader.entries(timeout_s=S):
                    if found.version not in seen:
                        seen.add(found.version)
                        data = await reader.load(found, timeout_s=S)
                        assert data == b"".join(payloads[found.version])

    await asyncio.gather(read_all(), *(store(root) for root in range(4)))


async def test_pruning_drops_all_pieces(open_whole: OpenLog) -> None:
    """A root died at version 2, which is never whole. As soon as what lies around it goes, it goes
    too; a piece of a version that is being stored just now stays, and becomes whole."""
    log, payloads = await open_whole(), [b"abc", b"defg"]
    for version in (1, 2, 3, 4, 5):
        for one, payload in zip(pieces(version - 1, version, payloads), payloads, strict=True):
            if (version, one.root) not in [(2, 1), (5, 0)]:
                await log.store(one, payload, timeout_s=S)
    before = await log.entries(timeout_s=S)
    assert [one.version for one in before] == [1, 3, 4]
    with pytest.raises(LogHole):
        await log.load(pieces(1, 2, payloads)[1], timeout_s=S)
    await log.prune(before[:2], timeout_s=S)
    other = await open_whole()
    assert await other.entries(timeout_s=S) == before[2:]
    for one in (*before[:2], *pieces(1, 2, payloads), *pieces(2, 3, payloads)):
        with pytest.raises(LogHole):
            await other.load(one, timeout_s=S)
    await other.store(pieces(4, 5, payloads)[0], payloads[0], timeout_s=S)
    assert [one.version for one in await log.entries(timeout_s=S)] == [4, 5]


async def test_an_entry_of_pieces_is_not_stored_as_one(open_whole: OpenLog) -> None:
    """Each root stores its own: what is put together already is refused by name."""
    log, payloads = await open_whole(), [b"abc", b"defg"]
    for one, payload in zip(pieces(0, 1, payloads), payloads, strict=True):
        await log.store(one, payload, timeout_s=S)
    [found] = await log.entries(timeout_s=S)
    with pytest.raises(LogError, match=r"'1-patch-1' is 2 pieces"):
        await log.store(found, b"abcdefg", timeout_s=S)


async def test_a_load_of_pieces_meets_the_broom(open_whole: OpenLog) -> None:
    """A piece of an anchor is gone when its turn comes: a hole, and no bytes."""
    log, payloads = await open_whole(), [os.urandom(50_000), os.urandom(70_000)]
    for one, payload in zip(pieces(None, 1, payloads), payloads, strict=True):
        await log.store(one, payload, timeout_s=S)
    [found] = await log.entries(timeout_s=S)
    await log.prune([found.pieces[1]], timeout_s=S)
    assert await log.entries(timeout_s=S) == []
    with pytest.raises(LogHole):
        await log.load(found, timeout_s=S)


async def test_a_piece_of_an_anchor_tells_its_names(open_whole: OpenLog, tier: str) -> None:
    """Who looks for the tensors of one root finds them where files have names, and nowhere else."""
    log, payloads = await open_whole(), [os.urandom(1000), os.urandom(2000)]
    for one, payload in zip(pieces(None, 1, payloads), payloads, strict=True):
        await log.store(one, payload, timeout_s=S)
    names = tier in ("directory", "tiered", "whole")
    for payload in payloads:
        wanted = manifest(len(payload))
        assert await log.manifest(wanted.hash, timeout_s=S) == (wanted if names else None)
    assert await log.manifest("whole", timeout_s=S) is None


async def test_tries_that_fail_do_not_fill_the_log(open_whole: OpenLog) -> None:
    """One root stores its piece of one anchor after the other, the other one fails each time: the
    pieces of one anchor are there at most, until one is whole."""
    log, payloads = await open_whole(), [os.urandom(1000), os.urandom(2000)]
    tries = [pieces(None, version, payloads) for version in (1, 2, 3)]
    for of_version in tries:
        await log.store(of_version[0], payloads[0], timeout_s=S)
    await log.store(tries[2][1], payloads[1], timeout_s=S)
    [found] = await log.entries(timeout_s=S)
    assert await log.load(found, timeout_s=S) == b"".join(payloads)
    for of_version in tries[:2]:
        with pytest.raises(LogHole):
            await log.load(of_version[0], timeout_s=S)
