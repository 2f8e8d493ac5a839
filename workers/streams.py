"""CUDA streams: those of the torch thread, and the fence that orders the holders of a guard.

A thread's current stream is its own affair, so whoever works on a model's weights beside its owner
does so on a stream of its own, and is ordered against the owner's by events. Nothing here waits
for a device as a whole while a run is on: that would wait for the owner's work too.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch

from ..messages.errors import WaitTimeout
from ..pipeline.windows.gpus import let_captures_be
from ..pipeline.windows.lane import sharpen_sleeps

log = logging.getLogger("sparsecast.driver")

T = TypeVar("T")

#: Host copies up to this size lie in pinned memory, larger ones in pageable memory: torch keeps
#: every pinned block for the life of the process.
PINNED_NBYTES = 64 << 20
#: How long work that was queued on a device may take: beyond it the device hangs.
DEVICE_S = 60.0

#: A wait for a device looks all the time at first, for work is short, and then now and then.
_SPIN_S = 0.0005
_POLL_S = 0.00005

#: Their stubs have no types.
_Stream: Any = torch.cuda.Stream
_Event: Any = torch.cuda.Event


def devices_of(tensors: Iterable[torch.Tensor]) -> tuple[torch.device, ...]:
    """The CUDA devices on which any of these lie, each once, in their order."""
    return tuple(dict.fromkeys(tensor.device for tensor in tensors if tensor.is_cuda))


def device_for(device: str | None, tensors: Callable[[], Mapping[str, torch.Tensor]]) -> str:
    """Where windows are to carry payloads: `device`, with its index, or else the first CUDA device
    that any of the tensors is on, or else "cpu"."""
    if device is not None:
        return f"cuda:{torch.cuda.current_device()}" if device == "cuda" else device
    if not torch.cuda.is_available():
        return "cpu"
    try:
        found = devices_of(tensors().values())
    except Exception as exc:
        # Whoever works with them in earnest will meet it again, and knows whom to tell.
        log.debug("where the weights are is not known yet: %s", exc)
        return "cpu"
    return str(found[0]) if found else "cpu"


def in_order(devices: Sequence[torch.device], work: Callable[[], T]) -> Callable[[], T]:
    """The same work for another thread, in the order of this thread's current streams."""
    streams = [torch.cuda.current_stream(device) for device in devices]

    def on_streams() -> T:
        with contextlib.ExitStack() as entered:
            for stream in streams:
                entered.enter_context(torch.cuda.stream(stream))
            return work()

    return on_streams


def settle(devices: Sequence[torch.device]) -> None:
    """Give this thread a stream of its own on each of these devices; the first is its device.

    For a thread that works beside the owner of the weights. From here on CUDA graphs may be
    captured on other threads whatever this one does.
    """
    for device in reversed(devices):
        # Sets the thread's device as well.
        torch.cuda.set_stream(new_stream(device))
    if devices:
        let_captures_be()
        sharpen_sleeps()


def new_stream(device: torch.device) -> torch.cuda.Stream:
    """A stream that nothing is queued on."""
    stream: torch.cuda.Stream = _Stream(device)
    return stream


def finish(device: torch.device, timeout_s: float = DEVICE_S) -> None:
    """Wait until what this thread has queued on its current stream is done. WaitTimeout."""
    if device.type != "cuda":
        return
    event = _Event()
    event.record(torch.cuda.current_stream(device))
    began = time.monotonic()
    # Not event.synchronize(): a device that hangs would keep this thread for ever.
    while not event.query():
        waited = time.monotonic() - began
        if waited > timeout_s:
            raise WaitTimeout(f"work on {device}", timeout_s, "the device does not come to its end")
        if waited < _SPIN_S:
            os.sched_yield()  # time.sleep(0) takes some 70 µs
        else:
            time.sleep(_POLL_S)


def own(*buffers: torch.Tensor) -> None:
    """Keep the memory of these, made on other streams, until this thread's stream is through."""
    for buffer in buffers:
        if buffer.is_cuda:
            buffer.record_stream(torch.cuda.current_stream(buffer.device))


def host_empty(nbytes: int) -> torch.Tensor:
    """Host memory for a payload to or from a device: uint8 [nbytes], pinned up to PINNED_NBYTES."""
    pinned = 0 < nbytes <= PINNED_NBYTES and torch.cuda.is_available()
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=pinned)


def to_host(buffer: torch.Tensor) -> torch.Tensor:
    """The same bytes in host memory, whole on return; a host tensor as it is.

    A device tensor (uint8, 1-d) must be whole, or be written on this thread's stream; the copy
    waits for no other stream.
    """
    if not buffer.is_cuda:
        return buffer
    host = host_empty(buffer.numel())
    host.copy_(buffer, non_blocking=True)
    finish(buffer.device)
    return host


class CudaFence:
    """Orders what readers and writers of a guard queue on CUDA devices (a `guard.Fence`).

    A reader's work is what its thread queued on its current stream until it left; what it queued
    on others it has to join to that one. A capture queues nothing: what it records runs in the
    reading() that its replay runs in.
    """

    def __init__(self) -> None:
        self.devices: tuple[torch.device, ...] = ()
        #: The last event of each thread and stream that has left since the last write.
        self._left: dict[tuple[int, torch.device, int], torch.cuda.Event] = {}

    def include(self, devices: Iterable[torch.device]) -> tuple[torch.device, ...]:
        """Order these devices too; those that are new.

        Inside writing(), or before anyone reads: it waits for all that was queued on the new ones.
        """
        new = tuple(device for device in devices if device not in self.devices)
        for device in new:
            torch.cuda.synchronize(device)
        self.devices += new
        return new

    def reader_leaves(self) -> None:
        """What this thread queued until now comes before the next write."""
        for device in self.devices:
            stream = torch.cuda.current_stream(device)
            if _captures(device):
                continue
            key = (threading.get_ident(), device, stream.cuda_stream)
            event = self._left.get(key)
            if event is None:
                event = self._left[key] = _Event()
            event.record(stream)

    def writer_enters(self) -> None:
        """What this thread queues from now on comes after all that readers have queued."""
        left, self._left = self._left, {}
        for device in self.devices:
            stream = torch.cuda.current_stream(device)
            for event in left.values():
                stream.wait_event(event)

    def writer_commits(self) -> None:
        """Return when what this thread has queued is done: WaitTimeout."""
        for device in self.devices:
            finish(device)


def _captures(device: torch.device) -> bool:
    """Whether this thread's current stream on the device is being captured into a graph."""
    if device.index == torch.cuda.current_device():
        return torch.cuda.is_current_stream_capturing()
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()
