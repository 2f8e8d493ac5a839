"""Patches that a trainer merges in its log: which, how they fail, and what they spare a worker."""

import asyncio
import threading
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from archives import Stand
from runs import QUICK, Ear, Site, Tensors, eventually, same_bits, step, until_stored, weights
from sparsecast import AsyncPublisher, LogHole, MemoryLog, Patch, apply, digest
from sparsecast.messages.control import LogEntry
from sparsecast.messages.metrics import Event
from sparsecast.pipeline.core.policy import Policy
from sparsecast.pipeline.log.base import way
from sparsecast.workers import archive as module
from sparsecast.workers.entries import PatchPayloads
from spawn import Context, Processes

#: An anchor at the start alone.
SPANS: dict[str, Any] = {"merge_every": 2, "anchor_every": 100, "keep_versions": 100}


def merged(stand: Stand) -> list[str]:
    """The merged entries in the log."""
    return sorted(name for name in stand.names if "-merged-" in name)


async def live(stand: Stand, versions: int) -> None:
    """Publish and store so many versions, and merge when it is time."""
    for _ in range(versions):
        await stand.publish()
        if stand.archive.mergeable:
            await stand.merge()


async def test_spans_are_merged_and_those_again() -> None:
    """Nine versions, merged by twos: each merged entry makes of the state where it begins, and of
    any within it, the bits of the one where it ends; its digest, step and checksum are that one's;
    and the wider one was made of the narrower ones."""
    stand = Stand(**SPANS)
    states = [weights()]
    for version in range(1, 10):
        await live(stand, 1)
        states.append({name: tensor.clone() for name, tensor in stand.trained.items()})
        assert stand.outgoing.version == version
    names = ["0-2", "0-4", "0-8", "2-4", "4-6", "4-8", "6-8"]
    assert merged(stand) == [f"1-merged-{name}" for name in names]
    for entry, data in stand.log._held.values():
        if entry.merged:
            assert entry.merged == 2
            assert entry.base_version is not None
            assert entry.digest == digest(states[entry.version])
            assert entry.checksum == PatchPayloads().checksum(data)
            for base in range(entry.base_version, entry.version):
                mine = {name: tensor.clone() for name, tensor in states[base].items()}
                apply(Patch.from_bytes(data), mine)
                assert same_bits(mine, states[entry.version])
    assert stand.log.loaded[-2:] == ["1-merged-0-4", "1-merged-4-8"]
    assert stand.told == []


async def test_coalesced_patches_are_merged() -> None:
    """Patches of three versions each: the first two end behind a multiple of four, and become one;
    the others are one by themselves."""
    stand = Stand(**SPANS | {"merge_every": 4})
    for _ in range(4):
        await stand.publish(times=3)
        if stand.archive.mergeable:
            await stand.merge()
    assert merged(stand) == ["1-merged-0-6"]
    assert stand.told == []


@pytest.mark.parametrize(
    ("policy", "share"),
    [({"merge_every": 1}, 0.02), ({"anchor_every": 1}, 0.02), ({}, 0.9)],
    ids=["off", "anchors-are-nearer", "as-large-as-an-anchor"],
)
async def test_nothing_is_merged_for_nothing(policy: dict[str, int], share: float) -> None:
    """Turned off; anchors lie closer than spans; nearly all changes in each step, so that an
    anchor is the better way."""
    stand = Stand(**SPANS | policy)
    for _ in range(5):
        await stand.publish(share)
        await stand.merge()
    assert merged(stand) == []
    assert stand.told == []


async def test_patches_that_share_nothing_are_merged_no_further() -> None:
    """A merged entry that is no smaller than its parts would be kept for nothing."""
    stand = Stand(**SPANS)
    for _ in range(2):
        await stand.publish()
    real = module.merge

    def padded(patches: Any, **options: Any) -> Patch:
        made = real(patches, **options)
        room = torch.zeros(sum(one.nbytes for one in patches) - made.nbytes, dtype=torch.uint8)
        made.buffer = torch.cat([made.buffer, room])
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "merge", padded)
        await stand.merge()
    assert merged(stand) == []


async def test_a_span_that_fails_is_told_once_and_left() -> None:
    """The log refuses three times, and gives bytes with a flipped bit: one event for the series;
    no span is tried twice, and the spans after them are merged."""
    stand = Stand(**SPANS)
    for _ in range(3):
        await stand.publish()
        await stand.publish()
        stand.log.failing_stores = 1
        await stand.merge()
        assert stand.log.failing_stores == 0
    assert stand.told == ["merging: no room on the disk"]
    await stand.publish()
    stand.log.flip("1-patch-6-7")
    await live(stand, 1)
    assert len(stand.told) == 1
    assert merged(stand) == []
    await live(stand, 2)
    assert merged(stand) == ["1-merged-8-10"]
    await stand.publish()
    stand.log.flip("1-patch-10-11")
    await live(stand, 1)
    assert len(stand.told) == 2
    assert "its checksum is" in stand.told[1]


async def test_what_was_pruned_meanwhile_is_no_failure() -> None:
    """Somebody prunes by hand while a span is read: nothing is told, and nothing half is stored."""
    stand = Stand(**SPANS)
    await stand.publish()
    await stand.publish()
    stand.log.before_load = lambda entry: stand.log._held.clear()
    await stand.merge()
    assert stand.names == []
    assert stand.told == []


async def test_a_new_epoch_ends_a_merge() -> None:
    """The run is claimed anew while a span is read: nothing is stored any more."""
    stand = Stand(**SPANS)
    for _ in range(4):
        await stand.publish()

    def reclaim(entry: LogEntry) -> None:
        stand.epoch = 2

    stand.log.before_load = reclaim
    await stand.merge()
    assert stand.log.loaded == ["1-patch-0-1"]
    assert merged(stand) == []
    assert stand.told == []


async def test_one_merge_at_a_time() -> None:
    """Two are asked for at once, and versions come while the first one works: it goes on with them,
    and no entry is read by two."""
    stand = Stand(**SPANS)
    await stand.publish()
    await stand.publish()
    first = asyncio.create_task(stand.merge())
    second = asyncio.create_task(stand.merge())
    await asyncio.sleep(0)
    assert not stand.archive.mergeable
    await stand.publish()
    await stand.publish()
    await asyncio.gather(first, second)
    assert merged(stand) == ["1-merged-0-2", "1-merged-0-4", "1-merged-2-4"]
    assert len(stand.log.loaded) == 6


@pytest.mark.parametrize("at_once", [1.0, 0.3, 0.15, 0.001], ids=str)
async def test_the_memory_of_a_merge_is_bounded(
    monkeypatch: pytest.MonkeyPatch, at_once: float
) -> None:
    """Eight patches: as many at a time as have that part of the weights' bytes, or one; they are
    read when the ones before them are one already."""
    monkeypatch.setattr(module, "AT_ONCE", at_once)
    stand = Stand(**SPANS | {"merge_every": 8})
    most = stand.outgoing.manifest.nbytes * at_once
    given: list[list[Patch]] = []
    real = module.merge

    def counted(patches: Any, **options: Any) -> Patch:
        given.append(list(patches[1:] if given else patches))
        assert len(stand.log.loaded) == sum(map(len, given))
        return real(patches, **options)

    monkeypatch.setattr(module, "merge", counted)
    await live(stand, 8)
    assert sum(map(len, given)) == 8
    for batch in given:
        assert len(batch) == 1 or sum(patch.nbytes for patch in batch) <= most
    for batch, following in pairwise(given):
        assert sum(patch.nbytes for patch in [*batch, following[0]]) > most
    assert merged(stand) == ["1-merged-0-8"]


async def test_old_patches_go_when_they_are_merged() -> None:
    """Two versions are promised: the merged ones take the place of what is older, once the anchor
    was read back; every version that is left leads on to the head."""
    stand = Stand(**SPANS | {"keep_versions": 2})
    await stand.anchor()
    await live(stand, 5)
    assert stand.log.loaded.count("1-anchor-0") == 1
    await live(stand, 2)
    assert stand.log.loaded.count("1-anchor-0") == 1
    single = [name for name in stand.names if "-patch-" in name]
    assert single == ["1-patch-4-5", "1-patch-5-6", "1-patch-6-7"]
    await live(stand, 1)
    entries = await stand.log.entries(timeout_s=1)
    for held in range(8):
        assert way(entries, epoch=1, held=held, target=8)
    for exact in (7, 8):
        until = [entry for entry in entries if entry.version <= exact]
        assert way(until, epoch=1, held=None, target=exact)
    with pytest.raises(LogHole):
        way([e for e in entries if e.version <= 3], epoch=1, held=None, target=3)


async def test_a_damaged_anchor_keeps_what_was_merged() -> None:
    """The only anchor is damaged when old patches could go: told, and all stay until another anchor
    was stored and read back."""
    stand = Stand(**SPANS | {"keep_versions": 1})
    await stand.anchor()
    stand.log.flip("1-anchor-0")
    await stand.publish()
    await stand.publish()
    seen: dict[str, list[str]] = {}
    stand.log.before_load = lambda entry: seen.update({entry.name: stand.names})
    await stand.merge()
    assert "log entry '1-anchor-0' is damaged" in stand.told[0]
    assert seen["1-anchor-2"] == ["1-patch-0-1", "1-patch-1-2", "1-merged-0-2", "1-anchor-2"]
    assert stand.names == ["1-merged-0-2", "1-anchor-2"]


# ---- a real run

POLICY = replace(QUICK, merge_every=4, keep_versions=100)
BEHIND = 20


async def stored(publisher: AsyncPublisher, name: str) -> None:
    """Wait until the log has an entry whose name begins so."""

    async def there() -> bool:
        entries = await publisher._ports.log.entries(timeout_s=5)
        return any(entry.name.startswith(name) for entry in entries)

    await eventually(there)


class Watched:
    """A worker, and the entries that it takes from the log."""

    def __init__(self, site: Site, name: str, log: str) -> None:
        self.tensors = weights()
        self.taken: list[LogEntry] = []
        self._site, self._options = site, {"name": name, "log": log}

    async def begin(self, **options: Any) -> None:
        """The worker starts."""
        self.replica = await self._site.replica(self.tensors, **self._options | options)
        log = self.replica.ports.log
        load = log.load

        async def counted(entry: LogEntry, **options: Any) -> Any:
            self.taken.append(entry)
            return await load(entry, **options)

        log.load = counted  # type: ignore[method-assign]

    async def holds(self, version: int, trained: Tensors) -> None:
        """It comes to hold this version, proven, and these bits, without a full copy."""
        await self.replica.wait_version(version, timeout_s=20)
        await eventually(lambda: self.replica.verified == version)
        assert same_bits(trained, self.tensors)
        assert self.replica.mismatches == 0
        assert all(entry.base_version is not None for entry in self.taken)


@pytest.mark.parametrize("tier", ["jetstream", "dir"])
async def test_a_worker_far_behind_takes_fewer_bytes(
    site: Site, tmp_path: Path, ear: Ear, tier: str
) -> None:
    """Twenty versions behind, by the log alone: two entries, and fewer bytes than the patches that
    were announced, to the very bits. So too a worker that stands within merged patches, since a
    reader held its weights."""
    log = tier if tier == "jetstream" else f"dir:{tmp_path}"
    trained, sizes = weights(), [0]
    publisher = await site.publisher(trained, policy=POLICY, log=log)
    late, held = Watched(site, "late", log), Watched(site, "held", log)
    await held.begin(policy=replace(POLICY, staging_nbytes=1))
    await publisher.wait_members(1, timeout_s=10)

    async def publish(first: int, last: int) -> None:
        for version in range(first, last + 1):
            step(trained, version, 0.05)
            sizes.append((await publisher.publish()).nbytes)
            await until_stored(publisher, version)

    await publish(1, 2)
    await held.replica.wait_version(2, timeout_s=20)
    with held.replica.reading():
        await publish(3, BEHIND)
        await stored(publisher, "1-merged-0-16")
        await stored(publisher, "1-merged-16-20")
        assert held.replica.version == 2
        held.taken.clear()
    await held.holds(BEHIND, trained)
    assert any(entry.merged for entry in held.taken)
    assert len(held.taken) <= 1 + 1 + 3 + 1
    assert sum(entry.nbytes for entry in held.taken) < sum(sizes[4:])
    await late.begin(policy=POLICY)
    await late.holds(BEHIND, trained)
    assert len(late.taken) == 2
    assert sum(entry.nbytes for entry in late.taken) < sum(sizes)
    assert not [one for one in ear.heard if isinstance(one, Event) and one.kind == "log-failed"]


async def test_a_worker_goes_around_a_damaged_merged_patch(site: Site) -> None:
    """The merged patch has a flipped bit: a worker refuses it, and takes the single ones."""
    log, trained = MemoryLog(), weights()
    publisher = await site.publisher(trained, policy=POLICY, log=log)
    for version in range(1, 5):
        step(trained, version)
        await publisher.publish()
        await until_stored(publisher, version)
    await stored(publisher, "1-merged-0-4")
    [(entry, data)] = [held for held in log._held.values() if held[0].merged]
    log._held[entry.name] = entry, data[:-1] + bytes([data[-1] ^ 1])
    mine = weights()
    replica = await site.replica(mine, policy=POLICY, log=log)
    await replica.wait_version(4, timeout_s=10)
    assert same_bits(trained, mine)
    assert replica.mismatches == 0


async def test_back_and_on_by_merged_patches(site: Site) -> None:
    """The single patches are gone where merged ones cover them: a rollback reaches the ends of
    these and every newest version, and a trainer that comes back goes on from the head."""
    policy = replace(POLICY, keep_versions=3)
    trained, states = weights(), [weights()]
    publisher = await site.publisher(trained, policy=policy)
    await until_stored(publisher, 0, anchor=True)
    for version in range(1, 11):
        step(trained, version)
        await publisher.publish()
        await until_stored(publisher, version)
        states.append({name: tensor.clone() for name, tensor in trained.items()})
    await stored(publisher, "1-merged-4-8")

    async def gone() -> bool:
        entries = await publisher._ports.log.entries(timeout_s=5)
        return not any(entry.name.startswith("1-patch-3-4") for entry in entries)

    await eventually(gone)
    mine = weights()
    await site.replica(mine, policy=policy)
    with pytest.raises(LogHole, match="to version 3 of run"):
        await publisher.rollback(3)
    for version in (4, 9, 8):
        back = await publisher.rollback(version)
        assert (await back.wait_applied(timeout_s=10)).complete
        assert same_bits(mine, states[version])
        await until_stored(publisher, back.version)
    await publisher.close()
    again = await site.publisher(weights(), policy=policy, resume="must")
    await again.wait_members(1, timeout_s=10)
    assert same_bits(mine, weights())


async def lead(context: Context, run: str, folder: str, policy: Policy) -> None:
    """A trainer process that stands still in the middle of storing a merged patch."""
    from sparsecast.pipeline.log import files

    trained, steps = weights(), files._steps

    def slow(view: memoryview) -> Any:
        if merging:
            half = view.nbytes // 2
            yield view[:half]
            context.mark("there")
            context.wait("never", rank=-1, timeout_s=60)
        yield from steps(view)

    merging: list[str] = []
    write = files.write

    def writing(file: Any, entry: LogEntry, *rest: Any) -> None:
        if entry.merged:
            file.flush()
            merging.append(entry.name)
        write(file, entry, *rest)

    from sparsecast.pipeline.log import directory

    files._steps = slow  # type: ignore[assignment]
    directory.write = writing  # type: ignore[assignment]
    publisher = AsyncPublisher(
        trained, run=run, bus=context.broker_url, policy=policy, log=f"dir:{folder}"
    )
    await publisher.__aenter__()
    for version in range(1, 5):
        step(trained, version)
        await publisher.publish()
        await until_stored(publisher, version)
    await asyncio.sleep(60)


async def test_killed_while_it_merges(site: Site, tmp_path: Path) -> None:
    """The trainer dies with half of a merged patch written: nobody sees it, and the single patches
    lead on."""
    context = (1, lead, site.run, str(tmp_path), POLICY)
    with Processes(*context, timeout_s=60, broker_url=site.url) as processes:
        await asyncio.to_thread(processes.wait, "there")
        processes.kill(0)
    folder = tmp_path / site.run
    assert len(list(folder.glob(".1-merged-0-4-*.tmp"))) == 1
    mine, trained = weights(3), weights()
    for version in range(1, 5):
        step(trained, version)
    replica = await site.replica(mine, policy=POLICY, log=f"dir:{tmp_path}")
    await replica.wait_version(4, timeout_s=20)
    assert same_bits(mine, trained)
    names = [one.name for one in await replica.ports.log.entries(timeout_s=5)]
    assert not any("merged" in name for name in names)


async def test_rounds_do_not_wait_for_a_merge(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """A merge that takes long has a thread of its own: updates go on through the window and into
    the log meanwhile, and the merged patch is there when it is done."""
    trained, mine = weights(), weights()
    publisher = await site.publisher(trained, policy=POLICY)
    await site.replica(mine, policy=POLICY)
    await publisher.wait_members(1, timeout_s=10)
    begun, go_on = threading.Event(), threading.Event()
    real = module.merge

    def slow(patches: Any, **options: Any) -> Patch:
        begun.set()
        assert go_on.wait(30)
        return real(patches, **options)

    monkeypatch.setattr(module, "merge", slow)
    for version in range(1, 8):
        step(trained, version)
        update = await publisher.publish()
        assert (await update.wait_applied(timeout_s=10)).complete
        await until_stored(publisher, version)
        if version == 4:
            assert await asyncio.to_thread(begun.wait, 10)
    assert same_bits(trained, mine)
    go_on.set()
    await stored(publisher, "1-merged-0-4")


async def test_left_while_it_merges(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """The publisher closes in the middle of a merge: it does not wait for it, and nothing of it is
    in the log."""
    trained = weights()
    publisher = await site.publisher(trained, policy=POLICY)
    reading = asyncio.Event()

    async def hangs(entry: LogEntry, **options: Any) -> Any:
        reading.set()
        await asyncio.sleep(3600)

    monkeypatch.setattr(publisher._ports.log, "load", hangs)
    for version in range(1, 5):
        step(trained, version)
        await publisher.publish()
        await until_stored(publisher, version)
    await asyncio.wait_for(reading.wait(), 10)
    async with asyncio.timeout(5):
        await publisher.close()
    replica = await site.replica(weights(), policy=POLICY)
    names = [one.name for one in await replica.ports.log.entries(timeout_s=5)]
    assert names
    assert not any("merged" in name for name in names)
