"""Where each tensor's arrays lie in a patch, as the kernels read it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..layout import Encoding, Table

#: Rows of the table: what a tensor's section is, and byte offsets from the start of the patch.
ENCODING, COUNTS, PLACES, VALUES, CHANGED = range(5)
ROWS = 5


def places(table: Table, found: npt.NDArray[np.int64]) -> None:
    """Write where each tensor's section lies: int64 [ROWS, tensors], 0 for one that has none."""
    found.fill(0)
    at = table.index
    found[ENCODING, at] = table.encoding
    found[COUNTS, at] = table.offset
    found[PLACES, at] = table.places_offset
    found[VALUES, at] = table.values_offset
    found[CHANGED, at] = table.count


def gaps(table: Table) -> npt.NDArray[np.int64]:
    """int64 [2, n]: start and end of every run of at most 15 bytes that no array covers."""
    dense = table.encoding == Encoding.DENSE
    counts_end = table.offset + 4 * table.blocks
    places_end = np.where(dense, table.offset, table.places_offset + table.places_nbytes)
    starts = [counts_end[~dense], places_end, table.values_offset + table.carried * table.itemsize]
    ends = [table.places_offset[~dense], table.values_offset, table.end]
    found = np.stack([np.concatenate(starts), np.concatenate(ends)])
    return found[:, found[0] < found[1]]
