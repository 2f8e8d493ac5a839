"""The memory in which payloads wait for their way into the weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from .streams import host_empty, new_stream


class Memory:
    """On `device` up to `device_nbytes` in all, and beyond that on the host."""

    def __init__(self, device: torch.device, device_nbytes: int) -> None:
        self.device = device
        #: How much of what is kept lies on the device, as keeps() was told.
        self.on_device_nbytes = 0
        self._device_nbytes = device_nbytes
        #: Memory is allocated on it, and nothing is ever queued there.
        self._stream: torch.cuda.Stream | None = None

    def start(self) -> None:
        """Get ready for a device of CUDA, whose streams are settled."""
        self._stream = new_stream(self.device)

    def adopt_thread(self) -> None:
        """Make the idle stream the current one of the calling thread."""
        if self._stream is not None:
            torch.cuda.set_stream(self._stream)

    def fresh(self, sizes: Sequence[int], transport: str) -> list[torch.Tensor]:
        """Memory for payloads that come through a window of this kind: uint8 [nbytes] each.

        On any thread. On the device only for NCCL, and while there is room; else on the host.
        RuntimeError or TypeError: there is no room for so many bytes at all.
        """
        made: list[torch.Tensor] = []
        for nbytes in sizes:
            made.append(self._fresh(nbytes, transport, beside=on_device(made)))
        return made

    def _fresh(self, nbytes: int, transport: str, *, beside: int) -> torch.Tensor:
        if transport == "nccl" and self._has_room(nbytes + beside):
            try:
                # From the pool of a stream of our own: a block of another one's may still be in
                # use by what its owner has queued, and the window does not wait for that.
                with torch.cuda.stream(self._stream):
                    return torch.empty(nbytes, dtype=torch.uint8, device=self.device)
            except torch.cuda.OutOfMemoryError:
                pass
        if self.device.type == "cuda":
            return host_empty(nbytes)
        return torch.empty(nbytes, dtype=torch.uint8)

    def placed(self, buffer: torch.Tensor, *, beside: int) -> torch.Tensor:
        """The same bytes on the device, where there is room for them, and for so many that are to
        be kept with them."""
        if buffer.is_cuda or not self._has_room(buffer.numel() + beside):
            return buffer
        try:
            return buffer.to(self.device, non_blocking=True)
        except torch.cuda.OutOfMemoryError:
            return buffer

    def keeps(self, buffers: Iterable[torch.Tensor]) -> None:
        """These are what is kept by now."""
        self.on_device_nbytes = on_device(buffers)

    def _has_room(self, nbytes: int) -> bool:
        room = self._device_nbytes - self.on_device_nbytes
        return self.device.type == "cuda" and nbytes <= room


def on_device(buffers: Iterable[torch.Tensor]) -> int:
    """How many of their bytes are on a device."""
    return sum(buffer.numel() for buffer in buffers if buffer.is_cuda)
