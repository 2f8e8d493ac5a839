"""Points in the order of a stream: to wait for, and to measure between."""

from __future__ import annotations

import contextlib
import time
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

#: Their stubs have no types.
_Event: Any = torch.cuda.Event


def on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Make a CUDA device the thread's current one: kernels are launched on that, whatever memory
    they are given."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


class Mark:
    """A point in the current stream of a device, or in time where there are no streams."""

    __slots__ = ("_at_s", "_event", "_stream", "device")

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._at_s = time.perf_counter()
        self._event = None
        if device.type == "cuda":
            self._stream = torch.cuda.current_stream(device)
            self._event = _Event(enable_timing=True)
            self._event.record(self._stream)

    def wait(self) -> None:
        """Return when the stream has come to here. On any thread."""
        if self._event is not None:
            self._event.synchronize()

    def precede(self) -> None:
        """What is put on the device's current stream from now on comes after this."""
        if self._event is not None:
            stream = torch.cuda.current_stream(self.device)
            if stream != self._stream:
                stream.wait_event(self._event)

    def until_us(self, later: Mark) -> int:
        """µs from here to a later mark; both have been waited for."""
        if self._event is None or later._event is None:
            return round((later._at_s - self._at_s) * 1e6)
        return round(float(self._event.elapsed_time(later._event)) * 1e3)


def host_numbers(size: int, device: torch.device) -> Tensor:
    """Host memory for numbers on their way to a device: int64 [size], pinned, not initialised."""
    return torch.empty(size, dtype=torch.int64, pin_memory=device.type == "cuda")


def to_device(device: torch.device, *columns: npt.NDArray[np.int64]) -> list[Tensor]:
    """int64 arrays as tensors on a device, in one transfer that is enqueued; the host does not
    wait."""
    sizes = [column.size for column in columns]
    host = host_numbers(sum(sizes), device)
    np.concatenate([column.reshape(-1) for column in columns], out=host.numpy())
    parts = torch.split(host.to(device, non_blocking=True), sizes)
    return [part.view(column.shape) for part, column in zip(parts, columns, strict=True)]


def to_host(tensor: Tensor) -> Tensor:
    """A copy in host memory, whole when the current stream of its device has come to here."""
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return host.copy_(tensor, non_blocking=tensor.is_cuda)
