"""What may go from a log: what stays always leads from an anchor to the newest version."""

from hypothesis import given
from hypothesis import strategies as st

from logs import entry
from sparsecast.messages.control import LogEntry
from sparsecast.messages.errors import LogHole
from sparsecast.pipeline.log.base import oldest_first, way
from sparsecast.pipeline.log.retention import needless


@st.composite
def logs(draw: st.DrawFn) -> list[LogEntry]:
    """Entries of up to three epochs, merged patches and holes included, in any order."""
    found = {}
    for epoch in range(1, draw(st.integers(1, 3)) + 1):
        for version in range(draw(st.integers(0, 12)) + 1):
            size = draw(st.integers(0, 9))
            if draw(st.integers(0, 3)) == 0:
                one = entry(None, version, bytes(size * 10), epoch)
                found[one.name] = one
            elif version and draw(st.integers(0, 9)):
                base = version - draw(st.integers(1, min(version, 3)))
                one = entry(base, version, bytes(size), epoch)
                found[one.name] = one
    return draw(st.permutations(list(found.values())))


def reached(entries: list[LogEntry], epoch: int, held: int | None = None) -> set[int]:
    """The versions that a reader can come to; from an anchor if it holds nothing."""
    found = set()
    for target in {one.version for one in entries if one.epoch == epoch}:
        until = [one for one in entries if one.version <= target]
        try:
            way(until, epoch=epoch, held=held, target=target)
        except LogHole:
            continue
        found.add(target)
    return found


@given(logs(), st.integers(1, 12), st.none() | st.integers(1, 300))
def test_whatever_goes_the_head_stays_within_reach(
    entries: list[LogEntry], versions: int, nbytes: int | None
) -> None:
    """Any log, any limits: who holds nothing comes to the newest version after the prune as before
    it, and pruning again finds nothing."""
    epoch = max((one.epoch for one in entries), default=1)
    drop = needless(entries, epoch=epoch, versions=versions, nbytes=nbytes)
    kept = [one for one in entries if one not in drop]
    head = max((one.version for one in entries if one.epoch == epoch), default=None)
    before, after = reached(entries, epoch), reached(kept, epoch)
    assert (head in before) == (head in after)
    if head not in before:
        assert drop == []
    if head is not None and nbytes is None and head in before:
        lost = {version for version in before - after if version > head - versions}
        assert not lost, "newest versions that are out of reach now"
    assert needless(kept, epoch=epoch, versions=versions, nbytes=nbytes) == []


@given(logs(), st.integers(1, 300))
def test_bytes_are_kept_to_as_far_as_the_chain_allows(entries: list[LogEntry], nbytes: int) -> None:
    """What stays is within the limit, or begins at the last anchor that leads to the head."""
    epoch = max((one.epoch for one in entries), default=1)
    drop = needless(entries, epoch=epoch, nbytes=nbytes)
    kept = [one for one in entries if one not in drop]
    anchors = sorted(one.version for one in kept if one.epoch == epoch and one.base_version is None)
    if not drop or sum(one.nbytes for one in kept if one.epoch == epoch) <= nbytes:
        return
    for later in anchors[1:]:
        assert later not in reached([one for one in kept if one.version == later], epoch) or (
            max(reached([one for one in kept if one.version >= later], epoch))
            < max(one.version for one in kept if one.epoch == epoch)
        ), "a later anchor would have done"


def test_later_epochs_and_other_writers_are_left_alone() -> None:
    """A fenced trainer prunes: its own old entries and earlier epochs go, nothing of a successor's,
    and nothing of a rival's who claimed the same epoch."""
    mine, rival = (
        [one for v in range(3) for one in (entry(None, v, b"a", 2, w), entry(v, v + 1, b"p", 2, w))]
        for w in ("me", "rival")
    )
    before, after = entry(None, 0, b"x", 1, "me"), entry(None, 9, b"x", 3, "next")
    entries = oldest_first([before, *mine, *rival, after])
    assert needless(entries, epoch=2, writer="me") == [before, mine[0]]
    assert needless(entries, epoch=2) == [before, mine[0], rival[0]]
    assert needless(entries, epoch=2, writer="nobody") == []
    assert needless([before, after], epoch=2) == []


def test_a_hole_keeps_all_until_an_anchor_covers_it() -> None:
    """A patch before the head is not stored yet: nothing goes, however many anchors there are."""
    entries = [entry(None, v, b"anchor") for v in range(3)] + [entry(4, 5, b"late")]
    assert needless(entries, epoch=1, nbytes=1) == []
    whole = [*entries, *(entry(v, v + 1, b"p") for v in (2, 3))]
    assert [one.name for one in needless(whole, epoch=1, nbytes=1)] == ["1-anchor-0", "1-anchor-1"]
