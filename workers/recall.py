"""Old states of a run, made again from its log: the head to go on from, a version to go back to."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from ..messages.control import Claim, LogEntry, added
from ..messages.errors import (
    BusError,
    CannotResume,
    LogError,
    LogHole,
    ManifestMismatch,
)
from ..messages.ranks import Held
from ..pipeline.bus.journal import Journal, JournalState
from ..pipeline.core.policy import Policy
from ..pipeline.log.base import Step
from ..pipeline.log.lineage import remakeable
from .driver import Ports
from .leading import RankSilent
from .outgoing import Outgoing, Past
from .remaking import Remaking, Spoilt, State


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
                    try:
                        return Past(
                            step.version, step.entry.digest, await self._state(step, claims)
                        )
                    except Spoilt as exc:
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

    async def _state(self, step: Step, claims: list[Claim]) -> State:
        """What a step leads to, as this rank holds it, and every other one at its order."""
        outgoing = self._outgoing
        remaking = Remaking(self._ports, self._policy, outgoing.manifest, outgoing.layout, claims)
        others = outgoing.recall(step.way)
        try:
            state = await remaking.state(step.way)
            share = await remaking.digest(state)
            held: list[Held] = await asyncio.gather(*map(asyncio.wrap_future, others))
        except RankSilent as exc:
            raise LogError(str(exc)) from exc
        spoilt = {one.spoilt for one in held if one.spoilt}
        for entry in step.way:
            if entry.name in spoilt:
                raise Spoilt(entry, "what another rank needs of it is not what it says")
        found = added((share, *(one.digest or 0 for one in held)))
        if found != step.entry.digest:
            reason = f"it leads to digest {found:016x}, {step.entry.digest:016x} was published"
            raise Spoilt(step.entry, reason)
        return state
