"""The tables by which a kernel's programs find the parts of a layout, and the way into one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl

from ..bits import quiet
from ..parts import Box, Parts
from .plan import Plan

#: Dimensions of a box that a kernel walks through.
MOST_DIMS = 4
#: A row of the table of boxes: the local tensor's place in its manifest; where the box begins in
#: it, in elements; the bounds of what it has of the published tensor; then, for each dimension, the
#: published tensor's size, the box's first index and extent, and its stride in the local tensor.
LOCAL, OFFSET, LOW, HIGH, DIMS_AT = (tl.constexpr(at) for at in range(5))
COLUMNS = tl.constexpr(4 + 4 * MOST_DIMS)
#: A position in a block is added to an index of an inner dimension in 32 bits.
_MOST_INNER = 1 << 30


@triton.jit
def locate(box, start, cell, DIMS: tl.constexpr):
    """Where elements start + cell of a published tensor (int64, and int32 below 65,536) are held:
    offsets from the box's first one, int64, and whether the box has them."""
    rest = start
    ahead = cell
    offset = (cell * 0).to(tl.int64)
    inside = cell >= 0
    for inner in tl.static_range(DIMS - 1):
        dim = box + DIMS_AT + 4 * (DIMS - 1 - inner)
        size = tl.load(dim)
        index = (rest % size).to(tl.int32) + ahead
        rest = rest // size
        ahead = index // size.to(tl.int32)
        here = index - ahead * size.to(tl.int32) - tl.load(dim + 1).to(tl.int32)
        inside = inside & (here >= 0) & (here < tl.load(dim + 2).to(tl.int32))
        offset += here.to(tl.int64) * tl.load(dim + 3)
    dim = box + DIMS_AT
    outer = rest + ahead.to(tl.int64) - tl.load(dim + 1)
    inside = inside & (outer >= 0) & (outer < tl.load(dim + 2))
    return offset + outer * tl.load(dim + 3), inside


@dataclass(frozen=True, slots=True)
class BoxGroup:
    """Consecutive tasks whose boxes have as many dimensions and elements of one size.

    The first `counted` of them are those whose boxes count for the digest.
    """

    itemsize: int
    dims: int
    first: int
    tasks: int
    counted: int


class Boxes:
    """The boxes of a layout, and the tasks: a block of a published tensor and a box that may have
    some of it; as tables on the device of a plan.

    `table`: int64 [boxes · COLUMNS]; `task_block`, `task_box`: int32 [tasks], 8 bytes for each
    block that a box reaches into. `others`: the numbers of the boxes that the kernels cannot take,
    those of too many dimensions, or too large ones.
    """

    def __init__(self, parts: Parts, plan: Plan) -> None:
        self.plan = plan
        self.others = frozenset(box.number for box in parts.boxes if not _fits(box))
        of: dict[tuple[int, int], list[Box]] = {}
        for box in parts.boxes:
            if box.number not in self.others:
                itemsize = parts.manifest.tensors[box.tensor].itemsize
                of.setdefault((itemsize, len(box.held)), []).append(box)
        first_block = plan.first_block.cpu().numpy().astype(np.int64)
        self.groups: list[BoxGroup] = []
        blocks, numbers = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        at = 0
        for (itemsize, dims), boxes in of.items():
            boxes.sort(key=lambda box: not box.part.counted)
            lows = np.array([box.low >> 16 for box in boxes], np.int64)
            each = np.array([((box.high - 1) >> 16) + 1 for box in boxes], np.int64) - lows
            starts = lows + first_block[[box.tensor for box in boxes]]
            ends = each.cumsum()
            tasks = int(ends[-1])
            blocks.append(np.arange(tasks) + np.repeat(starts - (ends - each), each))
            numbers.append(np.repeat(np.array([box.number for box in boxes], np.int64), each))
            counted = sum(box.part.counted for box in boxes)
            self.groups.append(
                BoxGroup(itemsize, dims, at, tasks, int(ends[counted - 1]) if counted else 0)
            )
            at += tasks
        rows = [_row(box) if box.number not in self.others else _NO_ROW for box in parts.boxes]
        with quiet():
            self.table = torch.tensor(rows, dtype=torch.int64).view(-1).to(plan.device)
            self.task_block, self.task_box = (
                torch.from_numpy(np.concatenate(column).astype(np.int32)).to(plan.device)
                for column in (blocks, numbers)
            )


def _fits(box: Box) -> bool:
    inner = box.held[1:]
    return len(inner) < MOST_DIMS and all(dim.size < _MOST_INNER for dim in inner)


def _row(box: Box) -> Sequence[int]:
    dims = [figure for dim in box.held for figure in dim]
    row = [box.local, box.offset, box.low, box.high, *dims]
    return row + [0] * (COLUMNS.value - len(row))


_NO_ROW = [0] * COLUMNS.value
