"""Who receives the same: ranks of workers that hold the same parts of the weights are of one class.

By broadcast each root of the trainer sends its patch whole to all of them; all-to-all it sends to
each class what that holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ...messages.control import WindowKind
from .membership import Member

#: All-to-all has more collectives, and patches have to be parted: it must win by this factor.
MARGIN = 1.25


@dataclass(frozen=True, slots=True)
class Classes:
    """`of` has the class of each rank of a window from 1 on, `layouts` what each class holds,
    packed (b"": what is published, or it is not known). Both are empty where all receive the
    same."""

    of: tuple[int, ...] = ()
    layouts: tuple[bytes, ...] = ()


def routed(
    members: Sequence[Member | None],
    routing: Literal["auto", "broadcast", "all-to-all"],
    kind: WindowKind,
    roots: int,
    nbytes: int,
) -> Classes:
    """The classes of the ranks of a window's members, in their order; none where a broadcast is
    asked for or quicker, or no rank tells that it holds less than the `nbytes` of all weights.

    Between GPUs it always is quicker: to part a patch takes longer there than to send all of it.

    All links are taken to be of one speed and to carry both ways at once, so that a way takes as
    long as its busiest link. Of what is broadcast a receiver's link carries everything. All-to-all
    it carries what the receiver holds, and a root's, if each publishes as much, 1/roots of what the
    classes hold together. The share of changed elements is the same everywhere, so bytes of weights
    stand for bytes of patches.
    """
    if routing == "broadcast" or (routing == "auto" and kind == "nccl"):
        return Classes()
    known: dict[bytes, int] = {}
    held: list[int] = []
    of: list[int] = []
    for member in members:
        ranks = len(member.gpus) if member is not None else 1
        layouts = member.layouts if member is not None and member.layouts else (b"",) * ranks
        sizes = member.held_nbytes if member is not None and member.held_nbytes else (0,) * ranks
        for layout, size in zip(layouts, sizes, strict=True):
            if layout not in known:
                known[layout] = len(known)
                held.append(size if layout else nbytes)
            of.append(known[layout])
    if not any(known):
        return Classes()
    busiest = max(sum(held) / roots, *held)
    if routing == "auto" and busiest * MARGIN >= nbytes:
        return Classes()
    return Classes(tuple(of), tuple(known))
