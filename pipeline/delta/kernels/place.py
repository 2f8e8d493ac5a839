"""Put the records of find.py where they belong in the patch: canonical order, section by section.

A program has a block: its tiles' records go, tile after tile, behind those of the blocks before.
"""

from __future__ import annotations

import triton.language as tl
from torch import Tensor

from .launch import kernel
from .places import COUNTS, ENCODING, PLACES, VALUES
from .plan import Group, Plan, word

#: Records that a program moves at a time.
_LANES = 256


@kernel(numbers=["tensors", "first", "slots"])
def _place(
    block_tensor, first_block, numels, tile_counts, block_counts, ends, table, tensors, records,
    values, spot, first, slots,
    BITS: tl.constexpr, ITEMSIZE: tl.constexpr, TILES: tl.constexpr,
    WIDTH: tl.constexpr, ENCODING: tl.constexpr, COUNTS: tl.constexpr, PLACES: tl.constexpr,
    VALUES: tl.constexpr,
):  # fmt: skip
    here = tl.program_id(0)
    block = first + here
    tensor = tl.load(block_tensor + block)
    encoding = tl.load(table + ENCODING * tensors + tensor)
    if (encoding == 1) | (encoding == 2):
        patch = tl.load(spot)
        index = block - tl.load(first_block + tensor)
        total = tl.load(block_counts + block)
        counts_at = tl.load(table + COUNTS * tensors + tensor)
        tl.store((patch + counts_at).to(tl.pointer_type(tl.int32)) + index, total)
        before = tl.load(ends + block) - total
        places = patch + tl.load(table + PLACES * tensors + tensor)
        positions = places.to(tl.pointer_type(tl.uint16))
        masks = places.to(tl.pointer_type(tl.uint32)) + index.to(tl.int64) * 2048
        out = (patch + tl.load(table + VALUES * tensors + tensor)).to(tl.pointer_type(BITS))
        if encoding == 2:
            left = tl.load(numels + tensor) - index.to(tl.int64) * 65536
            word = tl.arange(0, 2048)
            aligned = tl.multiple_of(masks, 16)
            tl.store(aligned + word, tl.zeros((2048,), tl.uint32), mask=word * 32 < left)
            # No bit is set before all of the block are zero.
            tl.debug_barrier()
        row = tl.arange(0, TILES)
        count = tl.load(tile_counts + here * TILES + row)
        at = before + (tl.cumsum(count, 0) - count)
        # Tiles with more changes than slots are emit.py's.
        held = tl.where(count <= slots, count, 0)
        most = tl.max(held, axis=0)
        column = tl.arange(0, WIDTH)
        step = 0
        while step < most:
            slot = step + column
            live = slot[None, :] < held[:, None]
            source = (here.to(tl.int64) * TILES + row)[:, None] * slots + slot[None, :]
            record = tl.load(records + source, mask=live, other=0)
            if ITEMSIZE <= 2:
                value = (record >> 16).to(BITS)
            elif ITEMSIZE == 4:
                value = (record >> 32).to(BITS)
            else:
                value = tl.load(values + source, mask=live, other=0)
            place = (record & 0xFFFF).to(tl.uint32)
            target = at[:, None] + slot[None, :]
            if encoding == 1:
                tl.store(positions + target, place.to(tl.uint16), mask=live)
            else:
                bit = (tl.full((TILES, WIDTH), 1, tl.uint32) << (place & 31)).to(
                    tl.int32, bitcast=True
                )
                tl.atomic_or(
                    masks.to(tl.pointer_type(tl.int32)) + (place >> 5).to(tl.int32), bit,
                    mask=live, sem="relaxed",
                )  # fmt: skip
            tl.store(out + target, value, mask=live)
            step += WIDTH


def place(
    plan: Plan,
    group: Group,
    tile_counts: Tensor,
    block_counts: Tensor,
    ends: Tensor,
    table: Tensor,
    records: Tensor,
    values: Tensor,
    spot: Tensor,
    *,
    slots: int,
) -> None:
    """Write counts, positions and values of a group's sparse and bitmap sections.

    `ends`: ends_of()'s; `table`: frame()'s; `spot`: int64, the first is the address of the buffer.
    """
    kind = group.kind
    _place[(group.blocks,)](
        plan.block_tensor, plan.first_block, plan.numels, tile_counts[group.first_tile :],
        block_counts, ends, table, plan.tensors, records, values, spot, group.first, slots,
        BITS=word(kind.itemsize), ITEMSIZE=kind.itemsize, TILES=kind.tiles,
        WIDTH=_LANES // kind.tiles, ENCODING=ENCODING, COUNTS=COUNTS, PLACES=PLACES, VALUES=VALUES,
        num_warps=1,
    )  # fmt: skip
