"""What goes ahead of every payload: a header, and the payload itself if it is small.

The envelope has one size whatever is in it, so that ranks that disagree about the payload still
agree about the broadcast in which they find that out.
"""

from __future__ import annotations

import numpy
import torch

from .side import Side

#: NCCL takes as long for a few bytes as for this.
NBYTES = 256 << 10
#: The payload begins here, the header at 0.
_BODY = 256
#: The largest payload that goes in an envelope.
CAPACITY = NBYTES - _BODY


class Envelope:
    """One on the GPU, and its image in pinned host memory; both belong to the stream `side`.

    Everything is made, and every way of copying used once, before the first collective.
    """

    def __init__(self, side: Side) -> None:
        self._side = side
        self.buffer = side.empty(NBYTES)
        self._image = torch.zeros(NBYTES, dtype=torch.uint8, pin_memory=True)
        self._bytes = self._image.numpy()
        side.copy(self.buffer, self._image)
        side.copy(self.buffer[:_BODY], self.buffer[_BODY : 2 * _BODY])
        side.copy(self._image, self.buffer)

    def seal(self, header: bytes, payload: torch.Tensor | None) -> None:
        """Enqueue: header and, if it goes with it, payload come into `buffer`. The last one has
        gone."""
        self._bytes[: len(header)] = numpy.frombuffer(header, numpy.uint8)
        end = len(header)
        if payload is not None and payload.device.type == "cpu":
            end = _BODY + payload.numel()
            self._bytes[_BODY:end] = payload.numpy()
        self._side.copy(self.buffer[:end], self._image[:end])
        if payload is not None and payload.is_cuda:
            self._side.copy(self.buffer[_BODY : _BODY + payload.numel()], payload)

    def open(self, header_nbytes: int, staging: torch.Tensor | None) -> None:
        """Enqueue: the header comes to the host and, if it goes with it, the payload to `staging`;
        to staging in host memory it comes by land()."""
        end = header_nbytes
        if staging is not None and staging.is_cuda:
            self._side.copy(staging, self.buffer[_BODY : _BODY + staging.numel()])
        elif staging is not None:
            end = _BODY + staging.numel()
        self._side.copy(self._image[:end], self.buffer[:end])

    def header(self, nbytes: int) -> bytes:
        """What came, once open() is done."""
        return self._bytes[:nbytes].tobytes()

    def land(self, staging: torch.Tensor) -> None:
        """Bring the payload to host memory, once open() is done."""
        if staging.device.type == "cpu":
            staging.numpy()[:] = self._bytes[_BODY : _BODY + staging.numel()]
