"""Which GPU a device is (two ranks of one communicator may not share one), and how a thread of a
window comes to it.
"""

from __future__ import annotations

import ctypes
import logging

log = logging.getLogger("sparsecast.windows")

#: cuda.h, CU_STREAM_CAPTURE_MODE_THREAD_LOCAL.
_THREAD_LOCAL = 1


def gpu_identity(device: str) -> str:
    """The GPU of a torch device by its UUID ("GPU-…"): the same in every process and container.

    "" for a device that is no CUDA GPU, or if there is none here. Only for a CUDA device is torch
    imported and CUDA initialised.
    """
    if not device.startswith("cuda"):
        return ""
    import torch

    if not torch.cuda.is_available():
        return ""
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    return "" if uuid is None else f"GPU-{uuid}"


def enter_gpu(index: int) -> None:
    """Make the GPU the device of the calling thread, which is a window's own.

    What such a thread asks or allocates would by default break off the CUDA graph that an engine
    captures on another thread meanwhile; from here on it does not.
    """
    import torch

    torch.cuda.set_device(index)
    mode = ctypes.c_int(_THREAD_LOCAL)
    try:
        found = ctypes.CDLL("libcuda.so.1").cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))
    except (OSError, AttributeError) as exc:
        log.debug("the capture mode of a window's thread stays as it is: %s", exc)
    else:
        if found:
            log.warning("the capture mode of a window's thread stays as it is: error %d", found)
