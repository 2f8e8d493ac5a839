"""A stream apart: where a window's copies and collectives run, beside everything else's work."""

from __future__ import annotations

import threading

import torch

#: Streams that windows have given back, by device. torch has 32 of a kind and hands them out in
#: turn: with a new one for each window, some window would be given the one of a module that must
#: not wait behind a collective.
_idle: dict[int, list[torch.cuda.Stream]] = {}
_giving = threading.Lock()


class Side:
    """A stream of high priority on the GPU `index`, its own until give_back()."""

    def __init__(self, index: int) -> None:
        with _giving:
            waiting = _idle.setdefault(index, [])
            stream = waiting.pop() if waiting else None
        self._index = index
        if stream is None:
            stream = torch.cuda.Stream(device=index, priority=-1)  # type: ignore[no-untyped-call]
        self._stream = stream
        self._thread = 0

    @property
    def handle(self) -> int:
        """The cudaStream_t."""
        return int(self._stream.cuda_stream)

    def empty(self, nbytes: int) -> torch.Tensor:
        """Memory on the device that is used on this stream only."""
        with torch.cuda.stream(self._stream):
            return torch.empty(nbytes, dtype=torch.uint8, device=f"cuda:{self._index}")

    def enter(self) -> None:
        """Make it the stream of the calling thread, which is a window's own, for good."""
        torch.cuda.set_stream(self._stream)
        self._thread = threading.get_ident()

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Enqueue a copy. Memory of the host must be pinned: else this would block."""
        if threading.get_ident() == self._thread:
            target.copy_(source, non_blocking=True)
            return
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)

    def mark(self) -> torch.cuda.Event:
        """An event: all that has been enqueued so far is done."""
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self._stream)
        return event

    def idle(self) -> bool:
        """Whether nothing enqueued is left to do."""
        return bool(self._stream.query())

    def give_back(self) -> None:
        """Let another window have the stream, which is idle."""
        with _giving:
            _idle[self._index].append(self._stream)
