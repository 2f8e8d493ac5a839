"""What a log is worth: every byte read, every version made again, a state written out."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
from collections.abc import Collection
from pathlib import Path

import msgspec
import safetensors.torch

from ..messages.control import LogEntry
from ..messages.errors import BusError, LogError, LogHole
from ..messages.manifest import Manifest
from ..pipeline.delta import digest
from ..pipeline.log.base import way
from .logbook import Logbook, State


class Checked(msgspec.Struct, frozen=True, kw_only=True):
    """One entry in one tier: whether its bytes are those of its checksum; `reason` if not."""

    tier: str
    name: str
    ok: bool
    reason: str = ""


class Made(msgspec.Struct, frozen=True, kw_only=True):
    """One entry's version, made again in host memory: the digest it names, and the one found."""

    name: str
    version: int
    ok: bool
    expected: str
    found: str = ""
    reason: str = ""


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What `sparsecast log verify --json` prints.

    `anchor` and `head` are the newest ones of the trainer that holds the run, or held it last;
    `unbroken`: patches lead from one to the other.
    """

    ok: bool
    run: str
    epoch: int | None
    anchor: int | None
    head: int | None
    unbroken: bool
    entries: list[Checked]
    versions: list[Made]
    problems: list[str]


async def verify(book: Logbook) -> Verdict:
    """Read every entry in every tier, and make every version of the newest epoch again."""
    checked = [
        await _checked(book, tier, entry) for tier, held in book.held.items() for entry in held
    ]
    (epoch, _), ours = next(iter(book.lines.items()), ((None, ""), []))
    versions = await _replay(book, ours)
    anchor = max((e.version for e in ours if e.base_version is None), default=None)
    head = max((e.version for e in ours), default=None)
    unbroken = False
    if epoch is not None and head is not None and anchor is not None:
        with contextlib.suppress(LogHole):
            after = [e for e in ours if e.version > anchor and e.base_version is not None]
            way(after, epoch=epoch, held=anchor, target=head)
            unbroken = True
    if not ours:
        book.problems.append("the log is empty")
    elif not unbroken:
        book.problems.append(
            f"no unbroken way from the newest anchor ({anchor}) to version {head}: a worker "
            "without weights cannot follow before the next anchor is stored"
        )
    good = all(one.ok for one in checked) and all(one.ok for one in versions)
    return Verdict(
        ok=good and not book.problems,
        run=book.run,
        epoch=epoch,
        anchor=anchor,
        head=head,
        unbroken=unbroken,
        entries=checked,
        versions=versions,
        problems=list(dict.fromkeys(book.problems)),
    )


async def _checked(book: Logbook, tier: str, entry: LogEntry) -> Checked:
    try:
        await book.load(entry, book.tiers[tier])
    except (LogError, BusError) as exc:
        return Checked(tier=tier, name=entry.name, ok=False, reason=str(exc))
    return Checked(tier=tier, name=entry.name, ok=True)


async def _replay(book: Logbook, entries: list[LogEntry]) -> list[Made]:
    """Make every version again by every entry: by the single patches first, then by merged ones in
    the place of what they cover.

    Each round applies entries in order of their versions, each anchor over what was reached without
    it. What never follows on what is held (before the first anchor, behind a hole) is left out.
    """
    try:
        manifest = await book.manifest(entries[0].manifest_hash) if entries else None
    except (LogError, BusError) as exc:
        book.problems.append(str(exc))
        return []
    if manifest is None:
        return []
    made: dict[str, Made] = {}
    while True:
        todo = {entry.name: entry for entry in entries if entry.name not in made}
        chosen = [
            entry
            for entry in entries
            if entry.name in todo or not any(_covers(wide, entry) for wide in todo.values())
        ]
        found = await _round(book, chosen, todo.keys(), manifest)
        made |= {one.name: one for one in found}
        if not found:
            return list(made.values())


def _covers(wide: LogEntry, entry: LogEntry) -> bool:
    """Whether one patch will do in the place of another."""
    if wide.base_version is None or entry.base_version is None:
        return False
    return wide.base_version <= entry.base_version and entry.version <= wide.version


async def _round(
    book: Logbook, entries: list[LogEntry], todo: Collection[str], manifest: Manifest
) -> list[Made]:
    """Apply entries in their order; what became of those that are still to do."""
    made: list[Made] = []
    held: int | None = None
    state: State = {}
    for at, entry in enumerate(entries):
        if not any(later.name in todo for later in entries[at:]):
            break
        base, expected = entry.base_version, f"{entry.digest:016x}"
        if base is not None and (held is None or not base <= held < entry.version):
            continue
        if base is None and entry.name not in todo and held is not None:
            continue
        found, reason = "", ""
        try:
            await book.apply(entry, manifest, state)
        except (LogError, BusError) as exc:
            reason = str(exc)
        else:
            found = f"{await asyncio.to_thread(digest, state, manifest=manifest):016x}"
            if found != expected:
                reason = "the state is not the one that was published"
        # A state of another digest proves nothing of what follows on it.
        held = None if reason else entry.version
        if entry.name in todo:
            made.append(
                Made(
                    name=entry.name, version=entry.version, ok=not reason,
                    expected=expected, found=found, reason=reason,
                )
            )  # fmt: skip
    return made


class Exported(msgspec.Struct, frozen=True, kw_only=True):
    """What `sparsecast log export --json` prints."""

    run: str
    version: int
    to: str
    nbytes: int
    digest: str
    way: list[str]


async def export(book: Logbook, version: int | None, to: Path) -> Exported:
    """Write the state at a version (None: the newest) to a safetensors file.

    It is read back and its digest compared before it gets its name (LogError).
    """
    found = book.way_to(version)
    last = found[-1]
    manifest = await book.manifest(last.manifest_hash)
    state: State = {}
    for entry in found:
        await book.apply(entry, manifest, state)
    metadata = {"format": "pt", "sparsecast.run": book.run, "sparsecast.version": str(last.version)}
    temporary = to.with_name(f".{to.name}.{secrets.token_hex(4)}.tmp")

    def write() -> int:
        safetensors.torch.save_file(state, temporary, metadata)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        proof = digest(safetensors.torch.load_file(temporary), manifest=None)
        if proof != last.digest:
            raise LogError(
                f"version {last.version} of run {book.run!r} has digest {proof:016x}, "
                f"{last.digest:016x} was published; where it goes wrong says: sparsecast log verify"
            )
        temporary.replace(to)
        return to.stat().st_size

    try:
        nbytes = await asyncio.to_thread(write)
    except OSError as exc:
        raise LogError(f"{to}: {exc.strerror or exc}") from exc
    finally:
        temporary.unlink(missing_ok=True)
    return Exported(
        run=book.run, version=last.version, to=str(to), nbytes=nbytes,
        digest=f"{last.digest:016x}", way=[entry.name for entry in found],
    )  # fmt: skip
