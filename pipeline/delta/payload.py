"""A payload as it arrives: its checksum, the patch that it should be, and the check of that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...messages.errors import CorruptPatch
from ...messages.layout import Layout
from ...messages.manifest import Manifest
from . import kernels
from .bits import quiet
from .check import Checked, check
from .digest import checksum as checksum_of
from .layout import HEADER
from .parts import parts_of
from .patch import Patch
from .timing import Mark, on

if TYPE_CHECKING:
    from .readied import Checking


class Payload:
    """A payload (uint8, 1-D, contiguous) for weights of a manifest, which may still be on its way.

    On a device with kernels, prepare() makes the memory and enqueue() queues all that there is to
    know of it on the current stream; whatever is asked for waits for that, once, on any thread, and
    does either first if nobody has. Elsewhere nothing is done before it is asked for.
    """

    def __init__(self, buffer: Tensor, manifest: Manifest) -> None:
        self.buffer = buffer
        self._manifest = manifest
        self._kernels = kernels.readable(buffer) and buffer.numel() >= HEADER.size
        self._kernels &= manifest.numel > 0
        self._checking: Checking | None = None
        #: When the device is through.
        self._mark: Mark | None = None
        self._patch: Patch | None = None

    def prepare(self) -> None:
        """Make all that enqueue() needs; where it was needed before, it is there."""
        if self._kernels and self._checking is None:
            from .readied import Checking

            with quiet(), on(self.buffer.device):
                self._checking = Checking(self.buffer, self._manifest)

    def enqueue(self) -> None:
        """Queue checksum and check."""
        self.prepare()
        if self._checking is None or self._mark is not None:
            return
        with quiet(), on(self.buffer.device):
            self._checking.enqueue()
            self._mark = Mark(self.buffer.device)

    @property
    def settled(self) -> bool:
        """Whether enqueue() has queued the work, and it has found nothing wrong: what is asked for
        takes no time then, once the host has waited for it."""
        if self._checking is None or self._mark is None:
            return False
        try:
            return self._checking.passed(self.patch) is not None
        except CorruptPatch:
            return False

    def _told(self) -> Checking | None:
        """What the kernels have found, once they have."""
        self.enqueue()
        if self._mark is not None:
            self._mark.wait()
        return self._checking

    @property
    def checksum(self) -> int:
        """The checksum of its bytes."""
        told = self._told()
        return checksum_of(self.buffer) if told is None else told.checksum

    @property
    def patch(self) -> Patch:
        """The patch: CorruptPatch if its header, or without kernels its table, is not one's."""
        if self._patch is None:
            told = self._told()
            if told is None:
                self._patch = Patch.from_buffer(self.buffer)
            elif self.buffer.dtype != torch.uint8 or self.buffer.dim() != 1:
                raise CorruptPatch(f"a patch is a 1-D uint8 tensor, not {self.buffer.dtype}")
            else:
                self._patch = Patch.from_start(self.buffer, told.start.clone())
        return self._patch

    def check(self) -> Checked:
        """check() of the patch."""
        return check(self.patch, self._manifest, checking=self._told())


def ready(manifests: Sequence[Manifest], device: torch.device) -> None:
    """Make on a device what the check of first payloads needs that come together, each for weights
    of one of these manifests."""
    if kernels.usable(device):
        from .readied import reserve

        with quiet(), on(device):
            reserve([manifest for manifest in manifests if manifest.numel], device)


def warm(
    tensors: Mapping[str, Tensor],
    manifest: Manifest,
    device: torch.device,
    layout: Layout | None = None,
) -> None:
    """Look tensors up on a device as apply_checked() will: those of the manifest, or a layout's."""
    if manifest.numel and kernels.usable(device):
        from .addresses import addresses_of, regions_of

        if layout is None:
            addresses_of(tensors, manifest, device)
        else:
            parts = parts_of(layout, manifest)
            regions_of(parts, device)
            addresses_of(tensors, parts.local, device)
