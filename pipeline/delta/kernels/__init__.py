"""Triton twins of the torch references, one operation a file, its launcher beside the kernel.

Every kernel covers all tensors of a model in one launch: a program finds its tensor through the
tables of a `Plan`. Results are the references' to the bit; the same tests hold both. Launchers
enqueue on the current stream of the device and wait for nothing. Addresses are passed as integers,
so memory may be a device's or pinned host memory that it can reach. Sizes are not specialised on:
what one small round has compiled and loaded serves every model of the same dtypes, and nothing
loads while a collective is pending.
"""

from __future__ import annotations

import functools
import importlib.util

import torch


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def usable(device: torch.device) -> bool:
    """Whether the kernels run on this device: a CUDA device, and Triton is installed."""
    return device.type == "cuda" and torch.version.cuda is not None and _installed()


def readable(buffer: torch.Tensor) -> bool:
    """Whether the checksum's kernel can read this payload: where it lies, whole aligned words."""
    nbytes = buffer.numel()
    return nbytes > 0 and usable(buffer.device) and not (nbytes % 8 or buffer.data_ptr() % 16)
