"""What a trainer stores: anchors that fail, logs that cannot be pruned, a successor's entries."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from runs import QUICK, step, weights
from sparsecast import LogError
from sparsecast.messages.control import LogEntry
from sparsecast.pipeline.core import events as ev
from sparsecast.pipeline.log.base import oldest_first
from sparsecast.pipeline.log.memory import MemoryLog
from sparsecast.workers.archive import Archive
from sparsecast.workers.outgoing import Outgoing

POLICY = replace(QUICK, retry_s=0.01, anchor_every=2)


class FailingLog(MemoryLog):
    """A log that fails as often as it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.failing_stores = 0
        self.failing_prunes = 0
        self.anchors_refused = False

    async def store(
        self, entry: LogEntry, payload: bytes | memoryview, *, timeout_s: float
    ) -> None:
        """Keep an entry, or fail."""
        if self.failing_stores or (self.anchors_refused and entry.base_version is None):
            self.failing_stores = max(self.failing_stores - 1, 0)
            raise LogError("no room on the disk")
        await super().store(entry, payload, timeout_s=timeout_s)

    async def prune(self, drop: Sequence[LogEntry], *, timeout_s: float) -> None:
        """Drop these, or fail."""
        if self.failing_prunes:
            self.failing_prunes -= 1
            raise LogError("denied")
        await super().prune(drop, timeout_s=timeout_s)


class Stand:
    """An archive over a log in memory."""

    def __init__(self, **policy: Any) -> None:
        self.log = FailingLog()
        self.trained = weights()
        self.outgoing = Outgoing(
            self.trained, dtype=None, include=None, exclude=None, rename=None, clock=lambda: 1.0
        )
        self.told: list[str] = []
        self.epoch = 1
        ports: Any = SimpleNamespace(log=self.log, run=self._run)
        self.archive = Archive(ports, self.outgoing, replace(POLICY, **policy), self.told.append)
        self.failures: list[Exception] = []

    @property
    def names(self) -> list[str]:
        """What the log holds, oldest first."""
        entries = oldest_first([entry for entry, _ in self.log._held.values()])
        return [entry.name for entry in entries]

    async def _run(self, function: Any, *args: Any) -> Any:
        if self.failures:
            raise self.failures.pop()
        return function(*args)

    async def anchor(self) -> None:
        """Store an anchor of what is published."""
        async with asyncio.timeout(5):
            await self.archive.anchor(lambda: self.epoch)

    async def publish(self) -> int:
        """Make a version and store its patch."""
        step(self.trained, self.outgoing.version)
        self.outgoing.publish(None, None)
        self.outgoing.take(())
        stored = await self.archive.store((self.outgoing.version,), self.epoch)
        assert isinstance(stored, ev.LogStored)
        return stored.version


async def test_an_anchor_is_tried_until_it_is_there() -> None:
    """The disk is full twice: told once, stored at the third try."""
    stand = Stand()
    stand.log.failing_stores = 2
    await stand.anchor()
    assert stand.names == ["1-anchor-0"]
    assert len(stand.told) == 1
    assert "no room" in stand.told[0]


async def test_no_memory_for_an_anchor_ends_nothing() -> None:
    """The copy fails for want of memory: told, and tried again."""
    stand = Stand()
    stand.failures = [RuntimeError("can't allocate memory")]
    await stand.anchor()
    assert stand.names == ["1-anchor-0"]
    assert "allocate memory" in stand.told[0]


async def test_two_anchors_and_all_from_the_older_one_on_are_kept() -> None:
    """Anchors at 0, 2, 4 with patches between: what leads below 2 goes, the rest stays."""
    stand = Stand()
    await stand.anchor()
    for _ in range(4):
        version = await stand.publish()
        if stand.archive.due(version):
            await stand.anchor()
    assert await stand.publish() == 5
    assert stand.names == [
        "1-patch-1-2", "1-anchor-2", "1-patch-2-3", "1-patch-3-4", "1-anchor-4", "1-patch-4-5"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("policy", "first"),
    [
        ({"keep_versions": 3}, 4),
        ({"keep_versions": 5}, 2),
        ({"keep_versions": 99}, 0),
        ({"keep_nbytes": 1}, 6),
        ({"keep_versions": 99, "keep_nbytes": 1}, 6),
        ({"keep_versions": 5, "keep_nbytes": 100_000}, 4),
    ],
    ids=str,
)
async def test_the_policy_says_how_much_is_kept(policy: dict[str, int], first: int) -> None:
    """Anchors at 0, 2, 4, 6 and a patch to 7: more versions are kept than needed, or as few bytes
    as can be; the newest anchor and its chain stay in any case."""
    stand = Stand(**policy)
    await stand.anchor()
    for _ in range(6):
        version = await stand.publish()
        if stand.archive.due(version):
            await stand.anchor()
    assert await stand.publish() == 7
    patches = [f"1-patch-{version}-{version + 1}" for version in range(max(first - 1, 0), 7)]
    anchors = [f"1-anchor-{version}" for version in range(first, 7, 2)]
    assert sorted(stand.names) == sorted([*patches, *anchors])


async def test_a_log_that_cannot_be_pruned_gets_one_anchor() -> None:
    """Storing works, dropping does not: no second copy is stored for that."""
    stand = Stand()
    for _ in range(2):
        await stand.publish()
    stand.log.failing_prunes = 1
    await stand.anchor()
    assert stand.names == ["1-patch-0-1", "1-patch-1-2", "1-anchor-2"]
    assert stand.told == ["pruning: denied"]


async def test_anchors_do_not_pile_up() -> None:
    """Patches are taken and anchors are not: one anchor is on its way, however long it lasts."""
    stand = Stand()
    stand.log.anchors_refused = True
    tries = asyncio.create_task(stand.archive.anchor(lambda: stand.epoch))
    for _ in range(6):
        version = await stand.publish()
        await asyncio.sleep(0)
        assert not stand.archive.due(version)
    stand.log.anchors_refused = False
    await asyncio.wait_for(tries, 5)
    assert stand.names[-1] == "1-anchor-6"
    assert not stand.archive.due(7)
    assert stand.archive.due(8)


async def test_a_new_epoch_ends_the_tries_of_the_old() -> None:
    """The run was claimed anew while an anchor did not get through: it has one of its own."""
    stand = Stand()
    stand.log.anchors_refused = True
    tries = asyncio.create_task(stand.archive.anchor(lambda: stand.epoch))
    await asyncio.sleep(0.02)
    stand.epoch = 2
    await asyncio.wait_for(tries, 5)
    assert stand.names == []


async def test_a_fenced_trainer_leaves_its_successors_entries() -> None:
    """It has not heard yet that it lost the run: what a later epoch has stored stays."""
    stand = Stand()
    for _ in range(2):
        await stand.publish()
    successor = Stand()
    successor.epoch = 2
    await successor.anchor()
    stand.log._held |= successor.log._held
    await stand.anchor()
    assert stand.names == ["1-patch-1-2", "1-anchor-2", "2-anchor-0"]


@pytest.mark.parametrize("failures", [1, 3])
async def test_a_patch_that_is_not_stored_is_kept(failures: int) -> None:
    """LogFailed leaves the patch here, to be stored by the next try."""
    stand = Stand()
    step(stand.trained, 1)
    stand.outgoing.publish(None, None)
    stand.outgoing.take(())
    stand.log.failing_stores = failures
    for _ in range(failures):
        failed = await stand.archive.store((1,), 1)
        assert isinstance(failed, ev.LogFailed)
        assert "no room" in failed.reason
        assert stand.outgoing.payload(1) is not None
    assert await stand.archive.store((1,), 1) == ev.LogStored(1)
    assert stand.outgoing.payload(1) is None
