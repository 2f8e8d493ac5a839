"""Which GPU a device is: two ranks of one communicator may not be on the same one."""

from __future__ import annotations


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
