"""Tiers together beyond the contract: one of them fails, hangs, forgets or lies behind."""

import asyncio
from collections.abc import Sequence

import pytest

from logs import entry
from sparsecast.messages.control import LogEntry
from sparsecast.messages.errors import BusUnavailable, LogError, LogHole
from sparsecast.messages.manifest import Manifest
from sparsecast.pipeline.log import tiered
from sparsecast.pipeline.log.base import Progress
from sparsecast.pipeline.log.memory import MemoryLog
from sparsecast.pipeline.log.tiered import TieredLog

S = 10.0


class FaultyLog(MemoryLog):
    """A tier that fails, or hangs, while it is told to."""

    def __init__(self, *, durable: bool = True) -> None:
        super().__init__()
        self.durable = durable
        self.error: Exception | None = None
        self.hangs = False
        #: So many bytes of an entry come, whatever happens then.
        self.gives: int | None = None
        self.calls = 0
        self.known: Manifest | None = None

    async def _maybe(self) -> None:
        self.calls += 1
        if self.hangs:
            await asyncio.sleep(3600)
        if self.error is not None:
            raise self.error

    async def store(
        self, entry: LogEntry, payload: bytes | memoryview, *, timeout_s: float
    ) -> None:
        await self._maybe()
        await super().store(entry, payload, timeout_s=timeout_s)

    async def entries(self, *, timeout_s: float) -> list[LogEntry]:
        await self._maybe()
        return await super().entries(timeout_s=timeout_s)

    async def load(
        self, entry: LogEntry, *, timeout_s: float, progress: Progress | None = None
    ) -> bytes:
        if self.gives is not None and progress is not None:
            progress(self.gives)
        await self._maybe()
        return await super().load(entry, timeout_s=timeout_s, progress=progress)

    async def prune(self, drop: Sequence[LogEntry], *, timeout_s: float) -> None:
        await self._maybe()
        await super().prune(drop, timeout_s=timeout_s)

    async def manifest(self, manifest_hash: str, *, timeout_s: float) -> Manifest | None:
        await self._maybe()
        return self.known


class Stand:
    """Two tiers that outlive the process, and what is told of them."""

    def __init__(self) -> None:
        self.one, self.two = FaultyLog(), FaultyLog()
        self.told: list[str] = []
        self.log = TieredLog({"one": self.one, "two": self.two}, tell=self.told.append)

    async def store(self, version: int, timeout_s: float = S) -> LogEntry:
        """Store a patch."""
        stored = entry(version - 1, version, b"x" * version)
        await self.log.store(stored, b"x" * version, timeout_s=timeout_s)
        return stored


@pytest.mark.parametrize(
    "error", [LogError("no room"), BusUnavailable("nats://h", "gone")], ids=str
)
async def test_a_tier_that_fails_stops_nobody(error: Exception) -> None:
    """One tier refuses everything for a while: it is told once, the other does the work, and when
    it works again and fails again, that is told again. What it missed comes from the other one."""
    stand = Stand()
    await stand.store(1)
    stand.one.error = error
    second, third = await stand.store(2), await stand.store(3)
    assert [one.version for one in await stand.log.entries(timeout_s=S)] == [1, 2, 3]
    assert await stand.log.load(second, timeout_s=S) == b"xx"
    await stand.log.prune([second], timeout_s=S)
    assert stand.told == [f"tier one of the log fails, the others go on: {error}"]
    stand.one.error = None
    await stand.store(4)
    assert [one.version for one in await stand.one.entries(timeout_s=S)] == [1, 4]
    assert await stand.log.load(third, timeout_s=S) == b"xxx"
    stand.one.error = error
    await stand.store(5)
    assert len(stand.told) == 2


async def test_only_if_all_fail_there_is_an_error() -> None:
    """Both tiers refuse: one LogError that names both, for every call."""
    stand = Stand()
    stored = await stand.store(1)
    stand.one.error, stand.two.error = LogError("no room"), LogError("no rights")
    for call in (
        stand.store(2),
        stand.log.entries(timeout_s=S),
        stand.log.load(stored, timeout_s=S),
        stand.log.prune([stored], timeout_s=S),
        stand.log.manifest("m", timeout_s=S),
    ):
        with pytest.raises(LogError, match=r"one: no room; two: no rights"):
            await call


async def test_what_dies_with_the_process_is_not_enough() -> None:
    """Memory takes an entry and the disk does not: stored means safe, so that is an error, until
    the disk takes it. With tiers in memory alone nothing else can be asked."""
    memory, disk = FaultyLog(durable=False), FaultyLog()
    log = TieredLog({"memory": memory, "disk": disk}, tell=lambda reason: None)
    assert log.durable
    disk.error = LogError("no room")
    stored = entry(0, 1, b"x")
    with pytest.raises(LogError, match="disk: no room"):
        await log.store(stored, b"x", timeout_s=S)
    disk.error = None
    await log.store(stored, b"x", timeout_s=S)
    assert await disk.load(stored, timeout_s=S) == b"x"
    alone = TieredLog({"memory": memory}, tell=lambda reason: None)
    assert not alone.durable
    await alone.store(entry(1, 2, b"y"), b"y", timeout_s=S)


async def test_a_tier_that_hangs_costs_one_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first tier does not answer any more: one call lasts until its deadline, the next ones as
    long as the other tier and a moment; when it answers again it is waited for as before."""
    monkeypatch.setattr(tiered, "GRACE_S", 0.05)
    stand = Stand()
    loop = asyncio.get_running_loop()
    await stand.store(1)
    stand.one.hangs = True
    began = loop.time()
    stored = await stand.store(2, timeout_s=0.5)
    assert 0.4 < loop.time() - began < 2
    began = loop.time()
    await stand.store(3)
    assert len(await stand.log.entries(timeout_s=S)) == 3
    assert await stand.log.load(stored, timeout_s=S) == b"xx"
    await stand.log.prune([stored], timeout_s=S)
    assert loop.time() - began < 2
    assert stand.told == ["tier one of the log fails, the others go on: no answer within 0.5 s"]
    stand.one.hangs = False
    await stand.store(4)
    assert [one.version for one in await stand.one.entries(timeout_s=S)] == [1, 4]


async def test_a_hanging_tier_leaves_time_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first tier hangs in a load: the second one gives the bytes within the same deadline, and
    is asked first from then on."""
    stand = Stand()
    stored = await stand.store(1)
    stand.one.hangs = True
    assert await stand.log.load(stored, timeout_s=0.6) == b"x"
    asked = stand.one.calls
    assert await stand.log.load(stored, timeout_s=0.6) == b"x"
    assert stand.one.calls == asked


@pytest.mark.parametrize("hangs", [False, True], ids=["fails", "hangs"])
async def test_a_tier_that_fails_midway_starts_again_from_nothing(hangs: bool) -> None:
    """Six of seven bytes have come when the first tier breaks off: what is told falls to 0, and the
    second one brings all; with nobody left to ask it does not fall, since nothing starts again."""
    stand = Stand()
    stored = await stand.store(7)
    stand.one.gives, stand.one.hangs = 6, hangs
    stand.one.error = LogError("the disk is gone")
    told: list[int] = []
    assert await stand.log.load(stored, timeout_s=1.0, progress=told.append) == b"x" * 7
    assert told == [6, 0, 7]
    stand.two.error, stand.two.gives = LogError("this one, too"), 5
    told.clear()
    with pytest.raises(LogError):
        await stand.log.load(stored, timeout_s=1.0, progress=told.append)
    assert told == [5, 0, 6]  # the one that failed before comes last


async def test_both_hang_and_the_deadline_holds() -> None:
    """No tier answers: every call ends at its deadline, the second time too."""
    stand = Stand()
    stored = await stand.store(1)
    stand.one.hangs = stand.two.hangs = True
    loop = asyncio.get_running_loop()
    for _ in range(2):
        for call in (stand.store(2, 0.2), stand.log.entries(timeout_s=0.2),
                     stand.log.load(stored, timeout_s=0.2)):  # fmt: skip
            began = loop.time()
            with pytest.raises(LogError, match="no answer within"):
                await call
            assert loop.time() - began < 1


async def test_a_hole_in_one_is_filled_by_the_other() -> None:
    """Each tier has what the other one lacks: entries are those of both, each is loaded from where
    it is, and what neither has is a hole, not a failure of the tiers."""
    stand = Stand()
    first, second = entry(0, 1, b"1"), entry(1, 2, b"22")
    await stand.one.store(first, b"1", timeout_s=S)
    await stand.two.store(second, b"22", timeout_s=S)
    assert await stand.log.entries(timeout_s=S) == [first, second]
    assert await stand.log.load(first, timeout_s=S) == b"1"
    assert await stand.log.load(second, timeout_s=S) == b"22"
    with pytest.raises(LogHole) as caught:
        await stand.log.load(entry(2, 3, b"333"), timeout_s=S)
    assert caught.value.version == 3
    assert stand.told == []


async def test_one_tier_that_knows_the_names_is_enough() -> None:
    """Only the second tier can tell a manifest: that is the answer; nobody can: None."""
    stand = Stand()
    assert await stand.log.manifest("m", timeout_s=S) is None
    stand.two.known = Manifest(tensors=())
    assert await stand.log.manifest("m", timeout_s=S) == Manifest(tensors=())


async def test_whoever_is_cancelled_takes_its_work_along() -> None:
    """The caller of a store is cancelled while a tier hangs: nothing of it goes on."""
    stand = Stand()
    stand.one.hangs = True
    storing = asyncio.ensure_future(stand.store(1))
    await asyncio.sleep(0.05)
    storing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await storing
    assert asyncio.all_tasks() == {asyncio.current_task()}
