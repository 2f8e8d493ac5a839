"""A state of a run made again from its log, as one rank holds it, in host memory.

It is made over the bytes of the anchor that it starts from where those are the rank's tensors: one
full copy of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..messages import codec
from ..messages.compose import through
from ..messages.control import Claim, LogEntry
from ..messages.errors import LogError, ManifestMismatch, PatchError, RemoteProtocolError
from ..messages.layout import Layout, identity
from ..messages.manifest import Manifest
from ..pipeline.core.policy import Policy
from ..pipeline.delta import digest
from ..pipeline.log.pieces import each
from .driver import Ports
from .entries import intact, remake

State = dict[str, torch.Tensor]


class Spoilt(LogError):
    """An entry that is not what it says: states are to be made without it."""

    def __init__(self, entry: LogEntry, reason: str) -> None:
        super().__init__(reason)
        self.entry = entry


class Remaking:
    """Makes states of the tensors of a manifest, or of those of a layout of them, again.

    `claims` are the run's: what a trainer of several ranks has stored is in the coordinates of the
    layouts that stand there.
    """

    def __init__(
        self,
        ports: Ports,
        policy: Policy,
        manifest: Manifest,
        layout: Layout | None,
        claims: Sequence[Claim],
    ) -> None:
        self._ports = ports
        self._policy = policy
        self._manifest = manifest
        self._layout = layout
        self._packed = [packed for claim in claims for packed in claim.roots]
        self._known: dict[str, Layout] = {}
        #: By the hash of a source ("": the published tensors), where what it has lies in ours.
        self._ways: dict[str, Layout | None] = {}

    async def state(self, way: Sequence[LogEntry]) -> State:
        """What these entries make, in their order (Spoilt, LogError, BusError)."""
        state: State = {}
        for entry in way:
            for piece in each(entry):
                source = await self._ports.run(self._source, piece)
                layout = await self._ports.run(self._way, source)
                if layout is not None and not layout.parts:
                    continue
                try:
                    data = await self._ports.log.load(piece, timeout_s=self._policy.store_s)
                    manifest = self._manifest if source is None else source.local
                    await self._ports.run(_put, data, piece, manifest, state, layout)
                except (LogError, PatchError) as exc:
                    raise Spoilt(entry, str(exc)) from exc
        return state

    async def digest(self, state: State) -> int:
        """Of a state, or the share of it that is held here."""
        found: int = await self._ports.run(
            lambda: digest(state, manifest=self._manifest, layout=self._layout)
        )
        return found

    def _source(self, piece: LogEntry) -> Layout | None:
        """The layout of the tensors that a piece names; None: the published ones (LogError)."""
        if not piece.layout:
            return None
        if piece.layout not in self._known:
            for packed in self._packed:
                try:
                    layout = codec.unpack_layout(packed)
                    layout.require_fit(self._manifest)
                except (RemoteProtocolError, ManifestMismatch):
                    continue  # of another model
                self._known[layout.hash] = layout
        if piece.layout not in self._known:
            raise LogError(
                f"log entry {piece.name!r} is of root {piece.root}, whose layout is not in the "
                "journal any more"
            )
        return self._known[piece.layout]

    def _way(self, source: Layout | None) -> Layout | None:
        """Where the tensors of a source lie in ours; None: they are ours."""
        if source is None and self._layout is None:
            return None
        key = "" if source is None else source.hash
        if key not in self._ways:
            whole = identity(self._manifest)
            self._ways[key] = through(source or whole, self._layout or whole)
        return self._ways[key]


def _put(
    data: bytes | bytearray,
    entry: LogEntry,
    manifest: Manifest,
    state: State,
    layout: Layout | None,
) -> None:
    """Apply an entry to a state, if its bytes are those that it names (PatchError)."""
    remake(intact(data, entry), entry, manifest, state, layout)
