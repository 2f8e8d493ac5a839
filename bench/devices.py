"""What the benches need of a device, so that their code runs on a CPU as well: waiting for it,
its streams, its clock and its memory."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

#: More than any L2: written between two repetitions, nothing of the last one is left there.
_FLUSH_NBYTES = 256 << 20
_BUSY_SIZE = 4096
#: So many products of matrices of that size take an H200 3 ms.
_OCCUPIED = 16


class Device:
    """One GPU, or the CPU as its stand-in."""

    def __init__(self, kind: str, index: int = 0) -> None:
        self.is_cuda = kind == "cuda"
        self.torch = torch.device("cuda", index) if self.is_cuda else torch.device("cpu")
        if self.is_cuda:
            torch.cuda.set_device(self.torch)
        self._flush: Tensor | None = None
        self._watched = 0
        #: What keeps a GPU busy: a matrix, and room for its square.
        self._busy: list[Tensor] = []
        if self.is_cuda:
            size = (_BUSY_SIZE, _BUSY_SIZE)
            matrix = torch.ones(size, dtype=torch.bfloat16, device=self.torch)
            self._busy = [matrix, torch.empty_like(matrix)]

    def synchronize(self) -> None:
        """Wait until all that was enqueued is done."""
        if self.is_cuda:
            torch.cuda.synchronize(self.torch)

    def stream(self) -> Any:
        """A new side stream; None on the CPU."""
        return torch.cuda.Stream(self.torch) if self.is_cuda else None

    def on(self, stream: Any) -> contextlib.AbstractContextManager[Any]:
        """What is enqueued inside goes to this stream."""
        return torch.cuda.stream(stream) if stream is not None else contextlib.nullcontext()

    def follow(self, stream: Any) -> None:
        """The side stream waits for the current one."""
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream(self.torch))

    def join(self, stream: Any) -> None:
        """The current stream waits for the side stream."""
        if stream is not None:
            torch.cuda.current_stream(self.torch).wait_stream(stream)

    def wake(self, seconds: float = 0.02) -> None:
        """Keep the device busy for a moment and wait for it: one that idled runs at lower clocks,
        while those of a trainer and its workers come from their work."""
        end = time.perf_counter() + seconds
        while self.is_cuda and time.perf_counter() < end:
            self._multiply(8)
            self.synchronize()

    def occupy(self) -> None:
        """Enqueue some milliseconds of work: what is enqueued next comes behind it."""
        if self.is_cuda:
            self._multiply(_OCCUPIED)

    def _multiply(self, times: int) -> None:
        matrix, square = self._busy
        for _ in range(times):
            torch.mm(matrix, matrix, out=square)

    def flush(self) -> None:
        """Enqueue a write that leaves nothing of before in the L2."""
        if self.is_cuda:
            if self._flush is None:
                self._flush = torch.empty(_FLUSH_NBYTES, dtype=torch.uint8, device=self.torch)
            self._flush.zero_()

    def timed(self, work: Callable[[], Any], *, behind: bool = False) -> tuple[float, float]:
        """Run `work` to its end: ms by the device's clock, and ms until the call returned.

        The device's clock runs from the moment it reaches the first of the work until it is past
        the last of it on the current stream: gaps in which it waits for the host count. `behind`:
        it is busy for long enough that the host is ahead of it when it comes to the work.
        """
        self.synchronize()
        if behind:
            self.occupy()
        self.flush()
        return self.clocked(work)

    def clocked(self, work: Callable[[], Any]) -> tuple[float, float]:
        """As timed(), from where the current stream is now, with whatever is in the L2."""
        if not self.is_cuda:
            began = time.perf_counter()
            work()
            took = 1e3 * (time.perf_counter() - began)
            return took, took
        begin = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        begin.record()
        began = time.perf_counter()
        work()
        returned = 1e3 * (time.perf_counter() - began)
        end.record()
        self.synchronize()
        return float(begin.elapsed_time(end)), returned

    # ---- memory, as torch's allocator counts it (0 on the CPU)

    @property
    def allocated(self) -> int:
        """Bytes of live tensors."""
        return int(torch.cuda.memory_allocated(self.torch)) if self.is_cuda else 0

    def watch(self) -> None:
        """Forget the highest level so far."""
        if self.is_cuda:
            torch.cuda.reset_peak_memory_stats(self.torch)
            self._watched = self.allocated

    def peak(self) -> int:
        """Bytes above the level of the last watch(), at most, since then."""
        if not self.is_cuda:
            return 0
        return int(torch.cuda.max_memory_allocated(self.torch)) - self._watched
