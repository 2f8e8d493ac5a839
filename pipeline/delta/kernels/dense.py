"""Copy the whole of some tensors, block by block: dense sections out of weights, and into them."""

from __future__ import annotations

import triton.language as tl
from torch import Tensor

from .launch import kernel
from .places import ENCODING, VALUES
from .plan import Group, Plan, word
from .regions import COLUMNS, HIGH, LOCAL, LOW, OFFSET, RegionGroup, Regions, locate


@kernel(numbers=["tensors", "first"])
def _dense(
    block_tensor, first_block, numels, tensors_at, table, tensors, spot, first,
    BITS: tl.constexpr, ALIGNED: tl.constexpr, T: tl.constexpr, INTO: tl.constexpr,
    ENCODING: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    block = first + tl.program_id(0)
    tensor = tl.load(block_tensor + block)
    address = tl.load(tensors_at + tensor)
    if (tl.load(table + ENCODING * tensors + tensor) == 3) & (address != 0):
        start = (block - tl.load(first_block + tensor)).to(tl.int64) * 65536
        left = tl.minimum(tl.load(numels + tensor) - start, 65536).to(tl.int32)
        weights = address.to(tl.pointer_type(BITS)) + start
        values = tl.load(spot) + tl.load(table + VALUES * tensors + tensor)
        values = values.to(tl.pointer_type(BITS)) + start
        values = tl.multiple_of(values, 16)
        if ALIGNED:
            weights = tl.multiple_of(weights, 16)
        source = values if INTO else weights
        target = weights if INTO else values
        lane = tl.arange(0, T)
        at = 0
        while at + T <= left:
            tl.store(target + at + lane, tl.load(source + at + lane))
            at += T
        if at < left:
            live = at + lane < left
            tl.store(target + at + lane, tl.load(source + at + lane, mask=live), mask=live)


def dense(
    plan: Plan, group: Group, weights: Tensor, table: Tensor, spot: Tensor, *, into: bool
) -> None:
    """Copy a group's tensors whose sections are dense: into the weights, or out of them.

    `weights`: int64 [tensors], addresses of contiguous elements of the published kind; 0
    leaves a tensor out. `spot`: int64, the first is the address of the patch.
    """
    kind = group.kind
    _dense[(group.blocks,)](
        plan.block_tensor, plan.first_block, plan.numels, weights, table, plan.tensors, spot,
        group.first,
        BITS=word(kind.itemsize), ALIGNED=kind.aligned, T=8192 // kind.itemsize, INTO=into,
        ENCODING=ENCODING, VALUES=VALUES, num_warps=4,
    )  # fmt: skip


@kernel(numbers=["tensors", "first"])
def _dense_parts(
    task_block, task_region, regions, block_tensor, first_block, weights, table, tensors, spot,
    first,
    BITS: tl.constexpr, DIMS: tl.constexpr, T: tl.constexpr, ENCODING: tl.constexpr,
    VALUES: tl.constexpr,
):  # fmt: skip
    task = first + tl.program_id(0)
    block = tl.load(task_block + task)
    tensor = tl.load(block_tensor + block)
    region = regions + tl.load(task_region + task).to(tl.int64) * COLUMNS
    address = tl.load(weights + tl.load(region + LOCAL))
    if (tl.load(table + ENCODING * tensors + tensor) == 3) & (address != 0):
        start = (block - tl.load(first_block + tensor)).to(tl.int64) * 65536
        values = tl.load(spot) + tl.load(table + VALUES * tensors + tensor)
        values = values.to(tl.pointer_type(BITS)) + start
        target = address.to(tl.pointer_type(BITS)) + tl.load(region + OFFSET)
        at = tl.maximum(tl.load(region + LOW) - start, 0).to(tl.int32)
        stop = tl.minimum(tl.load(region + HIGH) - start, 65536).to(tl.int32)
        while at < stop:
            cell = at + tl.arange(0, T)
            offset, inside = locate(region, start, cell, DIMS)
            live = inside & (cell < stop)
            tl.store(target + offset, tl.load(values + cell, mask=live), mask=live)
            at += T


def dense_parts(
    regions: Regions, group: RegionGroup, weights: Tensor, table: Tensor, spot: Tensor
) -> None:
    """Copy dense sections into the parts of a layout; arguments as for scatter_parts()."""
    plan = regions.plan
    _dense_parts[(group.tasks,)](
        regions.task_block, regions.task_region, regions.table, plan.block_tensor, plan.first_block,
        weights, table, plan.tensors, spot, group.first,
        BITS=word(group.itemsize), DIMS=group.dims, T=2048, ENCODING=ENCODING, VALUES=VALUES,
        num_warps=4,
    )  # fmt: skip
