"""Where each tensor's arrays lie in a patch, as the kernels read it."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..layout import Encoding, Table
from .plan import Plan

#: Rows of the table: what a tensor's section is, and byte offsets from the start of the patch.
ENCODING, COUNTS, PLACES, VALUES, CHANGED, END = range(6)
ROWS = 6


def places(table: Table, plan: Plan) -> npt.NDArray[np.int64]:
    """int64 [ROWS, tensors]: 0 everywhere for a tensor that has no section."""
    found = np.zeros((ROWS, plan.tensors), np.int64)
    at = table.index
    found[ENCODING, at] = table.encoding
    found[COUNTS, at] = table.offset
    found[PLACES, at] = table.places_offset
    found[VALUES, at] = table.values_offset
    found[CHANGED, at] = table.count
    found[END, at] = table.end
    return found


def gaps(table: Table) -> npt.NDArray[np.int64]:
    """int64 [2, n]: start and end of every run of at most 15 bytes that no array covers."""
    dense = table.encoding == Encoding.DENSE
    counts_end = table.offset + 4 * table.blocks
    places_end = np.where(dense, table.offset, table.places_offset + table.places_nbytes)
    starts = [counts_end[~dense], places_end, table.values_offset + table.carried * table.itemsize]
    ends = [table.places_offset[~dense], table.values_offset, table.end]
    found = np.stack([np.concatenate(starts), np.concatenate(ends)])
    return found[:, found[0] < found[1]]


def to_device(array: npt.NDArray[Any], device: torch.device) -> Tensor:
    """A copy on the device, enqueued; the host does not wait."""
    host = torch.from_numpy(np.array(array, order="C"))
    return host if device.type != "cuda" else host.pin_memory().to(device, non_blocking=True)
