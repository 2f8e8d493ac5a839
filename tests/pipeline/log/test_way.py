"""The way through the log, against brute force over every sequence of entries."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsecast.messages.control import LogEntry
from sparsecast.messages.errors import LogHole
from sparsecast.pipeline.log.base import way


def entry(base: int | None, version: int, nbytes: int = 10, epoch: int = 1) -> LogEntry:
    """A patch, or an anchor if `base` is None."""
    return LogEntry(
        name=f"{epoch}-{base}-{version}-{nbytes}",
        epoch=epoch,
        base_version=base,
        version=version,
        nbytes=nbytes,
        checksum=0,
        digest=0,
        manifest_hash="",
        chunks=1,
    )


@st.composite
def entries(draw: st.DrawFn) -> LogEntry:
    """Any entry with versions up to 7; sizes collide often, epochs seldom."""
    version = draw(st.integers(0, 7))
    base = draw(st.none() | st.integers(0, version))
    return entry(base, version, draw(st.integers(0, 4)), draw(st.sampled_from([1, 1, 1, 2])))


def leads(steps: tuple[LogEntry, ...], held: int | None, target: int, epoch: int) -> int | None:
    """Where the steps lead, if they may be applied in this order and reach the target."""
    at = held
    for step in steps:
        if step.epoch != epoch:
            return None
        carried = step.base_version is None or (
            at is not None and step.base_version <= at < step.version
        )
        if not carried:
            return None
        at = step.version
    return at if at is not None and at >= target else None


@settings(max_examples=250, deadline=None)
@given(
    st.lists(entries(), max_size=6, unique_by=lambda found: found.name),
    st.none() | st.integers(0, 7),
    st.integers(0, 7),
)
def test_no_other_way_is_cheaper(listed: list[LogEntry], held: int | None, target: int) -> None:
    """Whatever the log holds, the way that is found works, and no order of any of the entries
    reaches the target with fewer bytes; if it finds a hole, there is no way at all."""
    works = [
        (sum(step.nbytes for step in steps), steps)
        for length in range(len(listed) + 1)
        for steps in itertools.permutations(listed, length)
        if leads(steps, held, target, 1) is not None
    ]
    if not works:
        with pytest.raises(LogHole):
            way(listed, epoch=1, held=held, target=target)
        return
    found = way(listed, epoch=1, held=held, target=target)
    reached = leads(tuple(found), held, target, 1)
    assert reached is not None
    cheapest = min(nbytes for nbytes, _ in works)
    assert sum(step.nbytes for step in found) == cheapest
    furthest = max(
        leads(steps, held, target, 1) or 0 for nbytes, steps in works if nbytes == cheapest
    )
    assert reached == furthest


def test_a_joiner_starts_at_the_newest_anchor() -> None:
    """Weights that are worth nothing: the newest anchor and what follows it, not the old chain."""
    chain = [entry(version - 1, version, 5) for version in range(1, 9)]
    log = [entry(None, 0, 100), *chain[:4], entry(None, 4, 100), *chain[4:]]
    found = way(log, epoch=1, held=None, target=8)
    assert [(step.base_version, step.version) for step in found] == [
        (None, 4), (4, 5), (5, 6), (6, 7), (7, 8),
    ]  # fmt: skip


def test_a_merged_patch_carries_a_member_that_stands_within_it() -> None:
    """A member at 5 takes the merged patch 3 → 8: values are absolute, so 4 and 5 do no harm."""
    found = way([entry(3, 8), entry(None, 0, 1)], epoch=1, held=5, target=8)
    assert [step.version for step in found] == [8]


def test_the_head_itself_needs_nothing() -> None:
    """A member at the target gets an empty way, whatever newer patches there are."""
    assert way([entry(4, 5)], epoch=1, held=4, target=4) == []
    assert way([], epoch=1, held=7, target=4) == []


def test_a_hole_is_named() -> None:
    """A patch is missing from the chain and there is no anchor after it: LogHole says which way."""
    with pytest.raises(LogHole, match="from version 0 to 3 in epoch 1") as caught:
        way([entry(0, 1), entry(2, 3), entry(None, 3, epoch=2)], epoch=1, held=0, target=3)
    assert caught.value.version == 3


def test_a_long_log_is_no_burden() -> None:
    """A thousand patches: the way is found at once, on the event loop's thread."""
    log = [entry(None, 0, 1000), *(entry(version, version + 1, 1) for version in range(1000))]
    found = way(log, epoch=1, held=None, target=1000)
    assert len(found) == 1001
