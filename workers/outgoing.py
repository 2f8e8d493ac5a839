"""What a trainer has published and not yet given away: shadow, pending patch, kept patches.

Thread-safe. publish() runs on the caller's thread, all else on the driver's torch thread.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from ..messages.control import LogEntry, Tags
from ..messages.errors import LogError
from ..pipeline.core.events import Sealed
from ..pipeline.delta import Patch, Shadow, checksum, merge, named_tensors

log = logging.getLogger("sparsecast.publisher")

#: Pending patches beyond this many are merged at once, so that a bus that is away for long costs
#: memory for one patch and not for each.
PENDING = 8

Source = torch.nn.Module | Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Published:
    """What one publish() found. `changed` counts elements; sizes are bytes."""

    base_version: int
    version: int
    changed: int
    numel: int
    nbytes: int
    dense_nbytes: int
    encoding: str


@dataclass(slots=True)
class _Kept:
    patch: Patch
    digest: int
    published_at: float
    diff_us: int
    encode_us: int
    step: int | None
    tags: Tags | None

    def onto(self, earlier: _Kept) -> _Kept:
        """The two as one: the newest contents, since the earliest call."""
        return _Kept(
            patch=merge([earlier.patch, self.patch]),
            digest=self.digest,
            published_at=min(earlier.published_at, self.published_at),
            diff_us=earlier.diff_us + self.diff_us,
            encode_us=earlier.encode_us + self.encode_us,
            step=self.step,
            tags=self.tags,
        )


class Outgoing:
    """The weights as published (the shadow), and the patches that lead there."""

    def __init__(
        self,
        model: Source,
        *,
        dtype: torch.dtype | Mapping[str, torch.dtype] | None,
        include: Sequence[str] | None,
        exclude: Sequence[str] | None,
        rename: Callable[[str], str] | Mapping[str, str] | None,
        clock: Callable[[], float],
        writer: str = "",
    ) -> None:
        self._model = model
        self._include = include
        self._exclude = exclude
        self._rename = rename
        self._clock = clock
        #: The trainer's incarnation, by which its log entries are told from another's.
        self.writer = writer
        #: Held over a diff and by whoever changes what is pending; `_lists` tells of the latter.
        self._diffing = threading.Lock()
        self._lists = threading.Condition()
        self._pending: list[_Kept] = []
        self._kept: dict[int, _Kept] = {}
        self._shadow = Shadow(self._tensors(), dtype=dtype)
        self.manifest = self._shadow.manifest
        self._numel = self.manifest.numel
        self.version = 0

    def begin(self, version: int | None = None) -> tuple[int, int]:
        """The run starts, or starts anew, with the shadow's weights as `version` (None: as named).

        Returns the version and its digest. What was pending or kept is in the shadow already.
        """
        with self._diffing, self._lists:
            self.version = self.version if version is None else version
            self._pending.clear()
            self._kept.clear()
            self._lists.notify_all()
            return self.version, self._shadow.digest

    # ---- the caller's thread

    def publish(self, step: int | None, tags: Tags | None) -> Published:
        """Find what changed since the last publish. The weights may change again on return.

        UnsupportedTensor, ManifestMismatch: nothing was published, and the shadow is as it was.
        """
        now = self._clock()
        with self._diffing:
            base = self.version
            found = self._shadow.diff(self._tensors(), base_version=base, version=base + 1)
            # The torch thread reads the patch on a stream of its own.
            if found.patch.buffer.is_cuda:
                torch.cuda.synchronize(found.patch.buffer.device)
            kept = _Kept(found.patch, found.digest, now, found.diff_us, found.encode_us, step, tags)
            # The shadow has moved: this version is made, whatever becomes of what follows.
            self._pending.append(kept)
            self.version = base + 1
            if len(self._pending) >= PENDING:
                try:
                    self._pending = [_merged(self._pending)]
                except (RuntimeError, MemoryError) as exc:
                    log.warning("%d patches wait unmerged: %s", len(self._pending), exc)
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

    def wait_taken(self, timeout_s: float) -> bool:
        """Wait until no patch is pending; False at the deadline."""
        with self._lists:
            return self._lists.wait_for(lambda: not self._pending, timeout_s)

    # ---- the torch thread

    def take(self, unsafe: Sequence[int]) -> Sealed | None:
        """Fix the bytes of what is pending, merged onto the kept patches of `unsafe` versions.

        None if the run has begun anew since this was asked for, and nothing is pending.
        """
        with self._diffing, self._lists:
            taken, self._pending = self._pending, []
            self._lists.notify_all()
        if not taken:
            return None
        earlier = [self._kept[version] for version in unsafe if version in self._kept]
        try:
            kept = _merged([*earlier, *taken])
        except BaseException:
            with self._lists:
                self._pending[:0] = taken
            raise
        for old in earlier:
            self._kept.pop(old.patch.version, None)
        patch = kept.patch
        assert patch.base_version is not None
        self._kept[patch.version] = kept
        return Sealed(
            base_version=patch.base_version,
            version=patch.version,
            nbytes=patch.nbytes,
            checksum=checksum(patch.buffer),
            digest=kept.digest,
            changed=patch.changed,
            numel=self._numel,
            encoding=patch.encoding,
            dense_nbytes=patch.dense_nbytes,
            published_at=kept.published_at,
            diff_us=kept.diff_us,
            encode_us=kept.encode_us,
            step=kept.step,
            tags=kept.tags,
        )

    def payload(self, version: int) -> torch.Tensor | None:
        """The bytes of a sealed patch (uint8, 1-d), while it is kept."""
        kept = self._kept.get(version)
        return None if kept is None else kept.patch.buffer

    def entry(self, versions: Sequence[int], epoch: int) -> tuple[LogEntry, Patch]:
        """These kept versions as one log entry; they stay kept, as one, until released.

        LogError if the run has begun anew meanwhile: its anchor covers them.
        """
        found = [self._kept[version] for version in versions if version in self._kept]
        if not found:
            raise LogError(f"versions {list(versions)} are not kept any more")
        kept = _merged(found)
        for version in versions:
            self._kept.pop(version, None)
        self._kept[kept.patch.version] = kept
        entry = describe(kept.patch, epoch, kept.digest, kept.step, kept.tags, self.writer)
        return entry, kept.patch

    def release(self, version: int) -> None:
        """Kept patches up to this version are safe elsewhere."""
        for kept in [kept for kept in self._kept if kept <= version]:
            del self._kept[kept]

    def anchor(self, epoch: int) -> tuple[LogEntry, Patch]:
        """A full copy of the shadow as a log entry. Holds publish() up while it copies."""
        with self._diffing:
            patch = self._shadow.anchor(self.version)
            digest = self._shadow.digest
        return describe(patch, epoch, digest, writer=self.writer), patch

    def _tensors(self) -> dict[str, torch.Tensor]:
        return named_tensors(
            self._model, include=self._include, exclude=self._exclude, rename=self._rename
        )


def describe(
    patch: Patch,
    epoch: int,
    digest: int,
    step: int | None = None,
    tags: Tags | None = None,
    writer: str = "",
) -> LogEntry:
    """The log entry of a patch; `chunks` is for the tier to fill in."""
    kind = "anchor" if patch.base_version is None else f"patch-{patch.base_version}"
    return LogEntry(
        name=f"{epoch}-{kind}-{patch.version}" + (f"-{writer}" if writer else ""),
        epoch=epoch,
        base_version=patch.base_version,
        version=patch.version,
        nbytes=patch.nbytes,
        checksum=checksum(patch.buffer),
        digest=digest,
        manifest_hash=patch.manifest_hash,
        chunks=0,
        writer=writer,
        step=step,
        tags=tags,
    )


def _merged(kept: Sequence[_Kept]) -> _Kept:
    result = kept[0]
    for later in kept[1:]:
        result = later.onto(result)
    return result
