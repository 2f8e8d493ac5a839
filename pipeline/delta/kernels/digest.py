"""The digest of a whole state, a slice of its blocks at a time."""

from __future__ import annotations

import triton.language as tl
from torch import Tensor

from .bits import addend, block_factor
from .find import SUMS
from .launch import kernel
from .plan import Group, Plan, factors, word
from .regions import COLUMNS, HIGH, LOCAL, LOW, OFFSET, RegionGroup, Regions, locate

#: Programs of a slice: eight for each multiprocessor of an H200.
PROGRAMS = 132 * 8


@kernel(numbers=["at", "end"])
def _digest(
    block_tensor, first_block, numels, seeds, rows, columns, weights, sums, at, end,
    BITS: tl.constexpr, ITEMSIZE: tl.constexpr, ALIGNED: tl.constexpr, R: tl.constexpr,
    UNROLL: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, 256)
    row = tl.arange(0, R)
    acc = tl.zeros((R, 256), dtype=tl.uint64)
    block = at + tl.program_id(0)
    while block < end:
        tensor = tl.load(block_tensor + block)
        index = block - tl.load(first_block + tensor)
        start = index.to(tl.int64) * 65536
        left = tl.load(numels + tensor) - start
        address = tl.load(weights + tensor)
        left = tl.where(address == 0, 0, left)
        source = address.to(tl.pointer_type(BITS)) + start
        if ALIGNED:
            source = tl.multiple_of(source, 16)
        g = block_factor(tl.load(seeds + tensor), index)
        done = 0
        if left >= 65536:
            while done < 256:
                for step in tl.static_range(UNROLL):
                    here = done + step * R + row
                    bits = tl.load(source + here[:, None] * 256 + column[None, :])
                    factor = tl.load(rows + here).to(tl.uint64, bitcast=True) * g
                    acc += addend(bits, ITEMSIZE) * factor[:, None]
                done += UNROLL * R
        else:
            while done * 256 < left:
                here = done + row
                spot = here[:, None] * 256 + column[None, :]
                bits = tl.load(source + spot, mask=spot < left, other=0)
                factor = tl.load(rows + here).to(tl.uint64, bitcast=True) * g
                acc += addend(bits, ITEMSIZE) * factor[:, None]
                done += R
        block += tl.num_programs(0)
    acc *= tl.load(columns + column).to(tl.uint64, bitcast=True)[None, :]
    total = tl.sum(tl.sum(acc, axis=1), axis=0)
    tl.atomic_add(sums + tl.program_id(0) % SUMS, total.to(tl.int64, bitcast=True), sem="relaxed")


def digest(
    plan: Plan, group: Group, weights: Tensor, sums: Tensor, *, first: int, blocks: int
) -> None:
    """Add Σ bits · h over some blocks of a group, counted from its own first, to `sums`.

    `weights`: int64 [tensors], addresses of contiguous elements, 0 where there are none to count;
    `sums`: int64 [SUMS].
    """
    kind = group.kind
    rows, columns = factors(plan.device)
    at = group.first + first
    _digest[(min(PROGRAMS, blocks),)](
        plan.block_tensor, plan.first_block, plan.numels, plan.seeds, rows, columns, weights, sums,
        at, at + blocks,
        BITS=word(kind.itemsize), ITEMSIZE=kind.itemsize, ALIGNED=kind.aligned, R=4,
        UNROLL=16 // kind.itemsize, SUMS=SUMS, num_warps=4,
    )  # fmt: skip


@kernel(numbers=["at", "end"])
def _digest_parts(
    task_block, task_region, regions, block_tensor, first_block, seeds, rows, columns, weights,
    sums, at, end,
    BITS: tl.constexpr, ITEMSIZE: tl.constexpr, DIMS: tl.constexpr, R: tl.constexpr,
    SUMS: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, 256)
    row = tl.arange(0, R)
    acc = tl.zeros((R, 256), dtype=tl.uint64)
    task = at + tl.program_id(0)
    while task < end:
        block = tl.load(task_block + task)
        tensor = tl.load(block_tensor + block)
        index = block - tl.load(first_block + tensor)
        start = index.to(tl.int64) * 65536
        region = regions + tl.load(task_region + task).to(tl.int64) * COLUMNS
        address = tl.load(weights + tl.load(region + LOCAL))
        source = address.to(tl.pointer_type(BITS)) + tl.load(region + OFFSET)
        g = block_factor(tl.load(seeds + tensor), index)
        done = tl.maximum(tl.load(region + LOW) - start, 0).to(tl.int32) >> 8
        stop = tl.minimum(tl.load(region + HIGH) - start, 65536).to(tl.int32)
        stop = tl.where(address == 0, 0, stop)
        while done * 256 < stop:
            here = done + row
            cell = here[:, None] * 256 + column[None, :]
            offset, inside = locate(region, start, cell, DIMS)
            bits = tl.load(source + offset, mask=inside & (cell < stop), other=0)
            factor = tl.load(rows + here, mask=here < 256, other=0).to(tl.uint64, bitcast=True) * g
            acc += addend(bits, ITEMSIZE) * factor[:, None]
            done += R
        task += tl.num_programs(0)
    acc *= tl.load(columns + column).to(tl.uint64, bitcast=True)[None, :]
    total = tl.sum(tl.sum(acc, axis=1), axis=0)
    tl.atomic_add(sums + tl.program_id(0) % SUMS, total.to(tl.int64, bitcast=True), sem="relaxed")


def digest_parts(
    regions: Regions, group: RegionGroup, weights: Tensor, sums: Tensor, *, first: int, tasks: int
) -> None:
    """Add Σ bits · h over what regions have of some blocks, at its places in the published tensors.

    The tasks are counted from the group's own first. `weights`: int64 [local tensors], addresses of
    contiguous elements, 0 where there are none to count; `sums`: int64 [SUMS].
    """
    plan = regions.plan
    rows, columns = factors(plan.device)
    at = group.first + first
    _digest_parts[(min(PROGRAMS, tasks),)](
        regions.task_block, regions.task_region, regions.table, plan.block_tensor, plan.first_block,
        plan.seeds, rows, columns, weights, sums, at, at + tasks,
        BITS=word(group.itemsize), ITEMSIZE=group.itemsize, DIMS=group.dims, R=4, SUMS=SUMS,
        num_warps=4,
    )  # fmt: skip
