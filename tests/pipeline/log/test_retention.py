"""What may go from a log: what stays always leads from an anchor to the newest version."""

from hypothesis import given
from hypothesis import strategies as st

from logs import entry
from sparsecast.messages.control import LogEntry
from sparsecast.messages.errors import LogHole
from sparsecast.pipeline.log.base import oldest_first, way
from sparsecast.pipeline.log.retention import leading, needless, spare


@st.composite
def logs(draw: st.DrawFn) -> list[LogEntry]:
    """Entries of up to three epochs, in any order: some coalesced, some merged, with holes."""
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
            if version > 1 and draw(st.integers(0, 2)) == 0:
                base = version - draw(st.integers(2, version))
                one = entry(base, version, bytes(size), epoch, merged=2)
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


@given(logs(), st.integers(1, 12), st.none() | st.integers(1, 300))
def test_whoever_could_follow_still_can(
    entries: list[LogEntry], versions: int, nbytes: int | None
) -> None:
    """Any log, any limits: a worker at any version from the oldest anchor that stays comes to the
    newest version if it came there before, and to each promised one that it came to before."""
    epoch = max((one.epoch for one in entries), default=1)
    drop = needless(entries, epoch=epoch, versions=versions, nbytes=nbytes)
    kept = [one for one in entries if one not in drop]
    anchors = [one.version for one in kept if one.epoch == epoch and one.base_version is None]
    head = max((one.version for one in kept if one.epoch == epoch), default=0)
    for held in range(min(anchors, default=head), head):
        lost = reached(entries, epoch, held) - reached(kept, epoch, held)
        assert all(version <= max(held, head - versions) for version in lost)


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


def names(entries: list[LogEntry]) -> list[str]:
    """Their names, without the epoch."""
    return [one.name.removeprefix("1-") for one in entries]


def test_what_a_merged_patch_covers_goes_when_it_is_old() -> None:
    """Ten versions, merged by fours, and the two merged ones by one more: single patches go once
    the newest versions are reached without them; merged ones stay, also within wider ones."""
    entries = [entry(None, 0, b"anchor"), *(entry(v, v + 1, b"p") for v in range(10))]
    entries += [entry(0, 4, b"mm", merged=4), entry(4, 8, b"mm", merged=4)]
    entries += [entry(0, 8, b"mmm", merged=2)]
    assert names(needless(entries, epoch=1, versions=7)) == [f"patch-{v}" for v in range(1, 5)]
    assert names(needless(entries, epoch=1, versions=8)) == []
    kept = [one for one in entries if one not in needless(entries, epoch=1, versions=1)]
    assert names(kept) == [
        "anchor-0", "patch-9", "patch-10", "merged-0-4", "merged-4-8", "merged-0-8"
    ]  # fmt: skip


def test_a_coalesced_patch_is_no_merged_one() -> None:
    """A patch from 0 to 4 was announced as one, beside those that it was made of: it covers
    nothing, and a patch that reaches out of a merged one stays."""
    entries = [entry(None, 0, b"anchor"), entry(0, 1, b"p"), entry(0, 4, b"pp")]
    entries += [entry(3, 6, b"p"), entry(1, 5, b"mm", merged=2), entry(5, 9, b"p")]
    assert needless(entries, epoch=1) == []


def test_the_anchor_that_leads() -> None:
    """The newest anchor from which patches lead on: not one before a hole, nor another writer's."""
    anchors = [entry(None, v, b"anchor", writer="me") for v in (0, 2, 4)]
    patches = [entry(v, v + 1, b"p", writer="me") for v in (2, 3)]
    rival = entry(None, 9, b"anchor", writer="rival")
    found = leading([*anchors, *patches, rival], epoch=1, writer="me")
    assert found == anchors[2]
    ahead = [*anchors, *patches, entry(3, 6, b"p", writer="me"), rival]
    assert leading(ahead, epoch=1, writer="me") == anchors[2]
    assert leading(ahead[:2] + ahead[3:], epoch=1, writer="me") == anchors[1]
    assert leading([*ahead, entry(8, 9, b"p", writer="me")], epoch=1, writer="me") is None
    assert leading(ahead, epoch=2, writer="me") is None


def test_a_promise_reaches_back_over_a_restart() -> None:
    """Epoch 1 had versions 0 to 5, with anchors at 0, 2 and 4; epoch 2 goes on at 6. Four versions
    are promised: of epoch 1 stays what leads to 4 and 5; with two nothing of it; and with too few
    bytes for it nothing either."""
    first = [entry(base, base + 1, b"1", 1) for base in range(5)]
    anchors = [entry(None, version, b"12345", 1) for version in (0, 2, 4)]
    second = [entry(None, 6, b"12345", 2), entry(6, 7, b"1", 2)]
    entries = oldest_first([*first, *anchors, *second])

    def kept(**options: int) -> list[str]:
        drop = needless(entries, epoch=2, **options)
        return [one.name for one in entries if one not in drop and one.epoch == 1]

    names = [one.name for one in oldest_first([first[3], anchors[2], first[4]])]
    assert kept(versions=4) == names
    assert kept(versions=2) == []
    assert kept(versions=4, nbytes=13) == names
    assert kept(versions=4, nbytes=12) == []
    assert len(kept(versions=99)) == 8


@given(logs(), st.integers(0, 300))
def test_at_the_worst_one_anchor_stays_and_what_fits(entries: list[LogEntry], nbytes: int) -> None:
    """Any log: without an anchor nothing goes; else the newest trainer's newest anchor that leads
    on stays, alone or with what the bytes allow, and making room again finds nothing."""
    epoch = max((one.epoch for one in entries), default=1)
    drop = spare(entries, epoch=epoch, writer="", nbytes=nbytes)
    kept = [one for one in entries if one not in drop]
    anchors = [
        anchor
        for one in range(epoch, 0, -1)
        if (anchor := leading(entries, epoch=one, writer="")) is not None
    ]
    if not anchors:
        assert drop == []
        return
    assert anchors[0] in kept
    assert sum(one.nbytes for one in kept) <= max(nbytes, anchors[0].nbytes)
    assert spare(kept, epoch=epoch, writer="", nbytes=nbytes) == []
    assert all(one.epoch > 9 for one in spare(entries, epoch=0, writer="x", nbytes=0))
