"""Look at the tiles again that had more changes than slots, and write theirs into the patch.

By now it is known where they belong, so no scratch is needed however much has changed. Their share
of the digest is left to digest.py, which reads all for less than it would cost here.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .bits import changed_halves, popcount, published
from .launch import kernel
from .places import ENCODING, PLACES, VALUES
from .plan import Group, Plan, word

#: Elements that a program takes at a time: as many as one warp needs no barrier for.
_PART = 512
#: Registers of a thread, for enough warps to hide the memory's latency.
_REGISTERS = 64


@triton.jit
def _part(
    old, new, inside, limit, out, positions, masks, encoding,
    CAST: tl.constexpr, NATIVE: tl.constexpr, PART: tl.constexpr, UPDATE: tl.constexpr,
):  # fmt: skip
    """Write what has changed among PART elements, up to `limit` of the block; how many have."""
    base = tl.arange(0, PART // 32) * 32
    lane = tl.arange(0, 32)
    cell = inside + base[:, None] + lane[None, :]
    if inside + PART <= limit:
        before = tl.load(old + cell)
        value = published(tl.load(new + cell), CAST, NATIVE)
        if UPDATE:
            tl.store(old + cell, value)
    else:
        live = cell < limit
        before = tl.load(old + cell, mask=live, other=0)
        value = published(tl.load(new + cell, mask=live, other=0), CAST, NATIVE)
        if UPDATE:
            tl.store(old + cell, value, mask=live)
    total = 0
    if encoding != 3:
        differ = before != value
        words = tl.sum(differ.to(tl.uint32) << lane.to(tl.uint32)[None, :], axis=1).to(tl.uint32)
        count = popcount(words)
        below = (tl.full((32,), 1, tl.uint32) << lane.to(tl.uint32)) - 1
        rank = (tl.cumsum(count, 0) - count)[:, None] + popcount(words[:, None] & below[None, :])
        tl.store(out + rank, value, mask=differ)
        if encoding == 1:
            tl.store(positions + rank, cell.to(tl.uint16), mask=differ)
        else:
            tl.store(masks + (inside + base) // 32, words, mask=inside + base < limit)
        total = tl.sum(count, axis=0)
    return total


@triton.jit
def _part_of_fours(
    old, new, inside, out, positions, masks, encoding, PART: tl.constexpr, UPDATE: tl.constexpr
):
    """The same for aligned elements of 2 bytes that are all there, each four as one word of 64 bits
    that stays in its thread: with a third of the instructions, and it is they that it is bound by.
    """
    ROWS: tl.constexpr = PART // 4
    row = tl.arange(0, ROWS)
    before = tl.load(old.to(tl.pointer_type(tl.uint64)) + inside // 4 + row)
    value = tl.load(new.to(tl.pointer_type(tl.uint64)) + inside // 4 + row)
    if UPDATE:
        tl.store(old.to(tl.pointer_type(tl.uint64)) + inside // 4 + row, value)
    total = 0
    if encoding != 3:
        differ = before ^ value
        low = changed_halves(differ.to(tl.uint32))
        high = changed_halves((differ >> 32).to(tl.uint32))
        bits = ((low | (low >> 15)) & 3) | (((high | (high >> 15)) & 3) << 2)
        count = popcount(bits)
        rank = tl.cumsum(count, 0) - count
        for which in tl.static_range(4):
            changed = ((bits >> which) & 1) != 0
            tl.store(out + rank, (value >> (16 * which)).to(tl.uint16), mask=changed)
            if encoding == 1:
                tl.store(positions + rank, (inside + row * 4 + which).to(tl.uint16), mask=changed)
            rank += changed.to(tl.int32)
        if encoding == 2:
            word = bits << ((row & 7) * 4).to(tl.uint32)
            word = tl.sum(tl.reshape(word, (ROWS // 8, 8)), axis=1).to(tl.uint32)
            tl.store(masks + inside // 32 + tl.arange(0, ROWS // 8), word)
        total = tl.sum(count, axis=0)
    return total


@kernel(numbers=["tensors", "first", "slots"])
def _emit(
    block_tensor, first_block, numels, olds, news,
    tile_counts, block_counts, ends, table, tensors, spot, first, slots,
    BITS: tl.constexpr, ITEMSIZE: tl.constexpr, CAST: tl.constexpr, NATIVE: tl.constexpr,
    RAW: tl.constexpr, ALIGNED: tl.constexpr, T: tl.constexpr, PART: tl.constexpr,
    UPDATE: tl.constexpr, ENCODING: tl.constexpr, PLACES: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    TILES: tl.constexpr = 65536 // T
    FOURS: tl.constexpr = (ITEMSIZE == 2) and (CAST == "") and ALIGNED
    counts = tile_counts + tl.program_id(0) * TILES
    if tl.max(tl.load(counts + tl.arange(0, TILES)), axis=0) > slots:
        block = first + tl.program_id(0)
        tensor = tl.load(block_tensor + block)
        index = block - tl.load(first_block + tensor)
        start = index.to(tl.int64) * 65536
        limit = tl.minimum(tl.load(numels + tensor) - start, 65536).to(tl.int32)
        old = tl.load(olds + tensor).to(tl.pointer_type(BITS)) + start
        new = tl.load(news + tensor).to(tl.pointer_type(RAW)) + start
        # Of fours one is to go to a thread: what is known of the address would make it two.
        if ALIGNED and not FOURS:
            old = tl.multiple_of(old, 16)
            new = tl.multiple_of(new, 16)
        patch = tl.load(spot)
        encoding = tl.load(table + ENCODING * tensors + tensor)
        at = tl.load(ends + block) - tl.load(block_counts + block)
        places = patch + tl.load(table + PLACES * tensors + tensor)
        positions = places.to(tl.pointer_type(tl.uint16)) + at
        masks = places.to(tl.pointer_type(tl.uint32)) + start // 32
        out = (patch + tl.load(table + VALUES * tensors + tensor)).to(tl.pointer_type(BITS)) + at
        inside = 0
        here = 0
        while inside < limit:
            found = tl.load(counts + inside // T)
            if found > slots:
                if FOURS and inside + PART <= limit:
                    here += _part_of_fours(
                        old, new, inside, out + here, positions + here, masks, encoding,
                        PART, UPDATE,
                    )  # fmt: skip
                else:
                    here += _part(
                        old, new, inside, limit, out + here, positions + here, masks, encoding,
                        CAST, NATIVE, PART, UPDATE,
                    )  # fmt: skip
                inside += PART
            else:
                here += found
                inside += T


def emit(
    plan: Plan,
    group: Group,
    olds: Tensor,
    news: Tensor,
    tile_counts: Tensor,
    block_counts: Tensor,
    ends: Tensor,
    table: Tensor,
    spot: Tensor,
    *,
    slots: int,
    update: bool,
) -> None:
    """Write the tiles with more than `slots` changes: arguments as for find() and place().

    With `update` the old copy takes the new bits; the digest's change is nobody's here.
    """
    kind = group.kind
    _emit[(group.blocks,)](
        plan.block_tensor, plan.first_block, plan.numels, olds, news,
        tile_counts[group.first_tile :], block_counts, ends, table, plan.tensors, spot,
        group.first, slots,
        BITS=word(kind.itemsize), ITEMSIZE=kind.itemsize, CAST=kind.cast,
        NATIVE=plan.device.type == "cuda", RAW=tl.float32 if kind.cast else word(kind.itemsize),
        ALIGNED=kind.aligned, T=kind.tile, PART=_PART, UPDATE=update,
        ENCODING=ENCODING, PLACES=PLACES, VALUES=VALUES, num_warps=1, maxnreg=_REGISTERS,
    )  # fmt: skip
