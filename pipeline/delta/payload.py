"""A payload as it arrives: its checksum, and the patch that it should be."""

from __future__ import annotations

import torch
from torch import Tensor

from ...messages.errors import CorruptPatch
from . import kernels
from .bits import quiet
from .digest import LENGTH_FACTOR, checksum
from .patch import START_NBYTES, Patch
from .timing import Mark, on, to_host


class Payload:
    """A payload (uint8, 1-D, contiguous) and its checksum.

    On a device with kernels both cost one wait for its current stream, elsewhere one each.
    """

    __slots__ = ("_buffer", "_start", "checksum")

    checksum: int

    def __init__(self, buffer: Tensor) -> None:
        self._buffer = buffer
        self._start: Tensor | None = None
        nbytes = buffer.numel()
        if not kernels.readable(buffer):
            self.checksum = checksum(buffer)
            return
        from .slices import checksum_sums, total

        with quiet(), on(buffer.device):
            sums = to_host(checksum_sums(buffer))
            self._start = to_host(buffer[:START_NBYTES])
            Mark(buffer.device).wait()
            self.checksum = (total(sums) + nbytes * LENGTH_FACTOR) & ((1 << 64) - 1)

    def patch(self) -> Patch:
        """The patch; header and section table are validated: CorruptPatch."""
        if self._start is None:
            return Patch.from_buffer(self._buffer)
        if self._buffer.dtype != torch.uint8 or self._buffer.dim() != 1:
            raise CorruptPatch(f"a patch is a 1-D uint8 tensor, not {self._buffer.dtype}")
        return Patch.from_start(self._buffer, self._start)
