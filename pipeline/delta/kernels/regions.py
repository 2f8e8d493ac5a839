"""The tables by which a kernel's programs find the parts of a layout, and the way into one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl

from ..bits import quiet
from ..parts import Parts, Region
from .plan import Plan

#: Dimensions of a region that a kernel walks through.
MOST_DIMS = 4
#: A row of the table of regions: the local tensor's place in its manifest; where the region begins
#: in it, in elements; the bounds of what it has of the published tensor; then, for each dimension,
#: the published tensor's size, the region's first index and extent, and its local stride.
LOCAL, OFFSET, LOW, HIGH, DIMS_AT = (tl.constexpr(at) for at in range(5))
COLUMNS = tl.constexpr(4 + 4 * MOST_DIMS)
#: A position in a block is added to an index of an inner dimension in 32 bits.
_MOST_INNER = 1 << 30


@triton.jit
def locate(region, start, cell, DIMS: tl.constexpr):
    """Where elements start + cell of a published tensor (int64, and int32 below 65,536) are held:
    offsets from the region's first one, int64, and whether the region has them."""
    rest = start
    ahead = cell
    offset = (cell * 0).to(tl.int64)
    inside = cell >= 0
    for inner in tl.static_range(DIMS - 1):
        dim = region + DIMS_AT + 4 * (DIMS - 1 - inner)
        size = tl.load(dim)
        index = (rest % size).to(tl.int32) + ahead
        rest = rest // size
        ahead = index // size.to(tl.int32)
        here = index - ahead * size.to(tl.int32) - tl.load(dim + 1).to(tl.int32)
        inside = inside & (here >= 0) & (here < tl.load(dim + 2).to(tl.int32))
        offset += here.to(tl.int64) * tl.load(dim + 3)
    dim = region + DIMS_AT
    outer = rest + ahead.to(tl.int64) - tl.load(dim + 1)
    inside = inside & (outer >= 0) & (outer < tl.load(dim + 2))
    return offset + outer * tl.load(dim + 3), inside


@dataclass(frozen=True, slots=True)
class RegionGroup:
    """Consecutive tasks whose regions have as many dimensions and elements of one size.

    The first `counted` of them are those whose regions count for the digest.
    """

    itemsize: int
    dims: int
    first: int
    tasks: int
    counted: int


class Regions:
    """The regions of a layout, and the tasks: a block of a published tensor and a region that may
    have some of it; as tables on the device of a plan.

    `table`: int64 [regions · COLUMNS]; `task_block`, `task_region`: int32 [tasks], 8 bytes for each
    block that a region reaches into. `others`: the numbers of the regions that the kernels cannot
    take, those of too many dimensions, or too large ones.
    """

    def __init__(self, parts: Parts, plan: Plan) -> None:
        self.plan = plan
        self.others = frozenset(region.number for region in parts.regions if not _fits(region))
        of: dict[tuple[int, int], list[Region]] = {}
        for region in parts.regions:
            if region.number not in self.others:
                itemsize = parts.manifest.tensors[region.tensor].itemsize
                of.setdefault((itemsize, len(region.held)), []).append(region)
        first_block = plan.first_block.cpu().numpy().astype(np.int64)
        self.groups: list[RegionGroup] = []
        blocks, numbers = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        at = 0
        for (itemsize, dims), regions in of.items():
            regions.sort(key=lambda region: not region.part.counted)
            lows = np.array([region.low >> 16 for region in regions], np.int64)
            each = np.array([((region.high - 1) >> 16) + 1 for region in regions], np.int64) - lows
            starts = lows + first_block[[region.tensor for region in regions]]
            ends = each.cumsum()
            tasks = int(ends[-1])
            blocks.append(np.arange(tasks) + np.repeat(starts - (ends - each), each))
            numbers.append(
                np.repeat(np.array([region.number for region in regions], np.int64), each)
            )
            counted = sum(region.part.counted for region in regions)
            self.groups.append(
                RegionGroup(itemsize, dims, at, tasks, int(ends[counted - 1]) if counted else 0)
            )
            at += tasks
        rows = [
            _row(region) if region.number not in self.others else _NO_ROW
            for region in parts.regions
        ]
        with quiet():
            self.table = torch.tensor(rows, dtype=torch.int64).view(-1).to(plan.device)
            self.task_block, self.task_region = (
                torch.from_numpy(np.concatenate(column).astype(np.int32)).to(plan.device)
                for column in (blocks, numbers)
            )


def _fits(region: Region) -> bool:
    inner = region.held[1:]
    return len(inner) < MOST_DIMS and all(dim.size < _MOST_INNER for dim in inner)


def _row(region: Region) -> Sequence[int]:
    dims = [figure for dim in region.held for figure in dim]
    row = [region.local, region.offset, region.low, region.high, *dims]
    return row + [0] * (COLUMNS.value - len(row))


_NO_ROW = [0] * COLUMNS.value
