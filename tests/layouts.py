"""What a layout says that a rank holds, copied element by element: slow, and easy to believe."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sparsecast.messages.layout import Layout


def contents(layout: Layout, published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The local tensors, each box copied from the published ones; what nothing fills is 0."""
    local = {
        spec.name: torch.zeros(spec.shape, dtype=getattr(torch, spec.dtype))
        for spec in layout.tensors
    }
    for part in layout.parts:
        box = published[part.tensor]
        for dim, (begin, size) in enumerate(zip(part.begin, part.shape, strict=True)):
            box = box.narrow(dim, begin, size)
        place = local[part.local]
        for dim, begin in enumerate(part.at):
            size = part.shape[part.axes.index(dim)] if dim in part.axes else 1
            place = place.narrow(dim, begin, size)
        others = [dim for dim in range(place.ndim) if dim not in part.axes]
        place.permute((*others, *part.axes)).copy_(box)
    return local
