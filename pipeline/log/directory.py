"""The log in a directory: a file an entry, which any tool for safetensors opens.

    <root>/<run>/<entry>.safetensors

An anchor holds its tensors under their published names, a patch its bytes as one tensor; the entry
is in the file's metadata, for an anchor also what else it takes to give the exact payload back.

A file is written under a temporary name, synced, renamed, and the directory synced: a reader sees
all of it or nothing, whenever the writer or the machine dies. What such a death leaves is swept by
the next writer.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from ...messages.control import LogEntry
from ...messages.errors import LogError, LogHole, PatchError
from ...messages.manifest import Manifest
from ...messages.subjects import check_entry, check_token
from .base import Payloads, Progress, Tell, oldest_first, require_size, unheard
from .container import Damaged
from .files import SUFFIX, GoOn, read, read_payload, write
from .pieces import root_of
from .threads import Threads

log = logging.getLogger("sparsecast.log")

T = TypeVar("T")

TEMPORARY = ".tmp"
READERS = 4
#: What tells one state of a file from another.
_Stamp = tuple[int, int, int]

_HINTS = {
    errno.ENOSPC: "free some space, or keep less (Policy.keep_versions, Policy.keep_nbytes)",
    errno.EDQUOT: "free some space, or keep less (Policy.keep_versions, Policy.keep_nbytes)",
    errno.EROFS: "mount it writable",
    errno.EACCES: "give this user the right to it",
    errno.EPERM: "give this user the right to it",
    errno.ENOENT: "is the disk mounted? If it is, make the log's directory: mkdir -p",
    errno.ESTALE: "mount it again",
}


class DirectoryLog:
    """The log of one run in a directory that its processes share: implements `Log`.

    `root` has to be there: a mount that is missing must not become a directory on another disk.
    `tell` hears of every damaged file, once; such a file is no entry.
    """

    durable = True

    def __init__(
        self,
        root: Path | str,
        run: str,
        payloads: Payloads,
        *,
        tell: Tell = log.warning,
        threads: Callable[[str, int], Threads] = Threads,
    ) -> None:
        self._root = Path(root)
        self.path = self._root / check_token("run", run)
        self._payloads = payloads
        self._tell = tell
        #: One writer: a write that hangs is not overtaken by its own repetition.
        self._writing = threads("sparsecast-log-write", 1)
        self._reading = threads("sparsecast-log-read", READERS)
        self._token = secrets.token_hex(4)
        self._swept = False
        #: The entries of files as they were read last, None for a damaged one.
        self._known: dict[str, tuple[_Stamp, LogEntry | None]] = {}

    # ---- the contract

    async def store(
        self, entry: LogEntry, payload: bytes | memoryview, *, timeout_s: float
    ) -> None:
        """Store an entry, whole and on the disk, within `timeout_s` (LogError)."""
        view = require_size(entry, payload)
        what = f"log entry {entry.name!r} ({entry.nbytes} bytes) was not stored"
        await self._run(
            self._writing, lambda go_on: self._store(entry, view, go_on), what, timeout_s
        )

    async def entries(self, *, timeout_s: float) -> list[LogEntry]:
        """Every entry whose file is whole, oldest first; none if nothing was stored (LogError)."""
        return await self._run(self._reading, self._entries, "the log was not read", timeout_s)

    async def load(
        self, entry: LogEntry, *, timeout_s: float, progress: Progress | None = None
    ) -> bytearray:
        """The bytes of an entry, their checksum checked (LogError, LogHole).

        `progress` hears of each tensor of the file, of a large one of each 8 MiB.
        """
        loop, hear = asyncio.get_running_loop(), progress or unheard
        waited_for = True

        def on_loop(nbytes: int) -> None:
            # A read that hung may go on after its deadline, beside the next one.
            if waited_for:
                hear(nbytes)

        def tell(nbytes: int) -> None:
            loop.call_soon_threadsafe(on_loop, nbytes)

        what = f"log entry {entry.name!r} was not read"
        try:
            payload = await self._run(
                self._reading, lambda go_on: self._load(entry, go_on, tell), what, timeout_s
            )
        finally:
            waited_for = False
        # What lies between an anchor's tensors is in no step; and the checksum has been right.
        hear(entry.nbytes)
        return payload

    async def prune(self, drop: Sequence[LogEntry], *, timeout_s: float) -> None:
        """Remove the files of these entries (LogError)."""
        await self._run(
            self._writing,
            lambda go_on: self._prune(drop, go_on),
            "the log was not pruned",
            timeout_s,
        )

    async def manifest(self, manifest_hash: str, *, timeout_s: float) -> Manifest | None:
        """The manifest of that hash, if there is an anchor of it (LogError)."""
        what = "the tensors' names were not read"
        return await self._run(
            self._reading, lambda go_on: self._manifest(manifest_hash, go_on), what, timeout_s
        )

    async def _run(
        self, threads: Threads, function: Callable[[GoOn], T], what: str, timeout_s: float
    ) -> T:
        try:
            return await threads.run(function, timeout_s=timeout_s)
        except TimeoutError:
            raise LogError(
                f"{what} within {timeout_s:g} s: the disk of {self.path} is slow, or hangs"
            ) from None
        except OSError as exc:
            hint = _HINTS.get(exc.errno or 0, "")
            if exc.errno == errno.ENOENT:
                hint += f" {self._root}"
            place = exc.filename or self.path
            raise LogError(f"{what}: {place}: {exc.strerror or exc}; {hint}".rstrip("; ")) from exc
        except (PatchError, MemoryError) as exc:
            raise LogError(f"{what}: {exc}") from exc

    # ---- writing, on a thread

    def _store(self, entry: LogEntry, view: memoryview, go_on: GoOn) -> None:
        path = self._file(entry)
        self._prepare(entry)
        with contextlib.suppress(FileNotFoundError):
            if self._entry(path) is not None:
                # Whoever renamed it may have died before the directory was on the disk.
                _sync(self.path)
                return
        anatomy = self._payloads.anatomy(view) if entry.base_version is None else None
        temporary = self.path / f".{entry.name}.{self._token}{TEMPORARY}"
        try:
            with temporary.open("wb") as file:
                write(file, entry, view, anatomy, go_on)
                file.flush()
                os.fsync(file.fileno())
            go_on()
            temporary.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        _sync(self.path)

    def _prepare(self, entry: LogEntry) -> None:
        """Make the run's directory, and sweep what dead writers have left there.

        Of a trainer of several roots each sweeps what is its own: the others may be writing now.
        """
        if not self.path.is_dir():
            self.path.mkdir(exist_ok=True)
            _sync(self._root)
        if not self._swept:
            for path in self.path.glob(f".*{TEMPORARY}"):
                name = path.name[1:].removesuffix(TEMPORARY).rpartition(".")[0]
                if root_of(name) % entry.roots == entry.root:
                    log.info("swept %s, which a dead writer has left", path)
                    path.unlink(missing_ok=True)
            self._swept = True

    def _prune(self, drop: Sequence[LogEntry], go_on: GoOn) -> None:
        for entry in drop:
            go_on()
            self._file(entry).unlink(missing_ok=True)
        if self.path.is_dir():
            _sync(self.path)
        else:
            self._root.stat()

    # ---- reading, on a thread

    def _entries(self, go_on: GoOn) -> list[LogEntry]:
        try:
            with os.scandir(self.path) as listed:
                found = {item.name: Path(item.path) for item in listed}
        except FileNotFoundError:
            self._root.stat()
            return []
        paths = {name: path for name, path in found.items() if path.suffix == SUFFIX}
        for name in set(self._known) - paths.keys():
            self._known.pop(name, None)
        entries = []
        for path in paths.values():
            go_on()
            with contextlib.suppress(FileNotFoundError):  # pruned meanwhile
                entry = self._entry(path)
                if entry is not None:
                    entries.append(entry)
        return oldest_first(entries)

    def _entry(self, path: Path) -> LogEntry | None:
        """The entry of a file; None, and told once, if the file is damaged."""
        stamp = _stamp(path.stat())
        known = self._known.get(path.name)
        if known is not None and known[0] == stamp:
            return known[1]
        entry: LogEntry | None = None
        try:
            with path.open("rb") as file:
                entry = read(file, path).entry
        except Damaged as exc:
            self._tell(str(_damaged(path, exc)))
        self._known[path.name] = stamp, entry
        return entry

    def _load(self, entry: LogEntry, go_on: GoOn, tell: Progress) -> bytearray:
        path = self._file(entry)
        try:
            with path.open("rb") as file:
                stamp = _stamp(os.fstat(file.fileno()))
                try:
                    opened = read(file, path)
                    payload = read_payload(file, opened, go_on, tell)
                    if self._payloads.checksum(payload) != opened.entry.checksum:
                        raise Damaged("its tensors are not those that were written")
                    return payload
                except Damaged as exc:
                    # Out of the entries from now on: whoever asks finds a way around it.
                    self._known[path.name] = stamp, None
                    raise _damaged(path, exc) from exc
        except FileNotFoundError:
            self._root.stat()
            raise LogHole(f"{path} is not there: pruned, or lost", version=entry.version) from None

    def _manifest(self, manifest_hash: str, go_on: GoOn) -> Manifest | None:
        for entry in reversed(self._entries(go_on)):
            if entry.base_version is None and entry.manifest_hash == manifest_hash:
                path = self._file(entry)
                with contextlib.suppress(FileNotFoundError, Damaged), path.open("rb") as file:
                    anchor = read(file, path).anchor
                    if anchor is not None and anchor.manifest.hash == manifest_hash:
                        return anchor.manifest
        return None

    def _file(self, entry: LogEntry) -> Path:
        return self.path / f"{check_entry(entry.name)}{SUFFIX}"


def _damaged(path: Path, why: Damaged) -> LogError:
    return LogError(
        f"{path} is damaged: {why}; remove it, or bring it back from a copy: "
        "readers go around it, or start again from the newest anchor"
    )


def _stamp(found: os.stat_result) -> _Stamp:
    return found.st_ino, found.st_size, found.st_mtime_ns


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
