"""Add the counts of tiles up: by block, tensor and group, and whether any tile had too many."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import kernel
from .plan import Group, Plan

#: Blocks that a program adds up.
_ROWS = 16


@kernel(numbers=["group", "first", "blocks", "slots"])
def _tally(
    block_tensor, counts, block_counts, totals, changed, over, group, first, blocks, slots,
    TILES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < blocks
    tile = row[:, None] * TILES + tl.arange(0, TILES)[None, :]
    count = tl.load(counts + tile, mask=live[:, None], other=0)
    total = tl.sum(count, axis=1)
    tl.store(block_counts + first + row, total, mask=live)
    tensor = tl.load(block_tensor + first + row, mask=live, other=0)
    tl.atomic_add(totals + tensor, total.to(tl.int64), mask=live & (total > 0), sem="relaxed")
    most = tl.max(tl.max(count, axis=1), axis=0)
    tl.atomic_add(changed + group, tl.sum(total, axis=0).to(tl.int64), sem="relaxed")
    if most > slots:
        tl.atomic_add(over + group, 1, sem="relaxed")


def tally(
    plan: Plan,
    group: Group,
    counts: Tensor,
    block_counts: Tensor,
    totals: Tensor,
    changed: Tensor,
    over: Tensor,
    *,
    slots: int,
) -> None:
    """From counts of tiles (int32) to those of blocks and tensors, and of the whole group.

    `block_counts`: int32 [blocks of the plan], written. Added to are `totals`, int64 [tensors],
    `changed`, int64 [KINDS], by the number of the group, and `over`, the same: programs that met a
    tile with more than `slots` changes.
    """
    _tally[(triton.cdiv(group.blocks, _ROWS),)](
        plan.block_tensor, counts[group.first_tile :], block_counts, totals, changed, over,
        plan.groups.index(group), group.first, group.blocks, slots,
        TILES=group.kind.tiles, ROWS=_ROWS, num_warps=4,
    )  # fmt: skip
