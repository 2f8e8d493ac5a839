"""What several roots store of one version, seen as one entry: whole or not at all.

Each root of a trainer of several ranks stores an entry of its own, a piece: "<name>.<root>". They
are one entry of the name in front of the dot once all of them are there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import msgspec

from ...messages.control import LogEntry
from ...messages.errors import LogError, LogFull
from ...messages.manifest import Manifest
from .base import Log, Progress, oldest_first, unheard

#: Sums of checksums wrap around as the checksums do.
_CHECKSUMS = 1 << 64


def piece_name(name: str, root: int) -> str:
    """What the piece of this root of an entry is called."""
    return f"{name}.{root}"


def root_of(name: str) -> int:
    """Which root's piece is called so; 0 of what is no piece."""
    root = name.partition(".")[2]
    return int(root) if root.isdecimal() else 0


def each(entry: LogEntry) -> tuple[LogEntry, ...]:
    """What tiers hold of an entry: its pieces, or itself."""
    return entry.pieces or (entry,)


def whole(entries: Sequence[LogEntry]) -> list[LogEntry]:
    """The entries as readers see them, oldest first: pieces as one entry once all are there.

    Its `nbytes` and `checksum` are the sums of its pieces', `manifest_hash` is that of what is
    published. Pieces that do not agree on what they are pieces of are not of one entry, and what
    is not whole is not there. Entries of one root stay as they are, and so does what was put
    together already.
    """
    found = [entry for entry in entries if entry.roots == 1 or entry.pieces]
    for pieces in _groups(entries).values():
        if len(pieces) == next(iter(pieces.values())).roots:
            found.append(_together([pieces[root] for root in sorted(pieces)]))
    return oldest_first(found)


def pruned(entries: Sequence[LogEntry], drop: Sequence[LogEntry]) -> list[LogEntry]:
    """What tiers are to prune so that these go, of all `entries` that they hold.

    Pieces, and with them those of what nobody is going to complete: of the trainers whose entries
    go and of earlier epochs, what is older than all that stays of the same trainer. So a piece
    stays that was stored a moment ago, while other roots are still at theirs.
    """
    gone = {entry.name for entry in drop}
    newest = {_line(entry): entry.version for entry in oldest_first(drop)}
    stays = [entry for entry in reversed(whole(entries)) if entry.name not in gone]
    oldest = {_line(entry): entry.version for entry in stays}
    epoch = max((epoch for epoch, _ in newest), default=0)

    def hopeless(piece: LogEntry) -> bool:
        line = _line(piece)
        if line in oldest:
            return piece.version < oldest[line] and (piece.epoch < epoch or line in newest)
        return piece.epoch < epoch or piece.version <= newest.get(line, -1)

    found = {piece.name: piece for entry in drop for piece in each(entry)}
    found |= {piece.name: piece for piece in partial(entries) if hopeless(piece)}
    return list(found.values())


def abandoned(entries: Sequence[LogEntry], storing: LogEntry) -> list[LogEntry]:
    """The pieces that nobody is going to complete once an entry, or a piece of it, is stored: those
    of earlier epochs, and if it is an anchor those of its trainer's older ones, for that stores one
    at a time."""

    def superseded(piece: LogEntry) -> bool:
        anchors = piece.base_version is None and storing.base_version is None
        return anchors and _line(piece) == _line(storing) and piece.version < storing.version

    pieces = partial(entries)
    return [one for one in pieces if one.epoch < storing.epoch or superseded(one)]


def partial(entries: Sequence[LogEntry]) -> list[LogEntry]:
    """The pieces of what is not whole, in the order of `entries`."""
    known = {piece.name for entry in whole(entries) for piece in each(entry)}
    return [entry for entry in entries if entry.name not in known]


class WholeLog:
    """A log, seen by readers: pieces are one entry once all are there. Implements `Log`."""

    def __init__(self, log: Log) -> None:
        #: What holds the pieces.
        self.log = log

    @property
    def durable(self) -> bool:
        """Whether what is stored outlives this process."""
        return self.log.durable

    async def store(
        self, entry: LogEntry, payload: bytes | memoryview, *, timeout_s: float
    ) -> None:
        """Store an entry of one root, or a piece (LogError).

        Before an anchor's piece what its trainer has begun of older ones goes: tries that fail
        again and again would fill the log. Where there is no room, what earlier epochs have begun
        goes.
        """
        if entry.pieces:
            raise LogError(f"log entry {entry.name!r} is {len(entry.pieces)} pieces: store each")
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        if entry.base_version is None and entry.roots > 1:
            await self._clear(entry, entry.epoch, timeout_s)
        try:
            await self.log.store(entry, payload, timeout_s=max(0.0, deadline - loop.time()))
        except LogFull:
            if not await self._clear(entry, 0, max(0.0, deadline - loop.time())):
                raise
            await self.log.store(entry, payload, timeout_s=max(0.0, deadline - loop.time()))

    async def _clear(self, storing: LogEntry, epoch: int, timeout_s: float) -> bool:
        """Drop what is abandoned from this epoch on; whether there was any (LogError)."""
        held = await self.log.entries(timeout_s=timeout_s)
        drop = [piece for piece in abandoned(held, storing) if piece.epoch >= epoch]
        if drop:
            await self.log.prune(drop, timeout_s=timeout_s)
        return bool(drop)

    async def entries(self, *, timeout_s: float) -> list[LogEntry]:
        """Every entry that is whole, oldest first (LogError)."""
        return whole(await self.log.entries(timeout_s=timeout_s))

    async def load(
        self, entry: LogEntry, *, timeout_s: float, progress: Progress | None = None
    ) -> bytes | bytearray:
        """The bytes of an entry; those of its pieces in the order of their roots, which are loaded
        one after the other, all within `timeout_s` (LogError). LogHole if one of them is gone.

        A piece by itself is loaded as any entry is.
        """
        if not entry.pieces:
            return await self.log.load(entry, timeout_s=timeout_s, progress=progress)
        loop, hear = asyncio.get_running_loop(), progress or unheard
        deadline = loop.time() + timeout_s
        payload = bytearray(entry.nbytes)
        begin = 0

        def hear_all(nbytes: int) -> None:
            hear(begin + nbytes)

        for piece in entry.pieces:
            data = await self.log.load(
                piece, timeout_s=max(0.0, deadline - loop.time()), progress=hear_all
            )
            if len(data) != piece.nbytes:
                raise LogError(f"log entry {piece.name!r} has {len(data)} of {piece.nbytes} bytes")
            payload[begin : begin + piece.nbytes] = data
            begin += piece.nbytes
        return payload

    async def prune(self, drop: Sequence[LogEntry], *, timeout_s: float) -> None:
        """Drop these entries with all of their pieces, and what nobody is going to complete
        (LogError)."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        held = await self.log.entries(timeout_s=timeout_s)
        await self.log.prune(pruned(held, drop), timeout_s=max(0.0, deadline - loop.time()))

    async def manifest(self, manifest_hash: str, *, timeout_s: float) -> Manifest | None:
        """The manifest of that hash, if the log knows the tensors' names (LogError): of a root's
        own tensors, too."""
        return await self.log.manifest(manifest_hash, timeout_s=timeout_s)


def _line(entry: LogEntry) -> tuple[int, str]:
    """What one trainer stores under one claim."""
    return entry.epoch, entry.writer


def _groups(entries: Sequence[LogEntry]) -> dict[bytes, dict[int, LogEntry]]:
    """Pieces by what they are pieces of, then by root."""
    found: dict[bytes, dict[int, LogEntry]] = {}
    for entry in entries:
        name, _, _ = entry.name.partition(".")
        named = entry.name == piece_name(name, entry.root)
        if entry.pieces or not named or not 0 <= entry.root < entry.roots or entry.roots == 1:
            continue
        common = msgspec.structs.replace(
            entry, name=name, nbytes=0, checksum=0, manifest_hash="", chunks=0, root=0, layout=""
        )
        # As bytes, for a tag that is NaN does not equal itself.
        key = msgspec.msgpack.encode(common, order="deterministic")
        found.setdefault(key, {}).setdefault(entry.root, entry)
    return found


def _together(pieces: Sequence[LogEntry]) -> LogEntry:
    first = pieces[0]
    return msgspec.structs.replace(
        first,
        name=first.name.partition(".")[0],
        nbytes=sum(piece.nbytes for piece in pieces),
        checksum=sum(piece.checksum for piece in pieces) % _CHECKSUMS,
        manifest_hash=first.whole,
        chunks=sum(piece.chunks for piece in pieces),
        layout="",
        pieces=tuple(pieces),
    )
