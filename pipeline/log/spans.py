"""Which patches of a log become one more entry, so that whoever is behind needs few of them.

Like a skip list: with every = 8, a patch over every 8 versions, one over every 64, and so on. Who
is k versions behind finds a way of some every · log k entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from ...messages.control import LogEntry


def spans(
    entries: Sequence[LogEntry], *, after: int, every: int, longest: int
) -> list[tuple[int, int]]:
    """The spans (begin, end) that the stored versions above `after` have completed, in the order in
    which they are to be merged: the wider ones of the same end last, made of the others.

    `entries` are those of one trainer in one epoch. A version completes a span when, on the way to
    it from the version stored before, a multiple of `every` was crossed, or of its square, its cube
    … up to `longest`: all since the crossing before. With every = 1 there are none.
    """
    patches = [entry for entry in entries if entry.base_version is not None]
    versions = {entry.version for entry in patches}
    versions |= {min((entry.base_version or 0 for entry in patches), default=0)}
    stored, found = sorted(versions), []
    for before, version in pairwise(stored):
        size = every
        while version > after and 1 < size <= longest:
            if before // size < version // size:
                begin = next(one for one in stored if one >= before // size * size)
                found.append((begin, version))
            size *= every
    return found
