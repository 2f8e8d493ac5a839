"""A small round before the first one: a device has then loaded all that rounds use."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..messages.errors import CorruptPatch, UnsupportedTensor
from ..pipeline.delta import Patch, Shadow, apply_checked, check, checksum, digest, merge
from ..pipeline.delta.tensors import Dtypes, cast_to, manifest_of
from .streams import finish, host_empty, to_host

#: Elements of a rehearsed tensor: more than a block of 65,536, and not a whole number of them.
_NUMEL = 70_001
#: Every how many elements change: sparse, bitmap and dense sections.
_STRIDES = (97, 3, 1)
#: Blocks of pinned memory made beforehand, by the power of two: torch keeps them.
_PINNED = range(12, 24)


def rehearse(
    tensors: Mapping[str, torch.Tensor],
    device: torch.device,
    *,
    dtype: Dtypes = None,
    host: bool = False,
) -> None:
    """Diff, encode, merge, check, apply and digest each kind of tensor that is among these.

    Loads every kernel of a round where the tensors lie, and on `device`, and fills torch's pool of
    pinned memory there. `host`: with the shadow in host memory. Touches neither the tensors nor any
    random generator. On the torch thread; returns when the devices are through. CorruptPatch if a
    device leaves other bits than it should; UnsupportedTensor is left to whoever works in earnest.
    """
    try:
        manifest_of(tensors, dtype=dtype)
    except UnsupportedTensor:
        return
    kinds = {
        (tensor.device, tensor.dtype, cast_to(name, tensor, dtype))
        for name, tensor in tensors.items()
    }
    for where, held, published in sorted(kinds, key=str):
        if where.type == "cuda":
            _rehearse(where, held, published, host=host)
    if device.type == "cuda":
        _fill_pool(device)


def _rehearse(
    device: torch.device, held: torch.dtype, published: torch.dtype, *, host: bool = False
) -> None:
    bits = torch.zeros(_NUMEL * held.itemsize, dtype=torch.uint8, device=device)
    weights = {str(stride): bits.clone().view(held) for stride in _STRIDES}
    mine = {name: torch.zeros_like(tensor, dtype=published) for name, tensor in weights.items()}
    shadow = Shadow(weights, dtype=published if published.is_floating_point else None, host=host)
    patches: list[Patch] = []
    for version in range(2):
        for stride in _STRIDES:
            changed = weights[str(stride)].view(torch.uint8).view(-1, held.itemsize)
            changed[version::stride] = 64 + version
        found = shadow.diff(weights, base_version=version, version=version + 1)
        _agree(device, held, found.checksum, checksum(found.patch.buffer))
        patches.append(found.patch)
    merged = merge(patches)
    payload = to_host(merged.buffer).to(device, non_blocking=True)
    checked = check(Patch.from_buffer(payload), shadow.manifest)
    apply_checked(checked, mine)
    _agree(device, held, shadow.digest, digest(mine))
    finish(device)


def _agree(device: torch.device, dtype: torch.dtype, one: int, other: int) -> None:
    if one != other:
        raise CorruptPatch(
            f"a rehearsed round of {dtype} on {device} came to {one:016x} and {other:016x}: its "
            "kernels do not work with this driver, torch and Triton"
        )


def _fill_pool(device: torch.device) -> None:
    blocks = [host_empty(1 << power) for power in _PINNED for _ in range(2)]
    for block in blocks[-2:]:
        block.to(device, non_blocking=True)
    finish(device)
