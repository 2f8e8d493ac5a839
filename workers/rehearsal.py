"""A small round before the first one: a device has then loaded all that rounds use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from ..messages.errors import UnsupportedTensor
from ..messages.layout import Layout
from ..pipeline.delta.rehearsal import rehearse_parts, rehearse_whole
from ..pipeline.delta.tensors import Dtypes, cast_to, manifest_of
from .outgoing import Outgoing, ShadowPlace
from .streams import finish, host_empty

#: Blocks of pinned memory made beforehand, by the power of two: torch keeps them.
_PINNED = range(12, 24)


class Kind(NamedTuple):
    """What tensors have in common for the kernels: where they lie, in which dtype they are held and
    in which published, and of how many dimensions those are whose parts they hold, at most (0: they
    hold no parts)."""

    device: torch.device
    held: torch.dtype
    published: torch.dtype
    dims: int


def rehearse(
    tensors: Mapping[str, torch.Tensor],
    device: torch.device,
    *,
    dtype: Dtypes = None,
    host: bool = False,
    layout: Layout | None = None,
) -> None:
    """Diff, encode, merge, check, apply and digest each kind of tensor that is among these.

    Loads every kernel of a round where the tensors lie, and on `device`, and fills torch's pool of
    pinned memory there. `host`: with the shadow in host memory. `layout`: of which these are the
    local tensors; what the trainer publishes need not be known. Touches neither the tensors nor any
    random generator. On the torch thread; returns when the devices are through. CorruptPatch if a
    device leaves other bits than it should; UnsupportedTensor is left to whoever works in earnest.
    """
    try:
        manifest_of(tensors, dtype=dtype)
    except UnsupportedTensor:
        return
    for kind in kinds_of(tensors, dtype=dtype, layout=layout):
        if kind.device.type == "cuda":
            rehearse_whole(kind.device, kind.held, kind.published, host=host)
            if kind.dims:
                rehearse_parts(kind.device, kind.held, kind.dims)
    if device.type == "cuda":
        _fill_pool(device)


def rehearse_outgoing(
    outgoing: Outgoing, device: str, *, dtype: Dtypes, shadow: ShadowPlace
) -> None:
    """rehearse() for what a trainer's rank publishes, if any of it or its windows are on a device.

    Before any window opens: what is loaded while a collective is pending waits for it.
    """
    if outgoing.devices or device != "cpu":
        tensors, layout = outgoing.tensors(), outgoing.layout
        rehearse(tensors, torch.device(device), dtype=dtype, host=shadow == "host", layout=layout)


def rehearse_layouts(tensors: Mapping[str, torch.Tensor], layouts: Sequence[Layout]) -> None:
    """Check, apply and digest by layouts of which these are local tensors: what patches of several
    senders take beyond rehearse().

    Loads and leaves alone what that does, and fails alike.
    """
    kinds = {kind for layout in layouts for kind in kinds_of(tensors, layout=layout)}
    for kind in sorted(kinds, key=str):
        if kind.dims and kind.device.type == "cuda":
            rehearse_parts(kind.device, kind.held, kind.dims)


def kinds_of(
    tensors: Mapping[str, torch.Tensor], *, dtype: Dtypes = None, layout: Layout | None = None
) -> list[Kind]:
    """The kinds of tensor that are among these, each once, in a fixed order."""
    dims: dict[str, int] = {}
    if layout is not None:
        dtypes = {spec.name: spec.dtype for spec in layout.tensors}
        for part in layout.parts:
            if part.local in dtypes:
                held = dtypes[part.local]
                dims[held] = max(dims.get(held, 1), len(part.shape))
    kinds = {
        Kind(
            tensor.device,
            tensor.dtype,
            cast_to(name, tensor, dtype),
            dims.get(str(tensor.dtype).removeprefix("torch."), 0),
        )
        for name, tensor in tensors.items()
    }
    return sorted(kinds, key=str)


def _fill_pool(device: torch.device) -> None:
    blocks = [host_empty(1 << power) for power in _PINNED for _ in range(2)]
    for block in blocks[-2:]:
        block.to(device, non_blocking=True)
    finish(device)
