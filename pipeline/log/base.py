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
    async def limit_stream(
        self, stream: str, max_nbytes: int | None, *, timeout_s: float
    ) -> None: ...
    async def subjects(self, stream: str, subject: str, *, timeout_s: float) -> list[str]: ...
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
    """What a tier that looks into payloads asks of whoever can read them (workers/entries.py)."""

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
    """By epoch and version, wider patches behind narrower ones, an anchor behind all of them."""
    return sorted(
        entries,
        key=lambda e: (e.epoch, e.version, e.base_version is None, -(e.base_version or 0)),
    )


@dataclass(frozen=True, slots=True)
class Step:
    """A version that entries lead to: by `entry`, applied to what `before` makes (None: to what is
    held, or for an anchor to anything). `nbytes`: of all entries on the way."""

    entry: LogEntry
    before: Step | None
    nbytes: int

    @property
    def version(self) -> int:
        """The version that it makes."""
        return self.entry.version

    @property
    def way(self) -> list[LogEntry]:
        """The entries, in the order to apply."""
        found: list[LogEntry] = []
        step: Step | None = self
        while step is not None:
            found.append(step.entry)
            step = step.before
        return found[::-1]


def reached(
    entries: Sequence[LogEntry], held: int | None = None, by: Step | None = None
) -> dict[int, Step]:
    """Every version that entries of one epoch lead to, each by the fewest bytes.

    A patch carries any version in [base_version, version) to `version`, an anchor whatever there
    is. `held` is there already, at no cost or by what `by` has taken; None: nothing is.
    """
    found: dict[int, Step] = {}
    paid: dict[int, int] = {}
    if held is not None:
        paid[held] = 0 if by is None else by.nbytes
    # Every entry leads upwards: in the order of versions each is final when it is stepped from.
    for entry in sorted(entries, key=lambda e: e.version):
        before, nbytes = None, entry.nbytes
        if entry.base_version is not None:
            bases = [v for v in paid if entry.base_version <= v < entry.version]
            if not bases:
                continue
            base = min(bases, key=paid.__getitem__)
            before = found.get(base, by)
            nbytes += paid[base]
        if entry.version not in paid or nbytes < paid[entry.version]:
            paid[entry.version] = nbytes
            found[entry.version] = Step(entry, before, nbytes)
    return found


def way(
    entries: Sequence[LogEntry], *, epoch: int, held: int | None, target: int
) -> list[LogEntry]:
    """The entries, in the order to apply, that bring weights from `held` to at least `target`.

    `held` None means that the weights are worth nothing: the way starts at an anchor. Entries of
    another epoch do not count. Of all ways the one with the fewest bytes is taken, of equal ones
    the one that reaches furthest; none is needed if `held` is at `target` already. LogHole if
    there is no way.
    """
    known = [entry for entry in entries if entry.epoch == epoch]
    ends = [step for step in reached(known, held).values() if step.version >= target]
    best = min(ends, key=_furthest_for_least, default=None)
    if held is not None and held >= target:
        # An entry without bytes may lead on for nothing.
        best = best if best is not None and (best.nbytes, -best.version) < (0, -held) else None
        return best.way if best is not None else []
    if best is None:
        raise LogHole(
            f"from version {held} to {target} in epoch {epoch}, with {len(known)} entries",
            version=target,
        )
    return best.way


def _furthest_for_least(step: Step) -> tuple[int, int]:
    return step.nbytes, -step.version
