"""Which patches are merged: what completes a span, and what that does for whoever is behind."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from logs import entry
from sparsecast.messages.control import LogEntry
from sparsecast.pipeline.log.base import way
from sparsecast.pipeline.log.spans import spans


def patches(*versions: int) -> list[LogEntry]:
    """Patches from each of these versions to the next one."""
    return [entry(base, to, b"p") for base, to in pairwise(versions)]


def test_spans_of_spans() -> None:
    """Nine versions by twos: each second version ends a span of two, each fourth one of four as
    well, the eighth one of eight; what was looked at before is not told again."""
    chain = patches(*range(10))
    assert spans(chain, after=0, every=2, longest=100) == [
        (0, 2), (2, 4), (0, 4), (4, 6), (6, 8), (4, 8), (0, 8),
    ]  # fmt: skip
    assert spans(chain, after=6, every=2, longest=4) == [(6, 8), (4, 8)]
    assert spans(chain, after=8, every=2, longest=4) == []
    assert spans(chain, after=0, every=2, longest=1) == []
    assert spans(chain, after=0, every=1, longest=100) == []
    assert spans([], after=0, every=2, longest=100) == []


def test_versions_that_were_coalesced() -> None:
    """Nobody stored a multiple of four itself: spans begin and end at the versions behind it."""
    chain = patches(0, 3, 7, 9, 10, 21, 22, 24)
    assert spans(chain, after=0, every=4, longest=16) == [
        (0, 7), (7, 9), (9, 21), (0, 21), (21, 24),
    ]  # fmt: skip


def test_an_epoch_that_begins_anywhere() -> None:
    """The first patch starts at the claim's version; anchors and merged patches change nothing."""
    chain = patches(5, 6, 7, 8, 9)
    assert spans(chain, after=5, every=4, longest=4) == [(5, 8)]
    more = [*chain, entry(None, 3, b"anchor"), entry(5, 8, b"m", merged=3)]
    assert spans(more, after=5, every=4, longest=4) == [(5, 8)]


@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=70),
    st.integers(2, 5),
    st.integers(0, 9),
    st.lists(st.integers(1, 9), min_size=1, max_size=9),
)
def test_whoever_is_behind_needs_few(
    strides: list[int], every: int, start: int, looks: list[int]
) -> None:
    """Patches of any strides, merged whenever somebody looks: from every version a few entries lead
    to the newest one, whether or not the single ones are still there."""
    known: list[LogEntry] = []
    at = after = start
    for number, stride in enumerate(strides):
        known.append(entry(at, at + stride, bytes(100)))
        at += stride
        if number % looks[number % len(looks)] and number < len(strides) - 1:
            continue
        for begin, end in spans(known, after=after, every=every, longest=at):
            until = [one for one in known if one.version <= end]
            parts = way(until, epoch=1, held=begin, target=end)
            assert parts[-1].version == end
            if len(parts) > 1:
                nbytes = sum(one.nbytes for one in parts) - 1
                base = parts[0].base_version
                known.append(entry(base, end, bytes(nbytes), merged=len(parts)))
        after = at
    levels, size = 1, every
    while size <= at:
        levels, size = levels + 1, size * every
    for held in range(start, at):
        assert len(way(known, epoch=1, held=held, target=at)) <= 2 * every * levels
