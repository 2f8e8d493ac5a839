"""The same work on a device again and again, for the price of one launch.

A launch costs the host as long as a small model's kernel runs, and in a process that has just been
woken several times that: a dozen of them are most of a small round.

Captured by the driver's own calls: torch.cuda.CUDAGraph, up to torch 2.11, lets the random numbers
of the whole process fail while anything is captured.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

log = logging.getLogger("sparsecast.delta")

#: cuda.h: CU_STREAM_NON_BLOCKING, CU_STREAM_CAPTURE_MODE_THREAD_LOCAL.
_NON_BLOCKING, _THREAD_LOCAL = 1, 1
#: Held over a capture; it guards the streams, too.
_capturing = threading.Lock()
#: A stream for captures on each device: one of torch's pool may be somebody else's as well, whose
#: launches would be captured along.
_streams: dict[int, torch.cuda.Stream] = {}


class Repeated:
    """Queues one piece of work on the current stream of a device: as it is the first time, as a
    CUDA graph from then on. Where there are no graphs, or none can be made, always as it is.

    The work finds all that changes from time to time in device memory; it neither waits nor
    allocates, nor does it copy from or to the host: torch would record an event on the stream of
    captures as that memory goes, and if anything is captured then, it ends the process. The device
    is the thread's current one.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._graph: _Graph | None = None
        self._asis = device.type != "cuda"
        self._loaded = False

    def queue(self, work: Callable[[], None]) -> None:
        """Queue it once more; it is the same every time.

        Not kept here: it belongs to whoever this belongs to, and the two would wait for the garbage
        collector, which may come while somebody captures a graph and must not let go of one then.
        """
        if self._loaded and not self._asis and self._graph is None:
            self._capture(work)
        if self._graph is not None:
            self._graph.launch(torch.cuda.current_stream(self._device))
            return
        # Called as it is, it loads whatever must be there before it can be captured.
        work()
        self._loaded = True

    def _capture(self, work: Callable[[], None]) -> None:
        try:
            self._graph = _Graph(self._device, work)
        except (OSError, AttributeError, RuntimeError) as exc:
            log.warning("no CUDA graph on %s, launches go one by one: %s", self._device, exc)
            self._asis = True


class _Graph:
    """What `work` queues on the current stream, captured and ready to be launched."""

    def __init__(self, device: torch.device, work: Callable[[], None]) -> None:
        driver = _driver()
        graph, self._ready = ctypes.c_void_p(), ctypes.c_void_p()
        with _capturing, _uncollected():
            stream = _stream(device)
            handle = ctypes.c_void_p(stream.cuda_stream)
            with torch.cuda.stream(stream):
                _check("begin", driver.cuStreamBeginCapture_v2(handle, _THREAD_LOCAL))
                try:
                    work()
                finally:
                    ended = driver.cuStreamEndCapture(handle, ctypes.byref(graph))
        _check("end", ended)
        made = driver.cuGraphInstantiateWithFlags(
            ctypes.byref(self._ready), graph, ctypes.c_ulonglong(0)
        )
        driver.cuGraphDestroy(graph)
        _check("instantiation", made)
        self._launch, self._destroy = driver.cuGraphLaunch, driver.cuGraphExecDestroy

    def launch(self, stream: torch.cuda.Stream) -> None:
        """Queue it on a stream of its device."""
        _check("launch", self._launch(self._ready, ctypes.c_void_p(stream.cuda_stream)))

    def __del__(self) -> None:
        if self._ready.value:
            # What still runs of it, runs to its end.
            self._destroy(self._ready)


def _stream(device: torch.device) -> torch.cuda.Stream:
    """The stream on which work for this device is captured. Under the lock."""
    assert device.index is not None
    stream = _streams.get(device.index)
    if stream is None:
        handle = ctypes.c_void_p()
        _check("stream", _driver().cuStreamCreate(ctypes.byref(handle), _NON_BLOCKING))
        made: Any = torch.cuda.ExternalStream(handle.value, device=device)  # type: ignore[no-untyped-call]
        stream = _streams[device.index] = made
    return stream


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Let nothing be collected: the destructors of garbage would run on this thread, and one that
    lets go of a graph breaks the capture off. (Whoever switches collection off on another thread
    within this millisecond finds it on again.)"""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _check(step: str, code: int) -> None:
    if code:
        raise RuntimeError(f"CUDA graph, {step}: error {code} of the driver")
