"""The log of a trainer of several roots: patches merged, kept in bounds, read back, pruned."""

import asyncio
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from archives import POLICY, FailingLog
from rooted import WRITER, Roots
from runs import same_bits
from sparsecast import SettingsError, digest
from sparsecast.messages.compose import through
from sparsecast.messages.control import LogEntry
from sparsecast.messages.layout import identity
from sparsecast.pipeline.log.base import way
from sparsecast.pipeline.log.pieces import WholeLog
from sparsecast.workers.archive import Archive, roomy
from sparsecast.workers.entries import intact, remake

S = 10.0
#: An anchor at the start alone.
SPANS: dict[str, Any] = {"merge_every": 2, "anchor_every": 100, "keep_versions": 100}


class Stand:
    """An archive of the first root, over a log in memory to which all roots have stored."""

    def __init__(self, roots: int = 3, **policy: Any) -> None:
        self.roots = Roots(roots)
        self.held = FailingLog()
        self.log = WholeLog(self.held)
        self.told: list[str] = []
        ports: Any = SimpleNamespace(log=self.log, run=self._run, aside=self._run)
        self.archive = Archive(
            ports, self.roots.outgoing[0], replace(POLICY, **policy), self.told.append
        )

    async def _run(self, function: Any, *args: Any, timeout_s: float = S) -> Any:
        await asyncio.sleep(0)
        return function(*args)

    async def store(self, pieces: list[tuple[LogEntry, bytes]]) -> None:
        """Each root stores its own, the last one first."""
        for entry, payload in reversed(pieces):
            await self.log.store(entry, payload, timeout_s=S)
        self.archive._stored = self.roots.version

    async def live(self, versions: int) -> None:
        """Publish and store so many versions, and merge when it is time."""
        for _ in range(versions):
            await self.store(self.roots.publish())
            if self.archive.mergeable:
                async with asyncio.timeout(S):
                    await self.archive.merge(lambda: 1)

    async def names(self) -> list[str]:
        """What readers see."""
        found = await self.log.entries(timeout_s=S)
        return [entry.name.removesuffix(f"-{WRITER}") for entry in found]

    async def made(self, version: int, without: tuple[str, ...] = ()) -> dict[str, torch.Tensor]:
        """The state at a version, from the log alone."""
        entries = [
            entry
            for entry in await self.log.entries(timeout_s=S)
            if not entry.name.startswith(without or "none") and entry.version <= version
        ]
        state: dict[str, torch.Tensor] = {}
        published = identity(self.roots.manifest)
        for entry in way(entries, epoch=1, held=None, target=version):
            for piece, layout in zip(entry.pieces, self.roots.layouts, strict=True):
                data = await self.log.load(piece, timeout_s=S)
                remake(intact(data, piece), piece, layout.local, state, through(layout, published))
        return state


async def test_each_roots_chain_is_merged_by_itself() -> None:
    """Nine versions of three roots, merged by twos: the merged entries are those of one root, made
    of a piece a root, and lead to the bits of every version; digest and steps are those of the
    version where they end."""
    stand = Stand(**SPANS)
    await stand.store(stand.roots.anchor())
    await stand.live(9)
    assert stand.told == []
    spans = ["0-2", "0-4", "0-8", "2-4", "4-6", "4-8", "6-8"]
    merged = [name for name in await stand.names() if "-merged-" in name]
    assert sorted(merged) == [f"1-merged-{span}" for span in spans]
    for entry in await stand.log.entries(timeout_s=S):
        assert [piece.layout for piece in entry.pieces] == [
            layout.hash for layout in stand.roots.layouts
        ]
        assert entry.digest == digest(stand.roots.states[entry.version])
        if entry.merged:
            assert entry.merged == 2
            assert {piece.merged for piece in entry.pieces} == {2}
    assert same_bits(await stand.made(8), stand.roots.states[8])
    for version in range(10):
        assert same_bits(await stand.made(version, ("1-merged-0",)), stand.roots.states[version])
        assert same_bits(await stand.made(version, ("1-merged",)), stand.roots.states[version])


@pytest.mark.parametrize(("share", "merges"), [(0.02, True), (0.9, False)])
async def test_sizes_are_compared_as_sums(share: float, merges: bool) -> None:
    """All that one root holds changes in each step, so that its piece is as large as that of an
    anchor. Where the others change little their sum is smaller, and is stored; else nothing is."""
    stand = Stand(**SPANS)
    await stand.store(stand.roots.anchor())
    for _ in range(2):
        await stand.store(stand.roots.publish(share, busy=0))
    await stand.archive.merge(lambda: 1)
    merged = [entry for entry in await stand.log.entries(timeout_s=S) if entry.merged]
    assert len(merged) == merges
    if merges:
        [entry] = merged
        assert entry.pieces[0].nbytes >= stand.roots.layouts[0].local.nbytes
        assert same_bits(await stand.made(2), stand.roots.states[2])
    assert stand.told == []


async def test_a_version_that_one_root_has_not_stored_is_merged_by_nobody() -> None:
    """The second version is not whole when spans are looked for: nothing is merged from it, and
    nothing breaks."""
    stand = Stand(**SPANS)
    await stand.store(stand.roots.anchor())
    await stand.store(stand.roots.publish())
    await stand.store(stand.roots.publish()[1:])
    await stand.archive.merge(lambda: 1)
    assert await stand.names() == ["1-anchor-0", "1-patch-0-1"]
    assert stand.told == []


async def test_what_is_needless_goes_with_all_of_its_pieces() -> None:
    """Anchors at 0, 2 and 4: once the last one is there and was read back, what lies before the
    second one is gone, to the last piece, and so is what a dead root has left of version 1."""
    stand = Stand(keep_versions=1)
    lost = stand.roots.anchor()
    await stand.store(lost)
    for version in range(1, 6):
        await stand.store(stand.roots.publish())
        if version == 1:
            await stand.store(stand.roots.anchor()[:2])
        elif version % 2 == 0:
            await stand.store(stand.roots.anchor())
    stand.held.loaded.clear()
    assert await stand.archive._prune(1)
    assert stand.told == []
    names = ["1-patch-1-2", "1-anchor-2", "1-patch-2-3", "1-patch-3-4", "1-anchor-4", "1-patch-4-5"]
    assert await stand.names() == names
    assert len(stand.held._held) == 3 * len(names)
    assert stand.held.loaded == [f"1-anchor-4-{WRITER}.{root}" for root in range(3)]
    assert same_bits(await stand.made(5), stand.roots.states[5])


@pytest.mark.parametrize("root", range(3))
async def test_a_damaged_piece_of_an_anchor_keeps_all_else(root: int) -> None:
    """One bit of one root's piece of the newest anchor has flipped: nothing is dropped but that
    anchor, and another one is asked for."""
    stand = Stand(keep_versions=1)
    await stand.store(stand.roots.anchor())
    for version in range(1, 5):
        await stand.store(stand.roots.publish())
        if version % 2 == 0:
            await stand.store(stand.roots.anchor())
    stand.held.flip(f"1-anchor-4-{WRITER}.{root}")
    before = await stand.names()
    assert not await stand.archive._prune(1)
    assert "damaged" in stand.told[0]
    before.remove("1-anchor-4")
    assert await stand.names() == before
    assert same_bits(await stand.made(4), stand.roots.states[4])


async def test_a_quota_counts_all_pieces() -> None:
    """It must hold two anchors of all roots, and an entry has room with all of its pieces or not at
    all."""
    least = 2 * sum(roomy(layout.local.nbytes) for layout in Roots(3).layouts)
    with pytest.raises(SettingsError, match=f"needs {least}"):
        Stand(quota_nbytes=least - 1)
    stand = Stand(quota_nbytes=least)
    await stand.store(stand.roots.anchor())
    [anchor] = await stand.log.entries(timeout_s=S)
    left = least // 2 - anchor.nbytes
    assert await stand.archive._has_room(left, 1)
    assert not await stand.archive._has_room(left + 1, 1)
