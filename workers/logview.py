"""What `sparsecast log` prints: tables for people, JSON for programs."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from rich.console import Console
from rich.table import Table

from ..messages.control import LogEntry, Tags
from ..messages.errors import BusError, LogError, LogHole
from ..pipeline.log.pieces import each, partial, pruned
from ..pipeline.log.retention import needless
from .audit import Verdict
from .logbook import Logbook


class EntryView(msgspec.Struct, frozen=True, kw_only=True):
    """An entry: `tiers` have it. `base_version` None: an anchor. `merged`: of so many others; 0 if
    it was stored as it was announced. `pieces`: so many roots have stored theirs. Sums are hex
    digits."""

    name: str
    epoch: int
    base_version: int | None
    version: int
    nbytes: int
    checksum: str
    digest: str
    manifest_hash: str
    writer: str
    merged: int
    step: int | None
    tags: Tags | None
    tiers: tuple[str, ...]
    pieces: int


class Listing(msgspec.Struct, frozen=True, kw_only=True):
    """What `sparsecast log ls --json` prints. `way` leads to the newest version. `partial` are the
    pieces of what not all roots have stored."""

    run: str
    tiers: list[str]
    head: int | None
    nbytes: int
    entries: list[EntryView]
    way: list[str]
    partial: list[str]
    problems: list[str]


class Pruned(msgspec.Struct, frozen=True, kw_only=True):
    """What `sparsecast log prune --json` prints: the names that went, or would go."""

    run: str
    dry_run: bool
    dropped: list[str]
    nbytes: int
    kept: int
    kept_nbytes: int
    problems: list[str]


def view(book: Logbook, entry: LogEntry) -> EntryView:
    """An entry, for people and programs."""
    return EntryView(
        name=entry.name, epoch=entry.epoch, base_version=entry.base_version, version=entry.version,
        nbytes=entry.nbytes, checksum=f"{entry.checksum:016x}", digest=f"{entry.digest:016x}",
        manifest_hash=entry.manifest_hash, writer=entry.writer, merged=entry.merged,
        step=entry.step, tags=entry.tags, tiers=book.holders(entry), pieces=entry.roots,
    )  # fmt: skip


def listing(book: Logbook, entries: Sequence[LogEntry]) -> Listing:
    """These entries, and the way to the newest version."""
    way: list[str] = []
    try:
        way = [entry.name for entry in book.way_to(None)] if book.entries else []
    except LogHole as exc:
        book.problems.append(str(exc))
    line = next(iter(book.lines.values()), [])
    return Listing(
        run=book.run,
        tiers=list(book.tiers),
        head=line[-1].version if line else None,
        nbytes=sum(entry.nbytes for entry in entries),
        entries=[view(book, entry) for entry in entries],
        way=way,
        partial=[piece.name for piece in partial(book.stored)],
        problems=list(dict.fromkeys(book.problems)),
    )


async def prune(
    book: Logbook, *, keep_versions: int, keep_nbytes: int | None, dry_run: bool
) -> Pruned:
    """Drop what the trainer's retention would. LogError, and nothing is dropped, unless the newest
    anchors that stay are whole.

    Without the journal nobody can say which epoch lives: then each keeps what leads to its head.
    """
    entries = book.entries
    epochs = {entry.epoch for entry in entries}
    if book.claim is not None:
        epochs &= {book.claim.epoch}
    drop = []
    for epoch in epochs:
        among = [e for e in entries if e.epoch == epoch] if book.claim is None else entries
        drop += needless(among, epoch=epoch, versions=keep_versions, nbytes=keep_nbytes)
    gone = {entry.name for entry in drop}
    kept = [entry for entry in entries if entry.name not in gone]
    going = pruned(book.stored, drop)
    of_drop = {piece.name for entry in drop for piece in each(entry)}
    lost = [piece for piece in going if piece.name not in of_drop]
    if going and not dry_run:
        anchors = {(e.epoch, e.writer): e for e in kept if e.base_version is None}
        for anchor in anchors.values():
            await book.prove(anchor)
        for name, tier in book.tiers.items():
            try:
                await tier.prune(going, timeout_s=book.timeout_s)
            except (LogError, BusError) as exc:
                book.problems.append(f"{name}: {exc}")
    return Pruned(
        run=book.run,
        dry_run=dry_run,
        dropped=[entry.name for entry in (*drop, *lost)],
        nbytes=sum(entry.nbytes for entry in going),
        kept=len(kept),
        kept_nbytes=sum(entry.nbytes for entry in kept),
        problems=list(dict.fromkeys(book.problems)),
    )


# ---- for people


def print_listing(found: Listing) -> None:
    """A line an entry, and where the newest version is."""
    table = Table(title=f"log of run {found.run}", title_justify="left")
    several = any(entry.pieces > 1 for entry in found.entries)
    for name in (
        "entry",
        "from",
        "to",
        "bytes",
        *(("pieces",) if several else ()),
        "step",
        "tiers",
    ):
        right = name in ("from", "to", "bytes", "pieces")
        table.add_column(name, justify="right" if right else "left")
    for entry in found.entries:
        table.add_row(
            entry.name,
            "anchor" if entry.base_version is None else str(entry.base_version),
            str(entry.version),
            f"{entry.nbytes:,}",
            *((str(entry.pieces),) if several else ()),
            "" if entry.step is None else str(entry.step),
            ", ".join(entry.tiers),
        )
    console = Console()
    console.print(table)
    if found.head is None:
        console.print("empty")
    elif found.way:
        console.print(f"version {found.head} by: {' '.join(found.way)}", soft_wrap=True)
    if found.partial:
        console.print(f"not whole, other roots' pieces are missing: {' '.join(found.partial)}",
                      soft_wrap=True)  # fmt: skip


def print_entries(entries: Sequence[EntryView]) -> None:
    """All that is known of these entries."""
    console = Console()
    for entry in entries:
        table = Table(show_header=False, box=None)
        for name, value in msgspec.structs.asdict(entry).items():
            said = ", ".join(value) if name == "tiers" else value
            table.add_row(name, "" if said is None else str(said))
        console.print(table)


def print_verdict(found: Verdict) -> None:
    """What was found wrong, then the sum."""
    console = Console()
    for entry in found.entries:
        if not entry.ok:
            console.print(f"bad     {entry.tier}: {entry.name}: {entry.reason}", soft_wrap=True)
    for made in found.versions:
        if not made.ok:
            console.print(
                f"bad     version {made.version} by {made.name}: {made.reason} "
                f"(digest {made.found or 'none'}, published {made.expected})",
                soft_wrap=True,
            )
    for problem in found.problems:
        console.print(f"problem {problem}", soft_wrap=True)
    bad = sum(not one.ok for one in found.entries)
    proven = sum(one.ok for one in found.versions)
    console.print(
        f"{'ok' if found.ok else 'NOT OK'}: run {found.run}, {len(found.entries)} copies of "
        f"entries read, {bad} bad; {proven} of {len(found.versions)} digests proven; newest "
        f"anchor {found.anchor}, newest version {found.head}, the chain between them "
        f"{'unbroken' if found.unbroken else 'BROKEN'}",
        soft_wrap=True,
    )


def print_pruned(found: Pruned) -> None:
    """The names, one a line, then the sum."""
    console = Console()
    for name in found.dropped:
        console.print(name, soft_wrap=True)
    console.print(
        f"{'would drop' if found.dry_run else 'dropped'} {len(found.dropped)} entries, "
        f"{found.nbytes:,} bytes; {found.kept} stay, {found.kept_nbytes:,} bytes",
        soft_wrap=True,
    )
