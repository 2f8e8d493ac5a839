"""What a log keeps: rule 10 of the protocol, as a pure function of its entries."""

from __future__ import annotations

from collections.abc import Sequence

from ...messages.control import LogEntry
from ...messages.errors import LogHole
from .base import reached, way

#: So many anchors stay if bytes allow: a reader may be at the older one.
ANCHORS = 2


def needless(
    entries: Sequence[LogEntry],
    *,
    epoch: int,
    writer: str | None = None,
    versions: int = 1,
    nbytes: int | None = None,
) -> list[LogEntry]:
    """The entries that nobody needs any more, in the order of `entries`.

    Of `writer` in this epoch (None: of each writer by itself) patches go that lie within a merged
    one which ends no later than the oldest of the newest `versions` versions: each of these is
    reached as before, and whoever stands within the merged one goes on by it.

    Of the rest everything from one anchor on stays: the second newest one, or an older one if the
    newest `versions` versions are reached from there only; while what stays is more than `nbytes`,
    the next newer one. But never a newer one than the newest from which patches lead to the newest
    version: that one stays, and where there is none, nothing is needless. Of earlier epochs only
    that stays which the newest `versions` versions need, while all is no more than `nbytes`. Later
    epochs and other writers of this one stay: whoever is fenced off takes nothing of its
    successor's along.
    """
    writers = {entry.writer for entry in entries if entry.epoch == epoch}
    if writer is not None:
        writers &= {writer}
    drop: set[str] = set()
    oldest = None
    for name in writers:
        ours = [entry for entry in entries if (entry.epoch, entry.writer) == (epoch, name)]
        covered = _covered(ours, versions)
        left = [entry for entry in ours if entry.name not in covered]
        start = _start(left, versions, nbytes)
        if start is None:
            return []
        drop |= covered | {entry.name for entry in left if entry.version < start}
        wanted = _head(ours) - versions + 1
        oldest = wanted if oldest is None else min(oldest, wanted)
    if oldest is not None:
        earlier = [entry for entry in entries if entry.epoch < epoch]
        live = [entry for entry in entries if entry.epoch == epoch and entry.name not in drop]
        room = None if nbytes is None else nbytes - sum(entry.nbytes for entry in live)
        drop |= _of_the_past(earlier, oldest, room)
    return [entry for entry in entries if entry.name in drop]


def _of_the_past(earlier: Sequence[LogEntry], oldest: int, room: int | None) -> set[str]:
    """The names of what no version from `oldest` on needs, and of what there is no room for: the
    newest epochs have it first, and each is kept as a chain or not at all."""
    drop: set[str] = set()
    for epoch in sorted({entry.epoch for entry in earlier}, reverse=True):
        for writer in {entry.writer for entry in earlier if entry.epoch == epoch}:
            chain = [one for one in earlier if (one.epoch, one.writer) == (epoch, writer)]
            anchors = [e.version for e in chain if e.base_version is None and e.version <= oldest]
            start = max(anchors, default=0) if _head(chain) >= oldest else None
            stays = [one for one in chain if start is not None and one.version >= start]
            nbytes = sum(entry.nbytes for entry in stays)
            if room is not None:
                room -= nbytes
                if room < 0:
                    stays = []
            names = {entry.name for entry in stays}
            drop |= {entry.name for entry in chain if entry.name not in names}
    return drop


def _head(chain: Sequence[LogEntry]) -> int:
    return max((entry.version for entry in chain), default=0)


def spare(entries: Sequence[LogEntry], *, epoch: int, writer: str, nbytes: int) -> list[LogEntry]:
    """What may go at the worst, so that the next anchor of `writer` in this epoch has room.

    Of the newest trainer up to this one that has an anchor, the newest anchor that leads on stays,
    and what follows on it, as far as `nbytes` go; of later ones, which have none yet, the oldest
    patches too. Other writers of this epoch and later epochs stay. Nothing goes where there is no
    anchor.
    """
    ours = [e for e in entries if e.epoch < epoch or (e.epoch, e.writer) == (epoch, writer)]
    later: list[LogEntry] = []
    for chain in sorted({(e.epoch, e.writer) for e in ours}, reverse=True):
        of_chain = [entry for entry in ours if (entry.epoch, entry.writer) == chain]
        anchor = leading(of_chain, epoch=chain[0], writer=chain[1])
        if anchor is None:
            later = of_chain + later
            continue
        patches = [e for e in of_chain if e.base_version is not None]
        ways = reached(patches, anchor.version)
        furthest = ways[max(ways)].way if ways else []
        stays: set[str] = set()
        for entry in (anchor, *furthest, *later):
            nbytes -= entry.nbytes
            if nbytes < 0:
                break
            stays.add(entry.name)
        return [entry for entry in ours if entry.name not in stays | {anchor.name}]
    return []


def leading(entries: Sequence[LogEntry], *, epoch: int, writer: str) -> LogEntry | None:
    """The newest anchor of a trainer from which patches lead to its newest version."""
    ours = [entry for entry in entries if (entry.epoch, entry.writer) == (epoch, writer)]
    versions = _leading(ours)
    for entry in ours:
        if entry.base_version is None and entry.version in versions[-1:]:
            return entry
    return None


def _covered(ours: Sequence[LogEntry], versions: int) -> set[str]:
    """The names of the patches in whose place an old merged one will do.

    A merged one stays itself, also within a wider one: so at most merge_every versions are fetched
    that their reader holds already.
    """
    oldest = _head(ours) - versions + 1
    patches = [(e.base_version, e) for e in ours if e.base_version is not None]
    covered: set[str] = set()
    #: From where on the merged ones that end at this version or later lead.
    begin: int | None = None
    for base, entry in sorted(patches, key=lambda one: (-one[1].version, not one[1].merged)):
        if entry.merged and entry.version <= oldest:
            begin = base if begin is None else min(begin, base)
        elif not entry.merged and begin is not None and begin <= base:
            covered.add(entry.name)
    return covered


def _start(ours: Sequence[LogEntry], versions: int, nbytes: int | None) -> int | None:
    """The version of the anchor from which on everything stays; None if no chain is whole."""
    anchors = _leading(ours)
    if not anchors:
        return None
    head = _head(ours)
    old = [version for version in anchors if version <= head - versions + 1]
    at = anchors.index(min(anchors[-ANCHORS:][0], old[-1] if old else anchors[0]))
    while nbytes is not None and at < len(anchors) - 1:
        if sum(entry.nbytes for entry in ours if entry.version >= anchors[at]) <= nbytes:
            break
        at += 1
    return anchors[at]


def _leading(ours: Sequence[LogEntry]) -> list[int]:
    """The versions of the anchors, up to the newest from which patches lead to the head."""
    head = _head(ours)
    anchors = sorted({entry.version for entry in ours if entry.base_version is None})
    while anchors and not _reaches(ours, anchors[-1], head):
        anchors.pop()
    return anchors


def _reaches(ours: Sequence[LogEntry], anchor: int, head: int) -> bool:
    """Whether patches lead from the anchor at this version to the newest version."""
    patches = [e for e in ours if e.base_version is not None and e.version > anchor]
    try:
        way(patches, epoch=ours[0].epoch, held=anchor, target=head)
    except LogHole:
        return False
    return True
