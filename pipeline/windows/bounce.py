"""The way of memory that is not on a window's GPU: through a bounded buffer that is.

Ranks agree on the sizes of their broadcasts only, not on where their memory is; so all of them cut
a payload into the same pieces, and who needs it takes each piece through here. Pageable host memory
goes through two pinned slices as well: a copy from or to it would block until the collective that
it waits for is over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from .side import Side

#: The pieces of a payload. With 2 GiB and NVLink, each costs some 20 µs beside its 0.75 ms; in
#: larger ones no more is won.
PIECE_NBYTES = 256 << 20
#: One of the two pinned slices.
_SLICE_NBYTES = 32 << 20


def pieces(nbytes: int) -> Iterator[tuple[int, int]]:
    """The pieces (start, end) of a payload, the same on every rank."""
    for start in range(0, nbytes, PIECE_NBYTES):
        yield start, min(start + PIECE_NBYTES, nbytes)


class Bounce:
    """Buffers that grow to what is needed, up to a piece; they belong to the stream `side`.

    `wait(event)` waits on the host, under the operation's deadline.
    """

    def __init__(self, side: Side, wait: Callable[[torch.cuda.Event], None]) -> None:
        self._side = side
        self._wait = wait
        self._device = torch.empty(0, dtype=torch.uint8)
        self._pinned: list[torch.Tensor] = []
        self._reached: set[torch.device] = set()

    def reserve(self, memory: torch.Tensor) -> None:
        """Make ready for pieces of `memory`: to allocate, or to connect two GPUs, amid a collective
        may freeze them."""
        nbytes = min(memory.numel(), PIECE_NBYTES)
        if self._device.numel() < nbytes:
            self._device = self._side.empty(nbytes)
        nbytes = min(nbytes, _SLICE_NBYTES)
        if _pageable(memory) and (not self._pinned or self._pinned[0].numel() < nbytes):
            self._pinned = [
                torch.empty(nbytes, dtype=torch.uint8, pin_memory=True) for _ in range(2)
            ]
        if memory.is_cuda and memory.device not in self._reached:
            there = torch.zeros(1, dtype=torch.uint8, device=memory.device)
            self._side.copy(self._device[:1], there)
            self._side.copy(there, self._device[:1])
            self._wait(self._side.mark())
            self._reached.add(memory.device)

    def buffer(self, nbytes: int) -> torch.Tensor:
        """Where a piece of `nbytes` is broadcast from or to."""
        return self._device[:nbytes]

    def fill(self, piece: torch.Tensor) -> None:
        """Enqueue the copy of a piece into the buffer; its memory may not change until that is
        done."""
        if not _pageable(piece):
            self._side.copy(self.buffer(piece.numel()), piece)
            return
        copied: list[torch.cuda.Event | None] = [None, None]
        for number, (start, end) in enumerate(self._slices(piece)):
            pinned, before = self._pinned[number % 2][: end - start], copied[number % 2]
            if before is not None:
                self._wait(before)
            pinned.copy_(piece[start:end])
            self._side.copy(self._device[start:end], pinned)
            copied[number % 2] = self._side.mark()
        for event in copied:  # the next piece begins with the first slice again
            if event is not None:
                self._wait(event)

    def drain(self, piece: torch.Tensor) -> None:
        """Copy the buffer, once what is enqueued before has filled it, into a piece."""
        if not _pageable(piece):
            self._side.copy(piece, self.buffer(piece.numel()))
            return
        coming: tuple[torch.cuda.Event, torch.Tensor, torch.Tensor] | None = None
        for number, (start, end) in enumerate(self._slices(piece)):
            pinned = self._pinned[number % 2][: end - start]
            self._side.copy(pinned, self._device[start:end])
            coming, before = (self._side.mark(), pinned, piece[start:end]), coming
            self._land(before)
        self._land(coming)

    def _land(self, coming: tuple[torch.cuda.Event, torch.Tensor, torch.Tensor] | None) -> None:
        if coming is not None:
            event, pinned, memory = coming
            self._wait(event)
            memory.copy_(pinned)

    def _slices(self, piece: torch.Tensor) -> Iterator[tuple[int, int]]:
        step = self._pinned[0].numel()
        for start in range(0, piece.numel(), step):
            yield start, min(start + step, piece.numel())


def _pageable(memory: torch.Tensor) -> bool:
    return memory.device.type == "cpu" and not memory.is_pinned()
