"""The same work on a device again and again, for the price of one launch.

A launch costs the host as long as a small model's kernel runs, and in a process that has just been
woken several times that: a dozen of them are most of a small round.
"""

from __future__ import annotations

from collections.abc import Callable

import torch


class Repeated:
    """Queues `work` on the current stream of a device: as it is the first time, as a CUDA graph
    from then on. On a device without graphs, always as it is.

    The work finds all that changes from time to time in device memory, or in pinned memory that it
    copies from; it neither waits nor allocates.
    """

    def __init__(self, device: torch.device, work: Callable[[], None]) -> None:
        self._device = device
        self._work = work
        self._graph: torch.cuda.CUDAGraph | None = None
        self._loaded = False

    def queue(self) -> None:
        """Queue it once more."""
        if self._device.type != "cuda" or not self._loaded:
            # Called as it is, it loads whatever must be there before it can be captured.
            self._work()
            self._loaded = True
            return
        if self._graph is None:
            self._graph = _captured(self._work, self._device)
        self._graph.replay()


def _captured(work: Callable[[], None], device: torch.device) -> torch.cuda.CUDAGraph:
    # Not torch.cuda.graph(): it waits for the whole device, and empties the allocator's cache.
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(torch.cuda.Stream(device)):  # type: ignore[no-untyped-call]
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            work()
        finally:
            graph.capture_end()
    return graph
