"""A small update through all kernels of a device, which has then loaded what updates use."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ...messages.errors import CorruptPatch
from ...messages.layout import Layout, Part
from ...messages.manifest import TensorSpec
from .apply import apply_checked
from .check import check
from .diff import Shadow
from .digest import checksum, digest
from .merge import merge
from .patch import Patch
from .timing import Mark, to_host

#: Elements of a rehearsed tensor, at least: more than a block of 65,536, and no multiple of it.
_NUMEL = 70_001
#: Every how many elements change: sparse, bitmap and dense sections.
_STRIDES = (97, 3, 1)


def rehearse_whole(
    device: torch.device, held: torch.dtype, published: torch.dtype, *, host: bool = False
) -> None:
    """Diff, encode, merge, check, apply and digest two versions of tensors that are held in one
    dtype and published in another.

    `host`: with the shadow in host memory. On the current stream of the device; returns when it is
    through. CorruptPatch if it leaves other bits than it should.
    """
    weights = _zeros((_NUMEL,), held, device)
    mine = {name: torch.zeros_like(tensor, dtype=published) for name, tensor in weights.items()}
    shadow = Shadow(weights, dtype=published if published.is_floating_point else None, host=host)
    patches: list[Patch] = []
    for version in range(2):
        _change(weights, version)
        found = shadow.diff(weights, base_version=version, version=version + 1)
        _agree(device, held, found.checksum, checksum(found.patch.buffer))
        patches.append(found.patch)
    payload = to_host(merge(patches).buffer)
    Mark(device).wait()
    checked = check(Patch.from_buffer(payload.to(device, non_blocking=True)), shadow.manifest)
    apply_checked(checked, mine)
    _agree(device, held, shadow.digest, digest(mine))


def rehearse_parts(device: torch.device, dtype: torch.dtype, dims: int) -> None:
    """Check, apply and digest an update by a layout of published tensors of so many dimensions.

    Their parts are found by one dimension, by two, and so on up to all of them: whatever parts
    other tensors of at most so many dimensions have, the kernels for them are loaded. Streams and
    errors as for rehearse_whole().
    """
    side = math.ceil(_NUMEL ** (1 / dims))
    weights = _zeros((side,) * dims, dtype, device)
    shadow = Shadow(weights)
    pieces = [piece for spec in shadow.manifest.tensors for piece in _pieces(spec)]
    layout = Layout(
        tensors=tuple(local for local, _ in pieces), parts=tuple(part for _, part in pieces)
    )
    mine = {
        spec.name: torch.zeros(spec.shape, dtype=dtype, device=device) for spec in layout.tensors
    }
    _change(weights, 0)
    patch = shadow.diff(weights, base_version=0, version=1).patch
    apply_checked(check(patch, shadow.manifest), mine, layout=layout)
    # The parts make up the tensors.
    share = digest(mine, manifest=shadow.manifest, layout=layout)
    _agree(device, dtype, shadow.digest, share)


def _pieces(spec: TensorSpec) -> Iterator[tuple[TensorSpec, Part]]:
    """A tensor in boxes: half of it along the first dimension, half of the rest along the second,
    and so on; each with the local tensor that it is all of. The d-th box is found by d dimensions,
    and what is left after the last one by all."""
    begin, extent = [0] * len(spec.shape), list(spec.shape)

    def piece(number: int, shape: Sequence[int]) -> tuple[TensorSpec, Part]:
        local = TensorSpec(f"{spec.name}/{number}", spec.dtype, tuple(shape))
        return local, Part(
            tensor=spec.name,
            begin=tuple(begin),
            shape=local.shape,
            local=local.name,
            at=(0,) * len(begin),
            axes=tuple(range(len(begin))),
        )

    for dim, size in enumerate(spec.shape):
        half = size // 2
        yield piece(dim, [*extent[:dim], half, *extent[dim + 1 :]])
        begin[dim], extent[dim] = half, size - half
    yield piece(len(extent), extent)


def _zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """A tensor of zeros for each kind of section."""
    nbytes = math.prod(shape) * dtype.itemsize
    bits = torch.zeros(nbytes, dtype=torch.uint8, device=device)
    return {str(stride): bits.clone().view(dtype).view(shape) for stride in _STRIDES}


def _change(weights: Mapping[str, Tensor], version: int) -> None:
    """Change every so-many-th element of each, from element `version` on."""
    for stride in _STRIDES:
        flat = weights[str(stride)].view(-1)
        bits = flat.view(torch.uint8).view(-1, flat.element_size())
        bits[version::stride] = 64 + version


def _agree(device: torch.device, dtype: torch.dtype, one: int, other: int) -> None:
    if one != other:
        raise CorruptPatch(
            f"a rehearsed round of {dtype} on {device} came to {one:016x} and {other:016x}: its "
            "kernels do not work with this driver, torch and Triton"
        )
