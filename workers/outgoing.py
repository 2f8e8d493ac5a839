"""What a trainer has published and not yet given away: shadow, pending patch, kept patches.

Thread-safe. publish() runs on the caller's thread and current stream, and leaves a patch there that
may still be written in stream order; all else runs on the driver's torch thread and its stream,
and waits for the patch.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ..messages.control import LogEntry, Tags
from ..messages.errors import LogError, WaitTimeout
from ..messages.layout import Layout
from ..messages.ranks import At, Held, Roll
from ..pipeline.core.events import Sealed
from ..pipeline.delta import Diffed, Lookup, Patch, Shadow
from .choice import Choice
from .entries import Origin, describe
from .kept import Facts, Kept, merged
from .parted import Share
from .streams import devices_of, finish, own, settle, to_host
from .updates import Published
from .views import viewed

log = logging.getLogger("sparsecast.publisher")

#: Pending patches beyond this many are merged at once, so that a bus that is away for long costs
#: memory for one patch and not for each.
PENDING = 8

#: take() sleeps so long at a time, and so often, for a diff of kernels.
_NAP_S, _NAPS = 0.00003, 64
#: Where the copy of the published weights lies: beside them, or in pinned host memory.
ShadowPlace = Literal["device", "host"]


@dataclass(frozen=True, slots=True)
class Past:
    """A state of the run, made again: what `version` was, in host memory as it was published.

    `tensors` is empty where the digest alone has shown that nothing else is needed.
    """

    version: int
    digest: int
    tensors: Mapping[str, torch.Tensor]


class Outgoing:
    """The weights as published (the shadow), and the patches that lead there.

    With a `share` what is published is what this rank has of the tensors that several ranks publish
    together, and digests are shares then. Made on the torch thread, to which it gives streams of
    its own.
    """

    def __init__(
        self,
        choice: Choice,
        *,
        clock: Callable[[], float],
        writer: str = "",
        shadow: ShadowPlace = "device",
        share: Share | None = None,
    ) -> None:
        self._share = share
        self._lookup: Lookup | Share = share or choice.lookup()
        #: A share gives what the view makes already.
        self._view = choice.view if share is None else None
        self._clock = clock
        #: The trainer's incarnation, by which its log entries are told from another's.
        self.writer = writer
        #: What each rank of a trainer of several publishes, in their order; empty: this one, all.
        self.roots: tuple[Layout, ...] = share.roots if share is not None else ()
        self._origin: Origin | None = None
        #: What other ranks still do for a log entry, by its name.
        self.beside: dict[str, list[Future[Any]]] = {}
        #: Held over a diff and by whoever changes what is pending; `_lists` tells of the latter.
        self._diffing = threading.Lock()
        self._lists = threading.Condition()
        #: Whether take() waits for a publish() that has begun.
        self.awaited = False
        self._pending: list[Kept] = []
        self._kept: dict[int, Kept] = {}
        weights = share.weights() if share is not None else self._lookup.tensors()
        #: The CUDA devices of the weights, and of what a view makes of them.
        self.devices = _settled(devices_of(weights.values()))
        tensors = self.tensors()
        if tensors is not weights:
            self.devices = _settled(devices_of([*weights.values(), *tensors.values()]))
        self._shadow = Shadow(
            tensors,
            dtype=choice.dtype,
            host=shadow == "host",
            layout=share.layout if share is not None else None,
            published=share.manifest if share is not None else None,
        )
        for device in self.devices:
            finish(device)  # or they might change while they are copied
        #: The window whose ranks do not all receive the same, and what each of its classes holds of
        #: what is published here (None: all).
        self._routing: tuple[int, tuple[Layout | None, ...]] = (0, ())
        #: The last diff, which the shadow is whole after.
        self._last: Diffed | None = None
        #: What this rank holds of those that the run publishes; None: it is these.
        self.layout = share.layout if share is not None else None
        #: The tensors that the run publishes, and those in whose coordinates patches are made here.
        self.manifest = self.local = self._shadow.manifest
        if share is not None:
            self.manifest = share.manifest
            hashes = (share.layout.hash, share.manifest.hash)
            self._origin = Origin(share.root, len(share.roots), *hashes)
        self._numel = self.local.numel
        self.version = 0
        #: Of a rank among several: the versions that calls of publish() have failed to make, and
        #: those that were made of old ones, with these.
        self._failed: list[int] = []
        self._old: list[tuple[int, int]] = []
        #: Why the last of them has failed.
        self.failure = ""

    def begin(self, version: int | None = None, past: Past | None = None) -> tuple[int, int]:
        """The run starts, or starts anew, with the shadow's weights as `version` (None: as named).

        Returns the version and its digest. What was pending or kept is in the shadow already. With
        `past` it starts from that state, and what the shadow's weights differ in is pending as the
        version after it.
        """
        with self._diffing:
            return self._begin(self.version if version is None else version, past)

    def begin_at(self, made: int) -> Held:
        """begin() at the version that publish() has made, if that is the one; Held says whether."""
        with self._diffing:
            digest = self._begin(made)[1] if self.version == made else None
            return Held(version=self.version, digest=digest)

    def _begin(self, start: int, past: Past | None = None) -> tuple[int, int]:
        """Under the lock of a diff."""
        now = self._clock()
        with self._lists:
            self.version = start
            self._pending.clear()
            self._kept.clear()
            self._lists.notify_all()
        self._until_whole()
        digest = self._shadow.digest
        if past is None or past.digest == digest:
            return start, digest
        self._go_on(start, past.tensors, now)
        return start, past.digest

    def go_on(self, start: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """What the shadow's weights differ in from these is pending as the version after `start`,
        at which the run has begun."""
        with self._diffing:
            self._go_on(start, tensors, self._clock())

    def _go_on(self, start: int, tensors: Mapping[str, torch.Tensor], now: float) -> None:
        patch = self._shadow.since(tensors, base_version=start, version=start + 1)
        for device in self.devices:
            finish(device)
        diff_us = round((self._clock() - now) * 1e6)
        facts = Facts(self._shadow.digest, None, diff_us=diff_us, encode_us=0)
        with self._lists:
            self._pending.append(Kept(patch, now, None, None, _facts=facts))
            self.version = start + 1

    def recall(self, way: Sequence[LogEntry]) -> list[Future[Any]]:
        """Have other ranks make again what these entries lead to: the shares of the digest."""
        return []

    def roll(self, roll: Roll) -> list[Future[Any]]:
        """Have other ranks publish what they have made again, or not."""
        return []

    @property
    def digest(self) -> int:
        """The digest of what is published. On the torch thread."""
        with self._diffing:
            self._until_whole()
            return self._shadow.digest

    def tensors(self) -> Mapping[str, torch.Tensor]:
        """What is to be published of the model as it is now, not cast.

        A view is called for it; what that raises is raised.
        """
        tensors = self._lookup.tensors()
        return tensors if self._view is None else viewed(self._view, tensors)

    # ---- the caller's thread

    def publish(
        self,
        step: int | None,
        tags: Tags | None,
        begun: Callable[[], None] | None = None,
        *,
        past: Past | None = None,
    ) -> Published:
        """Find what changed since the last publish, in the model or, of that, in a `past` state.

        `begun` is called once take() will wait for the patch. The weights may change again on
        return, in the order of the caller's current stream. UnsupportedTensor, ManifestMismatch,
        what a view raises: nothing was published, and the shadow is as it was.
        """
        now = self._clock()
        with self._diffing:
            base = self.version
            try:
                tensors = self.tensors() if past is None else past.tensors
                # Of kernels all is queued when `begun` is called: it would hold up their launches.
                found = self._shadow.diff(
                    tensors,
                    base_version=base,
                    version=base + 1,
                    waiting=begun,
                )
            except BaseException as exc:
                if self._share is not None:
                    self._failed.append(base + 1)
                    self.failure = f"{type(exc).__name__}: {exc}"
                raise
            # The shadow has moved: this version is made, whatever becomes of what follows.
            self._last = found
            if self._share is not None and past is not None:
                self._old.append((base + 1, past.version))
            with self._lists:
                self._pending.append(Kept(found.patch, now, step, tags, found))
                self.version = base + 1
                self._lists.notify_all()
            self._merge_pending()
        patch = found.patch
        return Published(
            base_version=base,
            version=base + 1,
            changed=patch.changed,
            numel=self._numel,
            nbytes=patch.nbytes,
            dense_nbytes=patch.dense_nbytes,
            encoding=patch.encoding,
        )

    def _merge_pending(self) -> None:
        """Make one patch of those that wait, if they are many. Under the lock of a diff.

        Of a rank among several the newest stay by themselves: the first rank may be some calls
        behind, and asks for no more than it has made itself. What it asks for late is merged with
        what follows by then, and all ranks take that along.
        """
        ahead = PENDING if self._share is not None else 0
        many = self._pending[: len(self._pending) - ahead]
        if len(many) < PENDING:
            return
        try:
            self._pending[: len(many)] = [merged(many)]
        except (RuntimeError, MemoryError) as exc:
            log.warning("%d patches wait unmerged: %s", len(self._pending), exc)

    def at(self, version: int) -> At:
        """Of which calls this version is, or is to be, of a rank among several."""
        failed = sum(one <= version for one in self._failed)
        old = tuple((made, of) for made, of in self._old if made <= version)
        return At(version=version, failed=failed, old=old)

    def wait_made(self, version: int, timeout_s: float) -> int:
        """Wait until publish() has made this version; which it has made by now (WaitTimeout)."""
        with self._lists:
            if not self._lists.wait_for(lambda: self.version >= version, timeout_s):
                reason = f"publish() has made {self.version} on this rank"
                raise WaitTimeout(f"version {version}", timeout_s, reason)
            return self.version

    def wait_taken(self, timeout_s: float) -> bool:
        """Wait until no patch is pending; False at the deadline."""
        with self._lists:
            return self._lists.wait_for(lambda: not self._pending, timeout_s)

    # ---- the torch thread

    def take(self, unsafe: Sequence[int], until: int | None = None) -> Sealed | None:
        """Fix the bytes of what is pending, merged onto the kept patches of `unsafe` versions.

        Waits for a publish() that has begun. None if nothing is pending: that one has failed, or
        the run has begun anew since this was asked for. What comes after version `until` stays, but
        for what was merged with it; where nothing is pending up to it, and it is among `unsafe`,
        what is kept of it is given.
        """
        self.awaited = True
        with _soon(self._diffing) if self.devices else self._diffing, self._lists:
            self.awaited = False
            taken, self._pending = self._pending, []
            if until is not None:
                self._pending = [kept for kept in taken if (kept.patch.base_version or 0) >= until]
                taken = taken[: len(taken) - len(self._pending)]
            self._lists.notify_all()
        earlier = [self._kept[version] for version in unsafe if version in self._kept]
        if not taken and not any(kept.patch.version == until for kept in earlier):
            return None
        try:
            kept = merged([*earlier, *taken])
        except BaseException:
            with self._lists:
                self._pending[:0] = taken
            raise
        for old in earlier:
            self._kept.pop(old.patch.version, None)
        own(kept.patch.buffer)
        patch, facts = kept.patch, kept.facts
        with self._diffing:
            if self._last is not None and self._last.patch.version <= patch.version:
                self._last = None  # it is whole, and holds memory of the patch's size
        assert patch.base_version is not None
        self._kept[patch.version] = kept
        row = kept.part(*self._routing, self.local)
        return Sealed(
            base_version=patch.base_version,
            version=patch.version,
            nbytes=patch.nbytes,
            checksum=kept.checksum,
            digest=facts.digest,
            changed=patch.changed,
            numel=self._numel,
            encoding=patch.encoding,
            dense_nbytes=patch.dense_nbytes,
            published_at=kept.published_at,
            diff_us=facts.diff_us,
            encode_us=facts.encode_us,
            step=kept.step,
            tags=kept.tags,
            routes=(row,) if row else (),
            routed=kept.routed,
        )

    def unroute(self, window: int) -> None:
        """That window is left: nothing is parted for it any more, nor kept."""
        if self._routing[0] == window:
            self._routing = (0, ())
        for kept in list(self._kept.values()):
            if kept.routed == window:
                kept.unpart()

    def route(self, window: int, ways: Sequence[Layout | None]) -> None:
        """Part what is sealed from now on for a window: each class holds of the tensors here what a
        layout says (None: all). Without ways: as it was before."""
        self._routing = (window, tuple(ways)) if ways else (0, ())

    def routed(self, version: int, window: int) -> list[torch.Tensor] | None:
        """What a window's classes get of a sealed patch, each as payload(); None if it was not
        parted for that window, or is not kept."""
        kept = self._kept.get(version)
        if kept is None or not kept.routes or kept.routed != window:
            return None
        return [patch.buffer for patch in kept.routes]

    def payload(self, version: int) -> torch.Tensor | None:
        """The bytes of a sealed patch (uint8, 1-d, whole), while it is kept. On any thread."""
        kept = self._kept.get(version)
        return None if kept is None else kept.patch.buffer

    def host_payload(self, version: int) -> torch.Tensor | None:
        """The same in host memory."""
        kept = self._kept.get(version)
        return None if kept is None else kept.on_host()

    def wire(self, patch: Patch) -> bytes:
        """The bytes of a patch that entry() or anchor() gave."""
        kept = self._kept.get(patch.version)
        ours = kept is not None and kept.patch is patch
        host = kept.on_host() if kept is not None and ours else to_host(patch.buffer)
        return host.numpy().tobytes()

    def kept(self, base: int, version: int) -> list[int]:
        """The versions of the patches that are kept between these two."""
        between = [k for k, kept in self._kept.items() if (kept.patch.base_version or 0) >= base]
        return sorted(known for known in between if known <= version)

    def join(self, versions: Sequence[int]) -> int:
        """Keep these versions as one patch; the bytes of it. LogError if the run has begun anew
        meanwhile: its anchor covers them."""
        return self._joined(versions).patch.nbytes

    def _joined(self, versions: Sequence[int]) -> Kept:
        found = [self._kept[version] for version in versions if version in self._kept]
        if not found:
            raise LogError(f"versions {list(versions)} are not kept any more")
        kept = merged(found)
        for version in versions:
            self._kept.pop(version, None)
        self._kept[kept.patch.version] = kept
        return kept

    def entry(
        self, versions: Sequence[int], epoch: int, digest: int | None = None
    ) -> tuple[LogEntry, Patch]:
        """These kept versions as one log entry; they stay kept, as one, until released.

        `digest`: of the whole state, where this rank has but a share of it. LogError as join().
        """
        kept = self._joined(versions)
        entry = describe(
            kept.patch,
            epoch,
            kept.facts.digest if digest is None else digest,
            kept.step,
            kept.tags,
            self.writer,
            checksum=kept.checksum,
            origin=self._origin,
        )
        return entry, kept.patch

    def entry_until(self, version: int, epoch: int, digest: int) -> tuple[LogEntry, Patch]:
        """entry() of all that is kept up to a version: what the first rank has merged may have been
        left unmerged here, for want of memory."""
        return self.entry(self.kept(0, version), epoch, digest)

    def release(self, version: int) -> None:
        """Kept patches up to this version are safe elsewhere."""
        for kept in [kept for kept in self._kept if kept <= version]:
            del self._kept[kept]

    def anchor(self, epoch: int) -> tuple[LogEntry, Patch]:
        """A full copy of the shadow, in host memory, as a log entry.

        Holds publish() up while it copies.
        """
        patch, digest = self.copy()
        return self.anchored(patch, epoch, digest), patch

    def copy(self) -> tuple[Patch, int]:
        """A full copy of the shadow as an anchor of its version, in host memory, and its digest."""
        with self._diffing:
            self._until_whole()
            patch = self._shadow.anchor(self.version, device=torch.device("cpu"))
            digest = self._shadow.digest
            for device in self.devices:
                finish(device)  # the next diff writes into the shadow, on another stream
        return patch, digest

    def anchored(self, patch: Patch, epoch: int, digest: int) -> LogEntry:
        """The log entry of a copy; `digest` is that of the whole state."""
        return describe(patch, epoch, digest, writer=self.writer, origin=self._origin)

    def _until_whole(self) -> None:
        """Wait until the last diff has written the shadow, on whatever stream that was."""
        if self._last is not None:
            _ = self._last.digest
            self._last = None


def _settled(devices: tuple[torch.device, ...]) -> tuple[torch.device, ...]:
    """These devices, once this thread has streams of its own there and nothing is queued on any."""
    settle(devices)
    for device in devices:
        torch.cuda.synchronize(device)  # the owner's stream may still be making the weights
    return devices


@contextlib.contextmanager
def _soon(lock: threading.Lock) -> Iterator[None]:
    """Hold a lock that will be free within a millisecond or two, or else when it is.

    A thread that sleeps until then would take a few tenths of that to wake up.
    """
    for _ in range(_NAPS):
        if lock.acquire(timeout=_NAP_S):
            break
    else:
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
