"""Trainers that die and come back, from the head, an older checkpoint or a log that has suffered;
and old versions that are published again."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from runs import QUICK, Ear, Site, Tensors, eventually, same_bits, step, until_stored, weights
from sparsecast import (
    AsyncPublisher,
    Broker,
    CannotResume,
    Fenced,
    LogHole,
    MemoryLog,
    Publisher,
    Replica,
    RunBusy,
    SettingsError,
    digest,
)
from sparsecast.messages.control import LogEntry
from sparsecast.messages.metrics import Event, TrainerMetrics
from sparsecast.pipeline.bus.journal import JournalState
from sparsecast.pipeline.windows.gloo import GlooWindow
from sparsecast.workers.archive import Archive
from sparsecast.workers.recall import Recall
from spawn import Context, Processes

STORED = 4


def checkpoint(version: int) -> Tensors:
    """What lead() had published as this version."""
    tensors = weights()
    for seed in range(1, version + 1):
        step(tensors, seed)
    return tensors


async def never(*_: Any, **__: Any) -> Any:
    """What hangs."""
    await asyncio.sleep(3600)


async def lead(context: Context, run: str, end: str) -> str:
    """A trainer process: versions up to STORED come into the log, and it ends as it is told:
    "between" rounds, in the "middle" of the next one, or with the next one applied, and "unstored";
    or "again": it resumes, publishes the next version, and stores no anchor."""
    start = 0 if end != "again" else STORED
    trained = checkpoint(start)
    if end == "again":
        Archive.anchor = never  # type: ignore[method-assign]
    publisher = await _come_back(trained, run, context.broker_url)
    await publisher.wait_members(1, timeout_s=20)
    for version in range(start + 1, (STORED if end != "again" else STORED + 1) + 1):
        step(trained, version)
        update = await publisher.publish()
        assert (await update.wait_applied(timeout_s=10)).complete
        await until_stored(publisher, update.version)
    if end in ("middle", "unstored"):
        step(trained, STORED + 1)
        Archive.store = never  # type: ignore[method-assign]
        if end == "middle":
            await eventually(lambda: publisher.window == "gloo")
            GlooWindow.send = never  # type: ignore[method-assign]
        update = await publisher.publish()
        await eventually(lambda: publisher._core is not None and publisher._core.busy)
        if end == "middle":
            await asyncio.sleep(0.3)
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

        async def counted(entry: LogEntry, *, timeout_s: float) -> Any:
            self.loaded.append(entry)
            return await load(entry, timeout_s=timeout_s)

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


# ---- what there is to go on from


async def _published(site: Site, versions: int, **options: Any) -> list[int]:
    """A run with so many versions in its log, left in order; the digest of each."""
    trained, digests = weights(), []
    publisher = await site.publisher(trained, **options)
    digests.append(digest(trained))
    for version in range(1, versions + 1):
        step(trained, version)
        await publisher.publish()
        await until_stored(publisher, version)
        digests.append(digest(trained))
    await publisher.close()
    return digests


async def test_nothing_to_go_on_from(site: Site, tmp_path: Path, ear: Ear) -> None:
    """A run that never was, and one whose log is not this one: "must" refuses, says what is missing
    and holds nothing; "auto" begins with the weights that it has."""
    with pytest.raises(CannotResume, match="journal has no claim"):
        await site.publisher(weights(), resume="must")
    await _published(site, 2)
    with pytest.raises(CannotResume, match="of its 0 entries none leads") as caught:
        await site.publisher(checkpoint(1), resume="must", log=f"dir:{tmp_path}")
    assert 'start it with resume="auto"' in str(caught.value)
    publisher = await site.publisher(checkpoint(1), log=f"dir:{tmp_path}")
    assert publisher.version == 3
    told = await ear.until(Event, kind="resume")
    assert told.reason.startswith("not from the log: the log has no unbroken way")


async def test_never(site: Site) -> None:
    """It is not asked for: the claim has the weights themselves."""
    await _published(site, 2)
    trained, mine = checkpoint(1), weights(seed=4)
    publisher = await site.publisher(trained, resume="never")
    assert publisher.version == 3
    replica = await site.replica(mine)
    await replica.wait_version(3, timeout_s=10)
    assert same_bits(trained, mine)
    with pytest.raises(SettingsError, match="resume is one of"):
        Publisher(weights(), run="r", resume="always")  # type: ignore[arg-type]


async def test_another_model(site: Site) -> None:
    """The manifest has changed: there is nothing to diff against."""
    await _published(site, 1)
    grown = weights() | {"new": weights()["embed"]}
    with pytest.raises(CannotResume, match=r"another one .*'new'"):
        await site.publisher(grown, resume="must")
    publisher = await site.publisher(grown)
    assert publisher.version == 2


Damage = Callable[[LogEntry, bytes], tuple[LogEntry, bytes]]


def _flipped(entry: LogEntry, data: bytes) -> tuple[LogEntry, bytes]:
    at = len(data) // 2
    return entry, data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def _lying(entry: LogEntry, data: bytes) -> tuple[LogEntry, bytes]:
    return msgspec.structs.replace(entry, digest=entry.digest ^ 1), data


@pytest.mark.parametrize("damage", [_flipped, _lying], ids=["bytes", "digest"])
async def test_around_a_damaged_entry(site: Site, ear: Ear, damage: Damage) -> None:
    """The newest patch is not what was stored: it goes on from the version before, and tells. With
    all anchors damaged there is nothing."""
    log = MemoryLog()
    digests = await _published(site, 3, log=log)
    (newest,) = [name for name, (entry, _) in log._held.items() if entry.version == 3]
    log._held[newest] = damage(*log._held[newest])
    trained, mine = checkpoint(1), checkpoint(2)
    publisher = await site.publisher(trained, resume="must", log=log)
    assert publisher.version == 5
    told = await ear.until(Event, kind="log-failed")
    assert newest in told.reason
    replica = await site.replica(mine, log=log)
    await replica.wait_version(5, timeout_s=10)
    assert same_bits(trained, mine)
    assert digest(mine) == digests[1]
    await publisher.close()
    await replica.close()
    for name, (entry, data) in list(log._held.items()):
        if entry.base_version is None:
            log._held[name] = _flipped(entry, data)
    with pytest.raises(CannotResume, match="none leads from an anchor on"):
        await site.publisher(weights(seed=9), resume="must", log=log)


def _flip_a_byte(root: Path, pattern: str) -> None:
    (file,) = root.glob(pattern)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


async def test_a_damaged_file(site: Site, tmp_path: Path, ear: Ear) -> None:
    """The same in a directory, whose files are checked as they are read."""
    log = f"dir:{tmp_path}"
    await _published(site, 3, log=log)
    _flip_a_byte(tmp_path, "*/1-patch-2-3-*")
    publisher = await site.publisher(checkpoint(2), resume="must", log=log)
    assert publisher.version == 4
    assert (await ear.until(Event, kind="resume")).reason == "goes on from version 2"


async def test_the_lease_is_kept_meanwhile(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading the log takes longer than a lease lasts: nobody else gets the run."""
    await _published(site, 1)
    policy = replace(QUICK, lease_s=1)
    head = Recall.head

    async def slow(recall: Recall, state: JournalState) -> Any:
        await asyncio.sleep(2.5)
        return await head(recall, state)

    monkeypatch.setattr(Recall, "head", slow)
    coming = asyncio.ensure_future(site.publisher(checkpoint(1), resume="must", policy=policy))
    await asyncio.sleep(2.0)
    with pytest.raises(RunBusy):
        await site.publisher(checkpoint(1), resume="never")
    assert (await coming).version == 2


async def test_a_log_that_hangs(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not give what it lists: the wait has an end, and a name."""
    log = MemoryLog()
    await _published(site, 1, log=log)
    monkeypatch.setattr(log, "load", never)
    policy = replace(QUICK, resume_s=0.3)
    with pytest.raises(CannotResume, match=r"within 0\.3 s \(Policy\.resume_s\)"):
        await site.publisher(weights(), resume="must", log=log, policy=policy)
    assert (await site.publisher(weights(), log=log, policy=policy)).version == 2


# ---- back to an old version


async def test_rollback(site: Site, ear: Ear) -> None:
    """Back to version 1, then back to what was undone; the trainer's own weights stay, and its next
    publish() brings them again."""
    trained, mine = weights(), weights()
    publisher = await site.publisher(trained)
    replica = await site.replica(mine)
    await publisher.wait_members(1, timeout_s=10)
    for version in range(1, 4):
        step(trained, version)
        await publisher.publish()
        await until_stored(publisher, version)
    back = await publisher.rollback(1, step=7, tags={"why": "reward fell"})
    assert (back.base_version, back.version) == (3, 4)
    assert 0 < back.nbytes < back.dense_nbytes
    assert (await back.wait_applied(timeout_s=10)).complete
    assert same_bits(checkpoint(1), mine)
    assert same_bits(checkpoint(3), trained)
    assert replica.origin(4) == (7, {"why": "reward fell"})
    told = await ear.until(Event, kind="rollback")
    assert told.reason == "version 4 has the contents of version 1"
    await until_stored(publisher, 4)
    undone = await publisher.rollback(3)
    assert (await undone.wait_applied(timeout_s=10)).complete
    assert same_bits(checkpoint(3), mine)
    await until_stored(publisher, 5)
    again = await publisher.rollback(4)
    assert (await again.wait_applied(timeout_s=10)).complete
    assert same_bits(checkpoint(1), mine)
    update = await publisher.publish()
    assert update.version == 7
    assert (await update.wait_applied(timeout_s=10)).complete
    assert same_bits(trained, mine)
    await eventually(lambda: replica.verified == 7)
    assert replica.mismatches == 0


async def test_what_the_log_does_not_have(site: Site) -> None:
    """A version that nobody made, and one that was merged into the next: nothing is published."""
    publisher = await site.publisher(weights())
    await publisher.publish()
    await until_stored(publisher, 1)
    for version in (7, -1):
        with pytest.raises(LogHole, match=f"to version {version} of run"):
            await publisher.rollback(version)
    assert publisher.version == 1
    assert (await publisher.rollback(1)).changed == 0


async def test_back_to_an_earlier_epoch(site: Site) -> None:
    """The trainer has restarted, and its own anchor has not replaced the old entries yet."""
    await _published(site, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Archive, "anchor", never)
        publisher = await site.publisher(checkpoint(2), resume="must")
        mine = checkpoint(2)
        await site.replica(mine)
        await publisher.wait_members(1, timeout_s=10)
        for version in (1, 3):
            back = await publisher.rollback(version)
            assert (await back.wait_applied(timeout_s=10)).complete
            assert same_bits(checkpoint(1 if version == 1 else 2), mine)


def test_rollback_from_synchronous_code(broker: Broker, run: str) -> None:
    """Publisher has it as well, and gives an Update."""
    trained, mine = weights(), weights()
    with Publisher(trained, run=run, bus=broker.url, policy=QUICK, on_busy="wait") as publisher:
        replica = Replica(mine, run=run, bus=broker.url, name="w0", policy=QUICK)
        replica.start()
        publisher.wait_members(1, timeout_s=10)
        for version in (1, 2):
            step(trained, version)
            publisher.publish().wait_applied(timeout_s=10)
        publisher._call(until_stored(publisher._inner, 2))
        back = publisher.rollback(1)
        assert back.wait_applied(timeout_s=10).complete
        assert back.version == publisher.version == 3
        assert same_bits(checkpoint(1), mine)
        replica.stop()
