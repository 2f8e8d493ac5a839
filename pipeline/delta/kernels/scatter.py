"""Write the values of sparse sections at their positions, all tensors in one launch."""

from __future__ import annotations

import triton.language as tl
from torch import Tensor

from .launch import kernel
from .places import ENCODING, PLACES, VALUES
from .plan import Group, Plan, word
from .regions import COLUMNS, LOCAL, OFFSET, RegionGroup, Regions, locate

_WIDTH = 512


@kernel(numbers=["tensors", "first"])
def _scatter(
    block_tensor, first_block, numels, weights, table, tensors, spot, counts, ends, first,
    BITS: tl.constexpr, ENCODING: tl.constexpr, PLACES: tl.constexpr, VALUES: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    block = first + tl.program_id(0)
    tensor = tl.load(block_tensor + block)
    if tl.load(table + ENCODING * tensors + tensor) == 1:
        count = tl.load(counts + block).to(tl.int32)
        address = tl.load(weights + tensor)
        if (count > 0) & (address != 0):
            before = tl.load(ends + block) - count
            start = (block - tl.load(first_block + tensor)).to(tl.int64) * 65536
            limit = tl.minimum(tl.load(numels + tensor) - start, 65536).to(tl.int32)
            patch = tl.load(spot)
            places = patch + tl.load(table + PLACES * tensors + tensor)
            positions = places.to(tl.pointer_type(tl.uint16)) + before
            values = patch + tl.load(table + VALUES * tensors + tensor)
            values = values.to(tl.pointer_type(BITS)) + before
            target = address.to(tl.pointer_type(BITS)) + start
            at = 0
            while at < count:
                here = at + tl.arange(0, WIDTH)
                live = here < count
                place = tl.load(positions + here, mask=live, other=0).to(tl.int32)
                value = tl.load(values + here, mask=live, other=0)
                tl.store(target + place, value, mask=live & (place < limit))
                at += WIDTH


def scatter(
    plan: Plan,
    group: Group,
    weights: Tensor,
    table: Tensor,
    spot: Tensor,
    counts: Tensor,
    ends: Tensor,
) -> None:
    """Apply a group's sparse sections, which check() has passed.

    `weights`: int64 [tensors], addresses of contiguous elements (0: leave it out); the others
    as for check().
    """
    _scatter[(group.blocks,)](
        plan.block_tensor, plan.first_block, plan.numels, weights, table, plan.tensors, spot,
        counts, ends, group.first,
        BITS=word(group.kind.itemsize), ENCODING=ENCODING, PLACES=PLACES, VALUES=VALUES,
        WIDTH=_WIDTH, num_warps=4,
    )  # fmt: skip


@kernel(numbers=["tensors", "first"])
def _scatter_parts(
    task_block, task_region, regions, block_tensor, first_block, weights, table, tensors, spot,
    counts, ends, first,
    BITS: tl.constexpr, DIMS: tl.constexpr, ENCODING: tl.constexpr, PLACES: tl.constexpr,
    VALUES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    task = first + tl.program_id(0)
    block = tl.load(task_block + task)
    tensor = tl.load(block_tensor + block)
    if tl.load(table + ENCODING * tensors + tensor) == 1:
        count = tl.load(counts + block).to(tl.int32)
        region = regions + tl.load(task_region + task).to(tl.int64) * COLUMNS
        address = tl.load(weights + tl.load(region + LOCAL))
        if (count > 0) & (address != 0):
            before = tl.load(ends + block) - count
            start = (block - tl.load(first_block + tensor)).to(tl.int64) * 65536
            patch = tl.load(spot)
            places = patch + tl.load(table + PLACES * tensors + tensor)
            positions = places.to(tl.pointer_type(tl.uint16)) + before
            values = patch + tl.load(table + VALUES * tensors + tensor)
            values = values.to(tl.pointer_type(BITS)) + before
            target = address.to(tl.pointer_type(BITS)) + tl.load(region + OFFSET)
            at = 0
            while at < count:
                here = at + tl.arange(0, WIDTH)
                live = here < count
                place = tl.load(positions + here, mask=live, other=0).to(tl.int32)
                offset, inside = locate(region, start, place, DIMS)
                value = tl.load(values + here, mask=live & inside, other=0)
                tl.store(target + offset, value, mask=live & inside)
                at += WIDTH


def scatter_parts(
    regions: Regions,
    group: RegionGroup,
    weights: Tensor,
    table: Tensor,
    spot: Tensor,
    counts: Tensor,
    ends: Tensor,
) -> None:
    """The same into the parts of a layout.

    `weights`: int64 [local tensors], addresses of contiguous elements (0: leave it out).
    """
    plan = regions.plan
    _scatter_parts[(group.tasks,)](
        regions.task_block, regions.task_region, regions.table, plan.block_tensor, plan.first_block,
        weights, table, plan.tensors, spot, counts, ends, group.first,
        BITS=word(group.itemsize), DIMS=group.dims, ENCODING=ENCODING, PLACES=PLACES, VALUES=VALUES,
        WIDTH=_WIDTH, num_warps=4,
    )  # fmt: skip
