"""Check the counts, positions and bits of a patch without the weights.

It says whether all is well; delta/check.py then finds what is not, tensor by tensor.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .bits import popcount
from .launch import kernel
from .places import CHANGED, COUNTS, ENCODING, PLACES, VALUES
from .plan import Plan

_ROWS = 1024
_WIDTH = 1024


@kernel(numbers=["tensors", "blocks"])
def _counts(
    block_tensor, first_block, table, tensors, spot, counts, blocks,
    ENCODING: tl.constexpr, COUNTS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = block < blocks
    tensor = tl.load(block_tensor + block, mask=live, other=0)
    encoding = tl.load(table + ENCODING * tensors + tensor, mask=live, other=0)
    at = tl.load(table + COUNTS * tensors + tensor, mask=live, other=0)
    at += (block - tl.load(first_block + tensor, mask=live, other=0)).to(tl.int64) * 4
    listed = live & ((encoding == 1) | (encoding == 2))
    count = tl.load((tl.load(spot) + at).to(tl.pointer_type(tl.uint32)), mask=listed, other=0)
    tl.store(counts + block, count.to(tl.int64), mask=live)


@kernel(numbers=["tensors"])
def _check(
    block_tensor, first_block, numels, table, tensors, spot, counts, ends, wrong,
    ENCODING: tl.constexpr, PLACES: tl.constexpr, VALUES: tl.constexpr, CHANGED: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    tensor = tl.load(block_tensor + block)
    encoding = tl.load(table + ENCODING * tensors + tensor)
    if (encoding == 1) | (encoding == 2):
        patch = tl.load(spot)
        index = (block - tl.load(first_block + tensor)).to(tl.int64)
        left = tl.load(numels + tensor) - index * 65536
        limit = tl.minimum(left, 65536).to(tl.int32)
        changed = tl.load(table + CHANGED * tensors + tensor)
        count = tl.load(counts + block)
        before = tl.load(ends + block) - count
        faults = (count > limit).to(tl.int32)
        if left <= 65536:
            faults += (before + count != changed).to(tl.int32)
        start = tl.load(table + PLACES * tensors + tensor)
        if encoding == 1:
            # Counts that lie must not lead a read out of the section.
            count = tl.minimum(tl.minimum(count, limit), tl.maximum(changed - before, 0))
            positions = (patch + start).to(tl.pointer_type(tl.uint16)) + before
            at = 0
            while at < count:
                here = at + tl.arange(0, WIDTH)
                live = here < count
                place = tl.load(positions + here, mask=live, other=0).to(tl.int32)
                previous = tl.load(positions + here - 1, mask=live & (here > 0), other=0)
                previous = tl.where(here > 0, previous.to(tl.int32), -1)
                bad = live & ((place <= previous) | (place >= limit))
                faults += tl.sum(bad.to(tl.int32), axis=0)
                at += WIDTH
        else:
            words = (patch + start).to(tl.pointer_type(tl.uint32)) + index * 2048
            stored = tl.load(table + VALUES * tensors + tensor) - start - index * 8192
            found = tl.zeros((WIDTH,), dtype=tl.int32)
            beyond = tl.zeros((WIDTH,), dtype=tl.int32)
            at = 0
            while at < 2048:
                here = at + tl.arange(0, WIDTH)
                bits = tl.load(words + here, mask=here * 4 < stored, other=0)
                found += popcount(bits)
                inside = tl.minimum(tl.maximum(limit - here * 32, 0), 32)
                # A shift by 32 is not defined: two of at most 31.
                over = (bits >> (inside // 2).to(tl.uint32)) >> (inside - inside // 2).to(tl.uint32)
                beyond += (over != 0).to(tl.int32)
                at += WIDTH
            faults += (tl.sum(found, axis=0) != count).to(tl.int32)
            faults += tl.sum(beyond, axis=0)
        if faults > 0:
            tl.atomic_add(wrong, 1, sem="relaxed")


def counts_of(plan: Plan, table: Tensor, spot: Tensor, counts: Tensor) -> None:
    """Gather the counts of all blocks: int64 [blocks]; 0 for what is dense or has no section."""
    _counts[(triton.cdiv(plan.blocks, _ROWS),)](
        plan.block_tensor, plan.first_block, table, plan.tensors, spot, counts, plan.blocks,
        ENCODING=ENCODING, COUNTS=COUNTS, ROWS=_ROWS, num_warps=4,
    )  # fmt: skip


def check(
    plan: Plan, table: Tensor, spot: Tensor, counts: Tensor, ends: Tensor, wrong: Tensor
) -> None:
    """Add to `wrong` (int64, the first element) if any block is not as it must be.

    `table`: sections()'; `counts`: counts_of()'s, `ends`: ends_of()'s, int64 [blocks]; `spot`:
    int64, the first is the address of the patch.
    """
    _check[(plan.blocks,)](
        plan.block_tensor, plan.first_block, plan.numels, table, plan.tensors, spot, counts, ends,
        wrong,
        ENCODING=ENCODING, PLACES=PLACES, VALUES=VALUES, CHANGED=CHANGED, WIDTH=_WIDTH,
        num_warps=4,
    )  # fmt: skip
