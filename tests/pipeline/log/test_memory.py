"""The tier in memory beyond the contract: its bound, and threads."""

import asyncio
import threading

import pytest

from logs import entry, pieces
from sparsecast.messages.errors import LogError
from sparsecast.pipeline.log.memory import MemoryLog
from sparsecast.pipeline.log.pieces import whole

S = 10.0


async def store(log: MemoryLog, base: int | None, version: int, nbytes: int) -> None:
    """Store an entry of this size."""
    payload = bytes(nbytes)
    await log.store(entry(base, version, payload), payload, timeout_s=S)


async def names(log: MemoryLog) -> list[str]:
    """What is there."""
    return [one.name for one in await log.entries(timeout_s=S)]


async def test_what_the_newest_anchor_makes_needless_makes_room() -> None:
    """The bound is reached: the oldest goes as far as it must, then the next entry fits; the chain
    from the newest anchor is never touched, and what finds no room beside it is refused."""
    log = MemoryLog(max_nbytes=100)
    await store(log, None, 0, 40)
    await store(log, 0, 1, 20)
    with pytest.raises(LogError, match=r"1-patch-2.*MemoryLog\(max_nbytes=100\).*raise it"):
        await store(log, 1, 2, 50)
    assert await names(log) == ["1-anchor-0", "1-patch-1"]
    await store(log, None, 1, 40)
    await store(log, 1, 2, 10)
    assert await names(log) == ["1-patch-1", "1-anchor-1", "1-patch-2"]
    await store(log, 2, 3, 30)
    assert await names(log) == ["1-patch-1", "1-anchor-1", "1-patch-2", "1-patch-3"]
    with pytest.raises(LogError, match="does not fit"):
        await store(log, 3, 4, 1)
    assert await names(log) == ["1-patch-1", "1-anchor-1", "1-patch-2", "1-patch-3"]


async def test_an_anchor_pushes_out_all_that_it_replaces() -> None:
    """A full log would take no patch any more; the next anchor takes the place of all before it.
    One that is too large by itself is refused, and nothing is lost."""
    log = MemoryLog(max_nbytes=100)
    await store(log, None, 0, 60)
    await store(log, 0, 1, 40)
    await store(log, None, 1, 60)
    assert await names(log) == ["1-patch-1", "1-anchor-1"]
    with pytest.raises(LogError):
        await store(log, None, 2, 101)
    assert await names(log) == ["1-patch-1", "1-anchor-1"]


async def test_the_last_piece_of_an_anchor_replaces_what_was_before() -> None:
    """Two roots fill the log. The first piece of the next anchor leads to nothing yet: it pushes
    nothing out, and is refused. With room for it the second piece, which makes the anchor whole,
    takes the place of what it must of the older one, which is whole no more."""
    log, half = MemoryLog(max_nbytes=80), bytes(20)

    async def store_piece(base: int | None, version: int, root: int) -> None:
        await log.store(pieces(base, version, [half] * 2)[root], half, timeout_s=S)

    for base, version in ((None, 0), (0, 1)):
        for root in (0, 1):
            await store_piece(base, version, root)
    with pytest.raises(LogError, match="does not fit"):
        await store_piece(None, 1, 0)
    assert len(await names(log)) == 4
    log.max_nbytes = 100
    await store_piece(None, 1, 0)
    await store_piece(None, 1, 1)
    assert await names(log) == [
        "1-anchor-0.1", "1-patch-1.0", "1-patch-1.1", "1-anchor-1.0", "1-anchor-1.1"
    ]  # fmt: skip
    assert [one.name for one in whole(await log.entries(timeout_s=S))] == [
        "1-patch-1", "1-anchor-1"
    ]  # fmt: skip


async def test_a_store_keeps_a_copy() -> None:
    """The caller's buffer is used again after the store: the entry has what it held then."""
    log = MemoryLog()
    buffer = bytearray(b"first")
    stored = entry(0, 1, b"first")
    await log.store(stored, memoryview(buffer), timeout_s=S)
    buffer[:] = b"again"
    assert await log.load(stored, timeout_s=S) == b"first"


def test_loops_of_several_threads_share_it() -> None:
    """A trainer and three workers, each with a loop of its own, on one object: every entry that is
    seen is whole."""
    log = MemoryLog(max_nbytes=1 << 30)
    failures: list[BaseException] = []

    async def write() -> None:
        for version in range(200):
            payload = bytes([version]) * 1000
            await log.store(entry(version, version + 1, payload), payload, timeout_s=S)
            await asyncio.sleep(0)

    async def read() -> None:
        while len(found := await log.entries(timeout_s=S)) < 200:
            for one in found[-3:]:
                assert await log.load(one, timeout_s=S) == bytes([one.version - 1]) * 1000

    def run(work: object) -> None:
        try:
            asyncio.run(asyncio.wait_for(work(), S))  # type: ignore[operator]
        except BaseException as exc:
            failures.append(exc)

    threads = [threading.Thread(target=run, args=(work,)) for work in (write, read, read, read)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
