"""Trainers that die, as processes, and come back: from the head, or from an older checkpoint."""

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from runs import (
    QUICK,
    Ear,
    Site,
    Tensors,
    checkpoint,
    eventually,
    hangs,
    same_bits,
    step,
    until_stored,
    weights,
)
from sparsecast import AsyncPublisher, Fenced, Replica, RunBusy
from sparsecast.messages.control import LogEntry
from sparsecast.messages.metrics import Event, TrainerMetrics
from sparsecast.messages.subjects import Subjects
from sparsecast.pipeline.bus.nats import NatsBus
from sparsecast.pipeline.windows.gloo import GlooWindow
from sparsecast.workers.archive import Archive
from spawn import Context, Processes

STORED = 4


async def lead(context: Context, run: str, end: str) -> str:
    """A trainer process: versions up to STORED come into the log, and it ends as it is told:
    "between" rounds, in the "middle" of the next one, or with the next one applied, and "unstored";
    or "again": it resumes, publishes the next version, and stores no anchor."""
    start = 0 if end != "again" else STORED
    trained = checkpoint(start)
    if end == "again":
        Archive.anchor = hangs  # type: ignore[method-assign]
    publisher = await _come_back(trained, run, context.broker_url)
    await publisher.wait_members(1, timeout_s=20)
    for version in range(start + 1, (STORED if end != "again" else STORED + 1) + 1):
        step(trained, version)
        update = await publisher.publish()
        assert (await update.wait_applied(timeout_s=10)).complete
        await until_stored(publisher, update.version)
    if end in ("middle", "unstored"):
        step(trained, STORED + 1)
        Archive.store = hangs  # type: ignore[method-assign]
        if end == "middle":
            await eventually(lambda: publisher.window == "gloo")
            GlooWindow.send = hangs  # type: ignore[method-assign]
        update = await publisher.publish()
        if end == "middle":
            await eventually(lambda: _announced(publisher))
        else:
            assert (await update.wait_applied(timeout_s=10)).complete
    context.mark("there")
    await asyncio.to_thread(context.wait, "go on", rank=-1, timeout_s=30)
    try:
        await publisher.publish()
        await asyncio.sleep(2)
        await publisher.publish()
    except Fenced as exc:
        return str(exc)
    return "not fenced"


def _announced(publisher: AsyncPublisher) -> bool:
    """Whether the round in flight is known to the journal."""
    core = publisher._core
    return core is not None and core._round is not None and core._round.known


async def _come_back(trained: Tensors, run: str, url: str, **options: Any) -> AsyncPublisher:
    """A trainer that is started again and again until the one before has lost its lease."""
    options = {"policy": QUICK, "linger_s": 5.0} | options
    async with asyncio.timeout(QUICK.lease_s + 20):
        while True:
            publisher = AsyncPublisher(trained, run=run, bus=url, **options)
            try:
                return await publisher.__aenter__()
            except RunBusy:
                await asyncio.sleep(0.1)


class Stand:
    """A worker of this process that follows a trainer in another, which dies."""

    def __init__(self, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
        self.site = site
        self.mine = weights()
        #: The entries that the worker has taken from the log.
        self.loaded: list[LogEntry] = []
        self._monkeypatch = monkeypatch
        self.replica: Replica

    async def begin(self, **options: Any) -> None:
        """The worker starts."""
        self.replica = await self.site.replica(self.mine, **options)
        log = self.replica._ports.log
        load = log.load

        async def counted(entry: LogEntry, **options: Any) -> Any:
            self.loaded.append(entry)
            return await load(entry, **options)

        self._monkeypatch.setattr(log, "load", counted)

    async def leads(self, end: str) -> None:
        """A trainer leads until it is killed."""
        site = self.site
        with Processes(1, lead, site.run, end, timeout_s=60, broker_url=site.url) as processes:
            await asyncio.to_thread(processes.wait, "there")
            processes.kill(0)

    async def resumes(self, trained: Tensors, **options: Any) -> AsyncPublisher:
        """A trainer comes back in this process."""
        publisher = await _come_back(trained, self.site.run, self.site.url, **options)
        self.site.ends(publisher)
        return publisher

    async def holds(self, version: int, trained: Tensors) -> None:
        """The worker comes to hold this version, proven, and these bits."""
        await self.replica.wait_version(version, timeout_s=10)
        await eventually(lambda: self.replica.verified == version)
        assert same_bits(trained, self.mine)
        assert self.replica.mismatches == 0

    @property
    def full_copies(self) -> list[str]:
        """The anchors that the worker has taken."""
        return [entry.name for entry in self.loaded if entry.base_version is None]


@pytest.fixture
async def stand(site: Site, monkeypatch: pytest.MonkeyPatch) -> Stand:
    """A worker that follows."""
    stand = Stand(site, monkeypatch)
    await stand.begin()
    return stand


# ---- the trainer dies


async def test_from_the_head(stand: Stand, ear: Ear) -> None:
    """Killed between rounds, and back with the weights that it had: a new epoch under a new number,
    and the worker takes not one byte for it; it has served all the while."""
    await stand.leads("between")
    stand.loaded.clear()
    with stand.replica.reading() as version:
        assert version == STORED
    trained = checkpoint(STORED)
    publisher = await stand.resumes(trained, resume="must")
    assert publisher.version == STORED + 1
    await publisher.wait_members(1, timeout_s=10)
    await stand.holds(STORED + 1, trained)
    step(trained, 50)
    update = await publisher.publish()
    assert (update.base_version, update.version) == (STORED + 1, STORED + 2)
    assert (await update.wait_applied(timeout_s=10)).complete
    await stand.holds(STORED + 2, trained)
    assert stand.full_copies == []
    told = await ear.until(Event, kind="resume")
    assert told.reason == f"goes on from version {STORED}"


async def test_from_an_older_checkpoint(stand: Stand, ear: Ear) -> None:
    """Back with weights of two versions ago: what they differ in goes round as one sparse update,
    before wait_members() says that anybody is current."""
    await stand.leads("between")
    stand.loaded.clear()
    trained = checkpoint(STORED - 2)
    publisher = await stand.resumes(trained, resume="must")
    assert publisher.version == STORED + 2
    assert await publisher.wait_members(1, timeout_s=10) == ["w0"]
    assert stand.replica.version == STORED + 2
    await stand.holds(STORED + 2, trained)
    told = await ear.until(TrainerMetrics, version=STORED + 2)
    assert told.base_version == STORED + 1
    assert 0 < told.nbytes < told.dense_nbytes / 2
    assert stand.full_copies == []


@pytest.mark.parametrize("has", [STORED, STORED + 1], ids=["from-before", "from-after"])
async def test_in_mid_round(stand: Stand, has: int) -> None:
    """Killed after an announcement, before anybody had the patch: the announced version is void,
    its number is not given again, and whoever holds the one before needs no full copy."""
    await stand.leads("middle")
    stand.loaded.clear()
    trained = checkpoint(has)
    publisher = await stand.resumes(trained)
    newest = STORED + 2 if has == STORED else STORED + 3
    assert publisher.version == newest
    await stand.holds(newest, trained)
    assert stand.full_copies == []


async def test_an_unstored_version_comes_back(stand: Stand) -> None:
    """The worker holds what was announced and never stored, and the trainer's checkpoint has it:
    it is published anew, and the worker knows it by its digest."""
    await stand.leads("unstored")
    assert stand.replica.version == STORED + 1
    stand.loaded.clear()
    trained = checkpoint(STORED + 1)
    publisher = await stand.resumes(trained, resume="must")
    assert publisher.version == STORED + 3
    await stand.holds(STORED + 3, trained)
    assert stand.full_copies == []


async def test_an_unstored_version_is_void(stand: Stand) -> None:
    """The worker holds it, and nobody else does any more: it resyncs, and another one follows by
    a patch."""
    await stand.leads("unstored")
    other = checkpoint(STORED)
    follower = await stand.site.replica(other, "w1")
    trained = checkpoint(STORED)
    publisher = await stand.resumes(trained, resume="must")
    assert publisher.version == STORED + 2
    await stand.holds(STORED + 2, trained)
    assert len(stand.full_copies) == 1
    step(trained, 60)
    update = await publisher.publish()
    assert (await update.wait_applied(timeout_s=10)).complete
    assert same_bits(trained, other)
    assert follower.mismatches == 0


async def test_two_restarts_in_a_row(stand: Stand) -> None:
    """The second trainer dies before an anchor of its own is stored: the third one goes on from
    the first one's anchor, by way of the second one's patch."""
    await stand.leads("between")
    await stand.leads("again")
    stand.loaded.clear()
    trained = checkpoint(2)
    publisher = await stand.resumes(trained, resume="must")
    # 4, claimed as 5; 6; claimed as 7; and 8 is what the checkpoint differs in.
    assert publisher.version == STORED + 4
    await stand.holds(STORED + 4, trained)
    assert stand.full_copies == []


async def test_a_trainer_that_wakes_up_is_fenced(site: Site) -> None:
    """Stopped, not dead: its successor has resumed the run, and it hears that it is over."""
    mine = weights()
    replica = await site.replica(mine)
    with Processes(1, lead, site.run, "between", timeout_s=60, broker_url=site.url) as processes:
        await asyncio.to_thread(processes.wait, "there")
        processes.stop(0)
        trained = checkpoint(STORED)
        publisher = await _come_back(trained, site.run, site.url, resume="must")
        site.ends(publisher)
        assert publisher.version == STORED + 1
        processes.resume(0)
        processes.mark("go on")
        step(trained, 70)
        update = await publisher.publish()
        assert (await update.wait_applied(timeout_s=10)).complete
        (said,) = await asyncio.to_thread(processes.results)
        assert "is fenced off" in said
        await replica.wait_version(update.version, timeout_s=10)
        assert same_bits(trained, mine)


async def test_a_directory_remembers_what_the_bus_has_forgotten(
    site: Site, bus: NatsBus, tmp_path: Path
) -> None:
    """The broker loses a run whose log is in a directory, and a trainer starts it again: it begins
    above every epoch and version that is there, and what is there goes in its turn."""
    folder = tmp_path / "log"
    folder.mkdir()
    trained = weights()
    first = await site.publisher(trained, log=f"dir:{folder}")
    for version in range(1, 4):
        step(trained, version)
        await first.publish()
        await until_stored(first, version)
    await first.close()
    await bus.delete_stream(Subjects(site.run).journal_stream, timeout_s=5.0)
    policy = replace(QUICK, anchor_every=1, keep_versions=1)
    second = await site.publisher(trained, log=f"dir:{folder}", policy=policy)
    assert second.version == 4
    state = weights(9)
    replica = await site.replica(state, log=f"dir:{folder}")
    for _ in range(3):
        step(trained, second.version)
        await second.publish()
        await until_stored(second, second.version)
    await eventually(lambda: replica.verified == second.version)
    assert same_bits(trained, state)
    await eventually(lambda: not list((folder / site.run).glob("1-*")))
