"""Pieces as one entry, as a pure function: whatever comes in whatever order."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from logs import entry, pieces
from sparsecast.messages.control import LogEntry
from sparsecast.messages.errors import LogError, LogFull, LogHole
from sparsecast.pipeline.log.base import Progress, oldest_first
from sparsecast.pipeline.log.memory import MemoryLog
from sparsecast.pipeline.log.pieces import (
    WholeLog,
    abandoned,
    each,
    partial,
    pruned,
    root_of,
    whole,
)
from sparsecast.pipeline.log.tiered import TieredLog

#: (epoch, base, version, roots, merged): what was stored, by trainers of one to four roots.
Stored = tuple[int, int | None, int, int, int]


@st.composite
def logs(draw: st.DrawFn) -> tuple[list[LogEntry], list[list[LogEntry]]]:
    """All that was stored, and what each version consists of."""
    groups = []
    for epoch in range(1, draw(st.integers(1, 2)) + 1):
        roots = draw(st.integers(1, 4))
        writer = draw(st.sampled_from(["", f"w{epoch}"]))
        for version in range(1, draw(st.integers(1, 5)) + 1):
            kinds: list[tuple[int | None, int]] = [(version - 1, 0)]
            if draw(st.booleans()):
                kinds.append((None, 0))
            if version > 1 and draw(st.booleans()):
                kinds.append((0, version))
            for base, merged in kinds:
                payloads = [bytes(draw(st.integers(0, 9))) for _ in range(roots)]
                one = pieces(base, version, payloads, epoch, writer, merged)
                if roots == 1:
                    one = [entry(base, version, payloads[0], epoch, writer, merged)]
                groups.append(one)
    return [one for group in groups for one in group], groups


@given(found=logs(), data=st.data())
def test_what_is_whole_is_there_and_nothing_else(
    found: tuple[list[LogEntry], list[list[LogEntry]]], data: st.DataObject
) -> None:
    """Two epochs of trainers of one or several roots, patches, anchors and merged ones; some pieces
    are missing, and they come in any order: exactly what all roots have stored is seen, oldest
    first, made of exactly its pieces, in their order; seen again it is the same."""
    stored, groups = found
    gone = data.draw(st.sets(st.integers(0, len(stored) - 1), max_size=3))
    names = {one.name for at, one in enumerate(stored) if at not in gone}
    left = data.draw(st.permutations([one for one in stored if one.name in names]))
    seen = whole(left)
    wanted = [group for group in groups if {one.name for one in group} <= names]
    assert {tuple(each(one)) for one in seen} == {tuple(group) for group in wanted}
    assert seen == oldest_first(seen)
    assert whole(seen) == seen
    for one in seen:
        assert one.nbytes == sum(piece.nbytes for piece in each(one))
        assert one.checksum == sum(piece.checksum for piece in each(one)) % 2**64
        assert "." not in one.name
        assert one.roots == len(each(one))


@pytest.mark.parametrize(
    "other",
    [
        {"epoch": 2}, {"base_version": 1}, {"version": 3}, {"digest": 5}, {"writer": "b"},
        {"roots": 3}, {"whole": "other"}, {"merged": 2}, {"step": 9}, {"tags": {"a": 1.0}},
        {"root": 0}, {"root": 2}, {"name": "1-patch-3.1"}, {"name": "1-patch-2"},
    ],
    ids=str,
)  # fmt: skip
def test_pieces_that_do_not_agree_are_no_entry(other: dict[str, object]) -> None:
    """The second root has stored something else under the name of the second piece: nothing is
    seen; as it should be, it is one entry."""
    one, two = pieces(0, 2, [b"a", b"bc"])
    assert len(whole([one, two])) == 1
    assert whole([one, msgspec.structs.replace(two, **other)]) == []


def test_checksums_wrap_around() -> None:
    """Their sum has 64 bits, as each has; and a tag that is NaN is the same in all pieces."""
    found = [
        msgspec.structs.replace(one, checksum=2**64 - 1, tags={"loss": float("nan")})
        for one in pieces(0, 1, [b"a", b"b", b"c"])
    ]
    assert [one.checksum for one in whole(found)] == [2**64 - 3]


@pytest.mark.parametrize(
    ("name", "root"), [("1-a-2.0", 0), ("1-a-2.13", 13), ("1-a-2", 0), ("1-a-2.x", 0)]
)
def test_a_name_tells_the_root(name: str, root: int) -> None:
    """Tiers ask it of what has no entry (yet); what is no piece is the first one's."""
    assert root_of(name) == root


def names(entries: list[LogEntry]) -> set[str]:
    """What they are called."""
    return {one.name for one in entries}


def test_what_is_never_completed_goes_with_what_is_older() -> None:
    """An epoch ago a root died amid version 9, which goes with anything of this epoch once nothing
    whole of that trainer is left; another one died at version 2 of this epoch, which goes once all
    that is older does. A piece of an anchor that is still being stored stays, although newer
    patches go."""
    two = [b"a", b"b"]
    dead = pieces(8, 9, two, epoch=1, writer="old")[:1]
    before = pieces(7, 8, two, epoch=1, writer="old")
    held = [*dead, *before, *pieces(None, 0, two, epoch=2, writer="new")]
    for version in range(1, 7):
        held += pieces(version - 1, version, two, epoch=2, writer="new")
    held.remove(pieces(1, 2, two, epoch=2, writer="new")[1])
    held += pieces(None, 3, two, epoch=2, writer="new")[:1]
    held += pieces(0, 6, two, epoch=2, writer="new", merged=6)
    ours = [one for one in whole(held) if one.epoch == 2]
    covered = [one for one in ours if one.base_version is not None and not one.merged]
    of_covered = {piece.name for one in covered for piece in one.pieces}
    assert names(pruned(held, covered)) == of_covered
    assert names(pruned(held, whole(before))) == names(before)
    left = [one for one in held if one not in before]
    assert names(pruned(left, covered)) == of_covered | names(dead)
    # A newer anchor is there: all goes, and what was never whole with it.
    later = [*held, *pieces(None, 6, two, epoch=2, writer="new")]
    rest = [one for one in whole(later) if (one.base_version, one.version) != (None, 6)]
    assert names(pruned(later, rest)) == names(held)


class FullLog(MemoryLog):
    """It has room for so many entries."""

    room = 3

    async def store(
        self, entry: LogEntry, payload: bytes | memoryview, *, timeout_s: float
    ) -> None:
        """Keep an entry, or refuse it."""
        if len(self._held) >= self.room:
            raise LogFull("no room")
        await super().store(entry, payload, timeout_s=timeout_s)


class WeakLog(MemoryLog):
    """Of each entry it gives the first byte, and then fails."""

    async def load(
        self, entry: LogEntry, *, timeout_s: float, progress: Progress | None = None
    ) -> bytes:
        """Some of the bytes."""
        assert progress is not None
        progress(1)
        raise LogError("cannot be read")


async def test_progress_falls_to_where_a_piece_began() -> None:
    """A tier fails midway in the first piece, and the next one begins it anew and gives all; where
    they all fail in the second piece, what was told fell back to the bytes of the first."""
    payloads = [b"abc", b"de", b"fgh"]
    weak, sound = WeakLog(), MemoryLog()
    log = WholeLog(TieredLog({"weak": weak, "sound": sound}, tell=lambda reason: None))
    for one, payload in zip(pieces(0, 1, payloads), payloads, strict=True):
        await log.store(one, payload, timeout_s=1)
    [found] = await log.entries(timeout_s=1)
    told: list[int] = []
    assert await log.load(found, timeout_s=1, progress=told.append) == b"abcdefgh"
    assert told == [1, 0, 3, 5, 8]  # a tier that has failed is asked last
    await sound.prune(found.pieces[1:2], timeout_s=1)
    told.clear()
    with pytest.raises(LogHole):
        await log.load(found, timeout_s=1, progress=told.append)
    assert told == [3, 3, 4]


@pytest.mark.parametrize("roots", [1, 2])
async def test_what_a_dead_trainer_has_begun_makes_room(roots: int) -> None:
    """It died amid an anchor, and the log is full: its successor, of as many roots or of one, drops
    what was begun, and no more; when that is gone, full is full."""
    held = FullLog()
    log, two = WholeLog(held), [b"a", b"b"]
    stored = pieces(None, 3, two)
    for one, payload in zip(stored, two, strict=True):
        await log.store(one, payload, timeout_s=1)
    await log.store(pieces(None, 4, two)[0], b"a", timeout_s=1)
    new = entry(None, 5, b"a", epoch=2) if roots == 1 else pieces(None, 5, two, epoch=2)[0]
    await log.store(new, b"a", timeout_s=1)
    assert set(held._held) == {one.name for one in (*stored, new)}
    with pytest.raises(LogFull):
        await log.store(entry(5, 6, b"a", epoch=2), b"a", timeout_s=1)
    assert len(held._held) == 3


@given(found=logs(), data=st.data())
def test_pruning_takes_nothing_along_that_is_whole(
    found: tuple[list[LogEntry], list[list[LogEntry]]], data: st.DataObject
) -> None:
    """Any entries go, some pieces are missing: all of these go, and of the others none that is
    whole; nothing is named twice, and nothing that is not there goes along."""
    stored, _ = found
    left = data.draw(st.lists(st.sampled_from(stored), unique_by=lambda one: one.name))
    seen = whole(left)
    drop = [one for one in seen if data.draw(st.booleans())]
    going = [one.name for one in pruned(left, drop)]
    assert len(set(going)) == len(going)
    assert set(going) <= names(left)
    stays = whole([one for one in left if one.name not in going])
    assert stays == [one for one in seen if one not in drop]


def test_an_anchor_abandons_what_was_begun_before() -> None:
    """Pieces of an anchor of this trainer that failed, and what an earlier epoch has begun: they
    go once another anchor is stored, the latter with a patch as well. Patches of this epoch, its
    newer anchor, and what another trainer of the epoch is at stay, and so does what is whole."""
    two = [b"a", b"b"]
    failed = pieces(None, 2, two, epoch=2)[:1]
    earlier = pieces(8, 9, two, epoch=1, writer="x")[1:]
    stays = [
        pieces(2, 3, two, epoch=2)[0],
        pieces(None, 4, two, epoch=2)[0],
        pieces(None, 1, two, epoch=2, writer="other")[0],
        *pieces(None, 7, two, epoch=1),
        entry(0, 1, b"x"),
    ]
    held = [*stays[:2], *failed, *earlier, *stays[2:]]
    assert partial(held) == [*stays[:2], *failed, *earlier, stays[2]]
    for storing in (pieces(None, 4, two, epoch=2)[1], entry(None, 4, b"ab", epoch=2)):
        assert abandoned(held, storing) == [*failed, *earlier]
    assert abandoned(held, pieces(3, 4, two, epoch=2)[0]) == earlier
