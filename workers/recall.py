"""Old states of a run, made again from its log: the head to go on from, a version to go back to.

A state is made in host memory, over the bytes of the anchor that it starts from: one full copy.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import torch

from ..messages.control import Claim, LogEntry
from ..messages.errors import (
    BusError,
    CannotResume,
    LogError,
    LogHole,
    ManifestMismatch,
    PatchError,
)
from ..messages.manifest import Manifest
from ..pipeline.bus.journal import Journal, JournalState
from ..pipeline.core.policy import Policy
from ..pipeline.delta import digest
from ..pipeline.log.base import Step
from ..pipeline.log.lineage import remakeable
from .anchors import intact, remake
from .driver import Ports
from .outgoing import Outgoing, Past

State = dict[str, torch.Tensor]


class _Spoilt(Exception):
    """An entry that is not what it says: states are to be made without it."""

    def __init__(self, entry: LogEntry, reason: str) -> None:
        super().__init__(reason)
        self.entry = entry


class Recall:
    """Makes states of one run again; `tell(reason)` hears of entries that it went around."""

    def __init__(
        self,
        run: str,
        ports: Ports,
        outgoing: Outgoing,
        policy: Policy,
        tell: Callable[[str], None],
    ) -> None:
        self._run = run
        self._ports = ports
        self._outgoing = outgoing
        self._policy = policy
        self._tell = tell
        self._journal = Journal(ports.bus, run)

    async def head(self, state: JournalState) -> Past:
        """The newest announced version that the log makes again. CannotResume."""
        if state.claim is None or state.head is None:
            reason = "its journal has no claim: it never ran, or the broker has lost its store"
            raise CannotResume(self._run, reason)
        try:
            self._outgoing.manifest.require_same(state.claim.manifest)
            if self._outgoing.manifest.hash != state.claim.manifest.hash:
                raise ManifestMismatch("the same tensors in another order")
            return await self._make(state.head)
        except ManifestMismatch as exc:
            reason = f"its model was another one ({exc.difference})"
            raise CannotResume(self._run, reason) from exc
        except (LogError, BusError, RuntimeError, MemoryError) as exc:
            raise CannotResume(self._run, str(exc) or type(exc).__name__) from exc

    async def version(self, version: int, announced: int) -> Past:
        """What `version` was. LogHole, LogError, BusError."""
        return await self._make(announced, version)

    async def _make(self, announced: int, version: int | None = None) -> Past:
        """This version (None: the newest), around whatever is damaged."""
        policy, log = self._policy, self._ports.log
        try:
            async with asyncio.timeout(policy.resume_s):
                entries = await log.entries(timeout_s=policy.store_s)
                claims = await self._journal.claims(timeout_s=policy.bus_s)
                while True:
                    step = self._step(entries, claims, announced, version)
                    if version is None and step.entry.digest == await self._published():
                        return Past(step.version, step.entry.digest, {})
                    _require_one_root(step)
                    try:
                        return Past(step.version, step.entry.digest, await self._state(step))
                    except _Spoilt as exc:
                        self._tell(f"an old state is made without {exc.entry.name}: {exc}")
                        entries = [one for one in entries if one.name != exc.entry.name]
        except TimeoutError:
            what = "a version" if version is None else f"version {version}"
            raise LogError(
                f"the log did not give {what} of run {self._run!r} within {policy.resume_s:g} s "
                "(Policy.resume_s)"
            ) from None

    def _step(
        self,
        entries: list[LogEntry],
        claims: list[Claim],
        announced: int,
        version: int | None,
    ) -> Step:
        manifest_hash = self._outgoing.manifest.hash
        claims = [claim for claim in claims if claim.manifest.hash == manifest_hash]
        made = remakeable(entries, claims, announced)
        wanted = max(made, default=None) if version is None else version
        if wanted is not None and wanted in made:
            return made[wanted]
        whole = f"whole ones lead to {sorted(made)}" if made else "none leads from an anchor on"
        what = "any version" if version is None else f"version {version}"
        raise LogHole(
            f"to {what} of run {self._run!r}: of its {len(entries)} entries {whole}; see them "
            "with: sparsecast log ls",
            version=version,
        )

    async def _published(self) -> int:
        found: int = await self._ports.run(lambda: self._outgoing.digest)
        return found

    async def _state(self, step: Step) -> State:
        state: State = {}
        for entry in step.way:
            try:
                data = await self._ports.log.load(entry, timeout_s=self._policy.store_s)
                await self._ports.run(_put, data, entry, self._outgoing.manifest, state)
            except (LogError, PatchError) as exc:
                raise _Spoilt(entry, str(exc)) from exc
        found = await self._ports.run(digest, state)
        if found != step.entry.digest:
            reason = f"it leads to digest {found:016x}, {step.entry.digest:016x} was published"
            raise _Spoilt(step.entry, reason)
        return state


def _require_one_root(step: Step) -> None:
    """LogError if it takes what a trainer of several ranks has stored, each in its coordinates."""
    for entry in step.way:
        if entry.pieces:
            raise LogError(
                f"log entry {entry.name!r} is of a trainer of {entry.roots} ranks, whose states "
                "are not made again here; have it as a file by: sparsecast log export"
            )


def _put(data: bytes | bytearray, entry: LogEntry, manifest: Manifest, state: State) -> None:
    """Apply an entry to a state, if its bytes are those that it names (PatchError)."""
    remake(intact(data, entry), entry, manifest, state)
