"""The contract of the log: durable patches and anchors, by the road that needs no window.

An entry is stored whole or not at all: readers see it once all of its bytes are there. Every tier
passes the suite in tests/pipeline/log/test_contract.py.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any, Protocol

from ...messages.control import LogEntry
from ...messages.errors import LogHole


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


class Log(Protocol):
    """A tier of the log."""

    async def store(
        self, entry: LogEntry, payload: bytes | memoryview, *, timeout_s: float
    ) -> None:
        """Store an entry, whole or not at all (LogError). Storing the same name again replaces
        nothing and is no error."""

    async def entries(self, *, timeout_s: float) -> list[LogEntry]:
        """Every entry that is there, oldest first."""

    async def load(self, entry: LogEntry, *, timeout_s: float) -> bytes:
        """The bytes of an entry, their size and number of chunks checked (LogError, LogHole)."""

    async def prune(self, keep: Sequence[LogEntry], *, timeout_s: float) -> None:
        """Drop every entry that is not in `keep`, unless it was stored after all of them: the
        caller has not seen it yet."""


def way(
    entries: Sequence[LogEntry], *, epoch: int, held: int | None, target: int
) -> list[LogEntry]:
    """The entries, in the order to apply, that bring weights from `held` to at least `target`.

    A patch carries any version in [base_version, version) to `version`. `held` None means that the
    weights are worth nothing: the way starts at the newest anchor. Entries of another epoch do not
    count. Of all ways the one with the fewest bytes is taken. LogHole if there is none.
    """
    known = [entry for entry in entries if entry.epoch == epoch]
    # cost[v]: the fewest bytes that reach version v, and the entry that was taken last.
    cost: dict[int, tuple[int, LogEntry | None]] = {}
    if held is not None:
        cost[held] = (0, None)
    for entry in sorted(known, key=lambda entry: (entry.version, -(entry.base_version or -1))):
        if entry.base_version is None:
            start = 0
        else:
            reachable = [
                paid
                for version, (paid, _) in cost.items()
                if entry.base_version <= version < entry.version
            ]
            if not reachable:
                continue
            start = min(reachable)
        paid = start + entry.nbytes
        if entry.version not in cost or paid < cost[entry.version][0]:
            cost[entry.version] = (paid, entry)
    ends = [version for version in cost if version >= target]
    if not ends:
        raise LogHole(
            f"from version {held} to {target} in epoch {epoch}, with {len(known)} entries",
            version=target,
        )
    found: list[LogEntry] = []
    end: int | None = max(ends)
    while end is not None:
        paid, last = cost[end]
        if last is None:
            break
        found.append(last)
        if last.base_version is None:
            break
        rest = paid - last.nbytes
        base = last.base_version
        end = next(
            version
            for version, (spent, _) in cost.items()
            if base <= version < last.version and spent == rest
        )
    return found[::-1]
