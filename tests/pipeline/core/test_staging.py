"""Staged patches: what follows on what, without a hole."""

import pytest

from sparsecast.pipeline.core.commands import Drop
from sparsecast.pipeline.core.staging import Patch, Staging


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
