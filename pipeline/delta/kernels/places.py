"""Where each tensor's arrays lie in a patch, as the kernels read and compute it."""

from __future__ import annotations

import triton
import triton.language as tl

from ..layout import ENTRY, HEADER

#: Rows of the table, int64 [ROWS, tensors]: what a tensor's section is, and byte offsets from the
#: start of the patch; 0 for a tensor that has none.
ENCODING, COUNTS, PLACES, VALUES, CHANGED = range(5)
ROWS = 5
#: Bytes of the header, and of one entry of the section table.
HEAD = tl.constexpr(HEADER.size)
ENTRY_NBYTES = tl.constexpr(ENTRY.itemsize)


@triton.jit
def aligned(nbytes):
    """layout.aligned()."""
    return (nbytes + 15) & -16


@triton.jit
def choice(numel, itemsize, count):
    """The encoding of a section with `count` changed elements, as layout.lay_out() chooses it; 0
    without any."""
    counts = 4 * ((numel + 0xFFFF) >> 16)
    sparse = aligned(counts + 2 * count)
    bitmap = aligned(counts) + aligned((numel + 7) >> 3)
    values = aligned(count * itemsize)
    least = tl.minimum(sparse, bitmap) + values
    other = tl.where(bitmap <= sparse, 2, 1)
    return tl.where(count > 0, tl.where(aligned(numel * itemsize) <= least, 3, other), 0)


@triton.jit
def extent(encoding, numel, itemsize, count):
    """Where a section's parts end, from its start: counts, (start of) places, places, (start of)
    values, values. All 0 where the encoding is."""
    counts = tl.where((encoding == 1) | (encoding == 2), 4 * ((numel + 0xFFFF) >> 16), 0)
    first = tl.where(encoding == 2, aligned(counts), counts)
    places = tl.where(encoding == 1, 2 * count, tl.where(encoding == 2, (numel + 7) >> 3, 0))
    carried = tl.where(encoding == 3, numel, count) * itemsize
    values = aligned(first + places)
    return counts, first, first + places, values, tl.where(encoding == 0, 0, values + carried)
