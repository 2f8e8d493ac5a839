"""A run's log, opened to be looked at: which tier holds what, and how entries lead to a version."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from ..messages import codec
from ..messages.compose import through
from ..messages.control import Claim, LogEntry
from ..messages.errors import (
    BusError,
    LogError,
    LogHole,
    ManifestMismatch,
    PatchError,
    RemoteProtocolError,
    StreamMissing,
)
from ..messages.layout import Layout, identity
from ..messages.manifest import Manifest
from ..pipeline.bus.base import Bus
from ..pipeline.bus.journal import Journal
from ..pipeline.bus.nats import connect
from ..pipeline.log.base import Log, way
from ..pipeline.log.pieces import WholeLog, each, whole
from ..pipeline.log.tiered import TieredLog
from .entries import PatchPayloads, remake
from .tiers import JETSTREAM, open_tiers

State = dict[str, torch.Tensor]
#: Entries of one trainer's claim: its epoch, and its incarnation.
Line = tuple[int, str]


@dataclass(slots=True)
class Logbook:
    """The log of a run; made by opened()."""

    run: str
    tiers: Mapping[str, Log]
    timeout_s: float
    bus: Bus | None
    #: What was found wrong: tiers that cannot be read, damaged files.
    problems: list[str] = field(default_factory=list)
    #: The entries of each tier that can be read, the pieces of several roots one by one.
    held: dict[str, list[LogEntry]] = field(default_factory=dict)
    claim: Claim | None = None
    payloads: PatchPayloads = field(default_factory=PatchPayloads)
    #: All tiers as one.
    log: Log = field(init=False)
    #: Where the tensors of each root lie in the published ones, by the hashes of its layout and of
    #: their manifest.
    _through: dict[tuple[str, str], tuple[Manifest, Layout]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.log = WholeLog(TieredLog(self.tiers, tell=self.problems.append))

    async def read(self) -> None:
        """Read what every tier has. LogError if none can be read."""
        for name, tier in self.tiers.items():
            try:
                self.held[name] = await tier.entries(timeout_s=self.timeout_s)
            except (LogError, BusError) as exc:
                self.problems.append(f"{name}: {exc}")
        if not self.held:
            raise LogError("; ".join(self.problems))
        if self.bus is not None:
            try:
                self.claim = await Journal(self.bus, self.run).claim(timeout_s=self.timeout_s)
            except StreamMissing:
                pass
            except BusError as exc:
                self.problems.append(f"the journal: {exc}")

    @property
    def entries(self) -> list[LogEntry]:
        """The entries of all tiers that are whole, oldest first."""
        return whole(self.stored)

    @property
    def stored(self) -> list[LogEntry]:
        """What all tiers have, the pieces of several roots one by one."""
        return list({entry.name: entry for held in self.held.values() for entry in held}.values())

    def holders(self, entry: LogEntry) -> tuple[str, ...]:
        """The tiers that have an entry, with all of its pieces."""
        names = {piece.name for piece in each(entry)}
        return tuple(
            name for name, held in self.held.items() if names <= {one.name for one in held}
        )

    @property
    def lines(self) -> dict[Line, list[LogEntry]]:
        """The entries by trainer, the newest first: the one that the journal names, if it does."""
        found: dict[Line, list[LogEntry]] = {}
        for entry in self.entries:
            found.setdefault((entry.epoch, entry.writer), []).append(entry)
        now = (self.claim.epoch, self.claim.sender.incarnation) if self.claim else None
        order = sorted(found, key=lambda line: (line == now, line[0], found[line][-1].version))
        return {line: found[line] for line in reversed(order)}

    def way_to(self, version: int | None) -> list[LogEntry]:
        """The entries that lead from nothing to exactly this version (None: the newest)."""
        if not self.entries:
            raise LogHole(f"the log of run {self.run!r} is empty")
        for (epoch, _), entries in self.lines.items():
            target = entries[-1].version if version is None else version
            until = [entry for entry in entries if entry.version <= target]
            if version is None or any(entry.version == version for entry in until):
                return way(until, epoch=epoch, held=None, target=target)
        known = sorted({entry.version for entry in self.entries})
        raise LogHole(
            f"it has no version {version}; it goes from {known[0]} to {known[-1]}", version=version
        )

    async def manifest(self, manifest_hash: str) -> Manifest:
        """The manifest of that hash, from an anchor's file or the journal (LogError)."""
        found = await self.log.manifest(manifest_hash, timeout_s=self.timeout_s)
        if found is None and self.claim is not None:
            found = self.claim.manifest
        if found is None or found.hash != manifest_hash:
            raise LogError(
                f"the names of manifest {manifest_hash} are neither in an anchor's file nor in the "
                "journal; give the --bus of the run, or a dir: tier that has its anchors"
            )
        return found

    async def prove(self, entry: LogEntry) -> None:
        """Read an entry, piece by piece, from the first tier that has it (LogError)."""
        for piece in each(entry):
            await self.load(piece)

    async def load(self, entry: LogEntry, tier: Log | None = None) -> bytes | bytearray:
        """The bytes of an entry of one root, or of a piece; of one tier or the first that has it
        (LogError)."""
        data = await (tier or self.log).load(entry, timeout_s=self.timeout_s)
        found = await asyncio.to_thread(self.payloads.checksum, data)
        if found != entry.checksum:
            raise LogError(
                f"log entry {entry.name!r} has checksum {found:016x}, not {entry.checksum:016x}"
            )
        return data

    async def apply(self, entry: LogEntry, manifest: Manifest, state: State) -> None:
        """Apply an entry, piece by piece, to a state in host memory (LogError: it is spoilt)."""
        for piece in each(entry):
            named, layout = manifest, None
            if entry.pieces:
                named, layout = await self._root(piece, manifest)
            data = await self.load(piece)
            bytes_ = data if isinstance(data, bytearray) else bytearray(data)
            try:
                await asyncio.to_thread(remake, bytes_, piece, named, state, layout)
            except PatchError as exc:
                raise LogError(f"log entry {piece.name!r}: {exc}") from exc

    async def _root(self, piece: LogEntry, manifest: Manifest) -> tuple[Manifest, Layout]:
        """The tensors that a piece names, and where they lie in those of this manifest (LogError).

        What each root holds stands in the claim that it was stored under.
        """
        if self.bus is not None and not self._through:
            for claim in await Journal(self.bus, self.run).claims(timeout_s=self.timeout_s):
                self._through |= _roots(claim)
        try:
            return self._through[piece.layout, manifest.hash]
        except KeyError:
            raise LogError(
                f"log entry {piece.name!r} is of root {piece.root}, whose layout {piece.layout} "
                "is not in the journal; give the --bus of the run"
            ) from None


def _roots(claim: Claim) -> dict[tuple[str, str], tuple[Manifest, Layout]]:
    """What each root of a claim sends, and where that lies in the published tensors (LogError)."""
    found = {}
    published = identity(claim.manifest)
    for number, packed in enumerate(claim.roots):
        try:
            root = codec.unpack_layout(packed)
            root.require_fit(claim.manifest)
        except (RemoteProtocolError, ManifestMismatch) as exc:
            raise LogError(f"root {number} of epoch {claim.epoch} in the journal: {exc}") from exc
        found[root.hash, claim.manifest.hash] = root.local, through(root, published)
    return found


@contextlib.asynccontextmanager
async def opened(
    run: str, tiers: Sequence[str], url: str | None, *, timeout_s: float
) -> AsyncIterator[Logbook]:
    """The log of a run, read. `url` is the bus, if there is one; jetstream needs it."""
    async with contextlib.AsyncExitStack() as life:
        bus: Bus | None = None
        problems: list[str] = []
        if url is not None:
            bus = await connect(url, name="log", timeout_s=5.0)
            life.push_async_callback(bus.close)
        assert bus is not None or JETSTREAM not in tiers
        payloads = PatchPayloads()
        by_name = open_tiers(tiers, bus, run, payloads, tell=problems.append)
        book = Logbook(run, by_name, timeout_s, bus, problems, payloads=payloads)
        await book.read()
        yield book
