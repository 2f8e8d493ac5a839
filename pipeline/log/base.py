"""The contract of the log: durable patches and anchors, by the road that needs no window.

An entry is stored whole or not at all: readers see it once all of its bytes are there. Every tier
passes the suite in tests/pipeline/log/test_contract.py.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ...messages.control import LogEntry
from ...messages.errors import LogError, LogHole
from ...messages.manifest import Manifest

#: Hears what a tier cannot raise: a damaged entry that it passed over, a tier that failed.
Tell = Callable[[str], None]
#: Hears how many bytes of an entry are there so far.
Progress = Callable[[int], None]


class Record(Protocol):
    """One message as a stream holds it."""

    @property
    def subject(self) -> str: ...
    @property
    def sequence(self) -> int: ...
    @property
    def data(self) -> bytes: ...


class Streams(Protocol):
    """What the JetStream tier asks of the bus (see pipeline/bus/base.py, which fulfils it)."""

    @property
    def max_payload(self) -> int: ...
    async def ensure_stream(self, config: Any, *, timeout_s: float) -> Any: ...
    async def append(
        self, stream: str, subject: str, data: bytes, *, message_id: str = "", timeout_s: float
    ) -> int: ...
    def read(
        self, stream: str, subject: str, *, start_sequence: int = 1, timeout_s: float
    ) -> AsyncIterator[Record]: ...
    async def purge(
        self, stream: str, *, subject: str = "", before_sequence: int = 0, timeout_s: float
    ) -> None: ...


@dataclass(frozen=True, slots=True)
class Anatomy:
    """Where the payload of an anchor holds its tensors."""

    manifest: Manifest
    #: Of each tensor of the manifest, from the start of the payload, in bytes.
    offsets: tuple[int, ...]


class Payloads(Protocol):
    """What a tier that looks into payloads asks of whoever can read them (workers/anchors.py)."""

    def checksum(self, payload: bytes | bytearray | memoryview) -> int:
        """The checksum, as an entry has it. On any thread."""

    def anatomy(self, payload: memoryview) -> Anatomy:
        """Where an anchor that this process made holds its tensors (PatchError). On any thread."""


class Log(Protocol):
    """A tier of the log. One object serves one event loop, unless it says otherwise."""

    @property
    def durable(self) -> bool:
        """Whether what is stored outlives this process."""

    async def store(
        self, entry: LogEntry, payload: bytes | memoryview, *, timeout_s: float
    ) -> None:
        """Store an entry, whole or not at all (LogError). Storing the same name again replaces
        nothing and is no error."""

    async def entries(self, *, timeout_s: float) -> list[LogEntry]:
        """Every entry that is there, `oldest_first` (LogError)."""

    async def load(
        self, entry: LogEntry, *, timeout_s: float, progress: Progress | None = None
    ) -> bytes | bytearray:
        """The bytes of an entry, as many as it says (LogError). LogHole if it is not there (any
        more): start again from the entries.

        `progress` is called on the loop's thread while the bytes come, never with fewer than before
        (but see TieredLog), the last time with all of them; not once this has raised."""

    async def prune(self, drop: Sequence[LogEntry], *, timeout_s: float) -> None:
        """Drop these entries; what is not there is no error (LogError)."""

    async def manifest(self, manifest_hash: str, *, timeout_s: float) -> Manifest | None:
        """The manifest of that hash, if this tier knows the tensors' names (LogError)."""


def unheard(nbytes: int) -> None:
    """The progress of a load that nobody watches."""


def require_size(entry: LogEntry, payload: bytes | memoryview) -> memoryview:
    """The payload as bytes, if it has as many as its entry says (LogError)."""
    view = memoryview(payload).cast("B")
    if view.nbytes != entry.nbytes:
        raise LogError(
            f"log entry {entry.name!r} says {entry.nbytes} bytes, its payload has {view.nbytes}"
        )
    return view


def oldest_first(entries: Sequence[LogEntry]) -> list[LogEntry]:
    """By epoch and version, an anchor behind the patches that lead to its version."""
    return sorted(entries, key=lambda e: (e.epoch, e.version, e.base_version is None))


def way(
    entries: Sequence[LogEntry], *, epoch: int, held: int | None, target: int
) -> list[LogEntry]:
    """The entries, in the order to apply, that bring weights from `held` to at least `target`.

    A patch carries any version in [base_version, version) to `version`, an anchor whatever there
    is. `held` None means that the weights are worth nothing: the way starts at an anchor. Entries
    of another epoch do not count. Of all ways the one with the fewest bytes is taken, of equal
    ones the one that reaches furthest; none is needed if `held` is at `target` already. LogHole if
    there is no way.
    """
    known = sorted((entry for entry in entries if entry.epoch == epoch), key=_version)
    # The cheapest way to each version that can be reached: bytes, the version before, the entry.
    # Every entry leads upwards, so in the order of versions each is final when it is stepped from.
    best: dict[int, tuple[int, int | None, LogEntry | None]] = {}
    if held is not None:
        best[held] = (0, None, None)
    for entry in known:
        paid, before = 0, None
        if entry.base_version is not None:
            steps = [
                (best[version][0], version)
                for version in best
                if entry.base_version <= version < entry.version
            ]
            if not steps:
                continue
            paid, before = min(steps)
        paid += entry.nbytes
        if entry.version not in best or paid < best[entry.version][0]:
            best[entry.version] = (paid, before, entry)
    ends = [(best[version][0], -version) for version in best if version >= target]
    if not ends:
        raise LogHole(
            f"from version {held} to {target} in epoch {epoch}, with {len(known)} entries",
            version=target,
        )
    found: list[LogEntry] = []
    at: int | None = -min(ends)[1]
    while at is not None:
        _, at, last = best[at]
        if last is not None:
            found.append(last)
    return found[::-1]


def _version(entry: LogEntry) -> int:
    return entry.version
