"""What a replica has received and not yet applied, and the work on its weights.

All of it runs on the driver's torch thread, one call at a time, and on CUDA on that thread's own
streams, but for what says that it is for any thread.
"""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch

from ..messages.control import Announce, Claim, LogEntry, Tags
from ..messages.errors import (
    CorruptPatch,
    ManifestMismatch,
    PatchError,
    ReplicaTorn,
    SparsecastError,
    WaitTimeout,
    WrongBase,
)
from ..messages.layout import Layout
from ..pipeline.core import events as ev
from ..pipeline.delta import (
    Checked,
    Payload,
    apply_checked,
    digest,
    manifest_of,
    ready,
    warm,
)
from ..pipeline.delta.parts import parts_of
from .engine import Engine
from .memory import Memory, on_device
from .rehearsal import rehearse, rehearse_layouts
from .roots import AnyPiece, Root, Sources, named, sources_of
from .streams import CudaFence, devices_of, own, settle

#: How many applied versions' step and tags are remembered: a sample of an older one goes without.
ORIGINS = 1024


class Unwritten(Exception):
    """Other ranks have refused an apply, and none has written. `waiting`: only readers were in the
    way."""

    def __init__(self, reason: str, *, waiting: bool) -> None:
        super().__init__(reason)
        self.reason = reason
        self.waiting = waiting


#: Returns when other ranks have written. Unwritten if none has; or else it calls what it is given,
#: for some rank may have written, and raises.
Together: TypeAlias = Callable[[Callable[[], None]], None]


@dataclass(slots=True)
class Staged:
    """A checked update in staging. Times in seconds of the driver's clock, or µs.

    `pieces` are the patches of it of which something is held here, each with its sender; None: it
    was applied, and only what there is to tell of it is left.
    """

    pieces: tuple[tuple[Root, Checked], ...] | None
    base_version: int | None
    version: int
    nbytes: int
    staged_at: float
    receive_us: int
    check_us: int
    transport: str
    #: What the announcement says of the whole state, or the log.
    digest: int
    window: int = 0
    attempt: int = 0
    step: int | None = None
    tags: Tags | None = None
    apply_us: int = 0
    staged_us: int = 0


class Incoming:
    """Staging, and the way from there into the weights of one engine: those that are published, or
    the parts of them that `layout` says.

    Payloads stage on `device`, up to `device_nbytes` in all, and beyond that in host memory.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        clock: Callable[[], float],
        guard_s: float,
        layout: Layout | None = None,
        device: str = "cpu",
        device_nbytes: int = 0,
    ) -> None:
        self._engine = engine
        self._layout = layout
        self._clock = clock
        self._guard_s = guard_s
        self._device = torch.device(device)
        self._memory = Memory(self._device, device_nbytes)
        self._fence = CudaFence()
        #: Of the tensors whose devices the fence has.
        self._ordered: object = None
        #: What may come under the claim that the weights were last compared with.
        self._sources: Sources | None = None
        self._staged: dict[int, Staged] = {}
        #: Held by whoever changes what is staged.
        self._staging = threading.Lock()
        #: What was applied last, for its metrics.
        self.last: Staged | None = None
        #: Step and tags of the versions that were applied, the newest last.
        self.origins: OrderedDict[int, tuple[int | None, Tags | None]] = OrderedDict()

    def start(self) -> None:
        """Get ready for weights or windows on CUDA: streams, the guard's fence, kernels loaded.

        Before any window opens: what is loaded while a collective is pending waits for it, and the
        collective may wait for us.
        """
        if self._device.type == "cuda":
            settle((self._device,))
            self._memory.start()
        try:
            tensors = self._engine.tensors()
        except Exception:
            return  # prove() will meet it again, and tell
        self._order(tensors)
        rehearse(tensors, self._device, layout=self._layout)

    def adopt_thread(self) -> None:
        """Make the idle stream of staging the current one of the calling thread."""
        self._memory.adopt_thread()

    def warm(self) -> None:
        """Look at all that an apply will look at, which it does the quicker for it."""
        with contextlib.suppress(Exception):  # the apply will meet it again, and tell
            tensors = self._engine.tensors()
            for root in self._sources.senders if self._sources is not None else ():
                if root.held:
                    warm(tensors, root.manifest, self._device, root.layout)

    def _order(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Have the guard order the devices on which the weights lie by now."""
        token = getattr(tensors, "token", None)
        if token is not None and token is self._ordered:
            return  # nothing has moved
        self._ordered = token
        devices = devices_of(tensors.values())
        new = self._fence.include(devices)
        if new:
            settle([device for device in new if device != self._device])
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)
            self._engine.guard().fence = self._fence

    # ---- proof

    def prove(self, claim: Claim) -> ev.Proved | ev.Unfit:
        """Compare the engine's tensors with the claim's manifest, and digest them as a reader."""
        try:
            self._require_fit(claim)
            if self._sources is None or not self._sources.are_of(claim):
                self._sources = sources_of(claim, self._layout)
            with contextlib.suppress(torch.cuda.OutOfMemoryError):  # the first payload tries again
                self._ready(self._sources)
            try:
                with self._engine.guard().reading(timeout_s=self._guard_s):
                    found = self._digest()
            except (ReplicaTorn, WaitTimeout):
                found = -1  # no state has this digest: the anchor decides
        except ManifestMismatch as exc:
            return ev.Unfit(claim.epoch, exc.difference)
        except SparsecastError as exc:
            return ev.Unfit(claim.epoch, str(exc))
        except Exception as exc:
            return ev.Unfit(claim.epoch, f"its weights cannot be read: {type(exc).__name__}: {exc}")
        return ev.Proved(claim.epoch, claim.manifest.hash, found)

    def _require_fit(self, claim: Claim) -> None:
        """ManifestMismatch unless the engine's tensors are the published ones, or their parts."""
        mine = manifest_of(self._engine.tensors())
        if self._layout is None:
            mine.require_same(claim.manifest)
        else:
            mine.require_same(
                self._layout.local, here="in the model", there="in the layout of this rank"
            )
            # Asks if it fits, and spares the digest what that takes.
            parts_of(self._layout, claim.manifest)

    def _ready(self, sources: Sources) -> None:
        """Spare the first round what it takes to check and apply what comes."""
        ready([root.manifest for root in sources.senders], self._device)
        for root in sources.senders:
            if root.layout is not None:
                parts_of(root.layout, root.manifest)
        if sources.roots:
            layouts = [root.layout for root in sources.roots if root.layout is not None]
            rehearse_layouts(self._engine.tensors(), layouts)

    def _digest(self) -> int:
        """Of the weights as they stand, or this rank's share of it. Inside the guard."""
        tensors = self._engine.tensors()
        if self._layout is None:
            return digest(tensors)
        assert self._sources is not None  # what is read was compared with a claim
        return digest(tensors, manifest=self._sources.manifest, layout=self._layout)

    def hold(self, version: int) -> None:
        """Serve the weights, as they stand, as `version`."""
        self._engine.guard().declare(version)

    def quarantine(self, reason: str) -> None:
        """Serve nothing until the next apply has committed."""
        self._engine.guard().tear(reason)

    # ---- staging

    def staging(self, sizes: Sequence[int], transport: str) -> list[torch.Tensor]:
        """Fresh memory for the payloads of an update, on any thread; see `Memory.fresh`."""
        return self._memory.fresh(sizes, transport)

    def _count(self) -> None:
        """Under the lock."""
        self._memory.keeps(
            checked.patch.buffer
            for staged in self._staged.values()
            for _, checked in staged.pieces or ()
        )

    def expect(self, buffers: Sequence[torch.Tensor], announce: Announce) -> list[Payload] | None:
        """What is to follow the payloads that a window brings into these buffers, one a root; on
        any thread."""
        sources = self._sources
        if sources is None:
            return None
        try:
            sent = sources.of(announce)
        except PatchError:
            return None  # stage() refuses it
        return [
            Payload(buffer, root.manifest) for buffer, (root, _) in zip(buffers, sent, strict=True)
        ]

    def wanted(self, entry: LogEntry) -> list[bool]:
        """Of each piece of an entry of the log, whether anything of it is held here; on any thread.

        ManifestMismatch, CorruptPatch: the entry is of other tensors, or other roots, than the
        claim's.
        """
        return [root.held for root, _ in self._sent(entry)]

    def _sent(self, announce: Announce | LogEntry) -> list[tuple[Root, AnyPiece]]:
        if self._sources is None:
            raise ManifestMismatch(f"version {announce.version}: no claim was followed yet")
        return self._sources.of(announce)

    def stage(
        self,
        buffers: Sequence[torch.Tensor | None],
        announce: Announce | LogEntry,
        *,
        receive_us: int,
        transport: str,
        window: int = 0,
        attempt: int = 0,
        scratch: bool = False,
        payloads: Sequence[Payload] | None = None,
    ) -> None:
        """Check payloads (uint8, 1-d), one a root, against what was announced of them, and keep all
        of them. None: one of which nothing is held here, see wanted().

        `scratch`: check and drop them. `payloads`: expect()'s; if all are settled, this waits for
        nothing and is for any thread. PatchError: nothing was kept.
        """
        began = self._clock()
        sent = self._sent(announce)
        if len(buffers) != len(sent):
            raise CorruptPatch(f"{len(buffers)} payloads, {len(sent)} were announced")
        given: Sequence[Payload | None] = payloads or [None] * len(sent)
        pieces: list[tuple[Root, Checked]] = []
        beside = 0
        for at, ((root, piece), buffer, payload) in enumerate(
            zip(sent, buffers, given, strict=True)
        ):
            if buffer is None and not root.held:
                continue
            try:
                if buffer is None:  # another claim has come since wanted() was asked
                    raise CorruptPatch("its payload is missing, and something of it is held here")
                checked = self._checked(root, piece, buffer, payload, announce, beside)
            except PatchError as exc:
                raise named(exc, at, len(sent)) from exc
            if root.held:
                pieces.append((root, checked))
                beside += on_device([checked.patch.buffer])
        now = self._clock()
        if scratch:
            return
        staged = Staged(
            pieces=tuple(pieces),
            base_version=announce.base_version,
            version=announce.version,
            nbytes=announce.nbytes,
            staged_at=now,
            receive_us=receive_us,
            check_us=round((now - began) * 1e6),
            transport=transport,
            digest=announce.digest,
            window=window,
            attempt=attempt,
            step=announce.step,
            tags=announce.tags,
        )
        with self._staging:
            before = self._staged.get(staged.version)
            # Window and log may bring the same version: the wider one fits more. What an earlier
            # epoch called so is another.
            if (
                before is not None
                and before.digest == staged.digest
                and _reaches_back(before.base_version, staged.base_version)
            ):
                return
            self._staged[staged.version] = staged
            self._count()

    def _checked(
        self,
        root: Root,
        piece: AnyPiece,
        buffer: torch.Tensor,
        payload: Payload | None,
        announce: Announce | LogEntry,
        beside: int,
    ) -> Checked:
        """One root's payload, if it is what was announced of it."""
        if buffer.numel() != piece.nbytes:
            raise CorruptPatch(f"{buffer.numel()} bytes, {piece.nbytes} were announced")
        if payload is None or not payload.settled:
            buffer = self._memory.placed(buffer, beside=beside)
            own(buffer)
            payload = Payload(buffer, root.manifest)
        if payload.checksum != piece.checksum:
            raise CorruptPatch(
                f"checksum {payload.checksum:016x}, announced was {piece.checksum:016x}"
            )
        patch = payload.patch
        if (patch.base_version, patch.version) != (announce.base_version, announce.version):
            raise CorruptPatch(
                f"it says {patch.base_version} → {patch.version}, announced was "
                f"{announce.base_version} → {announce.version}"
            )
        return payload.check()

    def stage_bytes(
        self, data: Sequence[bytes | bytearray | None], entry: LogEntry, *, receive_us: int
    ) -> None:
        """stage() for what the log gave."""
        buffers: list[torch.Tensor | None] = []
        for one in data:
            if one is None:
                buffers.append(None)
                continue
            if not one:
                raise CorruptPatch(f"log entry {entry.name!r} has no bytes")
            whole = one if isinstance(one, bytearray) else bytearray(one)
            buffers.append(torch.frombuffer(whole, dtype=torch.uint8))
        self.stage(buffers, entry, receive_us=receive_us, transport="log")

    def drop(self, versions: tuple[int, ...] | None) -> None:
        """Forget staged patches (None: all)."""
        with self._staging:
            for version in list(self._staged) if versions is None else versions:
                self._staged.pop(version, None)
            self._count()

    # ---- into the weights

    def apply(
        self, versions: tuple[int, ...], together: Together | None = None
    ) -> ev.AppliedHere | ev.ApplyFailed:
        """Apply staged versions in order, in one hold of the guard; the version flips last.

        `together` is called within it, before the first write here.
        """
        patches = [self._staged[version] for version in versions if version in self._staged]
        if len(patches) != len(versions):
            return ev.ApplyFailed("a resync has dropped what was staged", torn=False)
        guard = self._engine.guard()
        entered = False
        try:
            with guard.writing(self._guard_s) as writer:
                entered = True
                began = self._clock()
                held = guard.version if guard.torn is None else None
                for patch in patches:
                    if not _fits(patch, held):
                        assert patch.base_version is not None
                        raise WrongBase(
                            base_version=patch.base_version, version=patch.version, held=held
                        )
                    held = patch.version
                # Looked up inside the guard: the engine may have moved their storage.
                tensors = self._engine.tensors()
                self._order(tensors)
                names: dict[str, None] = {}

                def begin() -> None:
                    nonlocal together
                    if together is not None:
                        others, together = together, None
                        others(writer.begin_write)
                    writer.begin_write()

                for patch in patches:
                    for root, checked in patch.pieces or ():
                        own(checked.patch.buffer)
                        changed = apply_checked(checked, tensors, layout=root.layout, begin=begin)
                        names.update(dict.fromkeys(changed))
                begin()  # who has nothing to write leads others that have
                last = patches[-1]
                self._engine.after_apply(last.version, list(names))
                writer.commit(last.version)
        except Exception as exc:
            if isinstance(exc, WaitTimeout) and not entered:
                return ev.ApplyFailed(str(exc), torn=False, waiting=True)
            if isinstance(exc, Unwritten):
                return ev.ApplyFailed(exc.reason, torn=False, waiting=exc.waiting)
            reason = str(exc) if isinstance(exc, PatchError) else f"{type(exc).__name__}: {exc}"
            return ev.ApplyFailed(reason, torn=guard.torn is not None)
        now = self._clock()
        last.apply_us = round((now - began) * 1e6)
        last.staged_us = round((now - last.staged_at) * 1e6)
        self.last = replace(last, pieces=None)
        self.origins[last.version] = (last.step, last.tags)
        while len(self.origins) > ORIGINS:
            self.origins.popitem(last=False)
        self.drop(versions)
        return ev.AppliedHere(last.version, last.staged_us, last.apply_us)

    def digest(self, version: int) -> ev.Digested | ev.DigestFailed:
        """Digest the whole state, as a reader, if it still is `version`."""
        began = self._clock()
        try:
            with self._engine.guard().holding(version, timeout_s=self._guard_s) as holds:
                if not holds:
                    return ev.DigestFailed(version, "the weights are another version by now")
                found = self._digest()
        except Exception as exc:
            return ev.DigestFailed(version, f"{type(exc).__name__}: {exc}")
        return ev.Digested(version, found, round((self._clock() - began) * 1e6))


def _reaches_back(base_version: int | None, other: int | None) -> bool:
    """Whether a patch from `base_version` (None: an anchor) fits all that one from `other` fits."""
    return base_version is None or (other is not None and base_version <= other)


def _fits(patch: Staged, held: int | None) -> bool:
    base = patch.base_version
    return base is None or (held is not None and base <= held < patch.version)
