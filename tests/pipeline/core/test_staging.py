"""Staged patches: what follows on what, without a hole."""

import pytest

from sparsecast.messages.control import Stamp
from sparsecast.pipeline.core.commands import Drop
from sparsecast.pipeline.core.staging import Patch, Staging
from toytalk import announcement


def staging(*patches: tuple[int | None, int]) -> Staging:
    """Patches by base and version."""
    made = Staging()
    for base, version in patches:
        made.add(Patch(base, version, 10, "window"))
    return made


@pytest.mark.parametrize(
    ("patches", "at", "chain"),
    [
        ([], 3, ()),
        ([(3, 4), (4, 5)], 3, (4, 5)),
        ([(4, 5), (3, 4)], 3, (4, 5)),
        ([(3, 4), (5, 6)], 3, (4,)),
        ([(4, 5)], 3, ()),
        # A merged patch covers what lies between.
        ([(1, 5)], 3, (5,)),
        ([(3, 4), (3, 5)], 3, (4, 5)),
        # What the weights hold already.
        ([(1, 2), (2, 3)], 3, ()),
        # An anchor makes everything before it needless, and is the only way from nothing.
        ([(3, 4), (None, 5), (5, 6)], 3, (5, 6)),
        ([(None, 5), (5, 6)], None, (5, 6)),
        ([(3, 4)], None, ()),
    ],
)
def test_the_chain(
    patches: list[tuple[int | None, int]], at: int | None, chain: tuple[int, ...]
) -> None:
    """What can be applied on weights at a version, in one hold of the guard."""
    assert staging(*patches).chain(at) == chain


@pytest.mark.parametrize(
    ("first", "second", "kept"),
    [(2, 0, 0), (0, 2, 0), (0, None, None), (None, 0, None), (None, None, None)],
)
def test_of_two_for_one_version_the_wider_is_kept(
    first: int | None, second: int | None, kept: int | None
) -> None:
    """Window and log bring the same version with different bases, in either order."""
    assert staging((first, 3), (second, 3)).patches[3].base_version == kept


def test_what_awaits_the_journal_is_no_part_of_a_chain() -> None:
    """Until the journal makes the announcement that it came with; another one is not it."""
    held, first, second = staging((0, 1)), announcement(Stamp(1, 1, 1, 2)), Stamp(1, 1, 1, 3)
    held.add(Patch(1, 2, 10, "window", awaits=first))
    held.add(Patch(2, 3, 10, "window", awaits=announcement(second)))
    assert (held.chain(0), held.nbytes) == ((1,), 30)
    assert held.confirm(first)
    assert held.chain(0) == (1, 2)
    assert not held.confirm(announcement(second, checksum=666))
    assert held.chain(0) == (1, 2)
    assert held.confirm(announcement(Stamp(1, 1, 1, 9))), "of which nothing is here"


@pytest.mark.parametrize("log_first", [True, False])
def test_what_the_log_has_awaits_nothing(log_first: bool) -> None:
    """Of two for one version the one that awaits nothing is kept, however wide the other is."""
    patches = [Patch(2, 3, 10, "log"), Patch(0, 3, 10, "window", announcement(Stamp(1, 1, 1, 3)))]
    held = Staging()
    for patch in patches if log_first else reversed(patches):
        held.add(patch)
    assert held.patches[3].source == "log"


def test_what_is_taken_or_dropped_is_gone() -> None:
    """Two are applied, one is dropped with one that never was here: nothing is left, and the
    road of the last one applied is told."""
    held = staging((0, 1), (2, 3))
    held.add(Patch(1, 2, 5, "log"))
    assert held.nbytes == 25
    assert held.useless(1) == (1,)
    assert held.useless(None) == ()
    assert held.take((1, 2)) == "log"
    assert held.drop((3, 4)) == Drop((3, 4))
    assert (held.patches, held.nbytes) == ({}, 0)
