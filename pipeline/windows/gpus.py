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
    """Make the GPU the device of the calling thread, which is a window's own."""
    import torch

    torch.cuda.set_device(index)
    let_captures_be()


def let_captures_be() -> None:
    """From here on this thread disturbs no CUDA graph that another thread captures.

    By default, whatever a thread asks or allocates meanwhile breaks the capture off.
    """
    mode = ctypes.c_int(_THREAD_LOCAL)
    try:
        found = ctypes.CDLL("libcuda.so.1").cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))
    except (OSError, AttributeError) as exc:  # a torch for other accelerators than NVIDIA's
        log.debug("capture mode of this thread left as it is: %s", exc)
    else:
        if found:
            log.warning("capture mode of this thread left as it is: CUDA error %d", found)
