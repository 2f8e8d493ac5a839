"""What a trainer finds to go on from: nothing, another model, a log that has suffered or hangs."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from rooted import Roots
from runs import QUICK, Ear, Site, checkpoint, eventually, hangs, published, same_bits, weights
from sparsecast import CannotResume, MemoryLog, Publisher, RunBusy, SettingsError, digest
from sparsecast.messages.control import LogEntry
from sparsecast.messages.metrics import Event
from sparsecast.pipeline.bus.journal import Journal, JournalState
from sparsecast.pipeline.bus.nats import NatsBus
from sparsecast.pipeline.log.jetstream import JetStreamLog
from sparsecast.pipeline.log.pieces import WholeLog
from sparsecast.workers.recall import Recall


async def test_nothing_to_go_on_from(site: Site, tmp_path: Path, ear: Ear) -> None:
    """A run that never was, and one whose log is not this one: "must" refuses, says what is missing
    and holds nothing; "auto" begins with the weights that it has."""
    with pytest.raises(CannotResume, match="journal has no claim"):
        await site.publisher(weights(), resume="must")
    await published(site, 2)
    with pytest.raises(CannotResume, match="of its 0 entries none leads") as caught:
        await site.publisher(checkpoint(1), resume="must", log=f"dir:{tmp_path}")
    assert 'start it with resume="auto"' in str(caught.value)
    publisher = await site.publisher(checkpoint(1), log=f"dir:{tmp_path}")
    assert publisher.version == 3
    told = await ear.until(Event, kind="resume")
    assert told.reason.startswith("not from the log: the log has no unbroken way")


async def test_never(site: Site) -> None:
    """It is not asked for: the claim has the weights themselves."""
    await published(site, 2)
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
    await published(site, 1)
    grown = weights() | {"new": weights()["embed"]}
    with pytest.raises(CannotResume, match=r"another one .*'new'"):
        await site.publisher(grown, resume="must")
    with pytest.raises(CannotResume, match="in another order"):
        await site.publisher(dict(reversed(weights().items())), resume="must")
    publisher = await site.publisher(grown)
    assert publisher.version == 2


async def test_what_ranks_have_stored_by_themselves(site: Site, bus: NatsBus) -> None:
    """The run was published by a trainer of two ranks, whose layouts the journal has: one of one
    rank makes its state again from their pieces, and publishes what its weights differ in."""
    roots, log = Roots(2), WholeLog(JetStreamLog(bus, site.run))
    journal = Journal(bus, site.run)
    await journal.open(5.0)
    await journal.append(roots.claim(), message_id="c", expected_sequence=0, timeout_s=5.0)
    for entry, payload in roots.anchor():
        await log.store(entry, payload, timeout_s=5.0)
    trained, mine = weights(seed=1), weights()
    publisher = await site.publisher(trained, resume="must")
    assert publisher.version == 2
    replica = await site.replica(mine)
    await eventually(lambda: replica.verified == 2)
    assert same_bits(trained, mine)


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
    digests = await published(site, 3, log=log)
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
    await published(site, 3, log=log)
    _flip_a_byte(tmp_path, "*/1-patch-2-3-*")
    publisher = await site.publisher(checkpoint(2), resume="must", log=log)
    assert publisher.version == 4
    assert (await ear.until(Event, kind="resume")).reason == "goes on from version 2"


async def test_the_lease_is_kept_meanwhile(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading the log takes longer than a lease lasts: nobody else gets the run."""
    await published(site, 1)
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
    await published(site, 1, log=log)
    monkeypatch.setattr(log, "load", hangs)
    policy = replace(QUICK, resume_s=0.3)
    with pytest.raises(CannotResume, match=r"within 0\.3 s \(Policy\.resume_s\)"):
        await site.publisher(weights(), resume="must", log=log, policy=policy)
    assert (await site.publisher(weights(), log=log, policy=policy)).version == 2
