"""Which tiers a run's log has: what is said of a slip, and runs that live by each of them."""

import asyncio
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

from runs import QUICK, Ear, Site, same_bits, step, until_stored, weights
from sparsecast import MemoryLog, Replica, SettingsError
from sparsecast.messages.metrics import Event
from sparsecast.workers.tiers import parse_log


def test_tiers_are_read_from_a_line_a_list_or_an_object(tmp_path: Path) -> None:
    """One tier, several with a comma, a sequence, a tier of one's own."""
    folder, own = f"dir:{tmp_path}", MemoryLog()
    assert parse_log("jetstream") == ("jetstream",)
    assert parse_log(f"{folder}, jetstream") == (folder, "jetstream")
    assert parse_log([folder, own]) == (folder, own)
    assert parse_log(own) == (own,)


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("", r"give jetstream, dir:/PATH, or several"),
        ("s3://bucket", r"log 's3://bucket': give jetstream, dir:/PATH, or several"),
        ("dir:", r"give jetstream, dir:/PATH"),
        ("jetstream,dir:/nowhere/at/all", r"no such directory; .*mkdir -p /nowhere/at/all"),
        ("jetstream,jetstream", r"names a tier twice"),
        ([], r"no log: give 'jetstream' or 'dir:/PATH'"),
    ],
    ids=["empty", "unknown", "no path", "no directory", "twice", "none"],
)
def test_a_slip_is_told_with_what_to_type(setting: Any, says: str) -> None:
    """A tier that does not exist is refused when the object is made, not when it is needed."""
    with pytest.raises(SettingsError, match=says):
        parse_log(setting)
    with pytest.raises(SettingsError, match=says):
        Replica(weights(), run="r", bus="nats://h:1", name="w", log=setting)


@pytest.mark.parametrize("tiers", ["dir", "dir,jetstream", "jetstream,dir", "memory"])
async def test_a_late_worker_lives_by_any_tier(site: Site, tmp_path: Path, tiers: str) -> None:
    """Three versions were published before a worker with other weights comes: the log gives it an
    anchor and the patches, whatever its tiers are, and it follows from there."""
    log: Any = tiers.replace("dir", f"dir:{tmp_path}") if tiers != "memory" else MemoryLog()
    trained = weights()
    publisher = await site.publisher(trained, log=log)
    for version in range(3):
        step(trained, version)
        await publisher.publish()
    late = weights(9)
    replica = await site.replica(late, log=log)
    assert await replica.wait_version(3, timeout_s=20) == 3
    assert same_bits(late, trained)
    step(trained, 7)
    update = await publisher.publish()
    report = await update.wait_applied(timeout_s=20)
    assert sorted(report.applied) == ["w0"]
    assert same_bits(late, trained)
    if "dir" in tiers:
        [anchor] = (tmp_path / site.run).glob("1-anchor-*.safetensors")
        assert safetensors.torch.load_file(anchor).keys() == trained.keys()


async def test_a_worker_goes_around_a_damaged_anchor(site: Site, tmp_path: Path) -> None:
    """The newest anchor has a flipped bit, and the directory is all there is: a late worker comes
    to the newest version by the older anchor and the patches after it."""
    log, trained = f"dir:{tmp_path}", weights()
    often = replace(QUICK, anchor_every=2)
    publisher = await site.publisher(trained, log=log, policy=often)
    for version in range(4):
        await until_stored(publisher, version, anchor=version % 2 == 0)
        if version < 3:
            step(trained, version)
            await publisher.publish()
    [anchor] = (tmp_path / site.run).glob("1-anchor-2-*.safetensors")
    data = bytearray(anchor.read_bytes())
    data[-1] ^= 1
    anchor.write_bytes(data)
    late = weights(9)
    worker = await site.replica(late, log=log, policy=often)
    await worker.wait_version(3, timeout_s=20)
    assert same_bits(late, trained)
    assert [
        e.name for e in await worker.ports.log.entries(timeout_s=5) if "anchor-2" in e.name
    ] == []


async def test_a_directory_that_vanishes_is_told_and_the_run_goes_on(
    site: Site, ear: Ear, tmp_path: Path
) -> None:
    """The shared disk is unmounted in the middle of a run: the event log-failed names it, updates
    are stored in JetStream, and a late worker has them from there."""
    folder = tmp_path / "shared"
    folder.mkdir()
    log = f"dir:{folder},jetstream"
    trained = weights()
    publisher = await site.publisher(trained, log=log)
    late = await site.replica(weights(3), name="late", log=log)
    await late.wait_version(0, timeout_s=20)
    await asyncio.to_thread(shutil.rmtree, folder)
    step(trained, 1)
    await publisher.publish()
    event = await ear.until(Event, kind="log-failed")
    assert f"tier dir:{folder} of the log fails" in event.reason
    later = weights(4)
    replica = await site.replica(later, name="later", log="jetstream")
    await replica.wait_version(1, timeout_s=20)
    assert same_bits(later, trained)


@pytest.mark.parametrize("how", ["flipped", "cut", "removed"])
async def test_a_joiner_gets_in_though_the_only_anchor_is_lost(
    site: Site, ear: Ear, tmp_path: Path, how: str
) -> None:
    """The log is a directory, and the one anchor in it is damaged or gone, which nobody knows until
    a worker needs it: the trainer hears of that, says what is wrong, and stores another."""
    log = f"dir:{tmp_path}"
    trained, state = weights(), weights(9)
    publisher = await site.publisher(trained, log=log)
    await until_stored(publisher, 0, anchor=True)
    step(trained, 1)
    await publisher.publish()
    await until_stored(publisher, 1)
    (anchor,) = (tmp_path / site.run).glob("*anchor*")
    data = anchor.read_bytes()
    if how == "removed":
        anchor.unlink()
    else:
        flipped = data[:-1] + bytes([data[-1] ^ 1])
        anchor.write_bytes(flipped if how == "flipped" else data[:-9])
    replica = await site.replica(state, log=log)
    await replica.wait_version(1, timeout_s=20)
    assert same_bits(trained, state)
    told = [e.reason for e in ear.heard if isinstance(e, Event) and e.kind == "log-failed"]
    assert any("another is stored" in reason for reason in told), told
