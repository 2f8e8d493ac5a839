"""What a trainer stores: anchors that fail, logs that cannot be pruned, a successor's entries."""

import asyncio
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from archives import Stand
from runs import step
from sparsecast import LogError
from sparsecast.messages.control import LogEntry
from sparsecast.pipeline.core import events as ev
from sparsecast.pipeline.log.directory import DirectoryLog
from sparsecast.workers.entries import PatchPayloads


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


# ---- the anchor that stays


async def test_an_anchor_is_read_back_before_anything_goes() -> None:
    """Anchors at 0, 2 and 4: none is read while all stays; then the newest, once, and only then the
    oldest goes."""
    stand = Stand()
    await stand.anchor()
    for _ in range(3):
        await stand.publish()
        if stand.archive.due(stand.outgoing.version):
            await stand.anchor()
    assert stand.log.loaded == []
    await stand.publish()
    seen: list[list[str]] = []
    stand.log.before_load = lambda entry: seen.append(stand.names)
    await stand.anchor()
    assert stand.log.loaded == ["1-anchor-4"]
    assert "1-anchor-0" in seen[0]
    assert "1-anchor-0" not in stand.names
    assert stand.told == []


@pytest.mark.parametrize("lost", [False, True], ids=["flipped", "lost"])
async def test_a_damaged_anchor_prunes_nothing(lost: bool) -> None:
    """The newest anchor cannot be had as it was stored: told, nothing goes, and another one takes
    its place; that one is whole, and what it makes needless goes."""
    stand = Stand()
    await stand.anchor()
    for _ in range(3):
        await stand.publish()
        if stand.archive.due(stand.outgoing.version):
            await stand.anchor()
    await stand.publish()
    before, seen = stand.names, list[list[str]]()

    def harm(entry: LogEntry) -> None:
        seen.append(stand.names)
        if len(seen) == 1:
            if lost:
                del stand.log._held[entry.name]
            else:
                stand.log.flip(entry.name)

    stand.log.before_load = harm
    await stand.anchor()
    assert seen == [[*before, "1-anchor-4"]] * 2
    assert stand.log.stored.count("1-anchor-4") == 2
    assert len(stand.told) == 1
    assert "all stays, another anchor is stored" in stand.told[0]
    assert stand.names == ["1-patch-1-2", "1-anchor-2", "1-patch-2-3", "1-patch-3-4", "1-anchor-4"]
    entry, data = stand.log._held["1-anchor-4"]
    assert PatchPayloads().checksum(data) == entry.checksum


async def test_an_anchor_that_cannot_be_read_now_prunes_nothing() -> None:
    """The log does not answer, and the anchor is listed all the same: told, all stays, no second
    copy is stored; the next turn reads it, and prunes."""
    stand = Stand()
    await stand.anchor()
    for _ in range(2):
        await stand.publish()
    await stand.anchor()
    for _ in range(2):
        await stand.publish()
    stand.log.failing_loads = 1
    await stand.anchor()
    assert stand.told == ["pruning: cannot be read"]
    assert stand.names[0] == "1-anchor-0"
    assert stand.log.stored.count("1-anchor-4") == 1
    for _ in range(2):
        await stand.publish()
    await stand.anchor()
    assert stand.names[0] == "1-patch-3-4"
    assert len(stand.told) == 1


async def test_a_damaged_file_of_an_anchor(tmp_path: Path) -> None:
    """The same in a directory, which finds the damage itself and lists the file no more: another
    anchor is stored in its place."""
    stand = Stand()
    payloads = PatchPayloads(lambda: stand.outgoing.manifest)
    log = stand.ports.log = DirectoryLog(tmp_path, "r", payloads, tell=lambda reason: None)
    await stand.anchor()
    for _ in range(2):
        await stand.publish()
    await stand.anchor()
    await stand.publish()
    await stand.publish()
    load, harmed = log.load, []

    async def harm(entry: LogEntry, **options: Any) -> Any:
        if not harmed:
            harmed.append(entry.name)
            with (tmp_path / "r" / f"{entry.name}.safetensors").open("r+b") as file:
                file.seek(-1, 2)
                last = file.read(1)[0]
                file.seek(-1, 2)
                file.write(bytes([last ^ 1]))
        return await load(entry, **options)

    log.load = harm  # type: ignore[method-assign]
    await stand.anchor()
    assert harmed == ["1-anchor-4"]
    assert len(stand.told) == 1
    names = [one.name for one in await log.entries(timeout_s=5)]
    assert names == ["1-patch-1-2", "1-anchor-2", "1-patch-2-3", "1-patch-3-4", "1-anchor-4"]
    [anchor] = [one for one in await log.entries(timeout_s=5) if one.name == "1-anchor-4"]
    assert payloads.checksum(await load(anchor, timeout_s=5)) == anchor.checksum


async def test_a_damaged_anchor_is_mended_when_a_member_needs_one() -> None:
    """A bit of the only anchor flips in the log: asked to see to it, the archive reads it, says
    what is wrong, and stores another of the newest version; asked again, it reads that, and it is
    well."""
    stand = Stand(anchor_every=100)
    await stand.anchor()
    await stand.publish()
    stand.log.flip("1-anchor-0")
    await stand.archive.mend(lambda: stand.epoch)
    assert stand.names == ["1-patch-0-1", "1-anchor-1"]
    (told,) = stand.told
    assert "'1-anchor-0' is damaged" in told
    assert "another is stored" in told
    stand.log.loaded.clear()
    await stand.archive.mend(lambda: stand.epoch)
    assert stand.log.loaded == ["1-anchor-1"]
    assert len(stand.told) == 1


async def test_a_lost_anchor_is_mended() -> None:
    """Somebody has removed the only anchor: another one is stored."""
    stand = Stand(anchor_every=100)
    await stand.anchor()
    await stand.publish()
    del stand.log._held["1-anchor-0"]
    await stand.archive.mend(lambda: stand.epoch)
    assert stand.names == ["1-patch-0-1", "1-anchor-1"]
    assert "no anchor" in stand.told[0]


async def test_a_log_that_cannot_be_read_is_not_mended() -> None:
    """The anchor cannot be read just now: it is told, and stays, for it may be sound."""
    stand = Stand()
    await stand.anchor()
    stand.log.failing_loads = 1
    await stand.archive.mend(lambda: stand.epoch)
    assert stand.names == ["1-anchor-0"]
    assert stand.told == ["mending: cannot be read"]


@pytest.mark.parametrize("fault", ["store", "entries", "full"])
async def test_versions_that_could_not_be_stored_are_kept_as_one(fault: str) -> None:
    """Three versions wait, and the log refuses them: it fails, or cannot say whether there is room,
    or there is none. They are one patch then, under the last of them, and stored as that: there is
    no hole behind the anchor."""
    stand = Stand(quota_nbytes=250_000)
    await stand.anchor()
    for _ in range(3):
        step(stand.trained, stand.outgoing.version)
        stand.outgoing.publish(None, None)
        stand.outgoing.take(())
    refused = mock.AsyncMock(side_effect=LogError("it is away"))
    patched = {
        "store": mock.patch.object(stand.log, "store", refused),
        "entries": mock.patch.object(stand.log, "entries", refused),
        "full": mock.patch.object(stand.archive, "_has_room", mock.AsyncMock(return_value=False)),
    }
    with patched[fault]:
        failed = await stand.archive.store((1, 2, 3), 1)
    assert isinstance(failed, ev.LogFailed)
    assert ("an anchor is taken now" in failed.reason) == (fault == "full")
    assert isinstance(await stand.archive.store((3,), 1), ev.LogStored)
    assert stand.names == ["1-anchor-0", "1-patch-0-3"]
