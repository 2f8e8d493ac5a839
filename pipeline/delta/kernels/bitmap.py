"""Write the values of bitmap sections where their bits are set, all tensors in one launch."""

from __future__ import annotations

import triton.language as tl
from torch import Tensor

from .bits import popcount
from .launch import kernel
from .places import ENCODING, PLACES, VALUES
from .plan import Group, Plan, word
from .regions import COLUMNS, LOCAL, OFFSET, RegionGroup, Regions, locate

#: Words of 32 elements that a program takes at a time: as many as one warp needs no barrier for.
_WORDS = 16
#: Registers of a thread, for enough warps to hide the memory's latency.
_REGISTERS = 64


@kernel(numbers=["tensors", "first"])
def _bitmap(
    block_tensor, first_block, numels, weights, table, tensors, spot, counts, ends, first,
    BITS: tl.constexpr, ENCODING: tl.constexpr, PLACES: tl.constexpr, VALUES: tl.constexpr,
    WORDS: tl.constexpr,
):  # fmt: skip
    block = first + tl.program_id(0)
    tensor = tl.load(block_tensor + block)
    if tl.load(table + ENCODING * tensors + tensor) == 2:
        count = tl.load(counts + block)
        address = tl.load(weights + tensor)
        if (count > 0) & (address != 0):
            before = tl.load(ends + block) - count
            index = (block - tl.load(first_block + tensor)).to(tl.int64)
            limit = tl.minimum(tl.load(numels + tensor) - index * 65536, 65536).to(tl.int32)
            patch = tl.load(spot)
            masks = patch + tl.load(table + PLACES * tensors + tensor)
            masks = masks.to(tl.pointer_type(tl.uint32)) + index * 2048
            values = patch + tl.load(table + VALUES * tensors + tensor)
            values = values.to(tl.pointer_type(BITS)) + before
            target = address.to(tl.pointer_type(BITS)) + index * 65536
            word = tl.arange(0, WORDS)
            lane = tl.arange(0, 32).to(tl.uint32)
            at = 0
            while at * 32 < limit:
                bits = tl.load(masks + at + word, mask=(at + word) * 32 < limit, other=0)
                here = popcount(bits)
                earlier = tl.cumsum(here, 0) - here
                below = (tl.full((32,), 1, tl.uint32) << lane) - 1
                rank = earlier[:, None] + popcount(bits[:, None] & below[None, :])
                cell = (at + word)[:, None] * 32 + lane.to(tl.int32)[None, :]
                live = (((bits[:, None] >> lane[None, :]) & 1) != 0) & (cell < limit)
                value = tl.load(values + rank, mask=live, other=0)
                tl.store(target + cell, value, mask=live)
                values += tl.sum(here, axis=0)
                at += WORDS


def bitmap(
    plan: Plan,
    group: Group,
    weights: Tensor,
    table: Tensor,
    spot: Tensor,
    counts: Tensor,
    ends: Tensor,
) -> None:
    """Apply a group's bitmap sections, which check() has passed; arguments as for scatter()."""
    _bitmap[(group.blocks,)](
        plan.block_tensor, plan.first_block, plan.numels, weights, table, plan.tensors, spot,
        counts, ends, group.first,
        BITS=word(group.kind.itemsize), ENCODING=ENCODING, PLACES=PLACES, VALUES=VALUES,
        WORDS=_WORDS, num_warps=1, maxnreg=_REGISTERS,
    )  # fmt: skip


@kernel(numbers=["tensors", "first"])
def _bitmap_parts(
    task_block, task_region, regions, block_tensor, first_block, numels, weights, table, tensors,
    spot, counts, ends, first,
    BITS: tl.constexpr, DIMS: tl.constexpr, ENCODING: tl.constexpr, PLACES: tl.constexpr,
    VALUES: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    task = first + tl.program_id(0)
    block = tl.load(task_block + task)
    tensor = tl.load(block_tensor + block)
    if tl.load(table + ENCODING * tensors + tensor) == 2:
        count = tl.load(counts + block)
        region = regions + tl.load(task_region + task).to(tl.int64) * COLUMNS
        address = tl.load(weights + tl.load(region + LOCAL))
        if (count > 0) & (address != 0):
            before = tl.load(ends + block) - count
            index = (block - tl.load(first_block + tensor)).to(tl.int64)
            limit = tl.minimum(tl.load(numels + tensor) - index * 65536, 65536).to(tl.int32)
            patch = tl.load(spot)
            masks = patch + tl.load(table + PLACES * tensors + tensor)
            masks = masks.to(tl.pointer_type(tl.uint32)) + index * 2048
            values = patch + tl.load(table + VALUES * tensors + tensor)
            values = values.to(tl.pointer_type(BITS)) + before
            target = address.to(tl.pointer_type(BITS)) + tl.load(region + OFFSET)
            word = tl.arange(0, WORDS)
            lane = tl.arange(0, 32).to(tl.uint32)
            at = 0
            while at * 32 < limit:
                bits = tl.load(masks + at + word, mask=(at + word) * 32 < limit, other=0)
                here = popcount(bits)
                earlier = tl.cumsum(here, 0) - here
                below = (tl.full((32,), 1, tl.uint32) << lane) - 1
                rank = earlier[:, None] + popcount(bits[:, None] & below[None, :])
                cell = (at + word)[:, None] * 32 + lane.to(tl.int32)[None, :]
                offset, inside = locate(region, index * 65536, cell, DIMS)
                live = (((bits[:, None] >> lane[None, :]) & 1) != 0) & (cell < limit) & inside
                value = tl.load(values + rank, mask=live, other=0)
                tl.store(target + offset, value, mask=live)
                values += tl.sum(here, axis=0)
                at += WORDS


def bitmap_parts(
    regions: Regions,
    group: RegionGroup,
    weights: Tensor,
    table: Tensor,
    spot: Tensor,
    counts: Tensor,
    ends: Tensor,
) -> None:
    """The same into the parts of a layout; arguments as for scatter_parts()."""
    plan = regions.plan
    _bitmap_parts[(group.tasks,)](
        regions.task_block, regions.task_region, regions.table, plan.block_tensor, plan.first_block,
        plan.numels, weights, table, plan.tensors, spot, counts, ends, group.first,
        BITS=word(group.itemsize), DIMS=group.dims, ENCODING=ENCODING, PLACES=PLACES, VALUES=VALUES,
        WORDS=_WORDS, num_warps=1, maxnreg=_REGISTERS,
    )  # fmt: skip
